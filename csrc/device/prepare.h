// What prepares a step whose scalars depend on device memory (a step count, a learning rate, an
// overflow): one thread a scalar slot. A plain function, like the bodies of the updates.
#pragma once

#include "core/registry.h"
#include "core/table.h"
#include "device/table.h"
#include "rules/all.h"

namespace fusedopt::cuda {

// A number in device memory, of one of the two types torch keeps such numbers in.
struct DeviceNumber {
  void* at;  // null: there is none
  int64_t is_double;

  FUSEDOPT_HD double get() const {
    return is_double != 0 ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
  }
  FUSEDOPT_HD void set(double value) const {
    if (is_double != 0) {
      *static_cast<double*>(at) = value;
    } else {
      *static_cast<float*>(at) = static_cast<float>(value);
    }
  }
};

// A param group's hyperparameters; those that are device tensors are read at every launch.
struct DeviceHyper {
  double values[kMaxHyper];
  DeviceNumber live[kMaxHyper];
  double grad_factor;
};

struct PrepareSlot {
  DeviceNumber step;   // counts the updates that took place, where it counts on the device
  double host_step;    // otherwise: the count after this step
  int32_t* first;      // 1 until the first update took place, where only the device knows
  int32_t host_first;  // otherwise
  int32_t hyper;       // index into the groups' hyperparameters; -1: no part in this step
};

struct PrepareTable {
  const PrepareSlot* prepare;
  const DeviceHyper* hypers;
  void* slots;
  int64_t slot_count;
};

// A skipped step bumps nothing, and its slots are not read.
template <class Rule, class T>
FUSEDOPT_HD void prepare_slot(const PrepareTable& table, const Scaler& scaler,
                              const StepDecision* decision, int64_t index) {
  if (skips(scaler, decision)) return;
  using Hyper = typename Rule::Hyper;
  const PrepareSlot& slot = table.prepare[index];
  if (slot.hyper < 0) return;
  const DeviceHyper& from = table.hypers[slot.hyper];
  constexpr int kCount = sizeof(Hyper) / sizeof(double);
  double values[kCount];
  for (int h = 0; h < kCount; ++h) {
    values[h] = from.live[h].at != nullptr ? from.live[h].get() : from.values[h];
  }
  Hyper hyper;
  memcpy(&hyper, values, sizeof hyper);
  double step = slot.host_step;
  if (slot.step.at != nullptr) {
    step = slot.step.get() + 1.0;
    slot.step.set(step);
  }
  bool first = slot.host_first != 0;
  if (slot.first != nullptr) {
    first = *slot.first != 0;
    *slot.first = 0;
  }
  static_cast<Slot<T, typename Rule::template Scalars<T>>*>(table.slots)[index] = {
      T(from.grad_factor), Rule::template prepare<T>(hyper, step, first)};
}

}  // namespace fusedopt::cuda
