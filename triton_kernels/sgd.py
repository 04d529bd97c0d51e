"""Stochastic gradient descent with momentum: the twin of ``csrc/rules/sgd.h``.

    g = grad + weight_decay * p
    b = g                                   on the first step (no dampening)
    b = momentum * b + (1 - dampening) * g  afterwards
    d = g + momentum * b (Nesterov), b (momentum), g (plain)
    p = p - lr * d

Source, variant and deviations: see the header. State: momentum_buffer, zero, in the parameter's
dtype, absent when momentum is 0.
"""

from typing import NamedTuple

import triton.language as tl

from .math import device


class Hyper(NamedTuple):
    """What the user passed, in double; a bool is 0 or 1."""

    lr: tl.tensor
    momentum: tl.tensor
    dampening: tl.tensor
    weight_decay: tl.tensor
    nesterov: tl.tensor


MOMENTUM = tl.constexpr(1)


class Scalars(NamedTuple):
    """What a step's updates read."""

    lr: tl.tensor
    weight_decay: tl.tensor
    nesterov: tl.tensor  # 0 or 1
    momentum: tl.tensor
    buffer_weight: tl.tensor  # 1 - dampening, 1 on the first step


@device
def prepare(h, scalar_states):
    """The scalars of a step, in double, and the scalar states after it."""
    kept = (h.momentum != 0) & (h.dampening != 0)
    first = kept & (scalar_states[0] == 1)
    scalars = Scalars(
        h.lr,
        h.weight_decay,
        h.nesterov,
        h.momentum,
        tl.where(first, 1.0, 1.0 - h.dampening),
    )
    return scalars, (scalar_states[0] * 0.0,)


@device
def update(param, grad, state, s, VARIANT: tl.constexpr):
    """The new parameter and states."""
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    if VARIANT == MOMENTUM:
        buffer = state[0]
        buffer = s.momentum * buffer + s.buffer_weight * grad
        if s.nesterov != 0:
            grad = grad + s.momentum * buffer
        else:
            grad = buffer
        state = (buffer,)
    param = param - s.lr * grad
    return param, state
