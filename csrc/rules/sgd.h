// Stochastic gradient descent with momentum.
//
//   g = grad + weight_decay * p
//   b = g                                   on the first step (no dampening)
//   b = momentum * b + (1 - dampening) * g  afterwards
//   d = g + momentum * b (Nesterov), b (momentum), g (plain)
//   p = p - lr * d
//
// Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in
// deep learning", ICML 2013. Variant: torch.optim.SGD, which scales by lr when the parameter is
// updated (the paper scales when the velocity is) and starts the buffer at the first gradient.
// State: momentum_buffer, zero, in the parameter's dtype, absent when momentum is 0.
// Deviation: none; the first step is `b = momentum * b + 1 * g` on a buffer of zeros.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

struct Sgd {
  static constexpr HyperName kHyperNames[] = {
      {"lr"}, {"momentum"}, {"dampening"}, {"weight_decay"}, {"nesterov"}};
  static constexpr ScalarStates kScalarStates{1, {{"_unstarted", 1.0, 0.0}}};

  struct Hyper {
    double lr, momentum, dampening, weight_decay, nesterov;
  };

  // Without dampening a first step needs no other arithmetic: the buffer is 0.
  FUSEDOPT_HD static bool keeps_scalar_states(const Hyper& h) {
    return h.momentum != 0 && h.dampening != 0;
  }

  enum : int { kPlain, kMomentum, kVariants };
  static int variant(const Hyper& h) { return h.momentum == 0 ? kPlain : kMomentum; }
  static constexpr StateNames states(int variant) {
    return variant == kPlain ? StateNames{0, {}} : StateNames{1, {"momentum_buffer"}};
  }

  template <class T>
  struct Scalars {
    T lr;
    T weight_decay;
    T nesterov;  // 0 or 1
    T momentum;
    T buffer_weight;  // 1 - dampening, 1 on the first step
  };

  template <class T>
  FUSEDOPT_HD static Scalars<T> prepare(const Hyper& h, double* scalar_states) {
    const bool first = keeps_scalar_states(h) && scalar_states[0] == 1.0;
    scalar_states[0] = 0.0;
    return {T(h.lr), T(h.weight_decay), T(h.nesterov), T(h.momentum),
            T(first ? 1.0 : 1.0 - h.dampening)};
  }

  template <int kVariant, class V>
  FUSEDOPT_HD static void update(V& param, V grad, V* state,
                                 const Scalars<typename ScalarOf<V>::Type>& s) {
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    if constexpr (kVariant == kMomentum) {
      V& buffer = state[0];
      buffer = s.momentum * buffer + s.buffer_weight * grad;
      if (s.nesterov != 0) {
        grad = grad + s.momentum * buffer;
      } else {
        grad = buffer;
      }
    }
    param = param - s.lr * grad;
  }
};

}  // namespace fusedopt
