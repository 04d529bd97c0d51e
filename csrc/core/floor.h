// The traffic floor: what a rule with kCount states reads and writes, through a driver's own loop,
// with one addition an array in place of the maths. For benchmarks; not in the registry.
#pragma once

#include "core/table.h"

namespace fusedopt {

template <int kCount>
struct Floor {
  static constexpr StateNames states(int) { return {kCount, {}}; }
  template <class T>
  struct Scalars {
    T unused = 0;
  };
  template <int, class V, class S>
  FUSEDOPT_HD static void update(V& param, V grad, V* state, const S&) {
    param = param + grad;
    for (int k = 0; k < kCount; ++k) state[k] = state[k] + grad;
  }
};

using FloorSlot = Slot<float, Floor<0>::Scalars<float>>;

}  // namespace fusedopt
