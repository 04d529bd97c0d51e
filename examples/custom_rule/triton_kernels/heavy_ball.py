"""The heavy ball: the twin of ``csrc/rules/heavy_ball.h``.

    b = momentum * b + lr * grad
    p = p - b

Source, variant and deviations: see the header. State: momentum_buffer, zero, in the parameter's
dtype.
"""

from typing import NamedTuple

import triton.language as tl

from .math import device


class Hyper(NamedTuple):
    """What the user passed, in double."""

    lr: tl.tensor
    momentum: tl.tensor


class Scalars(NamedTuple):
    """What a step's updates read."""

    lr: tl.tensor
    momentum: tl.tensor


@device
def prepare(h, scalar_states):
    """The scalars of a step, in double, and the scalar states after it: there are none."""
    return Scalars(h.lr, h.momentum), ()


@device
def update(param, grad, state, s, VARIANT: tl.constexpr):
    """The new parameter and state."""
    buffer = state[0]
    buffer = s.momentum * buffer + s.lr * grad
    param = param - buffer
    return param, (buffer,)
