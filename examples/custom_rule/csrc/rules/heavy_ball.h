// The heavy ball: momentum whose buffer is what the parameter moves by.
//
//   b = momentum * b + lr * grad
//   p = p - b
//
// Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964, eq. (9).
// Variant: the step is kept, as Sutskever et al. (ICML 2013) write it: lr is inside the buffer, so
// that a gradient keeps the rate of its own step. torch.optim.SGD multiplies by today's rate.
// State: momentum_buffer, zero, in the parameter's dtype.
// Deviation: none.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

struct HeavyBall {
  static constexpr HyperName kHyperNames[] = {{"lr"}, {"momentum"}};
  static constexpr ScalarStates kScalarStates{};

  struct Hyper {
    double lr, momentum;
  };

  enum : int { kPlain, kVariants };
  static int variant(const Hyper& /*hyper*/) { return kPlain; }
  static constexpr StateNames states(int /*variant*/) { return StateNames{1, {"momentum_buffer"}}; }

  template <class T>
  struct Scalars {
    T lr;
    T momentum;
  };

  template <class T>
  FUSEDOPT_HD static Scalars<T> prepare(const Hyper& h, double* /*scalar_states*/) {
    return {T(h.lr), T(h.momentum)};
  }

  template <int kVariant, class V>
  FUSEDOPT_HD static void update(V& param, V grad, V* state,
                                 const Scalars<typename ScalarOf<V>::Type>& s) {
    V& buffer = state[0];
    buffer = s.momentum * buffer + s.lr * grad;
    param = param - buffer;
  }
};

}  // namespace fusedopt
