// Adagrad: a learning rate a coordinate, from the sum of its squared gradients.
//
//   g   = grad + weight_decay * p
//   sum = sum + g^2
//   p   = p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)
//
// Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
// Optimization", JMLR 12, 2011. Variant: torch.optim.Adagrad: diagonal, eps outside the root.
// State: sum, initial_accumulator_value, in the parameter's dtype. Deviation: none.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

struct Adagrad {
  static constexpr HyperName kHyperNames[] = {{"lr"}, {"lr_decay"}, {"weight_decay"}, {"eps"}};
  static constexpr ScalarStates kScalarStates{1, {{"step"}}};

  struct Hyper {
    double lr, lr_decay, weight_decay, eps;
  };

  static constexpr int kVariants = 1;
  static int variant(const Hyper&) { return 0; }
  static constexpr StateNames states(int) { return {1, {"sum"}}; }

  template <class T>
  struct Scalars {
    T lr;  // after lr_decay
    T weight_decay;
    T eps;
  };

  template <class T>
  FUSEDOPT_HD static Scalars<T> prepare(const Hyper& h, double* scalar_states) {
    const double step = scalar_states[0] += 1.0;
    return {T(h.lr / (1.0 + (step - 1.0) * h.lr_decay)), T(h.weight_decay), T(h.eps)};
  }

  template <int kVariant, class V>
  FUSEDOPT_HD static void update(V& param, V grad, V* state,
                                 const Scalars<typename ScalarOf<V>::Type>& s) {
    V& sum = state[0];
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    sum = sum + grad * grad;
    param = param - s.lr * grad / (sqrt(sum) + s.eps);
  }
};

}  // namespace fusedopt
