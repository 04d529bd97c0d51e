"""The traffic floor: the twin of ``csrc/core/floor.h``, for benchmarks; not in the registry.

What a rule with as many states reads and writes, through the one kernel, with one addition an array
in place of the maths.
"""

from typing import NamedTuple

import triton.language as tl

from .math import device


class Scalars(NamedTuple):
    """None; a slot is never empty."""

    unused: tl.tensor


@device
def update(param, grad, state, s, VARIANT: tl.constexpr):
    """The new parameter and states."""
    param = param + grad
    new_state = ()
    for k in tl.static_range(len(state)):
        new_state = new_state + (state[k] + grad,)
    return param, new_state
