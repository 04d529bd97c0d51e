// What an optimizer asks of its steps beside the update, and what its steps remember from one to the
// next. Outlives plans.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/decision.h"

namespace fusedopt {

namespace py = pybind11;

// The entries of a parameter's state that the drivers own.
constexpr const char* kAccumulatorName = "accumulated_grad";
constexpr const char* kAverageName = "ema";

struct StepOptions {
  double max_norm = -1.0;   // negative: gradients are not clipped
  bool measures = false;    // somebody may ask for the norm
  bool check = false;       // gradients that are not finite are left out
  double ema_decay = -1.0;  // negative: parameters are not averaged
  bool zero_grads = false;
  bool accumulates = false;
  bool mean = true;  // a window's gradient is divided by its weight
  // Gradients come scaled by GradScaler: steps may not take place, and unscale them for good.
  bool scaled = false;
  bool shared = false;  // sums meet those of other ranks, even if this one has no gradient

  bool averages() const { return ema_decay >= 0.0; }
  // Whether a device may decide that a step does not take place, so that only it can count steps.
  bool may_skip() const { return check || accumulates || scaled; }
};

class StepMemory {
 public:
  // What is remembered of a parameter.
  struct Member {
    bool has_accumulated = false;  // its accumulator has gradients of the present window
    // The gradient that an accumulation left at zero, and its version then.
    const void* zeroed = nullptr;
    uint32_t zeroed_version = 0;
  };

  // `reduce` is called with the sums of each device, a row for each of the specs that DTensors have
  // there, and returns sums over the ranks, whose rows come to the total.
  explicit StepMemory(py::object reduce) : reduce(std::move(reduce)) {}

  StepOptions options;  // written by `set_options` alone
  py::object reduce;
  std::vector<at::Tensor> add_up(const std::vector<py::list>& specs,
                                 const std::vector<at::Tensor>& sums) const;

  // Takes effect with the next step; waits for the devices if parameters are averaged otherwise.
  void set_options(const StepOptions& now);

  // The reference stays valid.
  Member& member(PyObject* param) { return members_[param]; }
  void forget() {
    for (auto& [param, member] : members_) member = {};  // plans point to them
  }
  // The accumulators of all parameters have been used up.
  void end_window() {
    for (auto& [param, member] : members_) member.has_accumulated = false;
  }

  // The memory of a device's StepDecision, created with what is constant in it and with what the other
  // devices have decided.
  at::Tensor decision(c10::Device device);
  const std::vector<std::pair<c10::Device, at::Tensor>>& decisions() const { return decisions_; }

  // The weight of the micro-batches in the accumulators; reading it waits for the device.
  double window_weight() const;
  void set_window_weight(double weight);

  // Changes the decisions of all devices, in the order of their current streams.
  void change_decisions(const std::function<void(StepDecision&)>& change);

 private:
  std::unordered_map<PyObject*, Member> members_;
  std::vector<std::pair<c10::Device, at::Tensor>> decisions_;
  double first_weight_ = 0.0;  // of the window, until there is a decision
};

}  // namespace fusedopt
