"""Tables on a device, on a GPU and on the host: bits, scalars, overflow, graphs."""

import gc

import pytest
import rehearsal
import torch
from cases import ADAM, ADAMW, CASES, SGD
from devices import PLACES, Interpreted
from harness import DTYPES, checked_step, make_params, set_grads, states_of
from pairs import pairwise, samples_in

import fusedopt

pytestmark = pytest.mark.usefixtures("place")

SHAPES = [(), (0,), (1,), (3, 5), (37,), (2, 3, 40), (4099,)]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
WITH_STEP = [case for case in CASES if case.has_step]
CAPTURABLE = [case for case in CASES if case.capturable]
FUSED = [case for case in CASES if case.fused_on_a_gpu]
REPLAYABLE = [case for case in CASES if case.replayable]
each = pytest.mark.parametrize


def kwargs_on(place, case, sample, dtype):
    """A sample's keywords without what torch has on the CPU only."""
    kwargs = case.kwargs(sample, dtype)
    if place.device != "cpu":
        kwargs = {k: v for k, v in kwargs.items() if k not in {"fused", "foreach", "capturable"}}
        moved = {"lr": lambda v: v.to(place.device), "betas": lambda v: v}
        kwargs = {k: moved[k](v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return kwargs


def make(place, case, kwargs, dtype=torch.float32, shapes=SHAPES, backend=None):
    params = make_params(shapes, dtype, device=place.device)
    return params, case.fused()(params, backend=backend or place.backend, **kwargs)


def momentum_of(case):
    """Keywords under which every rule keeps a state, and its first step is unlike the others."""
    return {**case.stateful, **({"dampening": 0.5} if "dampening" in case.takes else {})}


def snapshot(params, optimizer):
    return [
        (p.detach().cpu().clone(), {k: v.cpu() for k, v in states_of(optimizer, p).items()})
        for p in params
    ]


def assert_equal(a, b):
    for (pa, sa), (pb, sb) in zip(a, b, strict=True):
        assert torch.equal(pa, pb)
        assert sa.keys() == sb.keys()
        for key in sa:
            assert torch.equal(sa[key], sb[key]), key


# ---- The same bits as on the CPU ----------------------------------------------------------------


@samples_in(DTYPES)
def test_the_bits_are_the_cpus(place, case, sample, dtype):
    kwargs = kwargs_on(place, case, sample, dtype)
    shapes = SHAPES if sample is case.richest else [(3, 5), (1030,)]
    ends = []
    for device in (True, False):
        params = make_params(shapes, dtype, device=place.device if device else "cpu")
        backend = place.backend if device else "cpu"
        given = dict(kwargs)
        if not device:
            given = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            given.pop("capturable", None)
        optimizer = case.fused()(params, backend=backend, **given)
        for step in range(4):
            set_grads(params, step)
            if step in (0, 2):
                params[-1 - step // 2].grad = None
            optimizer.step()
        ends.append(snapshot(params, optimizer))
    assert_equal(*ends)


@pairwise(
    place=PLACES,
    case=CASES,
    dtype=[torch.bfloat16, torch.float16],
    grad_dtype=[pytest.param(None, id="own_grads"), pytest.param(torch.float32, id="fp32_grads")],
    state_dtype=[
        pytest.param(None, id="own_states"),
        pytest.param(torch.float32, id="fp32_states"),
    ],
)
def test_storage_combinations(place, case, dtype, grad_dtype, state_dtype):
    ends = []
    for device, backend in ((place.device, place.backend), ("cpu", "cpu")):
        params = make_params(SHAPES, dtype, device=device)
        for param in params:
            param.grad_dtype = grad_dtype or dtype
        kwargs = {**momentum_of(case), "weight_decay": 0.1, "state_dtype": state_dtype}
        optimizer = case.fused()(params, backend=backend, **kwargs)
        for step in range(3):
            set_grads(params, step)
            checked_step(case, optimizer)
        ends.append(snapshot(params, optimizer))
        for name in case.states:
            state = optimizer.state[params[4]].get(name)
            assert state is None or state.dtype == (state_dtype or dtype)
    assert_equal(*ends)


@EACH_CASE
def test_layouts_and_misaligned_rows(place, case):
    def build(device):
        base = make_params([(4000,)], device=device)[0].detach()
        views = [base[i : i + 301] for i in (0, 400, 801, 1202, 1603)]
        views += [base[2000:2600].view(20, 30).t(), base[2600:3600].view(10, 100)[:, ::3]]
        params = [torch.nn.Parameter(view) for view in views]
        params.append(
            torch.nn.Parameter(base[3600:3984].view(2, 3, 8, 8))
            .data.to(memory_format=torch.channels_last)
            .requires_grad_()
        )
        return params

    ends = []
    for device, backend in ((place.device, place.backend), ("cpu", "cpu")):
        params = build(device)
        optimizer = case.fused()(params, backend=backend, **momentum_of(case))
        for step in range(3):
            set_grads(params, step)
            params[1].grad = params[1].grad.new_ones(()).expand(301)
            params[2].grad = torch.cat([params[2].grad[:1], params[2].grad])[1:]
            optimizer.step()
        ends.append(snapshot(params, optimizer))
    assert_equal(*ends)


@EACH_CASE
def test_complex_parameters(place, case):
    ends = []
    for device, backend in ((place.device, place.backend), ("cpu", "cpu")):
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(5, 7, dtype=torch.complex64, generator=generator) for _ in range(4)]
        params = [torch.nn.Parameter(values[0].to(device))]
        optimizer = case.fused()(params, backend=backend, **momentum_of(case))
        for value in values[1:]:
            params[0].grad = value.t().contiguous().t().to(device)
            optimizer.step()
        ends.append(snapshot(params, optimizer))
    assert_equal(*ends)


@EACH_CASE
def test_values_that_are_not_finite(place, case):
    ends = []
    for device, backend in ((place.device, place.backend), ("cpu", "cpu")):
        params = make_params([(64,)], device=device)
        optimizer = case.fused()(params, backend=backend, **momentum_of(case))
        for value in (float("inf"), float("-inf"), float("nan"), 0.0, -0.0):
            set_grads(params, 0)
            params[0].grad[7] = value
            optimizer.step()
        ends.append(snapshot(params, optimizer))
    for (pa, sa), (pb, sb) in zip(*ends, strict=True):
        torch.testing.assert_close(pa, pb, rtol=0, atol=0, equal_nan=True)
        for key in sa:
            torch.testing.assert_close(sa[key], sb[key], rtol=0, atol=0, equal_nan=True)


def test_amsgrads_maximum_keeps_nan(place):
    ends = []
    for device, backend in ((place.device, place.backend), ("cpu", "cpu")):
        params = make_params([(64,)], device=device)
        optimizer = fusedopt.Adam(params, backend=backend, amsgrad=True)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
            optimizer.state[params[0]]["max_exp_avg_sq"][::3] = float("nan")
        set_grads(params, 2)
        optimizer.step()
        ends.append(snapshot(params, optimizer))
    for _, states in ends[0]:
        assert states["max_exp_avg_sq"][::3].isnan().all()
    torch.testing.assert_close(*ends, rtol=0, atol=0, equal_nan=True)


# ---- Launches -----------------------------------------------------------------------------------


@EACH_CASE
def test_one_launch_whatever_the_number_of_groups(place, case):
    count = 33 if place is Interpreted else 465  # which takes a second for a few hundred
    params = make_params([(5,)] * count, device=place.device)
    groups = [{"params": [p], "lr": 0.1 / (1 + i)} for i, p in enumerate(params)]
    optimizer = case.fused()(groups, backend=place.backend)
    set_grads(params, 0)
    assert place.launches(optimizer.step) == (1, 0)
    params[3].grad = None
    assert place.launches(optimizer.step) == (1, 0)
    (table,) = optimizer._packed.plan.describe()
    assert table["rows"] == count


@each("case", FUSED, ids=lambda case: case.name)
def test_two_launches_with_scalars_on_the_device(place, case):
    params, optimizer = make(place, case, {"lr": 0.1, "fused": True})
    set_grads(params, 0)
    assert place.launches(optimizer.step) == (1, 1)
    assert optimizer._packed.plan.describe()[0]["device_scalars"]


def test_one_launch_a_dtype_and_flag(place):
    params = make_params([(5,)] * 3, device=place.device)
    params += make_params([(5,)] * 3, torch.bfloat16, device=place.device)
    optimizer = fusedopt.AdamW(
        [{"params": params}, {"params": make_params([(2,)], device=place.device), "amsgrad": True}],
        backend=place.backend,
    )
    params.append(optimizer.param_groups[1]["params"][0])
    set_grads(params, 0)
    assert place.launches(optimizer.step) == (3, 0)


def test_nothing_is_launched_for_empty_parameters(place):
    params, optimizer = make(place, SGD, {"lr": 0.1}, shapes=[(0,), (3, 0)])
    set_grads(params, 0)
    assert place.launches(optimizer.step) == (0, 0)


@each("case", CAPTURABLE, ids=lambda case: case.name)
def test_steps_of_empty_parameters_are_counted_on_the_device(place, case):
    params, optimizer = make(place, case, {"lr": 0.1, "capturable": True}, shapes=[(0,), (3, 0)])
    set_grads(params, 0)
    assert place.launches(optimizer.step) == (0, 1)
    params[1].grad = None
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [2, 1]


def test_a_failing_launch_is_an_error(place):
    params, optimizer = make(place, SGD, {"lr": 0.1})
    set_grads(params, 0)
    before = [param.detach().clone() for param in params]
    place.fail_next(b"no such luck")
    with pytest.raises(RuntimeError, match="no such luck"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    optimizer.step()
    assert not torch.equal(params[-1], before[-1])


# ---- Scalars on the device ----------------------------------------------------------------------


@each("case", CAPTURABLE, ids=lambda case: case.name)
@each("flags", [{"capturable": True}, {"fused": True}], ids=["capturable", "fused"])
def test_steps_counted_on_the_device_are_the_hosts(place, case, flags):
    if "fused" not in case.takes:
        flags = {"capturable": True}
    ends = []
    for given in ({}, flags):
        params, optimizer = make(place, case, {"lr": 0.1, **given})
        for step in range(5):
            set_grads(params, step)
            if step == 1:
                params[-1].grad = None
            optimizer.step()
        assert optimizer.state[params[1]]["step"].device.type == (place.device if given else "cpu")
        assert float(optimizer.state[params[-1]]["step"]) == 4
        ends.append(snapshot(params, optimizer))
    assert_equal(*ends)


@each("case", CASES, ids=lambda case: case.name)
def test_a_learning_rate_on_the_device_is_read_there(place, case):
    ends = []
    for live in (False, True):
        lr = torch.tensor(0.125, device=place.device) if live else 0.125
        params, optimizer = make(place, case, {"lr": lr})
        for step in range(3):
            set_grads(params, step)
            if live:
                lr.fill_(0.125 / 2**step)
            else:
                optimizer.param_groups[0]["lr"] = 0.125 / 2**step
            optimizer.step()
        assert optimizer._packed.plan.describe()[0]["device_scalars"] == live
        ends.append(snapshot(params, optimizer))
    assert_equal(*ends)


def test_a_group_may_turn_to_a_tensor_and_back(place):
    params, optimizer = make(place, SGD, {"lr": 0.5})
    twin, other = make(place, SGD, {"lr": 0.5})
    for step, lr in enumerate((0.5, torch.tensor(0.25, device=place.device), 0.125)):
        for members, stepped, value in ((params, optimizer, lr), (twin, other, float(lr))):
            set_grads(members, step)
            stepped.param_groups[0]["lr"] = value
            stepped.step()
    assert_equal(snapshot(params, optimizer), snapshot(twin, other))


def test_double_numbers_on_the_device(place):
    with_default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        params, optimizer = make(place, ADAM, {"lr": 0.1, "capturable": True}, torch.float64)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device=place.device)
        twin, other = make(place, ADAM, {"lr": 0.1}, torch.float64)
        for step in range(3):
            for members, stepped in ((params, optimizer), (twin, other)):
                set_grads(members, step)
                stepped.step()
    finally:
        torch.set_default_dtype(with_default)
    assert optimizer.state[params[0]]["step"].dtype == torch.float64
    assert_equal(snapshot(params, optimizer), snapshot(twin, other))


# ---- GradScaler ---------------------------------------------------------------------------------


@each("case", FUSED, ids=lambda case: case.name)
@each("skipped", [(0,), (0, 1, 3), (2,)], ids=str)
def test_an_overflow_leaves_everything_as_it_was(place, case, skipped):
    """Bit for bit; and the steps that took place are those of a run without the others.

    That run's scalars are the host's: the device's are its bits.
    """
    params, optimizer = make(place, case, {**momentum_of(case), "fused": True})
    twin, other = make(place, case, momentum_of(case))
    for step in range(5):
        set_grads(params, step)
        grads = [param.grad.clone() for param in params]
        before = snapshot(params, optimizer) if step else None
        optimizer.grad_scale = torch.tensor(4.0, device=place.device)
        optimizer.found_inf = torch.tensor(float(step in skipped), device=place.device)
        for param in params:
            param.grad.mul_(4)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        if step in skipped:
            if before is not None:
                assert_equal(snapshot(params, optimizer), before)
            continue
        for param, grad in zip(params, grads, strict=True):
            assert torch.equal(param.grad, grad)
        set_grads(twin, step)
        other.step()
    assert_equal(snapshot(params, optimizer), snapshot(twin, other))


@each("case", FUSED, ids=lambda case: case.name)
def test_state_of_skipped_steps_only_is_not_saved(place, case):
    params, optimizer = make(place, case, {**momentum_of(case), "fused": True})
    set_grads(params, 0)
    optimizer.found_inf = torch.ones((), device=place.device)
    optimizer.step()
    del optimizer.found_inf
    for state in optimizer.state_dict()["state"].values():
        assert all(not value.any() for value in state.values())
    if case.lazy_state:
        assert optimizer.state_dict()["state"] == {}
    twin, other = make(place, case, {**momentum_of(case), "fused": True})
    for members, stepped in ((params, optimizer), (twin, other)):
        set_grads(members, 1)
        stepped.step()
        assert stepped.state_dict()["state"]
    assert_equal(snapshot(params, optimizer), snapshot(twin, other))


@each("case", FUSED, ids=lambda case: case.name)
def test_grad_scaler_is_torchs(place, case):
    runs = []
    for ours in (True, False):
        params = make_params([(40,), (3, 5)], device=place.device)
        kwargs = {"lr": 0.01, "fused": True}  # no momentum: torch's buffer of a skipped first step
        optimizer = (  # is memory that nobody has written
            case.fused()(params, backend=place.backend, **kwargs)
            if ours
            else case.torch_class(params, **kwargs)
        )
        scaler = torch.amp.GradScaler(place.device, init_scale=1024.0, growth_interval=2)
        scales = []
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((param * (step + 1)).square().sum() for param in params)
            if step in (0, 3):
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        runs.append((scales, [param.detach() for param in params]))
    assert runs[0][0] == runs[1][0]
    assert runs[0][0][0] == 512.0
    for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- Graphs -------------------------------------------------------------------------------------


def captured(place, case, kwargs, shapes=SHAPES):
    """An optimizer that has taken a step, and a graph of the next; gradients stay in place."""
    params, optimizer = make(place, case, {**kwargs}, shapes=shapes)
    set_grads(params, 0)
    optimizer.step()
    graph = place.Graph()
    with graph.capture():
        optimizer.step()
    return params, optimizer, graph


def fill_grads(params, seed):
    """New values in the gradients that are there, as a captured backward leaves them."""
    kept = [param.grad for param in params]
    set_grads(params, seed)
    for param, grad in zip(params, kept, strict=True):
        grad.copy_(param.grad)
        param.grad = grad


def flags_of(case):
    return {"capturable": True} if case.capturable else {}


@each("case", REPLAYABLE, ids=lambda case: case.name)
@each("live", [False, True], ids=["numbers", "tensors on the device"])
def test_replays_are_steps(place, case, live):
    """Whose lr and weight_decay change."""
    kwargs = {**momentum_of(case), **flags_of(case)}
    numbers = {"lr": 0.125, "weight_decay": 0.125}
    tensors = {key: torch.tensor(value, device=place.device) for key, value in numbers.items()}
    params, optimizer, graph = captured(place, case, {**kwargs, **(tensors if live else numbers)})
    twin, other = make(place, case, {**kwargs, **numbers})
    set_grads(twin, 0)
    other.step()
    for step in range(1, 5):
        value = 0.125 / 2**step
        changed = {"lr": value, "weight_decay": 0.125 * step}
        if live:
            for key, tensor in tensors.items():
                tensor.fill_(changed[key])
        else:
            optimizer.param_groups[0].update(changed)
            assert optimizer.refresh_hyperparameters() == 1
        other.param_groups[0].update(changed)
        fill_grads(params, step)
        set_grads(twin, step)
        graph.replay()
        other.step()
    assert_equal(snapshot(params, optimizer), snapshot(twin, other))


@each("case", REPLAYABLE, ids=lambda case: case.name)
def test_a_graph_has_a_table_of_its_own(place, case):
    """Steps outside of it, over other gradients, do not disturb it, nor the optimizer's end."""
    kwargs = {**momentum_of(case), **flags_of(case)}
    params, optimizer, graph = captured(place, case, kwargs)
    captured_grads = [param.grad for param in params]
    twin, other = make(place, case, kwargs)
    set_grads(twin, 0)
    other.step()
    for step in range(1, 4):
        set_grads(params, step)  # new tensors
        set_grads(twin, step)
        optimizer.step()
        other.step()
        optimizer._packed = None  # another plan
        fill = make_params(SHAPES, seed=step, device=place.device)
        for mine, its, value in zip(captured_grads, twin, fill, strict=True):
            mine.copy_(value.detach())
            its.grad = value.detach().clone()
        graph.replay()
        other.step()
    ended = snapshot(params, optimizer)
    assert_equal(ended, snapshot(twin, other))
    _states = [*optimizer.state.values()]  # as with torch.optim, tensors are their owners' to keep
    del optimizer
    gc.collect()
    for its, value in zip(twin, captured_grads, strict=True):
        its.grad = value.clone()
    graph.replay()
    other.step()
    for ours, theirs in zip(params, twin, strict=True):
        assert torch.equal(ours, theirs)


def test_a_captured_table_lives_as_long_as_its_graph(place):
    if place.device != "cpu":
        pytest.skip("counted in the rehearsal")
    before = rehearsal.placed()
    params, optimizer, graph = captured(place, SGD, momentum_of(SGD))
    del params
    optimizer.zero_grad()
    optimizer._packed = None
    assert rehearsal.placed() == before + 1
    assert optimizer.refresh_hyperparameters() == 1
    graph.destroy()
    assert optimizer.refresh_hyperparameters() == 0  # frees what graphs have left
    assert rehearsal.placed() == before


def test_weight_decay_and_betas_follow_a_refresh(place):
    params, optimizer, graph = captured(place, ADAMW, {"lr": 0.1, "capturable": True})
    twin, other = make(place, ADAMW, {"lr": 0.1, "capturable": True})
    set_grads(twin, 0)
    other.step()
    for stepped in (optimizer, other):
        stepped.param_groups[0].update(betas=(0.5, 0.75), weight_decay=0.3, maximize=True)
    assert optimizer.refresh_hyperparameters() == 1
    fill_grads(params, 1)
    set_grads(twin, 1)
    graph.replay()
    other.step()
    assert_equal(snapshot(params, optimizer), snapshot(twin, other))


def test_a_flag_that_replays_cannot_follow_is_an_error(place):
    _, optimizer, _graph = captured(place, ADAM, {"lr": 0.1, "capturable": True})
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(RuntimeError, match="capture the step again"):
        optimizer.refresh_hyperparameters()


def test_a_refresh_that_one_graph_cannot_follow_changes_no_other(place):
    params, optimizer, graph = captured(place, SGD, {"lr": 0.5, "momentum": 0.9})
    optimizer.param_groups[0]["momentum"] = 0
    optimizer.step()
    second = place.Graph()
    with second.capture():
        optimizer.step()
    optimizer.param_groups[0].update(momentum=0.9, lr=0.0)
    with pytest.raises(RuntimeError, match="capture the step again"):
        optimizer.refresh_hyperparameters()
    before = [param.detach().clone() for param in params]
    graph.replay()  # still with its own lr
    assert not torch.equal(params[-1], before[-1])


@each(
    ("kwargs", "warm", "message"),
    [
        ({"capturable": False}, True, "capturable=False"),
        ({"capturable": True}, False, "take a step before capturing"),
    ],
    ids=["steps on the host", "first step"],
)
def test_what_cannot_be_captured_is_an_error(place, kwargs, warm, message):
    params, optimizer = make(place, ADAM, {"lr": 0.1, **kwargs})
    set_grads(params, 0)
    if warm:
        optimizer.step()
    before = snapshot(params, optimizer)
    graph = place.Graph()
    with pytest.raises(RuntimeError, match=message), graph.capture():
        optimizer.step()
    assert_equal(snapshot(params, optimizer), before)


def test_an_overflow_under_replay_is_skipped(place):
    params, optimizer = make(place, ADAMW, {"lr": 0.1, "fused": True, "capturable": True})
    found_inf = torch.zeros((), device=place.device)
    optimizer.grad_scale = torch.ones((), device=place.device)
    optimizer.found_inf = found_inf
    set_grads(params, 0)
    optimizer.step()
    graph = place.Graph()
    with graph.capture():
        optimizer.step()
    before = snapshot(params, optimizer)
    found_inf.fill_(1)
    graph.replay()
    assert_equal(snapshot(params, optimizer), before)
    found_inf.fill_(0)
    graph.replay()
    assert float(optimizer.state[params[0]]["step"]) == 2
