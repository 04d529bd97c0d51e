"""Adagrad, a learning rate a coordinate: the twin of ``csrc/rules/adagrad.h``.

    g   = grad + weight_decay * p
    sum = sum + g^2
    p   = p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)

Source, variant and deviations: see the header. State: sum, initial_accumulator_value, in the
parameter's dtype.
"""

from typing import NamedTuple

import triton.language as tl

from .math import device, div, sqrt


class Hyper(NamedTuple):
    """What the user passed, in double."""

    lr: tl.tensor
    lr_decay: tl.tensor
    weight_decay: tl.tensor
    eps: tl.tensor


class Scalars(NamedTuple):
    """What a step's updates read."""

    lr: tl.tensor  # after lr_decay
    weight_decay: tl.tensor
    eps: tl.tensor


@device
def prepare(h, scalar_states):
    """The scalars of a step, in double, and the scalar states after it."""
    step = scalar_states[0] + 1.0
    lr = div(h.lr, 1.0 + (step - 1.0) * h.lr_decay)
    return Scalars(lr, h.weight_decay, h.eps), (step,)


@device
def update(param, grad, state, s, VARIANT: tl.constexpr):
    """The new parameter and states."""
    sum = state[0]
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    sum = sum + grad * grad
    param = param - div(s.lr * grad, sqrt(sum) + s.eps)
    return param, (sum,)
