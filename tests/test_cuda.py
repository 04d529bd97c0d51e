"""What only a GPU can show: no synchronisation, streams, devices, memory, sizes, torch's own steps.

What a GPU shares with its rehearsal on the host is in test_device.py.
"""

import contextlib
from copy import deepcopy

import pytest
import torch
from cases import CASES
from devices import Cuda, needs, needs_two_gpus
from harness import make_params, set_grads

import fusedopt
from fusedopt import _C, backends

EACH_BACKEND = [pytest.param(name, marks=needs(name)) for name in ("cuda", "triton")]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SHAPES = [(), (0,), (1,), (3, 5), (37,), (2, 3, 40), (70_001,)]
MIB = 2**20


@pytest.fixture(params=EACH_BACKEND)
def backend(request):
    return request.param


def settings(case):
    return {**case.stateful, "lr": 0.01}


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EACH_CASE
def test_the_steps_are_torchs(backend, case):
    ours, theirs = (make_params(SHAPES, device="cuda") for _ in range(2))
    kwargs = {**settings(case), "weight_decay": 0.1}
    optimizers = case.fused()(ours, backend=backend, **kwargs), case.torch_class(theirs, **kwargs)
    for step in range(5):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_grads(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@EACH_CASE
def test_a_bfloat16_step_is_torchs_in_float32_rounded_once(backend, case):
    """Step by step from the same values: torch's own bf16 step rounds all it computes."""
    ours = make_params(SHAPES, torch.bfloat16, device="cuda")
    theirs = [torch.nn.Parameter(param.detach().float()) for param in ours]
    # A power of two: where a decay cancels its gradient, an fma and two roundings agree.
    kwargs = {**settings(case), "weight_decay": 0.125}
    optimizer, reference = (
        case.fused()(ours, backend=backend, **kwargs),
        case.torch_class(theirs, **kwargs),
    )
    for step in range(5):
        set_grads(ours, step)
        for a, b in zip(ours, theirs, strict=True):
            b.data.copy_(a)
            b.grad = a.grad.float()
        reference.load_state_dict(deepcopy(optimizer.state_dict()))
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            assert_rounded(a, b)
            for name, value in optimizer.state[a].items():
                assert_rounded(value, reference.state[b][name])


def assert_rounded(stored, exact):
    """Half a unit of bf16's last place at most, beside what fp32 steps differ by."""
    half = 2.0**-8 if stored.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(stored.float(), exact, rtol=half + 2e-5, atol=2e-5)


@EACH_CASE
@pytest.mark.parametrize("kwargs", [{}, {"lr": torch.tensor(0.01)}], ids=["number", "lr tensor"])
def test_a_step_never_waits_for_the_device(backend, case, kwargs):
    kwargs = {**settings(case), **{k: v.cuda() for k, v in kwargs.items()}}
    params = make_params(SHAPES, device="cuda")
    optimizer = case.fused()(params, backend=backend, **kwargs)
    for step in range(4):
        set_grads(params, step)
        if step == 1:
            params[3].grad = None
        with no_synchronisation():
            optimizer.step()


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_a_scaled_step_never_waits_for_the_device(backend, rule):
    params = make_params(SHAPES, device="cuda")
    optimizer = getattr(fusedopt, rule)(params, lr=0.01, fused=True, backend=backend)
    for found in (1.0, 0.0, 1.0):
        set_grads(params, 0)
        optimizer.grad_scale = torch.full((), 4.0, device="cuda")
        optimizer.found_inf = torch.full((), found, device="cuda")
        with no_synchronisation():
            optimizer.step()


@EACH_CASE
def test_the_current_stream_is_used(backend, case):
    """The gradients arrive late on a stream of their own: a step on another would miss them."""
    results = []
    for stream in (None, torch.cuda.Stream()):
        params = make_params([(4096,)] * 3, device="cuda")
        optimizer = case.fused()(params, backend=backend, **settings(case))
        torch.cuda.synchronize()
        for step in range(3):
            with torch.cuda.stream(stream):
                late = [torch.zeros_like(param) for param in params]
                torch.cuda._sleep(20_000_000)
                set_grads(params, step)
                for param, grad in zip(params, late, strict=True):
                    grad.copy_(param.grad)
                    param.grad = grad
                optimizer.step()
        torch.cuda.synchronize()
        results.append([param.detach().clone() for param in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_two_gpus
@EACH_CASE
def test_two_devices_in_one_group(backend, case):
    shapes = [(37,), (5, 3), (4096,)]
    split = make_params(shapes, device="cuda:0")
    split[1] = torch.nn.Parameter(split[1].detach().to("cuda:1"))
    whole = make_params(shapes, device="cuda:0")
    with torch.cuda.device(1):  # what is current decides nothing
        optimizers = [case.fused()(p, backend=backend, **settings(case)) for p in (split, whole)]
        for step in range(3):
            for params, optimizer in zip((split, whole), optimizers, strict=True):
                set_grads(params, step)
                optimizer.step()
    assert [table["device"] for table in optimizers[0]._packed.plan.describe()] == [
        "cuda:0", "cuda:1",
    ]  # fmt: skip
    for a, b in zip(split, whole, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@needs("cuda")
def test_parameters_on_the_host_and_on_the_device():
    mixed = make_params([(37,), (5, 3)], device="cuda")
    mixed[1] = torch.nn.Parameter(mixed[1].detach().cpu())
    optimizer = fusedopt.AdamW(mixed)
    set_grads(mixed, 0)
    optimizer.step()
    assert [route.backend for route in optimizer.routes()] == ["cuda", "cpu"]
    twin = make_params([(37,), (5, 3)])
    other = fusedopt.AdamW(twin)
    set_grads(twin, 0)
    other.step()
    for a, b in zip(mixed, twin, strict=True):
        assert torch.equal(a.cpu(), b)


@EACH_CASE
def test_memory_is_the_states_and_a_table(backend, case):
    params = make_params([(1000, 1000), *[(64,)] * 1000], device="cuda")
    set_grads(params, 0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = case.fused()(params, backend=backend, **settings(case))
    optimizer.step()
    states = sum(
        -(-value.nbytes // 512) * 512  # what torch's allocator makes of them
        for state in optimizer.state.values()
        for value in state.values()
        if value.is_cuda
    )
    assert torch.cuda.max_memory_allocated() - before <= states + MIB
    settled = torch.cuda.memory_stats()["allocation.all.allocated"]
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == settled


@EACH_CASE
def test_only_what_moved_is_uploaded(backend, case):
    params = make_params([(64,)] * 100, device="cuda")
    set_grads(params, 0)
    optimizer = case.fused()(params, backend=backend, **settings(case))
    for _ in range(2):
        optimizer.step()

    def copied():
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            optimizer.step()
            torch.cuda.synchronize()
        return sum("Memcpy HtoD" in event.name for event in profiler.events())

    assert copied() <= 1  # scalars
    params[7].grad = params[7].grad.clone()
    assert copied() <= 2


@pytest.mark.parametrize("grouped", [False, True])
def test_one_launch_of_ten_thousand_tensors(backend, grouped):
    params = make_params([(8,)] * 10_000, device="cuda")
    set_grads(params, 0)
    groups = [{"params": [p]} for p in params[:500]] + [{"params": params[500:]}]
    optimizer = fusedopt.AdamW(groups if grouped else params, backend=backend)
    optimizer.step()
    assert Cuda.launches(optimizer.step) == (1, 0)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend):
    """The smallest dtype, values that show who was updated, and how often."""
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip(f"needs {6 * count / 1e9:.0f} GB of GPU memory")
    param = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full((count,), 0.5, dtype=torch.bfloat16, device="cuda")
    optimizer = fusedopt.SGD([param], lr=1.0, backend=backend)
    optimizer.step()
    for at in (0, 2**30, 2**31 - 1, 2**31, 2**31 + 1, count - 1):
        assert param[at].item() == 0.5
    assert param.eq(0.5).all()


@needs("cuda")
def test_the_build_covers_this_device():
    capability = torch.cuda.get_device_capability()
    assert backends.covers(backends._build_info.CUDA_ARCHITECTURES, capability)
    assert _C.cuda_launcher() is not None


def test_what_needs_a_gpu_is_left_out_where_there_is_none_only(gpu_rows):
    collected, left_out = gpu_rows
    assert bool(collected) == torch.cuda.is_available()
    assert bool(left_out) == (not collected or torch.cuda.device_count() < 2)
    if left_out:
        rows = (f"{n} tests: {missing}" for missing, n in left_out.items())
        pytest.skip(f"needs a GPU, and is not collected: {'; '.join(rows)}")
