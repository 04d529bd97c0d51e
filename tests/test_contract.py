"""Drop-in: what programs do with an optimizer besides stepping it, beside torch.optim."""

import copy
import inspect
import io
import logging
import pickle

import pytest
import torch
from cases import CASES, case_samples
from harness import assert_same, clone_params, make_params, run, sample_named, set_grads
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@EACH_CASE
def test_signature_is_torchs_with_ours_after_it(case):
    theirs = inspect.signature(case.torch_class).parameters
    for given in (inspect.signature(case.fused()), inspect.signature(case.fused().__init__)):
        parameters = {name: p for name, p in given.parameters.items() if name != "self"}
        ours = ["backend", "state_dtype"]
        assert list(parameters) == [*theirs, *ours]
        for name, parameter in theirs.items():
            assert parameters[name].kind == parameter.kind
            assert parameters[name].default == parameter.default
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours)
    assert list(inspect.signature(case.fused()(make_params()).step).parameters) == ["closure"]


@EACH_CASE
def test_classes_are_torchs(case):
    optimizer = case.fused()(make_params())
    assert isinstance(optimizer, case.torch_class)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == case.torch_class.__name__
    for base in case.torch_class.__mro__:  # AdamW is an Adam here as there
        if base.__module__.startswith("torch.optim") and hasattr(fusedopt, base.__name__):
            assert isinstance(optimizer, getattr(fusedopt, base.__name__))


@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_groups_defaults_and_repr_are_torchs(case, sample):
    kwargs = case.kwargs(sample)
    ours, theirs = case.fused()(make_params(), **kwargs), case.torch_class(make_params(), **kwargs)
    assert ours.defaults.keys() == theirs.defaults.keys()
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert repr(ours) == repr(theirs)


INVALID = [
    ("SGD", {"lr": -1.0}),
    ("SGD", {"momentum": -0.5}),
    ("SGD", {"weight_decay": -0.5}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"momentum": 0.5, "dampening": 0.5, "nesterov": True}),
    ("SGD", {"lr": torch.tensor([0.1, 0.2])}),
    ("SGD", {"fused": True, "foreach": True}),
    ("Adagrad", {"lr_decay": -0.5}),
    ("Adagrad", {"initial_accumulator_value": -1.0}),
    ("Adagrad", {"eps": -1.0}),
    ("Adagrad", {"fused": True, "differentiable": True}),
    ("RMSprop", {"momentum": -1.0}),
    ("RMSprop", {"alpha": -1.0}),
    ("RMSprop", {"eps": -1.0}),
    ("Adam", {"betas": (1.0, 0.0)}),
    ("Adam", {"betas": (0.0, 1.0)}),
    ("Adam", {"betas": (0.9, torch.tensor(0.99))}),
    ("Adam", {"weight_decay": -1}),
    ("Adam", {"lr": torch.tensor(0.001), "foreach": True}),
    ("Adam", {"fused": True, "differentiable": True}),
    ("AdamW", {"lr": -1.0}),
    ("AdamW", {"fused": True, "foreach": True}),
    ("AdamW", {"no_such_argument": 1}),
]


@pytest.mark.parametrize(("name", "kwargs"), INVALID, ids=lambda value: str(value)[:40])
def test_wrong_hyperparameters_give_torchs_own_errors(name, kwargs):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whichever torch raises
        getattr(torch.optim, name)(make_params(), **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(fusedopt, name)(make_params(), **kwargs)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("params", [torch.zeros(3), [], ["x"], [{"lr": 1.0}], [{"params": {1}}]])
def test_wrong_params_give_torchs_own_errors(params):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whichever torch raises
        torch.optim.SGD(copy.deepcopy(params))
    with pytest.raises(type(theirs.value)) as ours:
        fusedopt.SGD(copy.deepcopy(params))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_checkpoints_interchange_with_torch_mid_run(case, sample):
    """Both ways, through torch.save with weights_only, then on along the same trajectory."""
    for first, second in ((case.fused(), case.torch_class), (case.torch_class, case.fused())):
        params = make_params()
        optimizer = run(first, params, case.kwargs(sample))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        others = clone_params(params)
        other = second(others, **case.kwargs(sample))
        other.load_state_dict(torch.load(file, weights_only=True))
        for step in range(3):
            for some, its in ((params, optimizer), (others, other)):
                set_grads(some, 10 + step)
                its.step()
        for a, b in zip(params, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_save_load_continue_is_bitwise_the_uninterrupted_run(case, sample, dtype):
    kwargs = case.kwargs(sample, dtype)
    params = make_params(dtype=dtype)
    optimizer = run(case.fused(), params, kwargs)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = clone_params(params)
    other = case.fused()(resumed, **kwargs)
    other.load_state_dict(torch.load(file, weights_only=True))
    for param in resumed:
        for key, value in other.state.get(param, {}).items():
            assert value.dtype == (torch.float32 if key == "step" else dtype)
    for step in range(3):
        for some, its in ((params, optimizer), (resumed, other)):
            set_grads(some, 10 + step)
            its.step()
    assert_same((params, optimizer), (resumed, other))


@EACH_CASE
@pytest.mark.parametrize("copier", ["pickle", "deepcopy"])
def test_pickle_and_deepcopy_go_on_alike(case, copier):
    params = make_params()
    optimizer = run(case.fused(), params, {"lr": 0.1, "backend": "cpu"})
    if copier == "pickle":
        twin_params, twin = pickle.loads(pickle.dumps((params, optimizer)))
    else:
        twin_params, twin = copy.deepcopy((params, optimizer))
    assert twin.backend == "cpu"
    for step in range(2):
        for some, its in ((params, optimizer), (twin_params, twin)):
            set_grads(some, 20 + step)
            its.step()
    assert_same((params, optimizer), (twin_params, twin))


def save_and_load(case, params, optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = clone_params(params)
    twin = case.fused()(twins, state_dtype=optimizer.state_dtype)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twins, twin


COPIERS = {
    "save and load": save_and_load,
    "pickle": lambda _, *both: pickle.loads(pickle.dumps(both)),
    "deepcopy": lambda _, *both: copy.deepcopy(both),
}


@EACH_CASE
@pytest.mark.parametrize("copier", COPIERS)
def test_state_dtype_goes_on_bitwise(case, copier):
    kwargs = {"lr": 0.1, "state_dtype": torch.float32}
    kwargs |= {"momentum": 0.9} if case.name == "sgd" else {}
    params = make_params(dtype=torch.bfloat16)
    optimizer = run(case.fused(), params, kwargs)
    twins, twin = COPIERS[copier](case, params, optimizer)
    for optimizer_ in (optimizer, twin):
        states = [v for state in optimizer_.state.values() for v in state.values()]
        assert states
        assert all(value.dtype == torch.float32 for value in states)
    for step in range(2):
        for some, its in ((params, optimizer), (twins, twin)):
            set_grads(some, 20 + step)
            its.step()
    assert_same((params, optimizer), (twins, twin))


@EACH_CASE
@pytest.mark.parametrize("declared", [None, torch.float32])
def test_a_loaded_state_takes_the_declared_dtype(case, declared):
    kwargs = {"lr": 0.1, **({"momentum": 0.9} if case.name == "sgd" else {})}
    params = make_params(dtype=torch.bfloat16)
    saved = run(case.torch_class, params, kwargs).state_dict()
    if declared is None:  # what was saved is wider than what is declared
        saved = run(case.fused(), params, {**kwargs, "state_dtype": torch.float32}).state_dict()
    twin = case.fused()(clone_params(params), state_dtype=declared, **kwargs)
    twin.load_state_dict(saved)
    for number, state in enumerate(twin.state.values()):
        for key, value in state.items():
            assert value.dtype == (torch.float32 if key == "step" or declared else torch.bfloat16)
            assert torch.equal(value, saved["state"][number][key].to(value.dtype))


def test_a_state_dtype_that_is_none():
    with pytest.raises(
        ValueError, match=r"state_dtype=torch\.float16 must be None, .* torch\.float32"
    ):
        fusedopt.AdamW(make_params(), state_dtype=torch.float16)


def test_a_state_dtype_that_torchs_step_cannot_have_changes_nothing():
    params = make_params([(3,), (4, 5)], dtype=torch.bfloat16)
    optimizer = fusedopt.AdamW(params, differentiable=True, state_dtype=torch.float32)
    set_grads(params, 0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"state_dtype=.* cannot be had for .*differentiable=True"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not optimizer.state


@EACH_CASE
def test_a_state_of_a_wrong_shape_loads_nothing(case):
    kwargs = {"lr": 0.1, **({"momentum": 0.9} if case.name == "sgd" else {})}
    params = [("first", make_params([(3,)])[0]), ("second", make_params([(4, 5)])[0])]
    optimizer = case.fused()(params, **kwargs)
    plain = [param for _, param in params]
    set_grads(plain, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    key = next(key for key in bad["state"][1] if key != "step")
    bad["state"][1][key] = torch.zeros(5, 4)
    bad["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"'second'.*" + key + r".*\(5, 4\).*Nothing was loaded"):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(after["state"][index][name], value)
    if case.has_step:
        del bad["state"][1][key]
        with pytest.raises(ValueError, match=f"'second'.*{key}.*is missing"):
            optimizer.load_state_dict(bad)


def test_checkpoint_with_momentum_buffer_none_as_old_torch_wrote():
    params = make_params([(4,)])
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    state_dict = optimizer.state_dict()
    state_dict["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(state_dict)
    set_grads(params, 0)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)


def test_checkpoint_whose_step_is_a_number():
    ours, theirs = make_params([(4,)]), make_params([(4,)])
    a, b = run(fusedopt.Adam, ours, {}), run(torch.optim.Adam, theirs, {})
    for params, optimizer in ((ours, a), (theirs, b)):
        state_dict = optimizer.state_dict()
        state_dict["state"][0]["step"] = 7
        optimizer.load_state_dict(state_dict)
        set_grads(params, 5)
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == 8
    torch.testing.assert_close(ours[0], theirs[0])


def test_hooks_fire_once_with_torchs_arguments():
    calls = []
    (param,) = make_params([(3,)])
    optimizer = fusedopt.AdamW([param])
    optimizer.step()
    assert calls == []
    handles = [
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("pre", args))),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(("post", args))),
        register_optimizer_step_pre_hook(
            lambda opt, args, kwargs: calls.append(("global pre", args))
        ),
        register_optimizer_step_post_hook(
            lambda opt, args, kwargs: calls.append(("global post", args))
        ),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == [
        ("global pre", (optimizer,)),
        ("pre", (optimizer,)),
        ("post", (optimizer,)),
        ("global post", (optimizer,)),
    ]


def test_hooks_fire_once_around_a_subclass_that_overrides_step():
    class Counting(fusedopt.SGD):
        def step(self, closure=None):
            return super().step(closure)

    calls = []
    (param,) = make_params([(3,)])
    optimizer = Counting([param])
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    param.grad = torch.ones(3)
    before = param.detach().clone()
    optimizer.step()
    assert calls == ["post"]
    assert not torch.equal(param.detach(), before)


def test_profiler_sees_the_step():
    (param,) = make_params([(3,)])
    optimizer = fusedopt.AdamW([param])
    param.grad = torch.ones(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    (param,) = make_params([(3,)])
    optimizer = fusedopt.SGD([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        before = param.square().sum()
        assert optimizer.step(closure) == before
    assert param.square().sum() < before


def test_schedulers_patch_and_drive_it():
    outcomes = []
    for optimizer_class in (fusedopt.SGD, torch.optim.SGD):
        (param,) = make_params([(9,)])
        optimizer = optimizer_class([param], lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
        for step in range(9):
            set_grads([param], step)
            optimizer.step()
            scheduler.step()
        outcomes.append(param.detach())
    torch.testing.assert_close(*outcomes, rtol=1e-6, atol=1e-6)


@EACH_CASE
def test_sparse_gradients_take_torchs_path_alone(case, caplog):
    """One sparse embedding is torch's; the rest of the model stays with the kernels."""
    outcomes = []
    for optimizer_class in (case.fused(), case.torch_class):
        params = make_params([(10, 3), (7,)])
        optimizer = optimizer_class(params, lr=0.1)
        try:
            for step in range(3):
                set_grads(params, step)
                params[0].grad = params[0].grad.to_sparse()
                with caplog.at_level(logging.WARNING, logger="fusedopt"):
                    optimizer.step()
            outcomes.append([p.detach() for p in params])
        except RuntimeError as error:
            outcomes.append(str(error))
        if optimizer_class is case.fused():
            routes = optimizer.routes()
            assert [route.backend for route in routes] == ["torch", "cpu"]
            assert "sparse" in routes[0].reason
            assert [r.getMessage().count("1 of 2 parameters") for r in caplog.records] == [1]
    if isinstance(outcomes[1], str):
        assert outcomes[0] == outcomes[1]
    else:
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_failing_torch_part_leaves_the_rest_untouched():
    params = make_params([(10, 3), (7,)])
    optimizer = fusedopt.Adam(params)
    set_grads(params, 0)
    params[0].grad = params[0].grad.to_sparse()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert params[1] not in optimizer.state
    params[0].grad = None
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1


@EACH_CASE
def test_differentiable_is_torchs(case):
    outcomes = []
    for optimizer_class in (case.fused(), case.torch_class):
        (leaf,) = make_params([(5,)])
        param = leaf.clone()
        optimizer = optimizer_class([param], lr=0.1, differentiable=True)
        param.grad = leaf * 2 + 1
        optimizer.step()
        param.sum().backward()
        outcomes.append((param.detach(), leaf.grad))
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


def test_routes_name_every_parameter():
    named = [("weight", make_params([(2, 3)])[0]), ("bias", make_params([(3,)])[0])]
    optimizer = fusedopt.Adam(named)
    routes = optimizer.routes()
    assert [(r.group, r.index, r.name, r.shape, r.backend) for r in routes] == [
        (0, 0, "weight", (2, 3), "cpu"),
        (0, 1, "bias", (3,), "cpu"),
    ]
    assert not optimizer.state, "asking creates no state"


class Tagged(torch.Tensor):
    """A subclass that could give operations another meaning."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_take_torchs_path():
    param = torch.ones(4).as_subclass(Tagged).requires_grad_()
    optimizer = fusedopt.SGD([param], lr=0.5)
    param.grad = torch.ones(4)
    assert optimizer.routes()[0].reason == "the parameter is a tensor subclass"
    optimizer.step()
    assert torch.equal(param.detach().as_subclass(torch.Tensor), torch.full((4,), 0.5))


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "rmsprop"], ids=lambda c: c.name)
def test_grad_scaler_with_fused_is_torchs(case):
    outcomes = []
    for optimizer_class in (case.fused(), case.torch_class):
        params = make_params([(6,), (3, 3)])
        optimizer = optimizer_class(params, lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2)
        assert optimizer._step_supports_amp_scaling
        scales = []
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((p * p).sum() * (step + 1) for p in params)
            if step in (0, 3):  # overflow on the first step and on a later one
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            before = [p.detach().clone() for p in params]
            steps = [
                optimizer.state[p]["step"].clone() for p in params if "step" in optimizer.state[p]
            ]
            scaler.step(optimizer)
            if step in (0, 3):
                assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
                now = [optimizer.state[p]["step"] for p in params if steps]
                assert all(torch.equal(a, b) for a, b in zip(now, steps, strict=True))
            else:
                torch.testing.assert_close(params[0].grad, before[0] * 2 * (step + 1))
            scaler.update()
            scales.append(scaler.get_scale())
        outcomes.append(([p.detach() for p in params], scales))
    assert outcomes[0][1] == outcomes[1][1]
    for ours, theirs in zip(outcomes[0][0], outcomes[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_overflow_on_the_first_step_creates_no_state():
    params = make_params([(6,)])
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(params[0].sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not optimizer.state_dict()["state"]
    optimizer.zero_grad()
    scaler.scale(params[0].sum()).backward()
    scaler.step(optimizer)
    # The first step that took place counts as the first: no dampening.
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], torch.ones(6))


def test_fused_and_foreach_choose_no_arithmetic():
    results = []
    for flags in ({}, {"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}):
        params = make_params()
        results.append((params, run(fusedopt.AdamW, params, {"lr": 0.1, **flags})))
        assert all(r.backend == "cpu" for r in results[-1][1].routes())
    for other in results[1:]:
        assert_same(results[0], other)


def test_step_has_the_default_dtype_of_torch():
    torch.set_default_dtype(torch.float64)
    try:
        params = make_params([(3,)])
        optimizer = run(fusedopt.Adam, params, {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[params[0]]["step"].dtype == torch.float64
    assert optimizer.state[params[0]]["step"] == 4


def test_a_zero_gradient_step_with_lr_zero_changes_nothing_later():
    """Distributed checkpoints initialise the state this way."""
    for case in CASES:
        sample = sample_named(case, "default")
        params, others = make_params(), make_params()
        optimizer = case.fused()(params, **{**case.kwargs(sample), "lr": 0.0})
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for a, b in zip(params, others, strict=True):
            assert torch.equal(a, b)


@EACH_CASE
def test_missing_hyperparameter_and_wrong_type_in_a_group(case):
    params = make_params([(3,)])
    optimizer = case.fused()(params)
    set_grads(params, 0)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="'lr' is 'fast'; it must be a number"):
        optimizer.step()
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(KeyError, match="lr"):
        optimizer.step()
    assert torch.equal(params[0].detach(), before)
