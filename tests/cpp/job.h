// Jobs for the tests of drivers: tables over random arrays, and what a rule makes of them when it is
// called one element at a time with the conversions of core/dtype.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/registry.h"
#include "cpu/tiers.h"
#include "rules/all.h"

namespace fusedopt::testing {

inline long checked = 0;
inline std::mt19937 random_bits(0);

// ---- The scalar path -------------------------------------------------------------------------

using Reference = void (*)(const Span& span, const void* slot, const Pass& pass);

// The gradient that the rule sees, up to the factor; what it is taken from is cleared.
template <class T, class G>
T take_grad(const Span& span, int64_t i, const Pass& pass) {
  auto* grad = static_cast<G*>(span.grad);
  auto* accumulator = static_cast<T*>(span.state[kAccumulator]);
  const bool take = grad != nullptr && (pass.verdict == nullptr || pass.verdict->take != 0);
  T seen = take ? T(widen(grad[i])) : T(0);
  if (accumulator != nullptr) {
    seen = take ? accumulator[i] + seen * pass.verdict->in<T>() : accumulator[i];
    accumulator[i] = 0;
  }
  if (grad != nullptr && pass.zero_grads != 0) grad[i] = Narrow<G>::from(0);
  return seen;
}

template <class Rule, int kVariant, class P, class G, class S>
void update_elements(const Span& span, const void* slot_bytes, const Pass& pass) {
  using T = typename ComputeOf<P>::Type;
  constexpr int kStates = Rule::states(kVariant).count;
  Slot<T, typename Rule::template Scalars<T>> slot;
  std::memcpy(&slot, slot_bytes, sizeof slot);
  const T factor = slot.grad_factor * (pass.verdict != nullptr ? pass.verdict->factor<T>() : T(1));
  for (int64_t i = 0; i < span.count; ++i) {
    P& stored = static_cast<P*>(span.param)[i];
    T param = widen(stored);
    const T grad = take_grad<T, G>(span, i, pass) * factor;
    T state[kMaxStates] = {};
    for (int k = 0; k < kStates; ++k) state[k] = widen(static_cast<S*>(span.state[k])[i]);
    Rule::template update<kVariant>(param, grad, state, slot.scalars);
    stored = Narrow<P>::from(param);
    for (int k = 0; k < kStates; ++k) {
      static_cast<S*>(span.state[k])[i] = Narrow<S>::from(state[k]);
    }
    if (auto* average = static_cast<T*>(span.state[kAverage])) {
      average[i] = pass.verdict->ema_decay<T>() * average[i] +
                   pass.verdict->ema_rest<T>() * T(widen(stored));
    }
  }
}

template <class Rule, int kVariant = 0>
Reference find_variant(int variant, int storage) {
  if constexpr (kVariant < Rule::kVariants) {
    if (variant != kVariant) return find_variant<Rule, kVariant + 1>(variant, storage);
    constexpr Reference kReferences[] = {
#define REFERENCE(P, G, S)                                                              \
  update_elements<Rule, kVariant, StorageOf<DType::P>::Type, StorageOf<DType::G>::Type, \
                  StorageOf<DType::S>::Type>,
        FUSEDOPT_FOR_EACH_STORAGE(REFERENCE)
#undef REFERENCE
    };
    return kReferences[storage];
  } else {
    return nullptr;
  }
}

inline Reference find_reference(int rule, int variant, int storage) {
  int index = 0;
#define FIND(name, Rule) \
  if (rule == index++) return find_variant<Rule>(variant, storage);
  FUSEDOPT_FOR_EACH_RULE(FIND)
#undef FIND
  return nullptr;
}

// ---- Data ------------------------------------------------------------------------------------

// One array of a row in an allocation that ends with its last element (AddressSanitizer sees a
// vector store that runs over) and starts `offset` elements in (no vector alignment).
struct Array {
  std::vector<std::byte> bytes;
  int64_t offset = 0;
  DType dtype = DType::kF32;

  Array() = default;
  Array(DType d, int64_t elements, int64_t skip)
      : bytes(static_cast<size_t>((elements + skip) * item_size(d))), offset(skip), dtype(d) {}

  std::byte* at(int64_t i) { return bytes.data() + (offset + i) * item_size(dtype); }
  const std::byte* at(int64_t i) const { return bytes.data() + (offset + i) * item_size(dtype); }

  void set(int64_t i, double value) {
    const auto put = [&](auto stored) { std::memcpy(at(i), &stored, sizeof stored); };
    switch (dtype) {
      case DType::kF64:
        return put(value);
      case DType::kF32:
        return put(static_cast<float>(value));
      case DType::kBF16:
        return put(Narrow<BF16>::from(static_cast<float>(value)));
      case DType::kF16:
        return put(Narrow<F16>::from(static_cast<float>(value)));
    }
  }
  double get(int64_t i) const {
    const auto take = [&](auto stored) -> double {
      std::memcpy(&stored, at(i), sizeof stored);
      return widen(stored);
    };
    switch (dtype) {
      case DType::kF64:
        return take(double{});
      case DType::kF32:
        return take(float{});
      case DType::kBF16:
        return take(BF16{});
      default:
        return take(F16{});
    }
  }
};

// The bits, except that any NaN is any other: which operand's payload survives is the compiler's
// choice.
inline bool same_element(const Array& a, int64_t i, const Array& b, int64_t j) {
  return std::memcmp(a.at(i), b.at(j), item_size(a.dtype)) == 0 ||
         (std::isnan(a.get(i)) && std::isnan(b.get(j)));
}

inline double random_value() {
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
inline double random_state(const std::string& name) {
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  if (name == "grad_avg") return uniform(random_bits);
  if (name.find("sq") != std::string::npos || name == "sum") return 2.5 + uniform(random_bits);
  return random_value();
}

// ---- Rules and their variants ----------------------------------------------------------------

inline double default_hyper(const HyperName& name) {
  const std::string key = name.key;
  if (key == "lr") return 0.5;
  if (key == "betas") return name.index == 0 ? 0.8 : 0.9;
  if (key == "alpha") return 0.9;
  if (key == "eps") return 1e-3;
  if (key == "lr_decay") return 1e-2;
  if (key == "weight_decay") return 0.1;
  return 0.25;
}

// Hyperparameters for every variant: those that may switch one on are tried at zero and above it.
inline std::vector<HyperValues> all_variants(const RuleInfo& rule) {
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

// ---- A table with its arrays, and the same arrays for the scalar path --------------------------

struct Job {
  const RuleInfo* rule;
  HyperValues hyper;
  StorageTuple storage;
  StateNames states;
  Table table;
  Pass pass;
  std::vector<std::vector<Array>> arrays;    // a row's, by their place; empty where it has none
  std::vector<std::vector<Array>> expected;  // the same before and, once `expect` ran, after

  Job(const RuleInfo& r, const HyperValues& h, StorageTuple s)
      : rule(&r), hyper(h), storage(s), states(r.states(r.variant(h))) {
    table.storage = storage;
    table.states = states.count;
    table.slot_size = r.slot_size(storage.param);
    for (int a = 0; a < 2 + states.count; ++a) places_.push_back(a);
    // The first step; a later one; a late one that maximizes.
    add_slot(1, true, 1.0);
    add_slot(7, false, 1.0);
    add_slot(1000, false, -1.0);
  }

  // Adds to the rows to come what is around an update: accumulators and averages.
  void surround(const Pass& with) {
    pass = with;
    table.accumulates = table.averages = true;
    places_.push_back(2 + kAccumulator);
    places_.push_back(2 + kAverage);
  }

  int variant() const { return rule->variant(hyper); }
  std::string name(const std::string& tier) const {
    return std::string(rule->name) + " variant " + std::to_string(variant()) + " " +
           dtype_name(storage.param) + "/" + dtype_name(storage.grad) + "/" +
           dtype_name(storage.state) + " on " + tier;
  }

  void add_slot(double step, bool first, double grad_factor) {
    const size_t at = table.slots.size();
    table.slots.resize(at + static_cast<size_t>(table.slot_size));
    rule->write_slot(storage.param, hyper, step, first, grad_factor, table.slots.data() + at);
  }

  // `extent` elements of memory an array hold the row's `numel` elements.
  void add_row(int64_t numel, int64_t extent, bool active, int32_t layout) {
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

  // Whether a row takes part in the step. Around an update it may lack its gradient or its
  // accumulator, but not both.
  bool has(size_t row, int array) const {
    if (std::find(places_.begin(), places_.end(), array) == places_.end()) return false;
    const bool surrounded = table.accumulates;
    if (array == 1) return active_[row] && !(surrounded && row % 3 == 1);
    if (array == 2 + kAccumulator) return active_[row] && row % 3 != 2;
    return true;
  }

  // Points the table at the arrays; call when all rows are there.
  void connect() {
    for (size_t r = 0; r < arrays.size(); ++r) {
      Row& row = table.rows[r];
      row.param = arrays[r][0].at(0);
      row.grad = has(r, 1) ? arrays[r][1].at(0) : nullptr;
      for (int k = 0; k < kMaxRowStates; ++k) {
        row.state[k] = has(r, 2 + k) ? arrays[r][2 + k].at(0) : nullptr;
      }
    }
  }

  int64_t element(const Row& row, int array, int64_t i) const {
    if (row.layout < 0) return i;
    const Layout& layout = table.layouts[row.layout];
    int64_t at = 0;
    for (size_t d = layout.sizes.size(); d-- > 0; i /= layout.sizes[d]) {
      at += i % layout.sizes[d] * layout.strides[array][d];
    }
    return at;
  }

  // Runs the scalar path on `expected`, element by element.
  void expect() {
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
        reference(span, table.slots.data() + row.slot * table.slot_size, pass);
      }
    }
  }

  // Compares every element of memory, gaps and the rows that take no part included, with
  // `expected`. One failure a job, of its first element, so that the report stays readable.
  void compare(const Job& before, const std::string& where, bool moves = true) const {
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

  // Runs a driver on a copy of this job and compares.
  template <class Run>
  void check(const std::string& where, const Run& run_table) const {
    Job run = *this;
    run.connect();
    run_table(run.table);
    run.compare(*this, where);
  }

 private:
  std::vector<bool> active_;
  std::vector<int> places_;  // of the arrays that rows have
};

// A verdict with numbers of its own in every place that an update reads.
inline Verdict some_verdict(bool take) {
  Verdict verdict;
  verdict.factor64 = verdict.factor32 = 0.625f;
  verdict.in64 = verdict.in32 = 1.5f;
  verdict.ema_decay64 = verdict.ema_decay32 = 0.75f;
  verdict.ema_rest64 = verdict.ema_rest32 = 0.25f;
  verdict.take = take ? 1 : 0;
  return verdict;
}

template <class Visit>
void for_each_variant(const Visit& visit) {
  for (const RuleInfo& rule : all_rules()) {
    for (const HyperValues& hyper : all_variants(rule)) {
      for (const StorageTuple& storage : kStorageTuples) visit(Job(rule, hyper, storage));
    }
  }
}

// ---- Layouts -----------------------------------------------------------------------------------

inline Layout make_layout(const std::vector<int64_t>& sizes, int arrays) {
  Layout layout;
  layout.sizes = sizes;
  const size_t dims = sizes.size();
  for (int a = 0; a < arrays; ++a) {
    layout.strides[a].resize(dims);
    // Array 0 last dimension first, 1 (the gradient) in C order, others with gaps between elements.
    int64_t stride = a >= 2 ? 2 : 1;
    for (size_t i = 0; i < dims; ++i) {
      const size_t d = a == 0 ? i : dims - 1 - i;
      layout.strides[a][d] = stride;
      stride *= sizes[d];
    }
  }
  return layout;
}

inline int64_t extent_of(const Layout& layout, int arrays) {
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
