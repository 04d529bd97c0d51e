// The traffic floor: the driver's loop with the same reads and writes as a step and no maths.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "core/table.h"
#include "plan/device.h"

namespace fusedopt {

// Holds a table over rows [parameter, gradient, states...]: `run` reads all of them and writes all but
// the gradient, moving raw bytes (any dtype) as fp32 and adding. Nothing is walked or checked on the
// host, so that a step's time over the floor's is all that the maths and the host cost.
class TrafficFloor {
 public:
  // Throws std::invalid_argument unless every row has the same number of contiguous tensors of equal
  // size in bytes, a multiple of four, all on one device. `launcher` is None for the CPU driver. With
  // `measures` the gradients are read once before, in a pass of their own (on a device by the kernel
  // that sums norms); with `zero_grads` they are written, too.
  TrafficFloor(const pybind11::list& rows, const pybind11::object& launcher, bool measures,
               bool zero_grads);
  void run();

 private:
  c10::Device device_{c10::kCPU};
  std::unique_ptr<TableOnDevice> on_device_;  // null: the CPU driver's
  pybind11::list keep_;
  Table table_;
  bool measures_;
  bool zero_grads_;
  int64_t blocks_ = 0;  // of the gradients' norm
  at::Tensor sums_;     // of these blocks, and a verdict, which nothing obeys
};

}  // namespace fusedopt
