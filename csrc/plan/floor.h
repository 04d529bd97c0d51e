// The traffic floor: the driver's loop with the same reads and writes as a step and no maths.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "core/table.h"

namespace fusedopt {

// Holds a table over rows [parameter, gradient, states...]: `run` reads all of them and writes all but
// the gradient, moving raw bytes (any dtype) as fp32 and adding. Nothing is walked or checked on the
// host, so that a step's time over the floor's is all that the maths and the host cost.
class TrafficFloor {
 public:
  // Throws std::invalid_argument unless every row has the same number of contiguous CPU tensors of
  // equal size in bytes, a multiple of four.
  explicit TrafficFloor(const pybind11::list& rows);
  void run();

 private:
  pybind11::list keep_;
  Table table_;
};

}  // namespace fusedopt
