// What prepares a step whose scalars depend on device memory (a step count, a learning rate, an
// overflow): one thread a scalar slot. A plain function, like the bodies of the updates.
#pragma once

#include "core/registry.h"
#include "core/table.h"
#include "device/table.h"
#include "rules/all.h"

namespace fusedopt::device {

// A number that the host gives, or that lies in device memory in one of the two types torch keeps
// such numbers in.
enum class NumberKind : int64_t { kValue, kFloat, kDouble };
struct DeviceNumber {
  union {
    double value = 0.0;
    void* at;
  };
  NumberKind kind = NumberKind::kValue;

  FUSEDOPT_HD double get() const {
    if (kind == NumberKind::kValue) return value;
    return kind == NumberKind::kDouble ? *static_cast<const double*>(at)
                                       : *static_cast<const float*>(at);
  }
  FUSEDOPT_HD void set(double to) const {  // what the host gives, the host advances
    if (kind == NumberKind::kDouble) *static_cast<double*>(at) = to;
    if (kind == NumberKind::kFloat) *static_cast<float*>(at) = static_cast<float>(to);
  }
};

inline DeviceNumber number_at(void* at, bool is_double) {
  DeviceNumber number;
  number.at = at;
  number.kind = is_double ? NumberKind::kDouble : NumberKind::kFloat;
  return number;
}

inline DeviceNumber number_of(double value) {
  DeviceNumber number;
  number.value = value;
  return number;
}

// A param group's hyperparameters; those that are device tensors are read at every launch.
struct DeviceHyper {
  DeviceNumber values[kMaxHyper];
  double grad_factor;
};

struct PrepareSlot {
  DeviceNumber scalar_states[kMaxScalarStates];
  int64_t hyper = -1;  // index into the groups' hyperparameters; -1: no part in this step
};

struct PrepareTable {
  const PrepareSlot* prepare;
  const DeviceHyper* hypers;
  void* slots;
  int64_t slot_count;
};

// A skipped step advances nothing, and its slots are not read.
template <class Rule, class T>
FUSEDOPT_HD void prepare_slot(const PrepareTable& table, const StepDecision* decision,
                              int64_t index) {
  if (skips(decision)) return;
  using Hyper = typename Rule::Hyper;
  const PrepareSlot& slot = table.prepare[index];
  if (slot.hyper < 0) return;
  const DeviceHyper& from = table.hypers[slot.hyper];
  constexpr int kCount = sizeof(Hyper) / sizeof(double);
  double values[kCount];
  for (int h = 0; h < kCount; ++h) values[h] = from.values[h].get();
  Hyper hyper;
  memcpy(&hyper, values, sizeof hyper);
  double states[kMaxScalarStates];
  for (int k = 0; k < kMaxScalarStates; ++k) states[k] = slot.scalar_states[k].get();
  static_cast<Slot<T, typename Rule::template Scalars<T>>*>(table.slots)[index] = {
      T(from.grad_factor), Rule::template prepare<T>(hyper, states)};
  for (int k = 0; k < kMaxScalarStates; ++k) slot.scalar_states[k].set(states[k]);
}

}  // namespace fusedopt::device
