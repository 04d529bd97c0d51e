"""One step of the Triton twin on one tensor, as step.cpp has one of the header."""

import triton
import triton.language as tl

from .heavy_ball import Scalars, update


@triton.jit
def kernel(param, grad, buffer, lr, momentum, numel, BLOCK: tl.constexpr):
    """Updates one block of elements; the library's kernel does so for all tensors of all groups."""
    i = tl.arange(0, BLOCK)
    mask = i < numel
    state = (tl.load(buffer + i, mask),)
    scalars = Scalars(lr, momentum)
    new, state = update(tl.load(param + i, mask), tl.load(grad + i, mask), state, scalars, 0)
    tl.store(param + i, new, mask)
    tl.store(buffer + i, state[0], mask)
