"""The traffic floor of a GPU, a kernel of `floor`; imported only where there is Triton."""

import triton
import triton.language as tl


@triton.jit
def _move(row, at, inside, sink, WIDTH: tl.constexpr, READS: tl.constexpr, ZERO: tl.constexpr):
    """The words `at` of a row's arrays, those that are `inside`; all of them if that is None."""
    kind = tl.pointer_type(tl.int32)
    grads = tl.multiple_of(tl.load(row + 1).to(kind) + at, 16)
    grad = tl.load(grads, inside)
    if READS:
        total = tl.sum(grad)
        tl.store(sink, total, total == 0x5F3759DF)  # so that the loads are not left out
    else:
        for k in tl.static_range(WIDTH):
            if k != 1:
                array = tl.multiple_of(tl.load(row + k).to(kind) + at, 16)
                tl.store(array, tl.load(array, inside) + grad, inside)
        if ZERO:
            tl.store(grads, tl.zeros_like(grad), inside)


@triton.jit
def stream(
    places, table, sink, WIDTH: tl.constexpr, READS: tl.constexpr, ZERO: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Moves a piece of a row: `table` has its row, its first word and the words of the row."""
    piece = table + 3 * tl.program_id(0).to(tl.int64)
    row = places + tl.load(piece) * WIDTH
    begin = tl.load(piece + 1)
    count = tl.load(piece + 2)
    at = begin + tl.arange(0, WORDS)
    if begin + WORDS <= count:  # without a mask, accesses are 16 bytes wide
        _move(row, at, None, sink, WIDTH, READS, ZERO)
    else:
        _move(row, at, at < count, sink, WIDTH, READS, ZERO)
