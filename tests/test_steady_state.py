"""What a long run needs: a step that allocates nothing, a plan that does not grow, flat memory."""

import ctypes
import gc
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from cases import CASES
from harness import make_params, set_grads
from torch.profiler import ProfilerActivity, profile

import fusedopt
from fusedopt import _C

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = [(), (5,), (33, 7), (4096,), (70_000,)]
PAGE = os.sysconf("SC_PAGE_SIZE")
SLACK = 4_000_000  # resident memory moves by a huge page or two though nothing leaks
HEAP_SLACK = (
    100_000  # as does the C++ heap by caches of free blocks: ten bytes a step are this much
)
LIBC = ctypes.CDLL(None)


def all_states(case):
    """Keywords under which the rule keeps all the states it can have."""
    for sample in case.samples:
        kwargs = case.kwargs(sample)
        group = case.torch_class(make_params([(1,)]), **kwargs).param_groups[0]
        if set(_C.state_names(case.name, group)) == set(case.states):
            return {**kwargs, "lr": 1e-3}
    raise AssertionError(f"no sample of {case.name} in tests/cases.py has all of {case.states}")


def make_optimizer(case, dtype=torch.float32, shapes=SHAPES, optimizer_class=None):
    params = make_params(shapes, dtype)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-4}]
    optimizer = (optimizer_class or case.fused())(groups, **all_states(case))
    set_grads(params, 0)
    return params, optimizer


def recorded(function):
    """Every operation torch ran and every event of its allocators, in order, as (name, bytes).

    These are the raw records: in the profiler's summaries, memory allocated outside an operation is
    counted for the range around it, the step's own, and is nothing once it has been freed. One
    thread does all the work meanwhile, because a profiler sees only its own thread's memory.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        activities = [ProfilerActivity.CPU]
        with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
            function()
    finally:
        torch.set_num_threads(threads)
    events = [(e.name(), e.nbytes()) for e in profiler.profiler.kineto_results.events()]
    return [event for event in events if not event[0].startswith("Optimizer.")]


def allocations(function):
    """Bytes of each event of torch's allocators meanwhile; negative where memory was freed."""
    return [size for name, size in recorded(function) if name == "[memory]"]


def state_bytes(optimizer):
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


class Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`: what the C++ heap holds, resident or not."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


LIBC.mallinfo2.restype = Mallinfo2


def heap_bytes():
    """Bytes that malloc has given out and not taken back, tensors' storages among them."""
    info = LIBC.mallinfo2()
    return info.uordblks + info.hblkhd


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_growth(function):
    """How far resident memory rose, at its highest, above where it was."""
    LIBC.malloc_trim(0)  # what malloc has kept for later would hide what is taken
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    function()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before


def test_the_recorder_sees_operations_and_allocations():
    seen = [("aten::empty", 0), ("[memory]", 308), ("[memory]", -308)]
    assert recorded(lambda: torch.empty(77)) == seen


def test_the_recorder_sees_what_no_operation_allocates_inside_a_step():
    _, optimizer = make_optimizer(CASES[0])
    optimizer.step()
    kept = []
    optimizer.register_step_pre_hook(lambda *_: kept.append(torch.UntypedStorage(77)))
    assert recorded(optimizer.step) == [("[memory]", 77)]
    optimizer.register_step_post_hook(lambda *_: kept.pop())
    assert recorded(optimizer.step) == [("[memory]", 77), ("[memory]", -77)]


@EACH_DTYPE
@EACH_CASE
def test_a_step_runs_no_operation_and_allocates_nothing(case, dtype):
    params, optimizer = make_optimizer(case, dtype)
    for _ in range(3):
        optimizer.step()
    for _ in range(5):
        before = params[-1].detach().clone()
        for param in params:
            param.grad.neg_()
        assert recorded(optimizer.step) == []
        assert not torch.equal(params[-1], before)


@pytest.mark.parametrize("keep_grads", [True, False], ids=["grads kept", "grads made anew"])
@EACH_DTYPE
@EACH_CASE
def test_the_plan_does_not_grow(case, dtype, keep_grads):
    params, optimizer = make_optimizer(case, dtype)
    optimizer.step()
    packed, plan = optimizer._packed, optimizer._packed.plan
    tables = plan.describe()
    for step in range(50):
        if keep_grads:
            for param in params:
                param.grad.neg_()
        else:
            optimizer.zero_grad(set_to_none=True)
            set_grads(params, step)
        optimizer.step()
    assert optimizer._packed is packed
    assert packed.plan is plan
    assert plan.describe() == tables
    assert tables[0]["rows"] == len(params)


@EACH_DTYPE
@EACH_CASE
def test_the_first_step_allocates_torchs_states_and_nothing_else(case, dtype):
    """What the constructor creates (Adagrad's do) the step must not: both are compared."""
    _, ours = make_optimizer(case, dtype)
    _, torchs = make_optimizer(case, dtype, optimizer_class=case.torch_class)
    constructed = state_bytes(ours)
    assert constructed == state_bytes(torchs)
    events = allocations(ours.step)
    torchs.step()
    assert state_bytes(ours) == state_bytes(torchs) > 0
    assert sum(events) == state_bytes(ours) - constructed
    assert all(size > 0 for size in events)  # nothing was there for a while only


@EACH_CASE
def test_no_step_uses_memory_of_a_tensors_size(case):
    """Not from the C++ heap either."""
    assert peak_growth(lambda: torch.ones(10_000_000)) > 40_000_000 - SLACK
    make_optimizer(case)[1].step()  # the thread pool and the imports of a first step
    _, optimizer = make_optimizer(case, shapes=[(10_000_000,), (5,)])
    constructed = state_bytes(optimizer)
    first = peak_growth(optimizer.step)
    assert abs(first - (state_bytes(optimizer) - constructed)) < SLACK
    assert peak_growth(optimizer.step) < SLACK


@EACH_CASE
def test_memory_is_flat_over_ten_thousand_steps(case):
    """Tensors, Python objects and the C++ heap; gradients come and go as in training."""
    params, optimizer = make_optimizer(case, shapes=[(64,)] * 20 + [(3, 5)] * 20)

    def steps(count):
        for step in range(count):
            if step % 100 == 0:
                optimizer.zero_grad(set_to_none=True)
                set_grads(params, step)
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gc.collect()

    steps(1_000)
    blocks, heap = sys.getallocatedblocks(), heap_bytes()
    steps(10_000)
    # Python's own free lists move by some hundred blocks; one object a step is ten thousand.
    assert sys.getallocatedblocks() - blocks < 1_000
    assert heap_bytes() - heap < HEAP_SLACK


@EACH_CASE
def test_a_gradients_memory_is_freed_with_it(case):
    """Whoever held its storage without the tensor would not be seen by a weak reference to that."""
    params, optimizer = make_optimizer(case)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def train():
        set_grads(params, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    events = allocations(train)
    assert sum(size for size in events if size > 0) >= sum(param.nbytes for param in params)
    assert sum(events) == 0


@EACH_CASE
def test_nothing_outlives_its_owner(case):
    """Gradients, parameters, states and the plan go at once: no cycle waits for the collector."""
    make_optimizer(case)  # a process's first makes torch import, and those frames hold on to it
    params, optimizer = make_optimizer(case)
    gc.collect()
    gc.disable()
    try:
        optimizer.step()
        grads = [weakref.ref(param.grad) for param in params]
        optimizer.zero_grad(set_to_none=True)
        assert [grad() for grad in grads] == [None] * len(grads)
        states = [v for state in optimizer.state.values() for v in state.values()]
        watched = [*map(weakref.ref, [*params, *states]), weakref.ref(optimizer._packed)]
        del params, states, optimizer
        assert [owned() for owned in watched] == [None] * len(watched)
    finally:
        gc.enable()


def test_many_optimizers_leave_nothing_behind():
    """Plans own tables and references in C++: building and dropping them must balance."""

    def build(count):
        for _ in range(count):
            params = make_params([(50,)])
            optimizer = fusedopt.AdamW(params)
            set_grads(params, 0)
            optimizer.step()
        del params, optimizer
        gc.collect()

    build(10)
    blocks, heap = sys.getallocatedblocks(), heap_bytes()
    build(1_000)
    assert sys.getallocatedblocks() - blocks < 1_000
    assert heap_bytes() - heap < HEAP_SLACK  # a hundred bytes an optimizer
