// The CPU driver against the scalar path: rules called one element at a time with the conversions
// of core/dtype.h. Every instruction tier the machine has must give the same bits, for every rule,
// variant and storage tuple, whatever the length, alignment, layout, chunk size or thread count.
#include "cpu/driver.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <type_traits>

#include "bits16.h"
#include "check.h"
#include "core/registry.h"
#include "rules/all.h"

namespace {

using namespace fusedopt;

long checked = 0;
std::mt19937 random_bits(0);

// ---- The scalar path -------------------------------------------------------------------------

using Reference = void (*)(const Span& span, const void* slot);

template <class Rule, int kVariant, class P, class G, class S>
void update_elements(const Span& span, const void* slot_bytes) {
  using T = typename ComputeOf<P>::Type;
  constexpr int kStates = Rule::states(kVariant).count;
  Slot<T, typename Rule::template Scalars<T>> slot;
  std::memcpy(&slot, slot_bytes, sizeof slot);
  for (int64_t i = 0; i < span.count; ++i) {
    P& stored = static_cast<P*>(span.param)[i];
    T param = widen(stored);
    const T grad = T(widen(static_cast<const G*>(span.grad)[i])) * slot.grad_factor;
    T state[kMaxStates] = {};
    for (int k = 0; k < kStates; ++k) state[k] = widen(static_cast<S*>(span.state[k])[i]);
    Rule::template update<kVariant>(param, grad, state, slot.scalars);
    stored = Narrow<P>::from(param);
    for (int k = 0; k < kStates; ++k) {
      static_cast<S*>(span.state[k])[i] = Narrow<S>::from(state[k]);
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

Reference find_reference(int rule, int variant, int storage) {
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

// ---- Rules and their variants ----------------------------------------------------------------

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

// Hyperparameters for every variant: those that may switch one on are tried at zero and above it.
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

// ---- A table with its arrays, and the same arrays for the scalar path --------------------------

struct Job {
  const RuleInfo* rule;
  HyperValues hyper;
  StorageTuple storage;
  StateNames states;
  Table table;
  std::vector<std::vector<Array>> arrays;    // a row: parameter, gradient, states
  std::vector<std::vector<Array>> expected;  // the same before and, once `expect` ran, after

  Job(const RuleInfo& r, const HyperValues& h, StorageTuple s)
      : rule(&r), hyper(h), storage(s), states(r.states(r.variant(h))) {
    table.storage = storage;
    table.states = states.count;
    table.slot_size = r.slot_size(storage.param);
    // The first step; a later one; a late one that maximizes.
    add_slot(1, true, 1.0);
    add_slot(7, false, 1.0);
    add_slot(1000, false, -1.0);
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
    std::vector<Array> row;
    for (int a = 0; a < 2 + states.count; ++a) {
      const DType dtype = a == 0 ? storage.param : a == 1 ? storage.grad : storage.state;
      row.emplace_back(dtype, extent, static_cast<int64_t>(random_bits() % 4));
      for (int64_t i = 0; i < extent; ++i) {
        row[a].set(i, a < 2 ? random_value() : random_state(states.names[a - 2]));
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
    if (!active) table.rows.back().grad = nullptr;
    active_.push_back(active);
  }

  // Points the table at the arrays; call when all rows are there.
  void connect() {
    for (size_t r = 0; r < arrays.size(); ++r) {
      Row& row = table.rows[r];
      row.param = arrays[r][0].at(0);
      row.grad = active_[r] ? arrays[r][1].at(0) : nullptr;
      for (int k = 0; k < states.count; ++k) row.state[k] = arrays[r][2 + k].at(0);
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
        span.grad = expected[r][1].at(element(row, 1, i));
        for (int k = 0; k < states.count; ++k) {
          span.state[k] = expected[r][2 + k].at(element(row, 2 + k, i));
        }
        span.count = 1;
        reference(span, table.slots.data() + row.slot * table.slot_size);
      }
    }
  }

  Work work(const Tier& tier) const {
    return {&table, tier.kernel(rule->index, variant(), storage_index(storage))};
  }

  // Compares every element of memory, gaps and the rows that take no part included, with
  // `expected`. One failure a job, of its first element, so that the report stays readable.
  void compare(const Job& before, const std::string& where) const {
    std::string first;
    int64_t wrong = 0;
    int64_t updated = 0;
    int64_t moved = 0;
    for (size_t r = 0; r < arrays.size(); ++r) {
      for (size_t a = 0; a < arrays[r].size(); ++a) {
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
    CHECK(moved * 2 > updated, where + ": only " + std::to_string(moved) + " of " +
                                   std::to_string(updated) + " parameters moved");
  }

  // Runs the driver on a copy of this job and compares.
  void check(const Tier& tier, const RunWorkers& workers, const std::string& what) const {
    Job run = *this;
    run.connect();
    run_tables({run.work(tier)}, workers);
    run.compare(*this, what + ": " + name(tier.name));
  }

 private:
  std::vector<bool> active_;
};

void one_thread(const std::function<void()>& worker) { worker(); }
void three_threads(const std::function<void()>& worker) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(worker);
  for (std::thread& thread : threads) thread.join();
}

std::vector<Tier> tiers_here() {
  std::vector<Tier> tiers;
  for (const Tier& tier : built_tiers()) {
    if (tier.supported()) tiers.push_back(tier);
  }
  return tiers;
}

template <class Visit>
void for_each_variant(const Visit& visit) {
  for (const RuleInfo& rule : all_rules()) {
    for (const HyperValues& hyper : all_variants(rule)) {
      for (const StorageTuple& storage : kStorageTuples) visit(Job(rule, hyper, storage));
    }
  }
}

// ---- Tests -----------------------------------------------------------------------------------

// Sizes 0 .. 4 vectors + 1 of the widest tier in one table; every seventh row takes no part.
void test_sizes() {
  for_each_variant([](Job job) {
    for (int64_t n = 0; n <= 4 * 16 + 1; ++n) job.add_row(n, n, n % 7 != 3, -1);
    job.table.cut(kCpuChunkElements);
    job.expect();
    for (const Tier& tier : tiers_here()) job.check(tier, one_thread, "sizes");
  });
}

Layout make_layout(const std::vector<int64_t>& sizes, int arrays) {
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

void test_layouts() {
  const std::vector<std::vector<int64_t>> shapes = {{1},       {7},      {5, 3},
                                                    {2, 1, 9}, {7, 300}, {3, 5, 2, 70}};
  for_each_variant([&](Job job) {
    const int arrays = 2 + job.states.count;
    for (const std::vector<int64_t>& sizes : shapes) {
      for (const bool expanded : {false, true}) {
        Layout layout = make_layout(sizes, arrays);
        if (expanded) layout.strides[1].assign(sizes.size(), 0);
        int64_t numel = 1;
        for (const int64_t size : sizes) numel *= size;
        const auto index = static_cast<int32_t>(job.table.layouts.size());
        job.table.layouts.push_back(layout);
        job.add_row(numel, extent_of(layout, arrays), true, index);
      }
    }
    // An expanded gradient that happens to be NaN or 0 would hide its row.
    for (size_t r = 1; r < job.arrays.size(); r += 2) {
      job.arrays[r][1].set(0, 0.75);
      job.expected[r][1].set(0, 0.75);
    }
    job.table.cut(1024);  // pieces begin inside a layout
    job.expect();
    for (const Tier& tier : tiers_here()) job.check(tier, three_threads, "layouts");
  });
}

// Cutting must not change a bit: rows longer than chunks, chunks of many rows, every thread count.
void test_chunks() {
  const RuleInfo& rule = find_rule("adamw");
  for (const HyperValues& hyper : all_variants(rule)) {
    Job job(rule, hyper, {DType::kBF16, DType::kBF16, DType::kBF16});
    for (const int64_t n : {1, 1023, 0, 1024, 1025, 5000, 0, 3, 2048, 4097, 0}) {
      job.add_row(n, n, true, -1);
    }
    job.expect();
    for (const int64_t elements : {1, 1000, 1024, 1025, 4096, 1 << 20}) {
      job.table.cut(elements);
      const std::string what = "chunks of " + std::to_string(elements);
      int64_t piece = 0;
      for (const Chunk& chunk : job.table.chunks) {
        CHECK(chunk.first_piece == piece && chunk.last_piece > piece,
              what + ": chunks leave a gap");
        piece = chunk.last_piece;
      }
      CHECK(piece == static_cast<int64_t>(job.table.pieces.size()),
            what + ": pieces are left over");
      std::vector<int64_t> covered(job.table.rows.size(), 0);
      for (const Piece& p : job.table.pieces) {
        CHECK(p.begin == covered[p.row] && p.count > 0, what + ": pieces leave a gap");
        covered[p.row] += p.count;
      }
      for (size_t r = 0; r < covered.size(); ++r) {
        CHECK(covered[r] == job.table.rows[r].numel, what + ": row " + std::to_string(r));
      }
      for (const Tier& tier : tiers_here()) {
        job.check(tier, one_thread, what);
        job.check(tier, three_threads, what + ", three threads");
      }
    }
  }
}

// One region over the tables of every rule: each keeps its own kernel, slots and chunks, and a
// table without rows in between changes nothing.
void test_tables() {
  std::vector<Job> jobs;
  for (const RuleInfo& rule : all_rules()) {
    const HyperValues hyper = all_variants(rule).front();
    for (const StorageTuple& storage : kStorageTuples) {
      jobs.emplace_back(rule, hyper, storage);
      Job& job = jobs.back();
      if (storage == StorageTuple{DType::kF16, DType::kF16, DType::kF16}) continue;  // no rows
      for (const int64_t n : {700, 0, 5000, 64}) job.add_row(n, n, n != 64, -1);
      job.table.cut(1024);
      job.expect();
    }
  }
  for (const Tier& tier : tiers_here()) {
    for (const RunWorkers& workers : {RunWorkers(one_thread), RunWorkers(three_threads)}) {
      std::vector<Job> runs = jobs;
      std::vector<Work> work;
      for (Job& run : runs) {
        run.connect();
        work.push_back(run.work(tier));
      }
      run_tables(work, workers);
      run_tables({}, workers);
      for (size_t j = 0; j < runs.size(); ++j) {
        if (!runs[j].arrays.empty()) runs[j].compare(jobs[j], "tables: " + runs[j].name(tier.name));
      }
    }
  }
}

// Every conversion of every tier's vectors: SGD with lr = -1 stores the rounded gradient in a
// parameter of -0, and its first momentum buffer is the widened gradient.
void test_conversions() {
  const RuleInfo& rule = find_rule("sgd");
  const auto hyper_of = [&](double lr, double momentum) {
    HyperValues hyper;
    for (size_t h = 0; h < rule.hyper_names.size(); ++h) {
      const std::string key = rule.hyper_names[h].key;
      hyper.values[h] = key == "lr" ? lr : key == "momentum" ? momentum : 0.0;
    }
    return hyper;
  };
  for (const DType half : {DType::kBF16, DType::kF16}) {
    const bits16::Format format = half == DType::kBF16 ? bits16::kBF16 : bits16::kF16;
    std::vector<float> floats;
    bits16::for_each_deciding_float(format, [&](float x) { floats.push_back(x); });
    const auto count = static_cast<int64_t>(floats.size());
    const Job narrow(rule, hyper_of(-1.0, 0.0), {half, DType::kF32, DType::kF32});
    const Job wide(rule, hyper_of(-1.0, 0.5), {half, half, DType::kF32});
    for (const Tier& tier : tiers_here()) {
      std::vector<uint16_t> rounded(floats.size(), 0x8000);
      const Span stored{rounded.data(), floats.data(), {}, count};
      tier.kernel(rule.index, narrow.variant(), storage_index(narrow.storage))(
          stored, stored, narrow.table.slots.data());
      for (size_t i = 0; i < floats.size(); ++i) {
        ++checked;
        CHECK(bits16::same(bits16::decode(format, rounded[i]), bits16::nearest(format, floats[i])),
              std::string("conversions: ") + dtype_name(half) + " on " + tier.name + " rounds " +
                  std::to_string(floats[i]) + " to pattern " + std::to_string(rounded[i]));
      }
      std::vector<uint16_t> patterns(0x10000);
      for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
      std::vector<uint16_t> params(patterns.size(), 0);
      std::vector<float> buffers(patterns.size(), -1.0f);
      const Span loaded{params.data(), patterns.data(), {buffers.data()}, 0x10000};
      tier.kernel(rule.index, wide.variant(), storage_index(wide.storage))(loaded, loaded,
                                                                           wide.table.slots.data());
      for (size_t i = 0; i < patterns.size(); ++i) {
        ++checked;
        CHECK(bits16::same(buffers[i], bits16::decode(format, patterns[i])),
              std::string("conversions: ") + dtype_name(half) + " on " + tier.name +
                  " widens pattern " + std::to_string(i) + " to " + std::to_string(buffers[i]));
      }
    }
  }
}

void test_tiers() {
  const std::vector<std::string> names = available_tiers();
  CHECK(!names.empty() && names[0] == "generic", "the generic tier runs everywhere");
  for (const std::string& name : names) {
    select_tier(name);
    CHECK(current_tier().name == name, "select_tier did not select " + name);
  }
  bool refused = false;
  try {
    select_tier("sse9");
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("generic") != std::string::npos;
  }
  CHECK(refused, "an unknown tier must be refused with the names of those there are");
  CHECK(current_tier().name == names.back(), "a refused tier must change nothing");
}

}  // namespace

int main() {
  test_tiers();
  test_conversions();
  test_chunks();
  test_sizes();
  test_layouts();
  test_tables();
  std::string tiers;
  for (const Tier& tier : tiers_here()) tiers += std::string(tiers.empty() ? "" : ", ") + tier.name;
  std::fprintf(stderr, "driver_test: tiers %s\n", tiers.c_str());
  return check::finish("driver_test", checked);
}
