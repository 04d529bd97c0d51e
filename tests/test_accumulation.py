"""Windows of micro-batches, counted and weighed: against the one big batch; halves, resumed."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cases import ADAMW, CASES, SGD
from devices import ANYWHERE, PLACES, Host
from harness import (
    DTYPES,
    make_params,
    set_grads,
    states_of,
    through_a_file,
)
from pairs import pairwise
from tolerances import assert_step_close, to_float64

import fusedopt

each = pytest.mark.parametrize
EACH_CASE = each("case", CASES, ids=lambda case: case.name)
SHAPES = [(), (0,), (3, 5), (37,), (2, 3, 40), (1030,)]
SCALERS = [
    pytest.param(fusedopt.GradScaler, id="ours"),
    pytest.param(torch.amp.GradScaler, id="torchs"),
]


def build(place, case, dtype=torch.float32, shapes=SHAPES, **options):
    params = make_params(shapes, dtype, device=place.device)
    kwargs = {**case.stateful, "weight_decay": 0.1, **dict(case.float16_kwargs)}
    return params, case.fused()(params, backend=place.backend, **kwargs, **options)


def snapshot(params, optimizer):
    return [(p.detach().clone(), states_of(optimizer, p)) for p in params]


def assert_equal(ours, theirs, names=None):
    for (p, states), (q, others) in zip(ours, theirs, strict=True):
        assert torch.equal(p.cpu(), q.cpu())
        for name in names or others.keys():
            if name in others:
                assert torch.equal(states[name].cpu(), others[name].cpu()), name


def assert_update_close(case, dtype, optimizer, before, grads):
    """One update of every parameter from these float64 gradients, None where it is left alone."""
    for param, grad in grads.items():
        old, old_states = before[param]
        after = states_of(optimizer, param)
        if grad is None:
            assert torch.equal(param, old)
            continue
        count = int(float(old_states.pop("step", torch.tensor(0.0)))) + 1
        if case.lazy_state and bool(old_states["window"][3]):  # its first step
            old_states = {}
        hyper = case.hyper(optimizer.param_groups[0])
        assert_step_close(case, dtype, (old, grad, old_states), (param, after), count, hyper)


# ---- Against the oracle -------------------------------------------------------------------------


@pairwise(anywhere=ANYWHERE, case=CASES, dtype=DTYPES, reduction=["mean", "sum"])
def test_a_counted_window_is_one_step_of_the_mean(anywhere, case, dtype, reduction):
    steps = 3
    params, optimizer = build(
        anywhere, case, dtype, accumulation_steps=steps, accumulation_reduction=reduction
    )
    for window in range(2):
        sums = dict.fromkeys(params)
        for micro_batch in range(steps):
            set_grads(params, 10 * window + micro_batch)
            if micro_batch == 1:
                params[2].grad = None  # adds nothing
            if window == 1:
                params[3].grad = None  # all the window
            last = micro_batch == steps - 1
            assert optimizer.will_step == last
            optimizer.state_dict()  # makes the window's numbers true
            before = {p: (p.detach().clone(), states_of(optimizer, p)) for p in params}
            for param in params:
                if param.grad is not None:
                    so_far = 0.0 if sums[param] is None else sums[param]
                    if last and sums[param] is not None:
                        so_far = to_float64(optimizer.state[param]["accumulated_grad"])
                    sums[param] = so_far + to_float64(param.grad)
            if not last:
                optimizer.step()
                for param in params:
                    assert torch.equal(param, before[param][0])
                    assert param.grad is None
            if not last:
                optimizer.zero_grad()
        weight = steps if reduction == "mean" else 1
        optimizer.step()
        assert all((p.grad is None) == (p is params[3] and window == 1) for p in params)
        grads = {p: None if s is None else s / weight for p, s in sums.items()}
        assert_update_close(case, dtype, optimizer, before, grads)
        optimizer.zero_grad()


@pairwise(place=PLACES, case=CASES, dtype=DTYPES)
def test_the_bits_are_the_cpus(place, case, dtype):
    ends = []
    options = {
        "accumulation_steps": 3,
        "max_grad_norm": 0.5,
        "ema_decay": 0.5,
        "skip_nonfinite": True,
    }
    for where in (place, Host):
        params, optimizer = build(where, case, dtype, **options)
        for step in range(7):  # ends in the middle of a window
            set_grads(params, step)
            if step in (1, 4):
                params[2].grad = None
            if step in (4, 5):  # in the middle and at the end of a window
                params[3].grad[0] = float("nan")
            optimizer.step()
            optimizer.zero_grad()
        ends.append((optimizer.grad_norm.cpu(), snapshot(params, optimizer)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert_equal(ends[0][1], ends[1][1])


def big_batch_and_parts(seed=0):
    """A model, and data whose micro-batches have unequal sizes."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Tanh(), torch.nn.Linear(20, 2))
    model = model.double()
    x, y = torch.randn(17, 6).double(), torch.randn(17, 2).double()
    return model, [(x[a:b], y[a:b]) for a, b in ((0, 8), (8, 13), (13, 16), (16, 17))], (x, y)


@each("on_device", [False, True], ids=["numbers", "tensors"])
@each("options", [{}, {"max_grad_norm": 0.1}], ids=["plain", "clipped"])
def test_unequal_weights_and_a_short_last_window_are_the_big_batch(on_device, options):
    ends = []
    for accumulates in (True, False):
        model, parts, whole = big_batch_and_parts()
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, **options)
        for _ in range(3):
            for x, y in parts if accumulates else [whole]:
                torch.nn.functional.mse_loss(model(x), y).backward()
                if accumulates:
                    weight = torch.tensor(float(len(x))) if on_device else len(x)
                    optimizer.accumulate(weight=weight)
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_256_micro_batches_and_one_more_lose_nothing(anywhere):
    param = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16, device=anywhere.device))
    optimizer = fusedopt.SGD(
        [param], lr=1.0, backend=anywhere.backend, accumulation_reduction="sum"
    )
    for _ in range(257):
        param.grad = torch.ones_like(param)
        optimizer.accumulate()
    assert (optimizer.state[param]["accumulated_grad"] == 257).all()
    param.data.zero_()
    optimizer.param_groups[0]["lr"] = 1 / 257
    optimizer.step()
    assert (param == -1).all()


def test_ten_thousand_micro_batches_stay_within_fp32():
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(40, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([param], lr=1.0, accumulation_reduction="sum")
    total, size = np.zeros(40), np.zeros(40)
    for _ in range(10_000):
        param.grad = torch.randn(40).to(torch.bfloat16)
        total += to_float64(param.grad)
        size = np.maximum(size, np.abs(total))
        optimizer.accumulate()
    error = np.abs(to_float64(optimizer.state[param]["accumulated_grad"]) - total)
    assert (error <= 10_000 * 2.0**-24 * size).all()
    assert (error <= 1e-3).all()  # in bf16 it would be of the order of 10


# ---- What a loop does ----------------------------------------------------------------------------


def test_an_unchanged_loop_accumulates():
    ends = []
    for steps in (4, 1):
        model, _, (x, y) = big_batch_and_parts()
        optimizer = fusedopt.SGD(model.parameters(), lr=0.1, momentum=0.9, accumulation_steps=steps)
        for _ in range(2):
            for part in range(4) if steps == 4 else [slice(0, 16)]:
                rows = slice(4 * part, 4 * part + 4) if steps == 4 else part
                torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@each("set_to_none", [True, False])
def test_zero_grad_clears_gradients_and_never_accumulators(set_to_none):
    params, optimizer = build(Host, SGD, accumulation_steps=3)
    set_grads(params, 0)
    optimizer.step()
    sums = [optimizer.state[p]["accumulated_grad"].clone() for p in params]
    set_grads(params, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in params)
    for param, wanted in zip(params, sums, strict=True):
        assert torch.equal(optimizer.state[param]["accumulated_grad"], wanted)


def test_gradients_are_zeroed_in_place_where_asked(anywhere):
    ends = []
    for zero_grads in (True, False):
        params, optimizer = build(anywhere, ADAMW, zero_grads=zero_grads, accumulation_steps=2)
        set_grads(params, 0)
        grads = [p.grad for p in params]
        for step in range(4):
            set_grads(params, step)
            if zero_grads:
                held = [p.grad for p in params]
            optimizer.step()
            if zero_grads:
                assert all(p.grad is g for p, g in zip(params, held, strict=True))
                assert all(g.abs().sum() == 0 for g in held)
            else:
                optimizer.zero_grad()
        del grads
        ends.append(snapshot(params, optimizer))
    assert_equal(*ends)


def test_accumulators_of_other_layouts(anywhere):
    base = make_params([(40, 30)], device=anywhere.device)[0].detach()
    param = torch.nn.Parameter(base[:, ::3])
    optimizer = fusedopt.SGD([param], lr=1.0, backend=anywhere.backend)
    total = torch.zeros(40, 10, device=anywhere.device)
    for step in range(3):
        param.grad = make_params([(10, 40)], seed=step, device=anywhere.device)[0].detach().t()
        total += param.grad
        optimizer.accumulate()
    assert torch.equal(optimizer.state[param]["accumulated_grad"], total)


def test_a_parameter_without_a_gradient_all_window_is_left_alone():
    params = make_params([(3,), (4,)])
    optimizer = fusedopt.AdamW(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    before = params[1].detach().clone()
    for step in range(2):
        set_grads(params[:1], step)
        params[1].grad = None
        optimizer.accumulate()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert [optimizer.state[p]["step"].item() for p in params] == [2.0, 1.0]


def test_a_none_gradient_adds_zero_while_its_weight_counts():
    params = make_params([(3,), (4,)])
    optimizer = fusedopt.SGD(params, lr=1.0)
    before = [p.detach().clone() for p in params]
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(4)
    optimizer.accumulate(weight=1)
    params[0].grad = torch.ones(3)
    optimizer.accumulate(weight=3)
    optimizer.step()
    assert torch.equal(params[0], before[0] - 1)
    assert torch.equal(params[1], before[1] - 0.25)


def test_a_counted_micro_batch_without_any_gradient_counts():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = fusedopt.SGD([param], lr=1.0, accumulation_steps=4)
    for micro_batch in range(4):
        param.grad = torch.ones(3) if micro_batch == 2 else None
        optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), -0.25))


def test_launches(place):
    params, optimizer = build(place, ADAMW, accumulation_steps=2)
    wanted = [{"accumulate": 1, "norm": 1}, {"norm": 1, "prepare": 1, "update": 1}]
    for step in range(4):
        set_grads(params, step)
        assert place.all_launches(optimizer.step) == wanted[step % 2]
        optimizer.zero_grad()


def test_a_window_cannot_be_captured(place):
    params, optimizer = build(place, ADAMW, accumulation_steps=2, capturable=True)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    before = snapshot(params, optimizer)
    graph = place.Graph()
    with pytest.raises(RuntimeError, match="gradients are being accumulated"), graph.capture():
        optimizer.step()
    assert_equal(snapshot(params, optimizer), before)


# ---- Micro-batches that are not finite -----------------------------------------------------------


@pairwise(scaler_class=SCALERS, case=CASES, at=[0, 1, 2])
def test_an_overflow_in_a_window_is_absent_and_nothing_else(case, scaler_class, at):
    """Either scaler: ours counts the micro-batch's call, torch's does not call ``step()``."""
    ends = []
    for overflows in (True, False):
        params, optimizer = build(Host, case, accumulation_steps=3)
        scaler = scaler_class("cpu", init_scale=8.0, growth_interval=1000)
        values = [0, 1, 2, 3]
        if overflows:
            values.insert(at, None)
        if scaler_class is fusedopt.GradScaler:  # the window of the overflow has one less
            values = [v for v in values if v != 3] if overflows else [0, 1]
        if not overflows and scaler_class is fusedopt.GradScaler:
            optimizer.accumulation_steps = 2
        for value in values[: 3 if scaler_class is fusedopt.GradScaler else 4]:
            scale = scaler.scale(torch.ones(())).item()
            if value == 2 and scaler_class is fusedopt.GradScaler:
                continue
            set_grads(params, 0 if value is None else value, scale)
            if value is None:
                params[3].grad[7] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(snapshot(params, optimizer))
        assert scaler.get_scale() == (4.0 if overflows else 8.0)
    assert_equal(*ends, [*case.states, "step"])


def test_an_overflow_in_a_weighed_window(anywhere):
    ends = []
    for overflows in (True, False):
        params, optimizer = build(anywhere, ADAMW)
        scaler = fusedopt.GradScaler(anywhere.device, init_scale=1024.0)
        for step in range(3):
            if step == 1 and not overflows:
                continue
            scale = scaler.scale(torch.ones((), device=anywhere.device)).item()
            set_grads(params, step, scale)
            if step == 1:
                params[0].grad.fill_(float("nan"))
            scaler.accumulate(optimizer, weight=step + 1)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (512.0 if overflows else 1024.0)
        ends.append(snapshot(params, optimizer))
    assert_equal(*ends, ["exp_avg", "exp_avg_sq", "step"])


@each("options", [{"skip_nonfinite": True}, {"skip_nonfinite": True, "zero_grads": True}])
def test_a_window_of_nothing_finite_is_skipped_and_the_next_is_clean(anywhere, options):
    ends = []
    for overflows in (True, False):
        params, optimizer = build(anywhere, ADAMW, accumulation_steps=2, **options)
        for step in range(4 if overflows else 2):
            set_grads(params, step % 2)
            if overflows and step < 2:
                params[2].grad.fill_(float("inf"))
            optimizer.step()
            if not optimizer._options.zero_grads:
                optimizer.zero_grad()
            if overflows and step == 1:
                assert optimizer.step_was_skipped
        ends.append(snapshot(params, optimizer))
    assert_equal(*ends)


def test_each_micro_batch_is_unscaled_by_its_own_scale(anywhere):
    params, optimizer = build(anywhere, SGD, accumulation_steps=2)
    plain, reference = build(anywhere, SGD, accumulation_steps=2)
    scaler = fusedopt.GradScaler(anywhere.device, init_scale=4.0, growth_interval=1)
    for step in range(2):
        scale = scaler.scale(torch.ones((), device=anywhere.device)).item()
        assert scale == 4.0 * 2**step
        set_grads(params, step, scale)
        scaler.step(optimizer)
        scaler.update()
        set_grads(plain, step)
        reference.step()
    assert_equal(snapshot(params, optimizer), snapshot(plain, reference), ["momentum_buffer"])


# ---- Weights of nothing --------------------------------------------------------------------------


def test_a_zero_total_weight_raises_for_numbers_and_skips_for_tensors(anywhere):
    params, optimizer = build(anywhere, ADAMW)
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(params, optimizer)
    set_grads(params, 1)
    optimizer.accumulate(weight=0)
    with pytest.raises(ValueError, match="weights of all 1 accumulated micro-batches are 0"):
        optimizer.step()
    set_grads(params, 2)
    optimizer.accumulate(weight=torch.zeros((), device=anywhere.device))
    optimizer.step()
    assert optimizer.step_was_skipped
    after = snapshot(params, optimizer)
    assert_equal(after, before, ["exp_avg", "exp_avg_sq", "step"])
    assert all((s["accumulated_grad"] == 0).all() for _, s in after)
    set_grads(params, 3)
    optimizer.step()  # an ordinary one
    assert not torch.equal(params[2], before[2][0])


# ---- Checkpoints ---------------------------------------------------------------------------------


def copies(params, optimizer, **options):
    """The same run, by every way that a run is kept."""
    yield "deepcopy", copy.deepcopy((params, optimizer))
    yield "pickle", pickle.loads(pickle.dumps((params, optimizer)))
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = type(optimizer)(fresh, lr=1.0, backend=optimizer.backend, **options)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    yield "file", (fresh, loaded)


@pairwise(anywhere=ANYWHERE, case=CASES, dtype=[torch.float32, torch.bfloat16], windows=range(2))
def test_a_half_full_window_is_resumed_exactly(anywhere, case, dtype, windows):
    options = {"accumulation_steps": 3}

    def go_on(params, optimizer):
        for step in range(2):
            set_grads(params, 10 + step)
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(params, optimizer)

    params, optimizer = build(anywhere, case, dtype, **options)
    for step in range(3 * windows + 2):
        set_grads(params, step)
        params[2].grad = None
        optimizer.step()
    kept = dict(copies(params, optimizer, **options))
    wanted = go_on(params, optimizer)
    for way, run in kept.items():
        assert run[1].will_step is True, way
        assert_equal(go_on(*run), wanted)


def test_a_weighed_window_is_resumed_exactly():
    params, optimizer = build(Host, ADAMW)
    set_grads(params, 0)
    optimizer.accumulate(weight=3)
    kept = dict(copies(params, optimizer))
    set_grads(params, 1)
    optimizer.accumulate(weight=1)
    optimizer.step()
    for _, (others, run) in kept.items():
        set_grads(others, 1)
        run.accumulate(weight=1)
        run.step()
        assert_equal(snapshot(others, run), snapshot(params, optimizer))


def test_loading_an_empty_window_empties_the_present_one():
    params, optimizer = build(Host, ADAMW, accumulation_steps=2)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    optimizer.step()
    full = through_a_file(optimizer.state_dict())
    set_grads(params, 2)
    optimizer.step()
    assert optimizer.will_step
    optimizer.load_state_dict(full)
    assert not optimizer.will_step


def test_the_step_that_initializes_a_distributed_checkpoint_leaves_no_trace(anywhere):
    """torch.distributed.checkpoint steps once with gradients and learning rates of zero."""
    for options in ({"accumulation_steps": 3}, {"accumulation_steps": 3, "ema_decay": 0.5}):
        ends = []
        for initializes in (True, False):
            params, optimizer = build(anywhere, ADAMW, **options)
            if initializes:
                for param in params:
                    param.grad = torch.zeros_like(param)
                optimizer.param_groups[0]["lr"] = 0.0
                optimizer.step(closure=None)
                optimizer.param_groups[0]["lr"] = 0.1
                optimizer.zero_grad(set_to_none=True)
                assert set(optimizer.state[params[0]]) >= {"step", "exp_avg", "accumulated_grad"}
                assert not optimizer.will_step
            for step in range(4):
                set_grads(params, step)
                optimizer.step()
                optimizer.zero_grad()
            ends.append(snapshot(params, optimizer))
        assert_equal(*ends)


def test_a_learning_rate_of_zero_alone_is_a_micro_batch():
    params, optimizer = build(Host, SGD, accumulation_steps=2)
    optimizer.param_groups[0]["lr"] = 0.0
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.will_step


# ---- Bad input -----------------------------------------------------------------------------------


def test_a_gradient_that_was_not_accumulated_raises_and_loses_nothing():
    for zero_grads in (False, True):
        params, optimizer = build(Host, ADAMW, zero_grads=zero_grads)
        set_grads(params, 0)
        optimizer.accumulate(weight=2)
        before = snapshot(params, optimizer)
        if zero_grads:
            params[2].grad.add_(1)
        else:
            params[2].grad = torch.ones_like(params[2])
        with pytest.raises(RuntimeError, match=r"accumulate\(\) was not given"):
            optimizer.step()
        assert_equal(snapshot(params, optimizer), before)
        optimizer.accumulate(weight=2)
        optimizer.step()
        assert not torch.equal(params[2], before[2][0])


def test_accumulate_without_any_gradient_raises():
    _, optimizer = build(Host, ADAMW)
    with pytest.raises(RuntimeError, match="found no gradient"):
        optimizer.accumulate()
    assert not optimizer.state
    assert optimizer.will_step


@each("weight", [-1, float("nan"), float("inf"), "3", True, torch.ones(2)])
def test_bad_weights_raise_and_lose_nothing(weight):
    params, optimizer = build(Host, SGD)
    set_grads(params, 0)
    optimizer.accumulate(weight=2)
    set_grads(params, 1)
    with pytest.raises(ValueError, match="weight"):
        optimizer.accumulate(weight=weight)
    assert params[2].grad is not None
    optimizer.accumulate(weight=2)
    assert optimizer.state_dict()["state"][0]["window"].tolist()[:2] == [2.0, 4.0]


def test_accumulation_steps_in_the_middle_of_a_window_raises_and_loses_nothing():
    params, optimizer = build(Host, SGD, accumulation_steps=3)
    set_grads(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="1 of 3 micro-batches"):
        optimizer.accumulation_steps = 2
    assert optimizer.accumulation_steps == 3
    with pytest.raises(RuntimeError, match=r"step\(\) itself counts"):
        optimizer.accumulate()
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    optimizer.accumulation_steps = 1
    before = params[2].detach().clone()
    optimizer.step()
    assert not torch.equal(params[2], before)


def test_a_sparse_gradient_cannot_be_accumulated():
    param = torch.nn.Parameter(torch.ones(4, 2))
    param.grad = torch.ones(4, 2).to_sparse()
    optimizer = fusedopt.SGD([param], lr=1.0)
    with pytest.raises(ValueError, match=r"accumulate.* sparse"):
        optimizer.accumulate()
    assert (param == 1).all()
    assert math.isclose(param.grad.to_dense().sum().item(), 8.0)


def test_a_window_without_gradients_leaves_no_weight_behind():
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = fusedopt.SGD([param], lr=1.0, accumulation_steps=2)
    for grad in (None, None, 1.0, 3.0):
        param.grad = None if grad is None else torch.tensor([grad])
        optimizer.step()
    assert param.item() == -2.0
