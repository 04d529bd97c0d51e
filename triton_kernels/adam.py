"""Adam, the bias-corrected running mean over a root: the twin of ``csrc/rules/adam.h``.

    g = grad + weight_decay * p                (coupled: Adam)
    p = p * (1 - lr * weight_decay)            (decoupled: AdamW)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    w = max(w, v) (AMSGrad), v otherwise
    p = p - lr / (1 - beta1^step) * m / (sqrt(w) / sqrt(1 - beta2^step) + eps)

Source, variant and deviations: see the header. States: exp_avg (m), exp_avg_sq (v),
max_exp_avg_sq (w), all zero, in the parameter's dtype; the last only with amsgrad.
"""

from typing import NamedTuple

import triton.language as tl

from .math import device, div, max, power, sqrt


class Hyper(NamedTuple):
    """What the user passed, in double; a bool is 0 or 1."""

    lr: tl.tensor
    beta1: tl.tensor
    beta2: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    amsgrad: tl.tensor
    decoupled_weight_decay: tl.tensor


AMSGRAD = tl.constexpr(1)


class Scalars(NamedTuple):
    """What a step's updates read."""

    beta1: tl.tensor
    one_minus_beta1: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    eps: tl.tensor
    step_size: tl.tensor  # lr / (1 - beta1^step)
    inv_sqrt_bias_correction2: tl.tensor  # 1 / sqrt(1 - beta2^step)
    weight_decay: tl.tensor  # coupled; 0 if decoupled
    decay: tl.tensor  # decoupled: 1 - lr * weight_decay; 1 if coupled


@device
def prepare(h, scalar_states):
    """The scalars of a step, in double, and the scalar states after it."""
    step = scalar_states[0] + 1.0
    bias_correction1 = 1.0 - power(h.beta1, step)
    bias_correction2 = 1.0 - power(h.beta2, step)
    decoupled = h.decoupled_weight_decay != 0
    scalars = Scalars(
        h.beta1,
        1.0 - h.beta1,
        h.beta2,
        1.0 - h.beta2,
        h.eps,
        div(h.lr, bias_correction1),
        div(1.0, sqrt(bias_correction2)),
        tl.where(decoupled, 0.0, h.weight_decay),
        tl.where(decoupled, 1.0 - h.lr * h.weight_decay, 1.0),
    )
    return scalars, (step,)


@device
def update(param, grad, state, s, VARIANT: tl.constexpr):
    """The new parameter and states."""
    exp_avg = state[0]
    exp_avg_sq = state[1]
    if s.decay != 1:
        param = param * s.decay
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad
    exp_avg_sq = s.beta2 * exp_avg_sq + (s.one_minus_beta2 * grad) * grad
    second_moment = exp_avg_sq
    new_state = (exp_avg, exp_avg_sq)
    if VARIANT == AMSGRAD:
        max_exp_avg_sq = state[2]
        max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
        new_state = (exp_avg, exp_avg_sq, max_exp_avg_sq)
    denominator = sqrt(second_moment) * s.inv_sqrt_bias_correction2 + s.eps
    param = param - div(s.step_size * exp_avg, denominator)
    return param, new_state
