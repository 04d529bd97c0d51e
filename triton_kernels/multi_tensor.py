"""The kernels: one template of an update over a table, one of what prepares its scalars.

What lies where in a table is in `layout`. All arguments but the last are plain 64-bit integers,
addresses among them, so that no value of them makes another kernel.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from .layout import (
    ACCESS_BYTES,
    ACCUMULATOR,
    AVERAGE,
    CHUNK_BYTES,
    CHUNK_COUNT,
    CHUNK_ROW,
    DECISION_EMA_DECAY32,
    DECISION_EMA_DECAY64,
    DECISION_EMA_REST32,
    DECISION_EMA_REST64,
    DECISION_FACTOR32,
    DECISION_FACTOR64,
    DECISION_IN32,
    DECISION_IN64,
    DECISION_SKIP,
    DECISION_TAKE,
    GRAD,
    HYPER_BYTES,
    HYPER_GRAD_FACTOR,
    LAYOUT_ARRAY,
    LAYOUT_BYTES,
    LAYOUT_SIZES,
    LAYOUT_STRIDES,
    NUMBER_BYTES,
    NUMBER_DOUBLE,
    NUMBER_FLOAT,
    NUMBER_KIND,
    PREPARE_BYTES,
    PREPARE_HYPER,
    ROW_BYTES,
    ROW_HEAD,
    ROW_LAYOUT,
    ROW_SLOT,
    ROW_WIDTH,
    SCALAR_STATES,
)
from .math import device, narrow, widen

THREADS = 256  # of a program; as in csrc/device/table.h: chunks are cut for it


@dataclass(frozen=True)
class Update:
    """What an update kernel is compiled for.

    Attributes:
        rule: A rule's `update`.
        scalars: Its `Scalars`.
        variant: The flags that change its formula.
        states: How many states a row has.
        param: Storage type of the parameter; `grad` and `state` likewise.
        threads: Elements of the narrowest type that a program takes at a time, over its width.
    """

    rule: object
    scalars: type
    variant: tl.constexpr
    states: int
    param: tl.dtype
    grad: tl.dtype
    state: tl.dtype
    threads: int = THREADS

    @property
    def compute(self) -> tl.dtype:
        """The type of the arithmetic."""
        return tl.float64 if self.param == tl.float64 else tl.float32

    @property
    def width(self) -> int:
        """Elements that a thread takes at a time where it can, as `vector_width` has it."""
        bits = min(dtype.primitive_bitwidth for dtype in (self.param, self.grad, self.state))
        return ACCESS_BYTES.value * 8 // bits

    @property
    def block(self) -> int:
        """Elements that a program takes at a time."""
        return self.threads * self.width

    @property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows the kernel by."""
        rule = getattr(self.rule, "cache_key", "")
        types = (self.param, self.grad, self.state)
        return f"{rule} {self.scalars._fields} {self.variant} {self.states} {types} {self.block}"


@dataclass(frozen=True)
class Prepare:
    """What a prepare kernel is compiled for: a rule's `prepare` and types, and the arithmetic's."""

    rule: object
    hyper: type
    scalars: type
    compute: tl.dtype

    @property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows the kernel by."""
        rule = getattr(self.rule, "cache_key", "")
        return f"{rule} {self.hyper._fields} {self.scalars._fields} {self.compute}"


@device
def read(at, T: tl.constexpr):
    """The number at an address."""
    return tl.load(at.to(tl.pointer_type(T)))


@device
def read_scalars(slot, K: tl.constexpr):
    """A slot's scalars, which follow its gradient factor."""
    SIZE: tl.constexpr = K.compute.primitive_bitwidth // 8
    COUNT: tl.constexpr = len(K.scalars._fields)
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (read(slot + (1 + k) * SIZE, K.compute),)
    return K.scalars(*values)


@device
def of_decision(decision, AT64: tl.constexpr, AT32: tl.constexpr, COMPUTE: tl.constexpr):
    """A decision's number in the type of the arithmetic."""
    AT: tl.constexpr = AT64 if COMPUTE == tl.float64 else AT32
    return read(decision + AT, COMPUTE)


@device
def address(row, ARRAY: tl.constexpr):
    """Of a row's array; 0 where the row has none."""
    return read(row + 8 * ARRAY, tl.int64)


@device
def has(row, ARRAY: tl.constexpr):
    """Whether a row has an array.

    The interpreter knows a comparison by the type of what was compared, and could not combine it
    with a block's if it were not made a plain bool here.
    """
    return tl.full((), 1, tl.int1) & (address(row, ARRAY) != 0)


@device
def place(row, at, ALIGNED: tl.constexpr, ARRAY: tl.constexpr, K: tl.constexpr):
    """Where element `at` of an array lies.

    The hint that it is aligned has to be given here, to the conversion: up to 3.8, Triton loses one
    on a sum of a pointer and an offset, or on what a function returns.
    """
    T: tl.constexpr = (
        K.param
        if ARRAY == 0
        else (K.grad if ARRAY == GRAD else (K.compute if ARRAY >= ACCUMULATOR else K.state))
    )
    SIZE: tl.constexpr = T.primitive_bitwidth // 8
    pointer = (address(row, ARRAY) + at * SIZE).to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, ACCESS_BYTES)
    return pointer


@device
def row_of(rows, chunk):
    """The row that a chunk is a piece of."""
    return rows + read(chunk + CHUNK_ROW, tl.int32).to(tl.int64) * ROW_BYTES


@device
def layout_of(row, layouts):
    """A row's layout; 0 where all arrays run through memory in one order."""
    index = read(row + ROW_LAYOUT, tl.int32).to(tl.int64)
    return tl.where(index < 0, 0, layouts + index * LAYOUT_BYTES)


@device
def dims_of(layout):
    """A layout's dimensions: none without one."""
    dims = tl.full((), 0, tl.int32)
    if layout != 0:
        dims = read(layout, tl.int32)
    return dims


@device
def element_of(layout, i, ARRAY: tl.constexpr):
    """Where the i-th element of an array lies, whatever the row's layout."""
    at = i * 0
    dims = dims_of(layout)
    for d in range(dims):
        dim = layout + 8 * (dims - 1 - d)
        size = read(dim + LAYOUT_SIZES, tl.int64)
        at = at + i % size * read(dim + LAYOUT_STRIDES + LAYOUT_ARRAY * ARRAY, tl.int64)
        i = i // size
    # What is left is the offset itself in a row without a layout, and 0 in one with.
    return at + i


@device
def store_zeros(places, mask, T: tl.constexpr):
    """Clears elements."""
    tl.store(places, narrow(tl.full(places.shape, 0.0, tl.float32), T), mask=mask)


@device
def clear(places, mask, T: tl.constexpr, K: tl.constexpr):
    """Clears elements that were read here.

    Triton has a thread read as many elements of all arrays, but write what one access moves, so of
    the wider types it may be another thread that clears an element: it must not come first.
    """
    EACH: tl.constexpr = places.shape[0] // K.threads
    if EACH * T.primitive_bitwidth > 8 * ACCESS_BYTES:
        tl.debug_barrier()
    store_zeros(places, mask, T)


class Chunk(NamedTuple):
    """What an update needs of its chunk besides the places: numbers, addresses, and yes or no."""

    factor: tl.tensor  # that gradients are multiplied by
    decision: tl.tensor
    take: tl.tensor  # gradients are read
    accumulates: tl.tensor  # there is an accumulator
    averages: tl.tensor  # there is an average
    zeroes: tl.tensor  # gradients are cleared
    writes: tl.tensor  # gradients are multiplied by the decision's factor, for good


@device
def update_places(places, mask, chunk, s, K: tl.constexpr):
    """Updates the elements at these places of the rule's arrays, the accumulator and the average.

    What a chunk asks for is the same for all of its elements, so branches on it cost next to
    nothing. Memory of an array that the row does not have is not touched.
    """
    STATES: tl.constexpr = K.states
    COMPUTE: tl.constexpr = K.compute
    taken = chunk.take
    if mask is not None:
        taken = mask & taken
    param = widen(tl.load(places[0], mask=mask), COMPUTE)
    grad = widen(tl.load(places[1], mask=taken, other=0.0), COMPUTE)
    state = ()
    for k in tl.static_range(STATES):
        state = state + (widen(tl.load(places[2 + k], mask=mask), COMPUTE),)
    if chunk.writes:
        decided = of_decision(chunk.decision, DECISION_FACTOR64, DECISION_FACTOR32, COMPUTE)
        tl.store(places[1], narrow(grad * decided, K.grad), mask=mask)
    if chunk.accumulates:
        sum = tl.load(places[2 + STATES], mask=mask)
        weight = of_decision(chunk.decision, DECISION_IN64, DECISION_IN32, COMPUTE)
        grad = tl.where(chunk.take, sum + grad * weight, sum)
        clear(places[2 + STATES], mask, COMPUTE, K)
    param, state = K.rule(param, grad * chunk.factor, state, s, K.variant)
    stored = narrow(param, K.param)
    tl.store(places[0], stored, mask=mask)
    for k in tl.static_range(STATES):
        tl.store(places[2 + k], narrow(state[k], K.state), mask=mask)
    if chunk.averages:
        average = tl.load(places[3 + STATES], mask=mask)
        decay = of_decision(chunk.decision, DECISION_EMA_DECAY64, DECISION_EMA_DECAY32, COMPUTE)
        rest = of_decision(chunk.decision, DECISION_EMA_REST64, DECISION_EMA_REST32, COMPUTE)
        average = decay * average + rest * widen(stored, COMPUTE)
        tl.store(places[3 + STATES], average, mask=mask)
    if chunk.zeroes:
        clear(places[1], mask, K.grad, K)


@device
def update_aligned(row, first, count, chunk, s, K: tl.constexpr):
    """Updates `count` elements, a multiple of the width, from `first`, which is aligned, on.

    Triton moves 16 bytes at a time where it knows that the pointer is aligned, that the elements
    follow each other, and that the mask is the same for all of an access: `count` is a product
    with the width.
    """
    BLOCK: tl.constexpr = K.block
    ARRAYS: tl.constexpr = 2 + K.states
    pointers = ()
    for a in tl.static_range(ARRAYS):
        pointers = pointers + (place(row, first, True, a, K),)
    pointers = pointers + (place(row, first, True, ACCUMULATOR, K),)
    pointers = pointers + (place(row, first, True, AVERAGE, K),)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        places = ()
        for b in tl.static_range(ARRAYS + 2):
            places = places + (pointers[b] + i,)
        if begin + BLOCK <= count:
            update_places(places, None, chunk, s, K)
        else:
            update_places(places, i < count, chunk, s, K)


@device
def update_others(row, layout, begin, first, skipped, count, chunk, s, K: tl.constexpr):
    """Updates `count` elements from `begin` on, but `skipped` ones after the first `first`."""
    BLOCK: tl.constexpr = K.threads  # one a thread: nothing here can be moved together
    ARRAYS: tl.constexpr = 2 + K.states
    dims = dims_of(layout)
    for done in range(0, count, BLOCK):
        i = done + tl.arange(0, BLOCK)
        mask = i < count
        left = begin + tl.where(i < first, i, i + skipped)
        offsets = ()
        for _ in tl.static_range(ARRAYS + 2):
            offsets = offsets + (left * 0,)
        for d in range(dims):
            dim = layout + 8 * (dims - 1 - d)
            size = read(dim + LAYOUT_SIZES, tl.int64)
            index = left % size
            left = left // size
            strides = dim + LAYOUT_STRIDES
            moved = ()
            for b in tl.static_range(ARRAYS + 2):
                array = b if b < ARRAYS else b - ARRAYS + ACCUMULATOR
                stride = read(strides + LAYOUT_ARRAY * array, tl.int64)
                moved = moved + (offsets[b] + index * stride,)
            offsets = moved
        # What is left is the offset itself in a row without a layout, and 0 in one with.
        places = ()
        for c in tl.static_range(ARRAYS):
            places = places + (place(row, offsets[c] + left, False, c, K),)
        places = places + (place(row, offsets[ARRAYS] + left, False, ACCUMULATOR, K),)
        places = places + (place(row, offsets[ARRAYS + 1] + left, False, AVERAGE, K),)
        update_places(places, mask, chunk, s, K)


@device
def update_chunk(rows, piece, layouts, slots, decision, zero_grads, write_grads, K: tl.constexpr):
    """Updates a piece of a row."""
    WIDTH: tl.constexpr = K.width
    COMPUTE: tl.constexpr = K.compute
    SLOT_BYTES: tl.constexpr = (1 + len(K.scalars._fields)) * (COMPUTE.primitive_bitwidth // 8)
    row = row_of(rows, piece)
    has_grad = has(row, GRAD)
    accumulates = has(row, ACCUMULATOR)
    if has_grad | accumulates:
        begin = read(piece, tl.int64)
        count = read(piece + CHUNK_COUNT, tl.int32)
        slot = slots + read(row + ROW_SLOT, tl.int32).to(tl.int64) * SLOT_BYTES
        factor = read(slot, COMPUTE)
        s = read_scalars(slot, K)
        take = has_grad
        if decision != 0:
            factor = factor * of_decision(decision, DECISION_FACTOR64, DECISION_FACTOR32, COMPUTE)
            take = take & (read(decision + DECISION_TAKE, tl.int32) != 0)
        averages = has(row, AVERAGE)
        zeroes = has_grad & (zero_grads != 0)
        writes = take & (write_grads != 0)
        chunk = Chunk(factor, decision, take, accumulates, averages, zeroes, writes)
        layout = layout_of(row, layouts)
        # Elements before the aligned ones; all where there are none.
        first = count
        if (layout == 0) & (read(row + ROW_WIDTH, tl.int32) == WIDTH):
            first = tl.minimum(read(row + ROW_HEAD, tl.int32), count)
        aligned = (count - first) // WIDTH * WIDTH
        if aligned != 0:
            update_aligned(row, begin + first, aligned, chunk, s, K)
        update_others(row, layout, begin, first, aligned, count - aligned, chunk, s, K)


@device
def clear_chunk(rows, piece, layouts, zero_grads, K: tl.constexpr):
    """What a step that is skipped still does with a piece of a row."""
    BLOCK: tl.constexpr = K.threads
    row = row_of(rows, piece)
    zeroes = has(row, GRAD) & (zero_grads != 0)
    accumulates = has(row, ACCUMULATOR)
    begin = read(piece, tl.int64)
    count = read(piece + CHUNK_COUNT, tl.int32)
    layout = layout_of(row, layouts)
    for done in range(0, count, BLOCK):
        i = done + tl.arange(0, BLOCK)
        if zeroes:
            at = element_of(layout, begin + i, GRAD)
            store_zeros(place(row, at, False, GRAD, K), i < count, K.grad)
        if accumulates:
            at = element_of(layout, begin + i, ACCUMULATOR)
            store_zeros(place(row, at, False, ACCUMULATOR, K), i < count, K.compute)


@device
def skips(decision):
    """Whether nothing is updated."""
    skip = decision != 0
    if skip:
        skip = read(decision + DECISION_SKIP, tl.int32) != 0
    return skip


@triton.jit
def fusedopt_update(
    rows,
    chunks,
    layouts,
    slots,
    chunk_count,
    decision,
    zero_grads,
    write_grads,
    K: tl.constexpr,
):
    """Updates a table's rows. The grid is persistent: programs walk the chunks in address order.

    A step that is skipped still empties the accumulators, and clears gradients if asked to.
    """
    if not skips(decision):
        for c in range(tl.program_id(0).to(tl.int64), chunk_count, tl.num_programs(0)):
            piece = chunks + c * CHUNK_BYTES
            update_chunk(rows, piece, layouts, slots, decision, zero_grads, write_grads, K)
    elif (zero_grads != 0) | (decision != 0):
        for c in range(tl.program_id(0).to(tl.int64), chunk_count, tl.num_programs(0)):
            clear_chunk(rows, chunks + c * CHUNK_BYTES, layouts, zero_grads, K)


@device
def read_number(number):
    """A DeviceNumber's value, in double."""
    kind = read(number + NUMBER_KIND, tl.int64)
    value = read(number, tl.float64)
    if kind == NUMBER_DOUBLE:
        value = read(read(number, tl.int64), tl.float64)
    elif kind == NUMBER_FLOAT:
        value = read(read(number, tl.int64), tl.float32).to(tl.float64)
    return value


@device
def write_number(number, value):
    """Gives a DeviceNumber another value, unless it is the host's."""
    kind = read(number + NUMBER_KIND, tl.int64)
    at = read(number, tl.int64)
    if kind == NUMBER_DOUBLE:
        tl.store(at.to(tl.pointer_type(tl.float64)), value)
    elif kind == NUMBER_FLOAT:
        tl.store(at.to(tl.pointer_type(tl.float32)), value.to(tl.float32))


@device
def read_hyper(hyper, K: tl.constexpr):
    """A group's hyperparameters; those that are device tensors are read there."""
    COUNT: tl.constexpr = len(K.hyper._fields)
    values = ()
    for h in tl.static_range(COUNT):
        values = values + (read_number(hyper + NUMBER_BYTES * h),)
    return K.hyper(*values)


@device
def prepare_slot(slot, hyper, to, K: tl.constexpr):
    """Computes a slot's scalars, and advances the scalar states that lie on the device."""
    COMPUTE: tl.constexpr = K.compute
    COUNT: tl.constexpr = len(K.scalars._fields)
    states = ()
    for a in tl.static_range(SCALAR_STATES):
        states = states + (read_number(slot + NUMBER_BYTES * a),)
    scalars, states = K.rule(read_hyper(hyper, K), states)
    for b in tl.static_range(len(states)):
        write_number(slot + NUMBER_BYTES * b, states[b])
    to = to.to(tl.pointer_type(COMPUTE))
    tl.store(to, read(hyper + HYPER_GRAD_FACTOR, tl.float64).to(COMPUTE))
    for k in tl.static_range(COUNT):
        tl.store(to + 1 + k, scalars[k].to(COMPUTE))


@triton.jit
def fusedopt_update_prepare(slots, hypers, to, decision, K: tl.constexpr):
    """Fills the slots of an update, one a program, each one thread's work.

    The scalar states that it reads it also writes, which needs no barrier as long as a
    program is one warp: of the threads that compute the same, Triton has one alone store.
    """
    SLOT_BYTES: tl.constexpr = (1 + len(K.scalars._fields)) * (K.compute.primitive_bitwidth // 8)
    slot = slots + tl.program_id(0).to(tl.int64) * PREPARE_BYTES
    index = read(slot + PREPARE_HYPER, tl.int64)
    if not skips(decision) and index >= 0:
        to = to + tl.program_id(0).to(tl.int64) * SLOT_BYTES
        prepare_slot(slot, hypers + index * HYPER_BYTES, to, K)
