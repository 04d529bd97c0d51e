#include "job.h"

#include <cmath>

#include "core/dispatch.h"

namespace fusedopt::testing {

namespace {

// ---- The scalar path -------------------------------------------------------------------------

using Reference = void (*)(const Span& span, const void* slot, const Epilogue& epilogue);

// The gradient that the rule sees, up to the factor; what it is taken from is cleared.
template <class T, class G>
T take_grad(const Span& span, int64_t i, const Epilogue& epilogue) {
  auto* grad = static_cast<G*>(span.grad);
  auto* accumulator = static_cast<T*>(span.state[kAccumulator]);
  const bool take =
      grad != nullptr && (epilogue.decision == nullptr || epilogue.decision->take != 0);
  T seen = take ? T(widen(grad[i])) : T(0);
  if (accumulator != nullptr) {
    seen = take ? accumulator[i] + seen * epilogue.decision->in<T>() : accumulator[i];
    accumulator[i] = 0;
  }
  if (take && epilogue.write_grads != 0) {
    grad[i] = Narrow<G>::from(T(widen(grad[i])) * epilogue.decision->factor<T>());
  }
  if (grad != nullptr && epilogue.zero_grads != 0) grad[i] = Narrow<G>::from(0);
  return seen;
}

template <class Rule, int kVariant, class P, class G, class S>
void update_elements(const Span& span, const void* slot_bytes, const Epilogue& epilogue) {
  using T = typename ComputeOf<P>::Type;
  constexpr int kStates = Rule::states(kVariant).count;
  Slot<T, typename Rule::template Scalars<T>> slot;
  std::memcpy(&slot, slot_bytes, sizeof slot);
  const T factor =
      slot.grad_factor * (epilogue.decision != nullptr ? epilogue.decision->factor<T>() : T(1));
  for (int64_t i = 0; i < span.count; ++i) {
    P& stored = static_cast<P*>(span.param)[i];
    T param = widen(stored);
    const T grad = take_grad<T, G>(span, i, epilogue) * factor;
    T state[kMaxStates] = {};
    for (int k = 0; k < kStates; ++k) state[k] = widen(static_cast<S*>(span.state[k])[i]);
    Rule::template update<kVariant>(param, grad, state, slot.scalars);
    stored = Narrow<P>::from(param);
    for (int k = 0; k < kStates; ++k) {
      static_cast<S*>(span.state[k])[i] = Narrow<S>::from(state[k]);
    }
    if (auto* average = static_cast<T*>(span.state[kAverage])) {
      average[i] = epilogue.decision->ema_decay<T>() * average[i] +
                   epilogue.decision->ema_rest<T>() * T(widen(stored));
    }
  }
}

Reference find_reference(int rule, int variant, int storage) {
  return visit_rule(rule, variant, [&]<class Rule, int kVariant>(Variant<Rule, kVariant>) {
    return visit_storage(storage, []<class P, class G, class S>(Types<P, G, S>) -> Reference {
      return update_elements<Rule, kVariant, P, G, S>;
    });
  });
}

// ---- Data ---------------------------------------------------------------------------------------

// The bits, except that any NaN is any other: which operand's payload survives is the compiler's
// choice.
bool same_element(const Array& a, int64_t i, const Array& b, int64_t j) {
  return std::memcmp(a.at(i), b.at(j), item_size(a.dtype)) == 0 ||
         (std::isnan(a.get(i)) && std::isnan(b.get(j)));
}

double random_value() {
  std::normal_distribution<double> normal;
  switch (random_bits() % 32) {
    case 0:
      return 0.0;
    case 1:
      return -0.0;
    case 2:
      return normal(random_bits) * 1e-40;  // subnormal in fp32 and bf16
    case 3:
      return normal(random_bits) * 1e-6;  // subnormal in fp16
    case 4:
      return normal(random_bits) * 1e30;
    case 5:
      return random_bits() % 2 != 0 ? INFINITY : NAN;
    default:
      return normal(random_bits);
  }
}

// Second moments are positive and, so that a centered variance is too, above the square of
// grad_avg.
double random_state(const std::string& name) {
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  if (name == "grad_avg") return uniform(random_bits);
  if (name.find("sq") != std::string::npos || name == "sum") return 2.5 + uniform(random_bits);
  return random_value();
}

// ---- Jobs ---------------------------------------------------------------------------------------

double default_hyper(const HyperName& name) {
  const std::string key = name.key;
  if (key == "lr") return 0.5;
  if (key == "betas") return name.index == 0 ? 0.8 : 0.9;
  if (key == "alpha") return 0.9;
  if (key == "eps") return 1e-3;
  if (key == "lr_decay") return 1e-2;
  if (key == "weight_decay") return 0.1;
  return 0.25;
}

}  // namespace

std::vector<HyperValues> all_variants(const RuleInfo& rule) {
  std::vector<HyperValues> found(rule.variants);
  std::vector<bool> seen(rule.variants, false);
  const auto count = static_cast<int>(rule.hyper_names.size());
  for (int zeros = 0; zeros < 1 << count; ++zeros) {
    HyperValues hyper;
    for (int h = 0; h < count; ++h) {
      const bool zero = (zeros >> h & 1) != 0;
      hyper.values[h] = zero ? 0.0 : default_hyper(rule.hyper_names[h]);
    }
    const int variant = rule.variant(hyper);
    if (seen[variant]) continue;  // the first has the fewest zeros
    seen[variant] = true;
    found[variant] = hyper;
  }
  CHECK(std::all_of(seen.begin(), seen.end(), [](bool s) { return s; }),
        std::string(rule.name) + ": a variant that no hyperparameters choose");
  return found;
}

void Job::add_row(int64_t numel, int64_t extent, bool active, int32_t layout) {
  std::vector<Array> row(kMaxArrays);
  for (const int a : places_) {
    row[a] = Array(table.dtype(a), extent, static_cast<int64_t>(random_bits() % 4));
    for (int64_t i = 0; i < extent; ++i) {
      const bool of_rule = a >= 2 && a < 2 + kAccumulator;
      row[a].set(i, of_rule ? random_state(states.names[a - 2]) : random_value());
    }
  }
  const auto r = static_cast<int32_t>(arrays.size());
  arrays.push_back(row);
  expected.push_back(std::move(row));
  Row entry;
  entry.numel = numel;
  entry.slot = r % 3;
  entry.layout = layout;
  table.rows.push_back(entry);
  active_.push_back(active);
}

bool Job::has(size_t row, int array) const {
  if (std::find(places_.begin(), places_.end(), array) == places_.end()) return false;
  const bool surrounded = table.accumulates;
  if (array == 1) return active_[row] && !(surrounded && row % 3 == 1);
  if (array == 2 + kAccumulator) return active_[row] && row % 3 != 2;
  return true;
}

void Job::connect() {
  for (size_t r = 0; r < arrays.size(); ++r) {
    Row& row = table.rows[r];
    row.param = arrays[r][0].at(0);
    row.grad = has(r, 1) ? arrays[r][1].at(0) : nullptr;
    for (int k = 0; k < kMaxRowStates; ++k) {
      row.state[k] = has(r, 2 + k) ? arrays[r][2 + k].at(0) : nullptr;
    }
  }
}

int64_t Job::element(const Row& row, int array, int64_t i) const {
  if (row.layout < 0) return i;
  const Layout& layout = table.layouts[row.layout];
  int64_t at = 0;
  for (size_t d = layout.sizes.size(); d-- > 0; i /= layout.sizes[d]) {
    at += i % layout.sizes[d] * layout.strides[array][d];
  }
  return at;
}

void Job::expect() {
  const Reference reference = find_reference(rule->index, variant(), storage_index(storage));
  for (size_t r = 0; r < expected.size(); ++r) {
    const Row& row = table.rows[r];
    if (!active_[r]) continue;
    for (int64_t i = 0; i < row.numel; ++i) {
      Span span{};
      span.param = expected[r][0].at(element(row, 0, i));
      if (has(r, 1)) span.grad = expected[r][1].at(element(row, 1, i));
      for (int k = 0; k < kMaxRowStates; ++k) {
        if (has(r, 2 + k)) span.state[k] = expected[r][2 + k].at(element(row, 2 + k, i));
      }
      span.count = 1;
      reference(span, slot(row.slot), epilogue);
    }
  }
}

void Job::compare(const Job& before, const std::string& where, bool moves) const {
  std::string first;
  int64_t wrong = 0;
  int64_t updated = 0;
  int64_t moved = 0;
  for (size_t r = 0; r < arrays.size(); ++r) {
    for (const int a : places_) {
      const Array& got = arrays[r][a];
      const Array& wanted = expected[r][a];
      const auto extent = static_cast<int64_t>(got.bytes.size()) / item_size(got.dtype);
      for (int64_t i = 0; i < extent - got.offset; ++i) {
        ++checked;
        if (same_element(got, i, wanted, i) || wrong++ != 0) continue;
        first = "row " + std::to_string(r) + " of " + std::to_string(table.rows[r].numel) +
                " elements, array " + std::to_string(a) + ", element " + std::to_string(i) +
                ": got " + std::to_string(got.get(i)) + ", scalar path " +
                std::to_string(wanted.get(i));
      }
    }
    for (int64_t i = 0; active_[r] && i < table.rows[r].numel; ++i) {
      const int64_t at = element(table.rows[r], 0, i);
      ++updated;
      moved += same_element(arrays[r][0], at, before.arrays[r][0], at) ? 0 : 1;
    }
  }
  CHECK(wrong == 0, where + ": " + std::to_string(wrong) + " elements differ, first " + first);
  // Zero gradients, infinities and half precision leave some where they were.
  CHECK(moves ? moved * 2 > updated : moved == 0, where + ": only " + std::to_string(moved) +
                                                      " of " + std::to_string(updated) +
                                                      " parameters moved");
}

Layout make_layout(const std::vector<int64_t>& sizes, int arrays) {
  Layout layout;
  layout.sizes = sizes;
  const size_t dims = sizes.size();
  for (int a = 0; a < arrays; ++a) {
    layout.strides[a].resize(dims);
    int64_t stride = a >= 2 ? 2 : 1;
    for (size_t i = 0; i < dims; ++i) {
      const size_t d = a == 0 ? i : dims - 1 - i;
      layout.strides[a][d] = stride;
      stride *= sizes[d];
    }
  }
  return layout;
}

int64_t extent_of(const Layout& layout, int arrays) {
  int64_t most = 0;
  for (int a = 0; a < arrays; ++a) {
    int64_t last = 0;
    for (size_t d = 0; d < layout.sizes.size(); ++d) {
      last += (layout.sizes[d] - 1) * layout.strides[a][d];
    }
    most = std::max(most, last + 1);
  }
  return most;
}

}  // namespace fusedopt::testing
