"""RMSprop, gradients over a running root mean square: the twin of ``csrc/rules/rmsprop.h``.

    g    = grad + weight_decay * p
    v    = alpha * v + (1 - alpha) * g^2
    a    = alpha * a + (1 - alpha) * g          (centered)
    d    = g / (sqrt(v - a^2) + eps)            (a = 0 unless centered)
    b    = momentum * b + d                     (momentum > 0)
    p    = p - lr * (b or d)

Source, variant and deviations: see the header. States: square_avg, momentum_buffer, grad_avg, all
zero, in the parameter's dtype; the last two only with momentum and centered.
"""

from typing import NamedTuple

import triton.language as tl

from .math import device, div, sqrt


class Hyper(NamedTuple):
    """What the user passed, in double; a bool is 0 or 1."""

    lr: tl.tensor
    alpha: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    momentum: tl.tensor
    centered: tl.tensor


MOMENTUM = tl.constexpr(1)
CENTERED = tl.constexpr(2)


class Scalars(NamedTuple):
    """What a step's updates read."""

    lr: tl.tensor
    alpha: tl.tensor
    one_minus_alpha: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    momentum: tl.tensor


@device
def prepare(h, scalar_states):
    """The scalars of a step, in double, and the scalar states after it."""
    scalars = Scalars(h.lr, h.alpha, 1.0 - h.alpha, h.eps, h.weight_decay, h.momentum)
    return scalars, (scalar_states[0] + 1.0,)


@device
def update(param, grad, state, s, VARIANT: tl.constexpr):
    """The new parameter and states."""
    square_avg = state[0]
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    square_avg = s.alpha * square_avg + (s.one_minus_alpha * grad) * grad
    variance = square_avg
    if (VARIANT & CENTERED) != 0:
        GRAD_AVG: tl.constexpr = 2 if (VARIANT & MOMENTUM) != 0 else 1
        grad_avg = state[GRAD_AVG]
        grad_avg = s.alpha * grad_avg + s.one_minus_alpha * grad
        variance = square_avg - grad_avg * grad_avg
    root = sqrt(variance) + s.eps
    if (VARIANT & MOMENTUM) != 0:
        buffer = state[1]
        buffer = s.momentum * buffer + div(grad, root)
        param = param - s.lr * buffer
    else:
        param = param - div(s.lr * grad, root)
    new_state = (square_avg,)
    if (VARIANT & MOMENTUM) != 0:
        new_state = new_state + (buffer,)
    if (VARIANT & CENTERED) != 0:
        new_state = new_state + (grad_avg,)
    return param, new_state
