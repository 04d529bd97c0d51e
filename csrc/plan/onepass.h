// What an optimizer asks of its steps beside the update, and what it remembers from one to the next.
// It outlives plans.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "core/onepass.h"

namespace fusedopt {

namespace py = pybind11;

// The entries of a parameter's state that the drivers own.
constexpr const char* kAccumulatorName = "accumulated_grad";
constexpr const char* kAverageName = "ema";

// What a plan says of a flush that meets a gradient which is in no accumulator.
constexpr const char* kUnseenGradient = "a gradient was not accumulated";

class OnePass {
 public:
  // What is remembered of a parameter.
  struct Member {
    bool taken = false;  // its accumulator has gradients of the present window
    bool fresh = false;  // its state was created and no step has taken place since
    // The gradient that an accumulation left at zero, and its version then.
    const void* zeroed = nullptr;
    uint32_t zeroed_version = 0;
  };

  double max_norm = -1.0;   // negative: gradients are not clipped
  bool measures = false;    // somebody may ask for the norm
  bool check = false;       // gradients that are not finite are left out
  double ema_decay = -1.0;  // negative: parameters are not averaged
  bool zero_grads = false;
  bool accumulates = false;
  bool mean = true;  // a window's gradient is divided by its weight

  bool averages() const { return ema_decay >= 0.0; }
  // Whether a device may decide that a step does not take place, so that only it can count steps.
  bool may_skip() const { return check || accumulates; }

  // The reference stays valid.
  Member& member(PyObject* param) { return members_[param]; }
  std::unordered_map<PyObject*, Member>& members() { return members_; }

  // The memory of a device's Verdict, created with what is constant in it.
  at::Tensor verdict(c10::Device device);
  const std::vector<std::pair<c10::Device, at::Tensor>>& verdicts() const { return verdicts_; }

  // Makes the window one of this weight, whatever was in it; adds to its weight.
  void reset_window(double weight);
  void add_weight(double weight) { reset_window(window_weight() + weight); }
  // Waits for the device.
  double window_weight() const;

 private:
  std::unordered_map<PyObject*, Member> members_;
  std::vector<std::pair<c10::Device, at::Tensor>> verdicts_;
  double first_weight_ = 0.0;  // of the window, as long as there is no verdict
};

// What a step hands over besides: numbers of GradScaler and of this micro-batch.
struct Micro {
  double weight = 1.0;
  at::Tensor live_weight;  // instead of it; may be undefined
};

}  // namespace fusedopt
