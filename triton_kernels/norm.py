"""The kernels that run before an update: the norm of gradients, and their way to the accumulators.

The twins of ``csrc/cuda/norm.cu``; what they compute, and in which order, is in
``csrc/core/decision.h``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from .layout import (
    ACCESS_BYTES,
    ACCUMULATE,
    ACCUMULATOR,
    CHUNK_BYTES,
    CHUNK_COUNT,
    CLOSE,
    DECISION_FACTOR32,
    DECISION_FACTOR64,
    DECISION_IN32,
    DECISION_IN64,
    DECISION_NORM,
    DECISION_NORM32,
    DECISION_SKIP,
    DECISION_TAKE,
    DECISION_TICKET,
    GRAD,
    NORM_BLOCK,
    NORM_CLASSES,
    ROW_NORM_BLOCK,
    SUMS_BYTES,
)
from .math import device, div, sqrt, widen
from .multi_tensor import (
    THREADS,
    address,
    element_of,
    has,
    layout_of,
    of_decision,
    place,
    read,
    row_of,
    store_zeros,
)

HALVINGS = tl.constexpr(8)  # of a block's classes, until one is left
LOADS_AT_ONCE = tl.constexpr(8)  # where the sums of blocks are added up


@dataclass(frozen=True)
class Norm:
    """What a norm kernel is compiled for.

    Attributes:
        grad: Storage type of the gradients.
        compute: The type of the arithmetic, and of the accumulators.
    """

    grad: tl.dtype
    compute: tl.dtype
    threads: int = THREADS

    @property
    def width(self) -> int:
        """Gradients that an access moves."""
        return ACCESS_BYTES.value * 8 // self.grad.primitive_bitwidth

    @property
    def block(self) -> int:
        """Gradients that a program takes at a time."""
        return self.threads * self.width

    @property
    def blocks(self) -> int:
        """Blocks that a program sums at a time: an access a thread for a turn over the classes."""
        return self.block // NORM_CLASSES.value

    @property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows the kernel by."""
        return f"{self.grad} {self.compute} {self.block}"


@dataclass(frozen=True)
class Accumulate(Norm):
    """What an accumulate kernel is compiled for."""


class DecisionInputs(NamedTuple):
    """What `decide` is told; doubles as their bits."""

    purpose: tl.tensor
    check: tl.tensor
    mean: tl.tensor
    grads: tl.tensor
    max_norm: tl.tensor
    weight: tl.tensor
    live_weight: tl.tensor
    grad_scale: tl.tensor
    found_inf: tl.tensor


@device
def overflowed(found_inf):
    """Whether GradScaler found that the step must not take place."""
    found = found_inf != 0
    if found:
        found = read(found_inf, tl.float32) != 0
    return found


@device
def store(at, value, T: tl.constexpr):
    """Writes a number to an address."""
    tl.store(at.to(tl.pointer_type(T)), value.to(T))


@device
def double_of(bits):
    """A double that came as its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@device
def is_finite(x):
    """Whether a double is."""
    return x - x == 0.0


@device
def weight_of(q):
    """The weight of the gradients in their window."""
    weight = double_of(q.weight)
    if q.live_weight != 0:
        weight = read(q.live_weight, tl.float64)
    return weight


@device
def weight_in(q):
    """What gradients are multiplied by on their way to the accumulators."""
    weight = weight_of(q)
    if q.grad_scale != 0:
        weight = div(weight, read(q.grad_scale, tl.float32).to(tl.float64))
    return weight


@device
def decide(q, sum_with, sum_without, decision):
    """Fills the decision from the sums over all rows."""
    found = overflowed(q.found_inf)
    take = (found == 0) & ((q.check == 0) | is_finite(sum_with))
    weight = weight_of(q)
    window = read(decision, tl.float64)
    # All threads of the program read it, one of them writes it.
    tl.debug_barrier()
    store(decision + DECISION_TAKE, take, tl.int32)
    store(decision + DECISION_IN64, weight_in(q), tl.float64)
    store(decision + DECISION_IN32, weight_in(q), tl.float32)
    if q.purpose == ACCUMULATE:
        if take:
            store(decision, window + weight, tl.float64)
    else:
        factor = tl.full((), 1.0, tl.float64)
        if q.purpose == CLOSE:
            total = tl.where(take & (q.grads != 0), window + weight, window)
            squares = tl.where(take, sum_with, sum_without)
            # Accumulators can overflow, too.
            good = (total > 0.0) & ((q.check == 0) | is_finite(squares))
            store(decision + DECISION_SKIP, good == 0, tl.int32)
            store(decision, factor * 0.0, tl.float64)
            if q.mean != 0:
                factor = div(1.0, total)
            norm = sqrt(squares) * factor
        else:
            store(decision + DECISION_SKIP, take == 0, tl.int32)
            if q.grad_scale != 0:
                factor = div(1.0, read(q.grad_scale, tl.float32).to(tl.float64))
            norm = sqrt(sum_with) * factor
        store(decision + DECISION_NORM, norm, tl.float64)
        store(decision + DECISION_NORM32, norm, tl.float32)
        max_norm = double_of(q.max_norm)
        if max_norm >= 0.0:  # as torch.nn.utils.clip_grad_norm_ does, NaN included
            coefficient = div(max_norm, norm + 1e-6)
            factor = tl.where(coefficient > 1.0, factor, factor * coefficient)
        store(decision + DECISION_FACTOR64, factor, tl.float64)
        store(decision + DECISION_FACTOR32, factor, tl.float32)


@device
def fold(sums, COUNT: tl.constexpr):
    """Folds the classes of so many blocks by halves.

    The order in which a reduction combines numbers is Triton's to choose, but of two there is one.
    """
    for k in tl.static_range(HALVINGS):
        halves = tl.reshape(sums, (COUNT, 2, NORM_CLASSES >> (k + 1)))
        sums = tl.reduce(halves, 1, tl.standard._sum_combine)
    return tl.reshape(sums, (COUNT,))


@device
def add_square(sums, x):
    """Adds squares to sums in double."""
    wide = x.to(tl.float64)
    return sums + wide * wide


@device
def sum_blocks(
    row, layout, begin, done, count, whole, weight, to, BLOCKS: tl.constexpr, K: tl.constexpr
):
    """Sums BLOCKS blocks of a row, `done` elements into a chunk of `count`.

    If there is more than one, they are aligned, and those that begin before `whole` are whole; of a
    single one the elements from `count` on are missing.
    """
    ALIGNED: tl.constexpr = BLOCKS > 1
    TURNS: tl.constexpr = NORM_BLOCK // NORM_CLASSES
    has_grad = has(row, GRAD)
    accumulates = has(row, ACCUMULATOR)
    blocks = tl.arange(0, BLOCKS)
    starts = done + blocks * NORM_BLOCK
    # Elements that are missing are 0, and make no difference to a sum. All of a thread's are asked
    # for before the first is needed.
    there = ()
    grads = ()
    accumulators = ()
    for turn in tl.static_range(TURNS):
        classes = tl.arange(0, NORM_CLASSES) + turn * NORM_CLASSES
        i = tl.expand_dims(starts, 1) + tl.expand_dims(classes, 0)
        if ALIGNED:
            mask = tl.expand_dims(starts < whole, 1)
            at = place(row, begin, True, GRAD, K) + i
            to_sum = place(row, begin, True, ACCUMULATOR, K) + i
        else:
            mask = i < count
            at = place(row, element_of(layout, begin + i, GRAD), False, GRAD, K)
            i = element_of(layout, begin + i, ACCUMULATOR)
            to_sum = place(row, i, False, ACCUMULATOR, K)
        there = there + (mask,)
        grads = grads + (tl.load(at, mask=mask & has_grad, other=0.0),)
        accumulators = accumulators + (to_sum,)
    with_grads = tl.full((BLOCKS, NORM_CLASSES), 0.0, tl.float64)
    without = tl.full((BLOCKS,), 0.0, tl.float64)
    if accumulates:
        sums = ()
        for a in tl.static_range(TURNS):
            sums = sums + (tl.load(accumulators[a], mask=there[a], other=0.0),)
        alone = tl.full((BLOCKS, NORM_CLASSES), 0.0, tl.float64)
        for b in tl.static_range(TURNS):
            grad = sums[b] + widen(grads[b], K.compute) * weight
            grad = tl.where(there[b] & has_grad, grad, sums[b])
            with_grads = add_square(with_grads, grad)
            alone = add_square(alone, sums[b])
        without = fold(alone, BLOCKS)
    else:
        for c in tl.static_range(TURNS):
            with_grads = add_square(with_grads, widen(grads[c], K.compute))
    to = (to + (begin + done) // NORM_BLOCK * SUMS_BYTES).to(tl.pointer_type(tl.float64))
    end = whole if ALIGNED else count
    tl.store(to + 2 * blocks, fold(with_grads, BLOCKS), mask=starts < end)
    tl.store(to + 2 * blocks + 1, without, mask=starts < end)


@device
def sum_chunk(rows, piece, layouts, blocks, weight, K: tl.constexpr):
    """Sums the blocks of a piece of a row."""
    GRAD_SIZE: tl.constexpr = K.grad.primitive_bitwidth // 8
    SIZE: tl.constexpr = K.compute.primitive_bitwidth // 8
    BLOCKS: tl.constexpr = K.blocks
    STEP: tl.constexpr = NORM_BLOCK * BLOCKS
    row = row_of(rows, piece)
    begin = read(piece, tl.int64)
    count = read(piece + CHUNK_COUNT, tl.int32)
    layout = layout_of(row, layouts)
    to = blocks + read(row + ROW_NORM_BLOCK, tl.int64) * SUMS_BYTES
    # What is not aligned as it should be is some remainder's; an array that is not there does not
    # matter, as chunks begin with a block.
    odd = (address(row, GRAD) + begin * GRAD_SIZE) % ACCESS_BYTES
    odd += (address(row, ACCUMULATOR) + begin * SIZE) % ACCESS_BYTES
    whole = tl.where((layout == 0) & (odd == 0), count // NORM_BLOCK * NORM_BLOCK, 0)
    for done in range(0, whole, STEP):
        sum_blocks(row, layout, begin, done, count, whole, weight, to, BLOCKS, K)
    for done in range(whole, count, NORM_BLOCK):
        sum_blocks(row, layout, begin, done, count, whole, weight, to, 1, K)


@device
def finish_norm(blocks, block_count, total, decision, decides, q):
    """The sums of all blocks of the norm, and what follows from them."""
    sum_with = tl.full((NORM_CLASSES,), 0.0, tl.float64)
    sum_without = tl.full((NORM_CLASSES,), 0.0, tl.float64)
    for begin in range(0, block_count, LOADS_AT_ONCE * NORM_CLASSES):
        # All are asked for before the first is needed: who waited for each would wait long.
        numbers = ()
        for k in tl.static_range(LOADS_AT_ONCE):
            i = tl.arange(0, NORM_CLASSES).to(tl.int64) + k * NORM_CLASSES + begin
            at = (blocks + i * SUMS_BYTES).to(tl.pointer_type(tl.float64))
            there = i < block_count
            # Other programs wrote them: not from a cache that may have older ones.
            numbers = numbers + (
                tl.load(at, mask=there, other=0.0, cache_modifier=".cg"),
                tl.load(at + 1, mask=there, other=0.0, cache_modifier=".cg"),
            )
        for m in tl.static_range(LOADS_AT_ONCE):
            sum_with = sum_with + numbers[2 * m]
            sum_without = sum_without + numbers[2 * m + 1]
    ROW: tl.constexpr = (1, NORM_CLASSES)
    with_grads = tl.reduce(fold(tl.reshape(sum_with, ROW), 1), 0, tl.standard._sum_combine)
    without = tl.reduce(fold(tl.reshape(sum_without, ROW), 1), 0, tl.standard._sum_combine)
    if total != 0:
        store(total, with_grads, tl.float64)
        store(total + 8, without, tl.float64)
    if decides != 0:
        decide(q, with_grads, without, decision)


@triton.jit
def fusedopt_norm(
    rows,
    chunks,
    layouts,
    chunk_count,
    blocks,
    block_count,
    total,
    decision,
    last,
    decides,
    purpose,
    check,
    mean,
    grads,
    max_norm,
    weight,
    live_weight,
    grad_scale,
    found_inf,
    K: tl.constexpr,
):
    """Sums the squares of a table's gradients, over the grid of the updates.

    The last program to end of a norm's last launch adds up what all wrote. It is known by the
    decision's ticket, which every program draws after all of its threads have stored their sums.
    """
    q = DecisionInputs(
        purpose, check, mean, grads, max_norm, weight, live_weight, grad_scale, found_inf
    )
    factor = weight_in(q).to(K.compute)
    for c in range(tl.program_id(0).to(tl.int64), chunk_count, tl.num_programs(0)):
        sum_chunk(rows, chunks + c * CHUNK_BYTES, layouts, blocks, factor, K)
    if last != 0:
        tl.debug_barrier()
        tickets = (decision + DECISION_TICKET).to(tl.pointer_type(tl.int32))
        ticket = tl.atomic_add(tickets, 1, sem="acq_rel")
        if ticket == tl.num_programs(0) - 1:
            tl.store(tickets, 0)
            finish_norm(blocks, block_count, total, decision, decides, q)


@device
def accumulate_places(grads, accumulators, mask, take, zeroes, weight, K: tl.constexpr):
    """Adds the gradients at these places to the accumulators."""
    if take:
        grad = widen(tl.load(grads, mask=mask), K.compute)
        tl.store(accumulators, tl.load(accumulators, mask=mask) + grad * weight, mask=mask)
    if zeroes:
        store_zeros(grads, mask, K.grad)


@device
def accumulate_chunk(rows, piece, layouts, decision, zero_grads, K: tl.constexpr):
    """Adds the gradients of a piece of a row to its accumulators."""
    WIDTH: tl.constexpr = K.width
    BLOCK: tl.constexpr = K.block
    EACH: tl.constexpr = K.threads
    GRAD_SIZE: tl.constexpr = K.grad.primitive_bitwidth // 8
    SIZE: tl.constexpr = K.compute.primitive_bitwidth // 8
    row = row_of(rows, piece)
    if has(row, GRAD):
        begin = read(piece, tl.int64)
        count = read(piece + CHUNK_COUNT, tl.int32)
        layout = layout_of(row, layouts)
        take = read(decision + DECISION_TAKE, tl.int32) != 0
        zeroes = zero_grads != 0
        weight = of_decision(decision, DECISION_IN64, DECISION_IN32, K.compute)
        odd = (address(row, GRAD) + begin * GRAD_SIZE) % ACCESS_BYTES
        odd += (address(row, ACCUMULATOR) + begin * SIZE) % ACCESS_BYTES
        aligned = tl.where((layout == 0) & (odd == 0), count // WIDTH, 0) * WIDTH
        grads = place(row, begin, True, GRAD, K)
        accumulators = place(row, begin, True, ACCUMULATOR, K)
        for done in range(0, aligned, BLOCK):
            i = done + tl.arange(0, BLOCK)
            accumulate_places(grads + i, accumulators + i, i < aligned, take, zeroes, weight, K)
        for done in range(aligned, count, EACH):
            i = done + tl.arange(0, EACH)
            at = element_of(layout, begin + i, GRAD)
            others = place(row, at, False, GRAD, K)
            at = element_of(layout, begin + i, ACCUMULATOR)
            sums = place(row, at, False, ACCUMULATOR, K)
            accumulate_places(others, sums, i < count, take, zeroes, weight, K)


@triton.jit
def fusedopt_accumulate(rows, chunks, layouts, chunk_count, decision, zero_grads, K: tl.constexpr):
    """Adds a table's gradients to its accumulators, over the grid of the updates."""
    for c in range(tl.program_id(0).to(tl.int64), chunk_count, tl.num_programs(0)):
        accumulate_chunk(rows, chunks + c * CHUNK_BYTES, layouts, decision, zero_grads, K)
