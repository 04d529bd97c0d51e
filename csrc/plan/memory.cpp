#include "plan/memory.h"

#include <ATen/ops/empty.h>

#include <cstring>

namespace fusedopt {

namespace {

// Copies a decision to where it lies, in the order of the device's current stream.
void write(const StepDecision& decision, const at::Tensor& to) {
  const auto size = static_cast<int64_t>(sizeof decision);
  const at::Tensor staging = at::empty({size}, at::TensorOptions(at::kByte));
  std::memcpy(staging.data_ptr(), &decision, sizeof decision);
  to.copy_(staging);
}

StepDecision read(const at::Tensor& from) {
  const at::Tensor here = from.cpu();
  StepDecision decision;
  std::memcpy(&decision, here.const_data_ptr(), sizeof decision);
  return decision;
}

}  // namespace

at::Tensor StepMemory::decision(c10::Device device) {
  for (const auto& [known, tensor] : decisions_) {
    if (known == device) return tensor;
  }
  StepDecision first;
  if (!decisions_.empty()) {
    first = read(decisions_.front().second);
  } else {
    if (options.averages()) {
      first.ema_decay64 = options.ema_decay;
      first.ema_rest64 = 1.0 - options.ema_decay;
      first.ema_decay32 = static_cast<float>(first.ema_decay64);
      first.ema_rest32 = static_cast<float>(first.ema_rest64);
    }
    first.weight = first_weight_;
  }
  at::Tensor made = at::empty({static_cast<int64_t>(sizeof(StepDecision))},
                              at::TensorOptions(at::kByte).device(device));
  write(first, made);
  decisions_.emplace_back(device, made);
  return made;
}

double StepMemory::window_weight() const {
  return decisions_.empty() ? first_weight_ : read(decisions_.front().second).weight;
}

void StepMemory::set_window_weight(double weight) {
  first_weight_ = weight;
  for (const auto& [device, tensor] : decisions_) {
    StepDecision decision = read(tensor);
    decision.weight = weight;
    write(decision, tensor);
  }
}

}  // namespace fusedopt
