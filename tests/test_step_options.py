"""Clip, check, average, clear in the update's pass: against the oracle, torch's chain, bits."""

import copy
import math

import numpy as np
import pytest
import torch
from cases import ADAMW, CASES
from devices import ANYWHERE, PLACES, Host
from harness import (
    DTYPES,
    assert_states_equal,
    make_params,
    set_grads,
    states_of,
    through_a_file,
)
from pairs import pairwise
from tolerances import assert_step_close, to_float64, ulp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from fusedopt import _C
from fusedopt.step_extras import Options

each = pytest.mark.parametrize
EACH_CASE = each("case", CASES, ids=lambda case: case.name)
EACH_DTYPE = each("dtype", DTYPES, ids=str)

# More than a block of a norm, and its edges, beside the usual.
SHAPES = [(), (0,), (3, 5), (37,), (1024,), (2, 3, 40), (2101,)]
FEW = [(), (3, 5), (37,)]  # where neither blocks of a norm nor layouts matter
LIMIT = 0.75
EVERYTHING = {
    "max_grad_norm": LIMIT,
    "skip_nonfinite": True,
    "ema_decay": 0.75,
    "zero_grads": True,
}


def build(place, case, dtype=torch.float32, shapes=SHAPES, **options):
    params = make_params(shapes, dtype, device=place.device)
    kwargs = {**case.stateful, "weight_decay": 0.1, **dict(case.float16_kwargs)}
    return params, case.fused()(params, backend=place.backend, **kwargs, **options)


def norm64(grads):
    """The norm in float64, summed in another order."""
    return math.sqrt(math.fsum(float(np.square(to_float64(g)).sum()) for g in grads))


def clip64(norm, limit):
    return min(1.0, limit / (norm + 1e-6))


def assert_ema_close(new, old, param, decay):
    """Two products and a sum, each rounded."""
    new, old, param = (to_float64(x) for x in (new, old, param))
    wanted = decay * old + (1 - decay) * param
    terms = np.abs(decay * old) + np.abs((1 - decay) * param)
    assert (np.abs(new - wanted) <= 2 * 2.0**-23 * terms).all()


# ---- Against the oracle --------------------------------------------------------------------------


@pairwise(
    anywhere=ANYWHERE,
    case=CASES,
    dtype=DTYPES,
    options=[
        pytest.param({"max_grad_norm": LIMIT}, id="clip"),
        pytest.param({"skip_nonfinite": True}, id="check"),
        pytest.param({"ema_decay": 0.75}, id="ema"),
        pytest.param({"zero_grads": True}, id="zero"),
        pytest.param(EVERYTHING, id="everything"),
    ],
)
def test_each_feature_and_all_together(anywhere, case, dtype, options):
    params, optimizer = build(anywhere, case, dtype, **options)
    for step in range(3):
        set_grads(params, step)
        params[3].grad = None if step == 1 else params[3].grad
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        norm = norm64([g for g in grads if g is not None])
        factor = clip64(norm, LIMIT) if "max_grad_norm" in options else 1.0
        before = [(p.detach().clone(), states_of(optimizer, p)) for p in params]
        optimizer.step()
        for param, grad, (old, old_states) in zip(params, grads, before, strict=True):
            after = states_of(optimizer, param)
            if grad is None:
                assert torch.equal(param, old)
                assert_states_equal(after, old_states)
                continue
            count = int(float(old_states.pop("step", torch.tensor(0.0)))) + 1
            old_ema = old_states.pop("ema", old)
            if not (old_states or case.lazy_state):
                old_states = {k: torch.zeros_like(v) for k, v in after.items() if k != "step"}
            assert_step_close(
                case,
                dtype,
                (old, to_float64(grad) * factor, old_states),
                (param, after),
                count,
                case.hyper(optimizer.param_groups[0]),
            )
            if "ema_decay" in options:
                assert after["ema"].dtype == (dtype if dtype == torch.float64 else torch.float32)
                assert_ema_close(after["ema"], old_ema, param, 0.75)
            if "zero_grads" in options:
                assert param.grad.abs().sum() == 0
            else:
                assert torch.equal(param.grad, grad)
        if "max_grad_norm" in options:
            assert abs(float(optimizer.grad_norm) - norm) <= ulp(norm, torch.float32)
        assert not optimizer.step_was_skipped


@EACH_CASE
def test_nothing_asked_is_the_plain_step_bit_for_bit(anywhere, case):
    ends = []
    for options in ({}, {"skip_nonfinite": True}, {"max_grad_norm": float("inf")}):
        params, optimizer = build(anywhere, case, shapes=FEW, **options)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        ends.append([(p, states_of(optimizer, p)) for p in params])
    for other in ends[1:]:
        for (p, states), (q, others) in zip(ends[0], other, strict=True):
            assert torch.equal(p, q)
            # Where a step may be skipped, a device counts them: values are compared on the host.
            assert all(torch.equal(states[name].cpu(), others[name].cpu()) for name in states)


@pairwise(place=PLACES, case=CASES, dtype=DTYPES)
def test_the_bits_are_the_cpus(place, case, dtype):
    ends = []
    for where in (place, Host):
        params, optimizer = build(where, case, dtype, **EVERYTHING)
        norms = []
        for step in range(4):
            set_grads(params, step)
            if step == 1:
                params[2].grad = None
            if step == 2:
                params[3].grad[5] = float("inf")
            optimizer.step()
            norms.append(optimizer.grad_norm.cpu())
            assert bool(optimizer.step_was_skipped) == (step == 2)
            assert all(p.grad is None or p.grad.abs().sum() == 0 for p in params)
        ends.append((norms, [(p.detach().cpu(), states_of(optimizer, p)) for p in params]))
    assert torch.equal(torch.stack(ends[0][0]), torch.stack(ends[1][0]))
    for (p, states), (q, others) in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(p, q)
        for name, value in others.items():
            assert torch.equal(states[name].cpu(), value), name


# ---- Beside torch --------------------------------------------------------------------------------


def test_the_whole_chain_beside_torchs():
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))

    ours, theirs = model(), model()
    x, y = torch.randn(32, 20), torch.randn(32, 3)
    fused = fusedopt.AdamW(
        ours.parameters(), lr=0.01, max_grad_norm=0.5, ema_decay=0.9, zero_grads=True
    )
    our_scaler, their_scaler = (
        s("cpu", init_scale=256.0) for s in (fusedopt.GradScaler, torch.amp.GradScaler)
    )
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    average = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(theirs)  # the first call copies
    for _ in range(5):
        our_scaler.scale(torch.nn.functional.mse_loss(ours(x), y)).backward()
        our_scaler.step(fused)
        our_scaler.update()
        their_scaler.scale(torch.nn.functional.mse_loss(theirs(x), y)).backward()
        their_scaler.unscale_(reference)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        their_scaler.step(reference)
        their_scaler.update()
        average.update_parameters(theirs)
        reference.zero_grad()
        torch.testing.assert_close(fused.grad_norm, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))
    with fused.swap_ema():
        torch.testing.assert_close(list(ours.parameters()), list(average.module.parameters()))


@each("limit", [1e-30, 1e-3, 1.0, float("inf")])
@each("value", [1.0, float("inf"), float("nan")])
def test_a_limit_acts_as_clip_grad_norms(limit, value):
    ends = []
    for fused in (True, False):
        params = make_params()
        set_grads(params, 0)
        params[4].grad[3] = value
        if fused:
            fusedopt.SGD(params, lr=0.1, max_grad_norm=limit).step()
        else:
            if not math.isinf(limit):  # inf clips nothing; torch makes NaN of inf / inf
                torch.nn.utils.clip_grad_norm_(params, limit)
            torch.optim.SGD(params, lr=0.1).step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, equal_nan=True)


# ---- Norms ---------------------------------------------------------------------------------------


@EACH_DTYPE
def test_a_norm_is_within_an_ulp_of_float64(anywhere, dtype):
    for seed in range(3):
        params = make_params(
            [(5000,), (3,), (1, 700), (1023,), (1025,)], dtype, device=anywhere.device
        )
        set_grads(params, seed, scale=10.0**seed)
        optimizer = fusedopt.SGD(params, lr=0.0, backend=anywhere.backend, max_grad_norm=1.0)
        optimizer.step()
        norm = norm64([p.grad for p in params])
        assert abs(float(optimizer.grad_norm) - norm) <= ulp(norm, torch.float32)


def test_squares_do_not_overflow_and_do_not_vanish(anywhere):
    for dtype, value in ((torch.float16, 6e4), (torch.float16, 6e-8), (torch.float32, 3e38 / 60)):
        params = make_params([(3000,)], dtype, device=anywhere.device)
        params[0].grad = torch.full_like(params[0], value)
        optimizer = fusedopt.SGD(params, lr=0.0, backend=anywhere.backend, max_grad_norm=1.0)
        optimizer.step()
        norm = norm64([params[0].grad])
        assert abs(float(optimizer.grad_norm) - norm) <= ulp(norm, torch.float32)
        assert torch.isfinite(params[0]).all()


def test_a_norm_has_the_same_bits_for_every_number_of_threads_and_tier():
    params = make_params([(70_001,), (1000, 13), (3,)])
    set_grads(params, 0)
    optimizer = fusedopt.SGD(params, lr=0.0, max_grad_norm=1.0)
    tier, threads = fusedopt.cpu_tier(), torch.get_num_threads()
    norms = set()
    try:
        for name in fusedopt.cpu_tiers():
            _C.select_tier(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                optimizer.step()
                norms.add(float(optimizer.grad_norm))
                decision = optimizer._extras.core.decisions[0]
                norms.add(float(decision[8:16].view(torch.float64)))
    finally:
        _C.select_tier(tier)
        torch.set_num_threads(threads)
    assert len(norms) == 2  # the one in float32 and the one in float64


def test_gradients_of_other_layouts(anywhere):
    bases = [p.detach() for p in make_params([(20, 30), (40, 90), (10, 5)], device=anywhere.device)]
    views = [bases[0].t(), bases[1][:, ::3], bases[2][:, 1:2]]
    params = [torch.nn.Parameter(view) for view in views]
    grads = make_params([p.shape for p in params], seed=1, device=anywhere.device)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.detach()
    params[1].grad = grads[1].detach().t().contiguous().t()
    optimizer = fusedopt.SGD(params, lr=0.5, backend=anywhere.backend, **EVERYTHING)
    wanted = norm64([p.grad for p in params])
    expected = [to_float64(p) - 0.5 * clip64(wanted, LIMIT) * to_float64(p.grad) for p in params]
    optimizer.step()
    assert abs(float(optimizer.grad_norm) - wanted) <= ulp(wanted, torch.float32)
    for param, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(to_float64(param), value, rtol=3e-7, atol=3e-7)
        assert param.grad.abs().sum() == 0


def test_an_expanded_gradient_is_cleared_as_a_whole():
    param = torch.nn.Parameter(torch.ones(4, 5))
    param.grad = torch.full((1, 1), 2.0).expand(4, 5)
    fusedopt.SGD([param], lr=0.25, zero_grads=True).step()
    assert (param == 0.5).all()
    assert (param.grad == 0).all()


def test_complex_parameters():
    param = torch.nn.Parameter(torch.tensor([1 + 1j, 2 - 1j]))
    param.grad = torch.tensor([3 + 0j, 0 + 4j])
    optimizer = fusedopt.SGD([param], lr=1.0, max_grad_norm=2.5, ema_decay=0.5)
    optimizer.step()
    assert float(optimizer.grad_norm) == 5.0
    torch.testing.assert_close(param.detach(), torch.tensor([-0.5 + 1j, 2 - 3j]))
    torch.testing.assert_close(optimizer.state[param]["ema"], torch.tensor([0.25 + 1j, 2 - 2j]))


# ---- Skips ---------------------------------------------------------------------------------------


@EACH_CASE
@each("value", [float("inf"), float("nan")])
def test_a_skip_changes_nothing(anywhere, case, value):
    options = {k: v for k, v in EVERYTHING.items() if k != "max_grad_norm"}
    params, optimizer = build(anywhere, case, shapes=FEW, **options)
    set_grads(params, 0)
    optimizer.step()
    before = [(p.detach().clone(), states_of(optimizer, p)) for p in params]
    set_grads(params, 1)
    params[-1].grad[-1] = value
    optimizer.step()
    assert optimizer.step_was_skipped
    assert not torch.isfinite(optimizer.grad_norm)
    for param, (old, states) in zip(params, before, strict=True):
        assert torch.equal(param, old)
        assert_states_equal(states_of(optimizer, param), states)
        assert param.grad.abs().sum() == 0


@EACH_CASE
def test_the_first_step_that_is_not_skipped_is_the_first(anywhere, case):
    ends = []
    for overflows in (0, 2):
        params, optimizer = build(anywhere, case, shapes=FEW, skip_nonfinite=True)
        created = len(optimizer.state)  # Adagrad's, by the constructor
        for step in range(overflows + 2):
            set_grads(params, max(0, step - overflows))
            if step < overflows:
                params[1].grad[0, 0] = float("nan")
            optimizer.step()
            if step < overflows and anywhere is Host:
                assert len(optimizer.state) == created
        ends.append([(p, states_of(optimizer, p)) for p in params])
    for (p, states), (q, others) in zip(*ends, strict=True):
        assert torch.equal(p, q)
        assert_states_equal(others, states)


# ---- The average ---------------------------------------------------------------------------------


def test_the_average_begins_with_the_parameters_before_the_first_step():
    param = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = fusedopt.SGD([param], lr=1.0, ema_decay=0.75)
    for wanted in (0.75, 0.3125):  # 0.75 * 1 + 0.25 * 0; 0.75 * 0.75 + 0.25 * -1
        param.grad = torch.ones(1)
        optimizer.step()
        assert optimizer.state[param]["ema"].item() == wanted


def test_a_16_bit_parameters_average_is_of_what_is_stored(anywhere):
    params = make_params([(300,)], torch.bfloat16, device=anywhere.device)
    optimizer = fusedopt.SGD(params, lr=1e-4, ema_decay=0.5, backend=anywhere.backend)
    old = params[0].detach().float()
    set_grads(params, 0)
    optimizer.step()
    average = optimizer.state[params[0]]["ema"]
    assert torch.equal(average, old * 0.5 + params[0].detach().float() * 0.5)


def test_swap_ema_and_back():
    params = make_params()
    optimizer = fusedopt.AdamW(params, lr=0.1, ema_decay=0.5)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    own = [p.detach().clone() for p in params]
    averages = [optimizer.state[p]["ema"].clone() for p in params]
    with optimizer.swap_ema():
        assert all(torch.equal(p, e) for p, e in zip(params, averages, strict=True))
        params[2].data.fill_(7.0)
        with pytest.raises(RuntimeError, match="leave it before a step"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="another swap"), optimizer.swap_ema():
            pass
    assert all(torch.equal(p, o) for p, o in zip(params, own, strict=True))
    with pytest.raises(ZeroDivisionError), optimizer.swap_ema():
        raise ZeroDivisionError
    assert all(torch.equal(p, o) for p, o in zip(params, own, strict=True))
    with pytest.raises(RuntimeError, match="ema_decay"):
        fusedopt.SGD(params, lr=0.1).swap_ema().__enter__()


# ---- Launches and allocations --------------------------------------------------------------------


def test_launches_are_two_or_three(place):
    def launches(**options):
        params, optimizer = build(place, ADAMW, **options)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        set_grads(params, 2)
        return place.all_launches(optimizer.step)

    assert launches() == {"update": 1}
    assert launches(max_grad_norm=1.0) == {"norm": 1, "update": 1}
    # A device that may skip counts steps itself, and so computes what follows from them.
    assert launches(skip_nonfinite=True) == {"norm": 1, "prepare": 1, "update": 1}
    assert launches(**EVERYTHING) == {"norm": 1, "prepare": 1, "update": 1}


def test_all_norms_come_before_all_updates(place, monkeypatch):
    if place.name != "interpreted":
        pytest.skip("the order of launches is recorded in the interpreter alone")
    order = []
    launch = place.kernels.launch

    def recorded(kind, *arguments):
        order.append(kind)
        launch(kind, *arguments)

    monkeypatch.setattr(place.kernels, "launch", recorded)
    params = make_params() + make_params(dtype=torch.bfloat16)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, backend=place.backend, max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    assert order == ["norm", "norm", "update", "update"]


def test_steady_state_allocates_nothing():
    params = make_params([(1000,), (3, 5)])
    optimizer = fusedopt.AdamW(params, lr=0.1, **EVERYTHING)
    grads = [torch.randn_like(p) for p in params]

    def step():
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)
        optimizer.step()

    set_grads(params, 0)
    for _ in range(3):
        step()
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    allocated = [e.name for e in profiler.events() if e.name == "[memory]"]
    assert not allocated


# ---- Graphs --------------------------------------------------------------------------------------


def test_a_captured_step_clips_checks_and_averages(place):
    ends = []
    for graph in (None, place.Graph()):
        params, optimizer = build(place, ADAMW, capturable=True, **EVERYTHING)
        set_grads(params, 0)
        optimizer.step()
        set_grads(params, 1)
        if graph is not None:
            held = [p.grad for p in params]
            with graph.capture():
                optimizer.step()
        for step in range(1, 4):
            values = make_params([p.shape for p in params], seed=step, device=place.device)
            if step == 2:
                values[3].data[0] = float("nan")
            for param, value in zip(params, values, strict=True):
                param.grad.copy_(value.detach())
            if graph is None:
                optimizer.step()
            else:
                assert all(p.grad is h for p, h in zip(params, held, strict=True))
                graph.replay()
        ends.append([(p.detach().clone(), states_of(optimizer, p)) for p in params])
        if graph is not None:
            graph.destroy()
    for (p, states), (q, others) in zip(*ends, strict=True):
        assert torch.equal(p, q)
        assert_states_equal(others, states)


# ---- Checkpoints and copies ----------------------------------------------------------------------


@each("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_and_copies_go_on(dtype):
    def go_on(params, optimizer):
        for step in range(2):
            set_grads(params, 10 + step)
            optimizer.step()
        return [(p.detach().clone(), states_of(optimizer, p)) for p in params]

    params, optimizer = build(Host, ADAMW, dtype, **EVERYTHING)
    set_grads(params, 0)
    optimizer.step()
    ways = {}
    ways["deepcopy"] = copied = copy.deepcopy((params, optimizer))
    assert copied[1].max_grad_norm == LIMIT
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = fusedopt.AdamW(fresh, lr=1.0, **EVERYTHING)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    ways["file"] = (fresh, loaded)
    assert loaded.state[fresh[2]]["ema"].dtype == torch.float32
    wanted = go_on(params, optimizer)
    for got in ways.values():
        for (p, states), (q, others) in zip(go_on(*got), wanted, strict=True):
            assert torch.equal(p, q)
            assert_states_equal(states, others)


def test_an_average_can_begin_later():
    params = make_params()
    optimizer = fusedopt.AdamW(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    averaging = fusedopt.AdamW(params, lr=0.1, ema_decay=0.5)
    averaging.load_state_dict(optimizer.state_dict())
    before = params[2].detach().clone()
    set_grads(params, 1)
    averaging.step()
    average = averaging.state[params[2]]["ema"]
    torch.testing.assert_close(average, (before + params[2].detach()) / 2)


# ---- Bad input -----------------------------------------------------------------------------------


@each(
    ("options", "words"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0.0 must be a number above 0 .*, or None"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan must be"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1' must be"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be a number in \[0, 1\)"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1 must be"),
        ({"skip_nonfinite": 1}, "skip_nonfinite=1 must be True or False"),
        ({"zero_grads": None}, "zero_grads=None must be True or False"),
        ({"accumulation_steps": 0}, "accumulation_steps=0 must be a whole number"),
        ({"accumulation_steps": 2.0}, "accumulation_steps=2.0 must be a whole number"),
        ({"accumulation_reduction": "max"}, "accumulation_reduction='max' must be 'mean'"),
        ({"accumulation_dtype": torch.bfloat16}, "accumulation_dtype=torch.bfloat16 must be"),
    ],
)
def test_bad_options_raise(options, words):
    with pytest.raises(ValueError, match=words):
        fusedopt.SGD(make_params(), lr=0.1, **options)


def test_bad_options_set_later_change_nothing():
    params = make_params()
    optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="max_grad_norm=-2"):
        optimizer.max_grad_norm = -2
    assert optimizer.max_grad_norm == 1.0
    set_grads(params, 0)
    optimizer.step()
    assert float(optimizer.grad_norm) > 1.0
    optimizer.max_grad_norm = None
    before = params[2].detach().clone()
    optimizer.step()
    torch.testing.assert_close(params[2].detach(), before - 0.1 * params[2].grad)


def test_a_limit_that_is_set_later_is_kept():
    params = make_params()
    optimizer = fusedopt.SGD(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.max_grad_norm = 1e-30
    before = params[2].detach().clone()
    optimizer.step()
    assert torch.equal(params[2], before)
    assert abs(float(optimizer.grad_norm) - norm64([p.grad for p in params])) < 1e-5


SETTINGS = {
    "backend": ("auto", "cpu"),
    "state_dtype": (None, torch.float32),
    "max_grad_norm": (None, LIMIT, float("inf")),
    "skip_nonfinite": (False, True),
    "ema_decay": (None, 0.5),
    "zero_grads": (False, True),
    "accumulation_steps": (1, 2),
    "accumulation_reduction": ("mean", "sum"),
    "accumulation_dtype": (None, torch.float32),
    "norm_group": (None, ()),  # test_norm_group.py has groups
}


@each("dtype", [torch.float32, torch.bfloat16], ids=str)
@each("name", SETTINGS)
@each("start", [{}, EVERYTHING, {"accumulation_steps": 2}, {"zero_grads": True}], ids=str)
def test_an_option_set_later_is_in_force(name, start, dtype):
    """As in an optimizer that is constructed with it, and goes on from here."""

    def take(optimizer, params, first, overflow):
        for step in range(2 * optimizer.accumulation_steps):
            set_grads(params, first + step)
            if overflow and step == 0:
                params[1].grad[0, 0] = float("nan")
            optimizer.step()

    for value in SETTINGS[name]:
        params = make_params(FEW, dtype)
        optimizer = fusedopt.AdamW(params, lr=0.1, **start)
        take(optimizer, params, 0, overflow=False)
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = fusedopt.AdamW(others, lr=0.1, **{**start, name: value})
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        setattr(optimizer, name, value)
        assert getattr(optimizer, name) == value
        for overflow in (False, True):
            take(optimizer, params, 10, overflow)
            take(other, others, 10, overflow)
            for p, q in zip(params, others, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)
                states = states_of(optimizer, p)
                for key, state in states_of(other, q).items():
                    torch.testing.assert_close(states[key], state, rtol=0, atol=0, equal_nan=True)
            assert (optimizer.grad_norm is None) == (other.grad_norm is None)


def test_options_set_one_after_the_other_have_the_cpus_bits(place):
    ends = []
    for where in (place, Host):
        params, optimizer = build(where, ADAMW, shapes=FEW)
        steps = iter(range(100))
        for name in [*SETTINGS][2:]:
            for value in SETTINGS[name][::-1]:
                setattr(optimizer, name, value)
                for _ in range(optimizer.accumulation_steps):
                    set_grads(params, next(steps))
                    optimizer.step()
            setattr(optimizer, name, SETTINGS[name][1])  # and stays
        set_grads(params, next(steps))
        params[2].grad[0] = float("inf")
        optimizer.step()
        ends.append([(p.detach().cpu(), states_of(optimizer, p)) for p in params])
    for (p, states), (q, others) in zip(*ends, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(states[key].cpu(), others[key].cpu()) for key in others)


def test_all_options_are_tried_and_refuse_bad_values_later():
    optimizer = fusedopt.SGD(make_params(), lr=0.1)
    assert SETTINGS.keys() == Options.__dataclass_fields__.keys()
    for name in SETTINGS:
        before = getattr(optimizer, name)
        with pytest.raises(ValueError, match=f"{name}='0'"):
            setattr(optimizer, name, "0")
        assert getattr(optimizer, name) == before


@each("name", SETTINGS)
def test_an_option_in_a_param_group_raises_until_it_is_gone(name):
    params = make_params(FEW)
    optimizer = fusedopt.AdamW([{"params": params, "initial_lr": 0.1}], lr=0.1)
    for step in range(3):
        optimizer.param_groups[0].update({name: SETTINGS[name][1]} if step == 1 else {})
        set_grads(params, step)
        before = [p.detach().clone() for p in params]
        if step == 1:
            for _ in range(2):
                with pytest.raises(ValueError, match=f"'{name}' is an option of the whole"):
                    optimizer.step()
            assert all(map(torch.equal, params, before))
            del optimizer.param_groups[0][name]
        optimizer.step()
        assert not all(map(torch.equal, params, before))
    constructed = fusedopt.AdamW([{"params": params, name: SETTINGS[name][1]}])
    with pytest.raises(ValueError, match=f"'{name}' is an option of the whole"):
        constructed.step()


@each(
    ("name", "value", "number"),
    [
        ("max_grad_norm", np.float32(0.5), 0.5),
        ("max_grad_norm", np.int64(2), 2),
        ("max_grad_norm", torch.tensor(0.5), 0.5),
        ("ema_decay", np.array(0.5), 0.5),
        ("skip_nonfinite", np.bool_(True), True),
        ("zero_grads", torch.tensor(True), True),
        ("accumulation_steps", np.int32(2), 2),
        ("accumulation_steps", torch.tensor(2), 2),
    ],
    ids=str,
)
def test_numbers_of_numpy_and_in_tensors_are_taken(name, value, number):
    for optimizer in (
        fusedopt.SGD(make_params(), lr=0.1, **{name: value}),
        fusedopt.SGD(make_params(), lr=0.1),
    ):
        setattr(optimizer, name, value)
        assert getattr(optimizer, name) == number
        assert type(getattr(optimizer, name)) is type(number)


@each("weight", [np.float32(3), np.int64(3), np.array(3.0), torch.tensor(3), 3])
def test_weights_of_numpy_and_in_tensors_are_taken(weight):
    params = make_params(FEW)
    before = params[2].detach().clone()
    optimizer = fusedopt.SGD(params, lr=1.0, accumulation_reduction="sum")
    set_grads(params, 0)
    grad = params[2].grad.clone()
    optimizer.accumulate(weight)
    optimizer.step()
    torch.testing.assert_close(params[2].detach(), before - 3 * grad)


@each("options", [{k: v} for k, v in EVERYTHING.items()], ids=list(EVERYTHING))
def test_a_parameter_that_torch_must_step_cannot_have_them(options):
    params = make_params([(3,), (5, 2)])
    params[1].grad = torch.ones(5, 2).to_sparse()
    params[0].grad = torch.ones(3)
    before = [p.detach().clone() for p in params]
    optimizer = fusedopt.SGD(params, lr=0.1, **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* sparse"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not optimizer.state


def test_signatures_have_the_options():
    import inspect

    for case in CASES:
        options = inspect.signature(case.fused()).parameters
        for name in [*EVERYTHING, "accumulation_steps", "accumulation_reduction"]:
            assert options[name].kind is inspect.Parameter.KEYWORD_ONLY
        defaults = case.fused()(make_params(), lr=0.1).defaults
        assert not {*EVERYTHING, "accumulation_steps"} & defaults.keys()
