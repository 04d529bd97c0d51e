// Adam: bias-corrected running mean of the gradient over the root of that of its square.
//
//   g = grad + weight_decay * p                (coupled: Adam)
//   p = p * (1 - lr * weight_decay)            (decoupled: AdamW)
//   m = beta1 * m + (1 - beta1) * g
//   v = beta2 * v + (1 - beta2) * g^2
//   w = max(w, v) (AMSGrad), v otherwise
//   p = p - lr / (1 - beta1^step) * m / (sqrt(w) / sqrt(1 - beta2^step) + eps)
//
// Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv:1412.6980,
// Algorithm 1; AMSGrad: Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018,
// Algorithm 2. Variant: torch.optim.Adam: eps outside the root and added after the bias
// correction, the maximum taken over uncorrected v, decay before the update.
// States: exp_avg (m), exp_avg_sq (v), max_exp_avg_sq (w), all zero, in the parameter's dtype; the
// last only with amsgrad. Deviation: the bias corrections are powers by repeated squaring in double
// and the root is multiplied by 1 / sqrt(1 - beta2^step), narrowed once, where torch divides.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

struct Adam {
  static constexpr HyperName kHyperNames[] = {{"lr"},
                                              {"betas", 0},
                                              {"betas", 1},
                                              {"eps"},
                                              {"weight_decay"},
                                              {"amsgrad"},
                                              {"decoupled_weight_decay"}};
  static constexpr ScalarStates kScalarStates{1, {{"step"}}};

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay;
  };

  enum : int { kPlain, kAmsgrad, kVariants };
  static int variant(const Hyper& h) { return h.amsgrad != 0 ? kAmsgrad : kPlain; }
  static constexpr StateNames states(int variant) {
    return variant == kAmsgrad ? StateNames{3, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}}
                               : StateNames{2, {"exp_avg", "exp_avg_sq"}};
  }

  template <class T>
  struct Scalars {
    T beta1;
    T one_minus_beta1;
    T beta2;
    T one_minus_beta2;
    T eps;
    T step_size;                  // lr / (1 - beta1^step)
    T inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^step)
    T weight_decay;               // coupled; 0 if decoupled
    T decay;                      // decoupled: 1 - lr * weight_decay; 1 if coupled
  };

  template <class T>
  FUSEDOPT_HD static Scalars<T> prepare(const Hyper& h, double* scalar_states) {
    const double step = scalar_states[0] += 1.0;
    const double bias_correction1 = 1.0 - power(h.beta1, step);
    const double bias_correction2 = 1.0 - power(h.beta2, step);
    const bool decoupled = h.decoupled_weight_decay != 0;
    return {T(h.beta1),
            T(1.0 - h.beta1),
            T(h.beta2),
            T(1.0 - h.beta2),
            T(h.eps),
            T(h.lr / bias_correction1),
            T(1.0 / sqrt(bias_correction2)),
            T(decoupled ? 0.0 : h.weight_decay),
            T(decoupled ? 1.0 - h.lr * h.weight_decay : 1.0)};
  }

  template <int kVariant, class V>
  FUSEDOPT_HD static void update(V& param, V grad, V* state,
                                 const Scalars<typename ScalarOf<V>::Type>& s) {
    V& exp_avg = state[0];
    V& exp_avg_sq = state[1];
    if (s.decay != 1) param = param * s.decay;
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad;
    exp_avg_sq = s.beta2 * exp_avg_sq + (s.one_minus_beta2 * grad) * grad;
    V second_moment = exp_avg_sq;
    if constexpr (kVariant == kAmsgrad) {
      V& max_exp_avg_sq = state[2];
      max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq);
      second_moment = max_exp_avg_sq;
    }
    const V denominator = sqrt(second_moment) * s.inv_sqrt_bias_correction2 + s.eps;
    param = param - s.step_size * exp_avg / denominator;
  }
};

}  // namespace fusedopt
