#include "plan/memory.h"

#include <ATen/ops/empty.h>

#include <cstring>
#include <stdexcept>

#include "plan/arguments.h"

namespace fusedopt {

namespace {

// Copies a decision to where it lies, in the order of the device's current stream.
void write(const StepDecision& decision, const at::Tensor& to) {
  const auto size = static_cast<int64_t>(sizeof decision);
  const at::Tensor staging = at::empty({size}, at::TensorOptions(at::kByte));
  std::memcpy(staging.data_ptr(), &decision, sizeof decision);
  to.copy_(staging);
}

// Decisions are there for Python to read, which may free what it is given.
const at::Tensor& with_memory(const at::Tensor& decision) {
  if (!has_memory(decision)) throw std::runtime_error("a decision's storage is empty");
  return decision;
}

StepDecision read(const at::Tensor& from) {
  const at::Tensor here = with_memory(from).cpu();
  StepDecision decision;
  std::memcpy(&decision, here.const_data_ptr(), sizeof decision);
  return decision;
}

void set_decay(StepDecision& decision, double decay) {
  decision.ema_decay64 = decay;
  decision.ema_rest64 = 1.0 - decay;
  decision.ema_decay32 = static_cast<float>(decision.ema_decay64);
  decision.ema_rest32 = static_cast<float>(decision.ema_rest64);
}

}  // namespace

std::vector<at::Tensor> StepMemory::add_up(const std::vector<py::list>& specs,
                                           const std::vector<at::Tensor>& sums) const {
  py::list by_device, rows;
  for (const py::list& list : specs) by_device.append(list);
  for (const at::Tensor& tensor : sums) {
    rows.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)));
  }
  std::vector<at::Tensor> reduced;
  for (const py::handle tensor : reduce(by_device, rows)) {
    const at::Tensor& sum = reduced.emplace_back(tensor_of(tensor.ptr(), "a sum of reduce()"));
    if (sum.dim() != 2 || sum.size(1) != 2 || !has_memory(sum)) {
      throw py::value_error("reduce() returned sums that are not rows of two numbers");
    }
  }
  return reduced;
}

void StepMemory::change_decisions(const std::function<void(StepDecision&)>& change) {
  for (const auto& [device, tensor] : decisions_) {
    StepDecision decision = read(tensor);
    change(decision);
    write(decision, tensor);
  }
}

void StepMemory::set_options(const StepOptions& now) {
  const bool decays = now.averages() && now.ema_decay != options.ema_decay;
  options = now;
  if (decays) change_decisions([&](StepDecision& d) { set_decay(d, now.ema_decay); });
}

at::Tensor StepMemory::decision(c10::Device device) {
  for (const auto& [known, tensor] : decisions_) {
    if (known == device) return with_memory(tensor);
  }
  StepDecision first;
  if (!decisions_.empty()) {
    first = read(decisions_.front().second);
  } else {
    if (options.averages()) set_decay(first, options.ema_decay);
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
  change_decisions([&](StepDecision& decision) { decision.weight = weight; });
}

}  // namespace fusedopt
