"""The maths helpers that rules share, named as in ``csrc/rules/rule.h``, and the storage types.

Arithmetic is fp32 for fp32, bf16 and fp16 storage and fp64 for fp64. Every operation here is
correctly rounded, on a device and under Triton's interpreter, so that all backends give the same
bits; ``/`` is not used in kernels, because for fp32 it compiles to an approximation.
"""

import triton
import triton.language as tl

# Whether functions of this module run in Triton's interpreter: decided when they are decorated.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _plain(function):
    return function


# What a kernel calls. Each call of an interpreted function patches all of triton.language anew,
# which costs more than what the function does; inside of a kernel that has been done already.
device = _plain if INTERPRETED.value else triton.jit


@device
def sqrt(x):
    """The square root, correctly rounded."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@device
def div(x, y):
    """The quotient, correctly rounded."""
    return x / y if y.dtype == tl.float64 else tl.div_rn(x, y)


@device
def max(a, b):
    """The larger one; NaN wins, as in torch.maximum."""
    return tl.where((a > b) | (a != a), a, b)


@device
def power(base, exponent):
    """``base ** exponent`` in double by repeated squaring: the same bits on host and device."""
    result = tl.full((), 1.0, tl.float64)
    n = exponent.to(tl.int64)
    while n != 0:
        if n & 1 != 0:
            result = result * base
        base = base * base
        n = n >> 1
    return result


@device
def widen(x, COMPUTE: tl.constexpr):
    """A stored value as the compute type, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter's own conversion gets subnormals wrong.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x.to(COMPUTE)
    return wide


@device
def narrow(x, STORAGE: tl.constexpr):
    """A computed value as the storage type, rounded to nearest even; NaN stays NaN."""
    if INTERPRETED and STORAGE == tl.bfloat16:
        # The interpreter's own conversion truncates. Adding 0x7fff plus the last kept bit carries
        # exactly when it must, as in csrc/core/dtype.h.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        narrowed = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrowed = x.to(STORAGE)
    return narrowed
