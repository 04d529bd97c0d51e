// Jobs for the tests of drivers: tables over random arrays, and what a rule makes of them when it is
// called one element at a time with the conversions of core/dtype.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/registry.h"
#include "cpu/tiers.h"

namespace fusedopt::testing {

inline long checked = 0;
inline std::mt19937 random_bits(0);

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

// Hyperparameters for every variant: those that may switch one on are tried at zero and above it.
std::vector<HyperValues> all_variants(const RuleInfo& rule);

// A scalar state after `steps` steps.
inline double scalar_after(const ScalarState& state, double steps) {
  return state.name[0] == '_' ? (steps == 0 ? state.initial : state.loaded) : state.initial + steps;
}

// Writes the slot of a rule's `step`-th step.
inline void write_slot(const RuleInfo& rule, DType param, const HyperValues& hyper, double step,
                       double grad_factor, std::byte* slot) {
  double scalars[kMaxScalarStates] = {};
  for (int k = 0; k < rule.scalar_states.count; ++k) {
    scalars[k] = scalar_after(rule.scalar_states.states[k], step - 1);
  }
  rule.write_slot(param, hyper, scalars, grad_factor, slot);
}

// ---- A table with its arrays, and the same arrays for the scalar path --------------------------

struct Job {
  const RuleInfo* rule;
  HyperValues hyper;
  StorageTuple storage;
  StateNames states;
  Table table;
  Epilogue epilogue;
  std::vector<std::vector<Array>> arrays;    // a row's, by their place; empty where it has none
  std::vector<std::vector<Array>> expected;  // the same before and, once `expect` ran, after

  Job(const RuleInfo& r, const HyperValues& h, StorageTuple s)
      : rule(&r), hyper(h), storage(s), states(r.states(r.variant(h))) {
    table.storage = storage;
    table.states = states.count;
    table.slot_size = r.slot_size(storage.param);
    for (int a = 0; a < 2 + states.count; ++a) places_.push_back(a);
    // The first step; a later one; a late one that maximizes.
    add_slot(1, 1.0);
    add_slot(7, 1.0);
    add_slot(1000, -1.0);
  }

  // Adds to the rows to come what is around an update: accumulators and averages.
  void surround(const Epilogue& with) {
    epilogue = with;
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

  const std::byte* slot(int64_t i) const { return table.slots.data() + i * table.slot_size; }

  void add_slot(double step, double grad_factor) {
    const size_t at = table.slots.size();
    table.slots.resize(at + static_cast<size_t>(table.slot_size));
    write_slot(*rule, storage.param, hyper, step, grad_factor, table.slots.data() + at);
  }

  // `extent` elements of memory an array hold the row's `numel` elements.
  void add_row(int64_t numel, int64_t extent, bool active, int32_t layout);

  // Whether a row takes part in the step. Around an update it may lack its gradient or its
  // accumulator, but not both.
  bool has(size_t row, int array) const;

  // Points the table at the arrays; call when all rows are there.
  void connect();

  int64_t element(const Row& row, int array, int64_t i) const;

  // Runs the scalar path on `expected`, element by element.
  void expect();

  // Compares every element of memory, gaps and the rows that take no part included, with
  // `expected`. One failure a job, of its first element, so that the report stays readable.
  void compare(const Job& before, const std::string& where, bool moves = true) const;

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

// A decision with numbers of its own in every place that an update reads.
inline StepDecision some_verdict(bool take) {
  StepDecision decision;
  decision.factor64 = decision.factor32 = 0.625f;
  decision.in64 = decision.in32 = 1.5f;
  decision.ema_decay64 = decision.ema_decay32 = 0.75f;
  decision.ema_rest64 = decision.ema_rest32 = 0.25f;
  decision.take = take ? 1 : 0;
  return decision;
}

template <class Visit>
void for_each_variant(const Visit& visit) {
  for (const RuleInfo& rule : all_rules()) {
    for (const HyperValues& hyper : all_variants(rule)) {
      for (const StorageTuple& storage : kStorageTuples) visit(Job(rule, hyper, storage));
    }
  }
}

// Array 0 last dimension first, 1 (the gradient) in C order, others with gaps between elements.
Layout make_layout(const std::vector<int64_t>& sizes, int arrays);

// Elements of memory that the largest of a layout's arrays needs.
int64_t extent_of(const Layout& layout, int arrays);

}  // namespace fusedopt::testing
