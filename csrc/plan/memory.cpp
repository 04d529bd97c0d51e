#include "plan/memory.h"

#include <ATen/ops/empty.h>

#include <cstring>

namespace fusedopt {

namespace {

// Copies a verdict to where it lies, in the order of the device's current stream.
void write(const Verdict& verdict, const at::Tensor& to) {
  const auto size = static_cast<int64_t>(sizeof verdict);
  const at::Tensor staging = at::empty({size}, at::TensorOptions(at::kByte));
  std::memcpy(staging.data_ptr(), &verdict, sizeof verdict);
  to.copy_(staging);
}

Verdict read(const at::Tensor& from) {
  const at::Tensor here = from.cpu();
  Verdict verdict;
  std::memcpy(&verdict, here.const_data_ptr(), sizeof verdict);
  return verdict;
}

}  // namespace

at::Tensor StepMemory::verdict(c10::Device device) {
  for (const auto& [known, tensor] : verdicts_) {
    if (known == device) return tensor;
  }
  Verdict first;
  if (!verdicts_.empty()) {
    first = read(verdicts_.front().second);
  } else {
    if (options.averages()) {
      first.ema_decay64 = options.ema_decay;
      first.ema_rest64 = 1.0 - options.ema_decay;
      first.ema_decay32 = static_cast<float>(first.ema_decay64);
      first.ema_rest32 = static_cast<float>(first.ema_rest64);
    }
    first.weight = first_weight_;
  }
  at::Tensor made = at::empty({static_cast<int64_t>(sizeof(Verdict))},
                              at::TensorOptions(at::kByte).device(device));
  write(first, made);
  verdicts_.emplace_back(device, made);
  return made;
}

double StepMemory::window_weight() const {
  return verdicts_.empty() ? first_weight_ : read(verdicts_.front().second).weight;
}

void StepMemory::set_window_weight(double weight) {
  first_weight_ = weight;
  for (const auto& [device, tensor] : verdicts_) {
    Verdict verdict = read(tensor);
    verdict.weight = weight;
    write(verdict, tensor);
  }
}

}  // namespace fusedopt
