// RMSprop: gradients divided by a running root mean square.
//
//   g    = grad + weight_decay * p
//   v    = alpha * v + (1 - alpha) * g^2
//   a    = alpha * a + (1 - alpha) * g          (centered)
//   d    = g / (sqrt(v - a^2) + eps)            (a = 0 unless centered)
//   b    = momentum * b + d                     (momentum > 0)
//   p    = p - lr * (b or d)
//
// Source: Tieleman, Hinton, "Lecture 6.5: rmsprop", Coursera, 2012; centered: Graves, "Generating
// Sequences With Recurrent Neural Networks", 2013, arXiv:1308.0850, eqs. 38 to 45. Variant:
// torch.optim.RMSprop: eps outside the root, lr applied outside the momentum.
// States: square_avg, momentum_buffer, grad_avg, all zero, in the parameter's dtype; the last two
// only with momentum and centered. Deviation: none.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

struct RmsProp {
  static constexpr HyperName kHyperNames[] = {{"lr"},           {"alpha"},    {"eps"},
                                              {"weight_decay"}, {"momentum"}, {"centered"}};
  static constexpr ScalarStates kScalarStates{1, {{"step"}}};

  struct Hyper {
    double lr, alpha, eps, weight_decay, momentum, centered;
  };

  enum : int { kPlain = 0, kMomentum = 1, kCentered = 2, kVariants = 4 };
  static int variant(const Hyper& h) {
    return (h.momentum > 0 ? kMomentum : 0) | (h.centered != 0 ? kCentered : 0);
  }
  static constexpr StateNames states(int variant) {
    switch (variant) {
      case kMomentum:
        return {2, {"square_avg", "momentum_buffer"}};
      case kCentered:
        return {2, {"square_avg", "grad_avg"}};
      case kMomentum | kCentered:
        return {3, {"square_avg", "momentum_buffer", "grad_avg"}};
      default:
        return {1, {"square_avg"}};
    }
  }

  template <class T>
  struct Scalars {
    T lr;
    T alpha;
    T one_minus_alpha;
    T eps;
    T weight_decay;
    T momentum;
  };

  template <class T>
  FUSEDOPT_HD static Scalars<T> prepare(const Hyper& h, double* scalar_states) {
    scalar_states[0] += 1.0;
    return {T(h.lr), T(h.alpha), T(1.0 - h.alpha), T(h.eps), T(h.weight_decay), T(h.momentum)};
  }

  template <int kVariant, class V>
  FUSEDOPT_HD static void update(V& param, V grad, V* state,
                                 const Scalars<typename ScalarOf<V>::Type>& s) {
    V& square_avg = state[0];
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    square_avg = s.alpha * square_avg + (s.one_minus_alpha * grad) * grad;
    V variance = square_avg;
    if constexpr ((kVariant & kCentered) != 0) {
      constexpr int kGradAvg = (kVariant & kMomentum) != 0 ? 2 : 1;
      V& grad_avg = state[kGradAvg];
      grad_avg = s.alpha * grad_avg + s.one_minus_alpha * grad;
      variance = square_avg - grad_avg * grad_avg;
    }
    const V root = sqrt(variance) + s.eps;
    if constexpr ((kVariant & kMomentum) != 0) {
      V& buffer = state[1];
      buffer = s.momentum * buffer + grad / root;
      param = param - s.lr * buffer;
    } else {
      param = param - s.lr * grad / root;
    }
  }
};

}  // namespace fusedopt
