"""The kernels: one template of an update over a table, one of what prepares its scalars.

A table is the byte image that ``csrc/cuda/image.h`` makes; the offsets below are those of the
structs in ``csrc/cuda/table.h`` and ``csrc/cuda/prepare.h``. All arguments but the last are plain
64-bit integers, addresses among them, so that no value of them makes another kernel.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .math import device, div, narrow, widen

# DeviceRow. Pointers: parameter, gradient, states.
ROW_BYTES = tl.constexpr(56)
ROW_GRAD = tl.constexpr(8)
ROW_SLOT = tl.constexpr(40)
ROW_LAYOUT = tl.constexpr(44)
ROW_WIDTH = tl.constexpr(48)
ROW_HEAD = tl.constexpr(52)
# DeviceChunk, which begins with `begin`.
CHUNK_BYTES = tl.constexpr(16)
CHUNK_COUNT = tl.constexpr(8)
CHUNK_ROW = tl.constexpr(12)
# DeviceLayout, which begins with `dims`: kMaxDims sizes, and as many strides an array.
LAYOUT_BYTES = tl.constexpr(3080)
LAYOUT_SIZES = tl.constexpr(8)
LAYOUT_STRIDES = tl.constexpr(520)
LAYOUT_ARRAY = tl.constexpr(512)
# PrepareSlot, which begins with `step`.
PREPARE_BYTES = tl.constexpr(40)
PREPARE_HOST_STEP = tl.constexpr(16)
PREPARE_FIRST = tl.constexpr(24)
PREPARE_HOST_FIRST = tl.constexpr(32)
PREPARE_HYPER = tl.constexpr(36)
# DeviceHyper, which begins with `values`.
HYPER_BYTES = tl.constexpr(200)
HYPER_LIVE = tl.constexpr(64)
HYPER_GRAD_FACTOR = tl.constexpr(192)
NUMBER_BYTES = tl.constexpr(16)
NUMBER_IS_DOUBLE = tl.constexpr(8)

ACCESS_BYTES = tl.constexpr(16)  # what an access moves at most
THREADS = 256  # of a program; as in csrc/cuda/body.h, whose chunks are cut for it


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
def read(address, T: tl.constexpr):
    """The number at an address."""
    return tl.load(address.to(tl.pointer_type(T)))


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
def place(row, at, ALIGNED: tl.constexpr, ARRAY: tl.constexpr, K: tl.constexpr):
    """Where element `at` of an array lies: 0 is the parameter, 1 the gradient, 2 and up states.

    The hint that it is aligned has to be given here, to the conversion: up to 3.8, Triton loses one
    on a sum of a pointer and an offset, or on what a function returns.
    """
    T: tl.constexpr = K.param if ARRAY == 0 else (K.grad if ARRAY == 1 else K.state)
    SIZE: tl.constexpr = T.primitive_bitwidth // 8
    pointer = (read(row + 8 * ARRAY, tl.int64) + at * SIZE).to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, ACCESS_BYTES)
    return pointer


@device
def update_places(places, mask, grad_scale, factor, s, K: tl.constexpr):
    """Updates the elements at these places of the parameter, the gradient and the states."""
    STATES: tl.constexpr = K.states
    COMPUTE: tl.constexpr = K.compute
    param = widen(tl.load(places[0], mask=mask), COMPUTE)
    grad = widen(tl.load(places[1], mask=mask), COMPUTE)
    state = ()
    for k in tl.static_range(STATES):
        state = state + (widen(tl.load(places[2 + k], mask=mask), COMPUTE),)
    if grad_scale != 0:
        grad = div(grad, read(grad_scale, tl.float32).to(COMPUTE))
        tl.store(places[1], narrow(grad, K.grad), mask=mask)
    param, state = K.rule(param, grad * factor, state, s, K.variant)
    tl.store(places[0], narrow(param, K.param), mask=mask)
    for k in tl.static_range(STATES):
        tl.store(places[2 + k], narrow(state[k], K.state), mask=mask)


@device
def update_aligned(row, first, count, grad_scale, factor, s, K: tl.constexpr):
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
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        places = ()
        for b in tl.static_range(ARRAYS):
            places = places + (pointers[b] + i,)
        if begin + BLOCK <= count:
            update_places(places, None, grad_scale, factor, s, K)
        else:
            update_places(places, i < count, grad_scale, factor, s, K)


@device
def update_others(
    row, layout, begin, first, skipped, count, grad_scale, factor, s, K: tl.constexpr
):
    """Updates `count` elements from `begin` on, but `skipped` ones after the first `first`."""
    BLOCK: tl.constexpr = K.threads  # one a thread: nothing here can be moved together
    ARRAYS: tl.constexpr = 2 + K.states
    dims = tl.full((), 0, tl.int32)
    if layout != 0:
        dims = read(layout, tl.int32)
    for done in range(0, count, BLOCK):
        i = done + tl.arange(0, BLOCK)
        mask = i < count
        left = begin + tl.where(i < first, i, i + skipped)
        offsets = ()
        for _ in tl.static_range(ARRAYS):
            offsets = offsets + (left * 0,)
        for d in range(dims):
            dim = layout + 8 * (dims - 1 - d)
            size = read(dim + LAYOUT_SIZES, tl.int64)
            index = left % size
            left = left // size
            moved = ()
            for b in tl.static_range(ARRAYS):
                stride = read(dim + LAYOUT_STRIDES + LAYOUT_ARRAY * b, tl.int64)
                moved = moved + (offsets[b] + index * stride,)
            offsets = moved
        # What is left is the offset itself in a row without a layout, and 0 in one with.
        places = ()
        for c in tl.static_range(ARRAYS):
            places = places + (place(row, offsets[c] + left, False, c, K),)
        update_places(places, mask, grad_scale, factor, s, K)


@device
def update_chunk(rows, chunk, layouts, slots, grad_scale, K: tl.constexpr):
    """Updates a piece of a row."""
    WIDTH: tl.constexpr = K.width
    SIZE: tl.constexpr = K.compute.primitive_bitwidth // 8
    SLOT_BYTES: tl.constexpr = (1 + len(K.scalars._fields)) * SIZE
    row = rows + read(chunk + CHUNK_ROW, tl.int32).to(tl.int64) * ROW_BYTES
    if read(row + ROW_GRAD, tl.int64) != 0:
        begin = read(chunk, tl.int64)
        count = read(chunk + CHUNK_COUNT, tl.int32)
        slot = slots + read(row + ROW_SLOT, tl.int32).to(tl.int64) * SLOT_BYTES
        factor = read(slot, K.compute)
        s = read_scalars(slot, K)
        index = read(row + ROW_LAYOUT, tl.int32).to(tl.int64)
        layout = tl.where(index < 0, 0, layouts + index * LAYOUT_BYTES)
        # Elements before the aligned ones; all where there are none.
        first = count
        if (index < 0) & (read(row + ROW_WIDTH, tl.int32) == WIDTH):
            first = tl.minimum(read(row + ROW_HEAD, tl.int32), count)
        aligned = (count - first) // WIDTH * WIDTH
        if aligned != 0:
            update_aligned(row, begin + first, aligned, grad_scale, factor, s, K)
        update_others(row, layout, begin, first, aligned, count - aligned, grad_scale, factor, s, K)


@device
def overflowed(found_inf):
    """Whether GradScaler found that the step must not take place."""
    found = found_inf != 0
    if found:
        found = read(found_inf, tl.float32) != 0
    return found


@triton.jit
def fusedopt_update(
    rows, chunks, layouts, slots, chunk_count, grad_scale, found_inf, K: tl.constexpr
):
    """Updates a table's rows. The grid is persistent: programs walk the chunks in address order."""
    if not overflowed(found_inf):
        for c in range(tl.program_id(0).to(tl.int64), chunk_count, tl.num_programs(0)):
            update_chunk(rows, chunks + c * CHUNK_BYTES, layouts, slots, grad_scale, K)


@device
def read_number(number):
    """A DeviceNumber's value, in double."""
    address = read(number, tl.int64)
    if read(number + NUMBER_IS_DOUBLE, tl.int64) != 0:
        value = read(address, tl.float64)
    else:
        value = read(address, tl.float32).to(tl.float64)
    return value


@device
def count_step(number):
    """Adds one to a DeviceNumber; its new value, in double."""
    value = read_number(number) + 1.0
    address = read(number, tl.int64)
    if read(number + NUMBER_IS_DOUBLE, tl.int64) != 0:
        tl.store(address.to(tl.pointer_type(tl.float64)), value)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)), value.to(tl.float32))
    return value


@device
def read_hyper(hyper, K: tl.constexpr):
    """A group's hyperparameters; those that are device tensors are read there."""
    COUNT: tl.constexpr = len(K.hyper._fields)
    values = ()
    for h in tl.static_range(COUNT):
        value = read(hyper + 8 * h, tl.float64)
        live = hyper + HYPER_LIVE + NUMBER_BYTES * h
        if read(live, tl.int64) != 0:
            value = read_number(live)
        values = values + (value,)
    return K.hyper(*values)


@device
def prepare_slot(slot, hyper, to, K: tl.constexpr):
    """Computes a slot's scalars, and counts the step where that happens on the device."""
    COMPUTE: tl.constexpr = K.compute
    COUNT: tl.constexpr = len(K.scalars._fields)
    step = read(slot + PREPARE_HOST_STEP, tl.float64)
    if read(slot, tl.int64) != 0:
        step = count_step(slot)
    first = read(slot + PREPARE_HOST_FIRST, tl.int32)
    at = read(slot + PREPARE_FIRST, tl.int64)
    if at != 0:
        first = read(at, tl.int32)
        tl.store(at.to(tl.pointer_type(tl.int32)), 0)
    scalars = K.rule(read_hyper(hyper, K), step, first != 0)
    to = to.to(tl.pointer_type(COMPUTE))
    tl.store(to, read(hyper + HYPER_GRAD_FACTOR, tl.float64).to(COMPUTE))
    for k in tl.static_range(COUNT):
        tl.store(to + 1 + k, scalars[k].to(COMPUTE))


@triton.jit
def fusedopt_update_prepare(slots, hypers, to, found_inf, K: tl.constexpr):
    """Fills the slots of an update, one a program, each one thread's work.

    The step counts and flags that it reads it also writes, which needs no barrier as long as a
    program is one warp: of the threads that compute the same, Triton has one alone store.
    """
    SLOT_BYTES: tl.constexpr = (1 + len(K.scalars._fields)) * (K.compute.primitive_bitwidth // 8)
    slot = slots + tl.program_id(0).to(tl.int64) * PREPARE_BYTES
    index = read(slot + PREPARE_HYPER, tl.int32).to(tl.int64)
    if not overflowed(found_inf) and index >= 0:
        to = to + tl.program_id(0).to(tl.int64) * SLOT_BYTES
        prepare_slot(slot, hypers + index * HYPER_BYTES, to, K)
