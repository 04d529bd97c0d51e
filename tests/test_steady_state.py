"""What a long run needs: a step that allocates nothing, a plan that does not grow, flat memory."""

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

# The flags under which a rule keeps all the states it can have.
ALL_STATES = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "adam": {"amsgrad": True},
    "adamw": {"amsgrad": True},
}
SHAPES = [(), (5,), (33, 7), (4096,), (70_000,)]
PAGE = os.sysconf("SC_PAGE_SIZE")


def make_optimizer(case, dtype=torch.float32, shapes=SHAPES):
    params = make_params(shapes, dtype)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-4}]
    optimizer = case.fused()(groups, lr=1e-3, **ALL_STATES.get(case.name, {}))
    set_grads(params, 0)
    return params, optimizer


def operations(function):
    """Names and bytes of what torch ran and allocated (or freed, as negative bytes) meanwhile."""
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as recorded:
        function()
    return [
        (event.name, event.self_cpu_memory_usage)
        for event in recorded.events()
        if not event.name.startswith("Optimizer.step#")
    ]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_the_recorder_sees_operations_and_allocations():
    assert operations(lambda: torch.empty(77)) == [("aten::empty", 308), ("[memory]", -308)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_runs_no_operation_and_allocates_nothing(case, dtype):
    params, optimizer = make_optimizer(case, dtype)
    for _ in range(3):
        optimizer.step()

    def steps():
        for _ in range(5):
            optimizer.step()

    before = params[-1].detach().clone()
    assert operations(steps) == []
    assert not torch.equal(params[-1], before)


@pytest.mark.parametrize("keep_grads", [True, False], ids=["grads kept", "grads made anew"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plan_does_not_grow(case, keep_grads):
    params, optimizer = make_optimizer(case)
    optimizer.step()
    plan = optimizer._packed
    tables = plan.plan.describe()
    for step in range(50):
        optimizer.zero_grad(set_to_none=not keep_grads)
        if not keep_grads:
            set_grads(params, step)
        optimizer.step()
    assert optimizer._packed is plan
    assert plan.plan.describe() == tables
    assert tables[0]["rows"] == len(params)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_step_allocates_the_states_and_nothing_else(case):
    params, optimizer = make_optimizer(case)
    allocated = sum(bytes for _, bytes in operations(optimizer.step) if bytes > 0)
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    if case.name == "adagrad":  # torch's constructor creates its states, and so does ours
        assert allocated == 0
    else:
        assert allocated == sum(value.nbytes for value in states) >= sum(p.nbytes for p in params)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory_is_flat_over_ten_thousand_steps(case):
    """Tensors, Python objects and resident memory; gradients come and go as in training."""
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
    blocks, resident = sys.getallocatedblocks(), resident_bytes()
    steps(10_000)
    # Python's own pools and free lists move by some hundred blocks, the C++ heap by a huge page; a
    # leak of one object or of 400 bytes a step would be ten thousand blocks or 4 MB.
    assert sys.getallocatedblocks() - blocks < 1_000
    assert resident_bytes() - resident < 4_000_000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
            params = make_params([(500_000,)])
            optimizer = fusedopt.AdamW(params)
            set_grads(params, 0)
            optimizer.step()
        del params, optimizer
        gc.collect()

    build(10)
    blocks, resident = sys.getallocatedblocks(), resident_bytes()
    build(100)
    assert sys.getallocatedblocks() - blocks < 1_000
    assert resident_bytes() - resident < 8e6  # what a single optimizer holds
