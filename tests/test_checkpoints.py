"""Checkpoints: torch.optim's and ours, mid-run, in both directions, old ones and broken ones."""

import copy
import pickle

import pytest
import torch
from cases import CASES, case_samples
from harness import (
    DTYPES,
    assert_same,
    clone_params,
    make_params,
    run,
    set_grads,
    states_of,
    through_a_file,
    with_states,
)

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def go_on(*runs, steps=2):
    """Steps several runs over the same gradients."""
    for step in range(steps):
        for params, optimizer in runs:
            set_grads(params, 10 + step)
            optimizer.step()


@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_checkpoints_interchange_with_torch_mid_run(case, sample):
    """Both ways, through torch.save with weights_only, then on along the same trajectory."""
    for first, second in ((case.fused(), case.torch_class), (case.torch_class, case.fused())):
        params = make_params()
        optimizer = run(first, params, case.kwargs(sample))
        others = clone_params(params)
        other = second(others, **case.kwargs(sample))
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        go_on((params, optimizer), (others, other), steps=3)
        for a, b in zip(params, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@EACH_CASE
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_of_torch_interchanges_everywhere(anywhere, case, implementation):
    """Three runs that are one: torch's alone, ours from torch's checkpoint, torch's from ours."""
    kwargs = {**with_states(case), "weight_decay": 0.1}
    flags = IMPLEMENTATIONS[implementation]
    if case.name == "rmsprop" and "fused" in flags:
        with pytest.raises(TypeError, match="fused"):  # torch's has none
            case.fused()(make_params(), **flags)
        return
    shapes = [(), (0,), (3, 5), (40,)]
    alone = make_params(shapes, device=anywhere.device)
    torchs = run(case.torch_class, alone, {**kwargs, **flags})
    ours_params = clone_params(alone)
    ours = case.fused()(ours_params, backend=anywhere.backend, **kwargs, **flags)
    ours.load_state_dict(through_a_file(torchs.state_dict()))
    for a, b in zip(ours_params, alone, strict=True):
        assert_states_equal(states_of(ours, a), states_of(torchs, b))
    go_on((alone, torchs), (ours_params, ours))
    back_params = clone_params(ours_params)
    back = case.torch_class(back_params, **kwargs, **flags)
    back.load_state_dict(through_a_file(ours.state_dict()))
    for a, b in zip(back_params, ours_params, strict=True):
        assert_states_equal(states_of(back, a), states_of(ours, b))
    go_on((alone, torchs), (back_params, back))
    for a, b in zip(alone, back_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def assert_states_equal(ours, theirs):
    """Bit for bit; dtype, device and strides as well."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        for attribute in ("dtype", "device", "shape"):
            assert getattr(ours[name], attribute) == getattr(value, attribute), name
        assert ours[name].stride() == value.stride(), name


@pytest.mark.parametrize("case", [c for c in CASES if c.name in {"rmsprop", "adam", "adamw"}],
                         ids=lambda case: case.name)  # fmt: skip
def test_a_capturable_checkpoint_goes_on_where_steps_can_be_captured(place, case):
    params = make_params([(3, 5), (40,)], device=place.device)
    saved = run(case.torch_class, params, {"lr": 0.1}).state_dict()
    saved["param_groups"][0]["capturable"] = True
    runs = []
    for cls, kwargs in ((case.fused(), {"backend": place.backend}), (case.torch_class, {})):
        loaded = clone_params(params)
        optimizer = cls(loaded, lr=0.1, capturable=cls is case.fused(), **kwargs)
        optimizer.load_state_dict(through_a_file(saved))
        runs.append((loaded, optimizer))
    assert runs[0][1].param_groups[0]["capturable"]
    step = runs[0][1].state[runs[0][0][0]]["step"]
    assert step.device.type == place.device
    runs[1][1].param_groups[0]["capturable"] = False  # torch refuses it on the CPU
    if place.device != "cpu":
        for state in runs[1][1].state.values():
            state["step"] = state["step"].cpu()
    go_on(*runs)
    assert runs[0][1]._packed.plan.describe()[0]["device_scalars"]
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@EACH_CASE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_and_device_of_a_loaded_state_are_torchs(anywhere, case, dtype):
    """Whatever was saved: torch's cast to the parameter's dtype, and step counts as they were."""
    params = make_params([(5,), (3, 4)], torch.float32)
    saved = run(case.fused(), params, with_states(case)).state_dict()
    loaded = []
    for cls, kwargs in ((case.fused(), {"backend": anywhere.backend}), (case.torch_class, {})):
        others = make_params([(5,), (3, 4)], dtype, device=anywhere.device)
        optimizer = cls(others, **with_states(case), **kwargs)
        optimizer.load_state_dict(through_a_file(saved))
        loaded.append([states_of(optimizer, param) for param in others])
    for ours, theirs in zip(*loaded, strict=True):
        assert ours
        assert_states_equal(ours, theirs)


# What torch's classes have gained since their first release; older checkpoints lack it.
LATER = {"foreach", "maximize", "capturable", "fused", "differentiable"}
OWN_LATER = {
    "sgd": {"nesterov"},
    "rmsprop": {"centered", "momentum"},
    "adam": {"amsgrad", "decoupled_weight_decay"},
    "adamw": {"amsgrad"},
}


@EACH_CASE
@pytest.mark.parametrize("step_is_a_number", [False, True], ids=["tensor step", "number step"])
def test_older_checkpoints_load_as_in_torch(case, step_is_a_number):
    kwargs = {"lr": 0.1, "weight_decay": 0.1}
    later = LATER | OWN_LATER.get(case.name, set())
    runs = []
    for cls in (case.fused(), case.torch_class):
        params = make_params()
        saved = run(cls, params, kwargs).state_dict()
        for group in saved["param_groups"]:
            for key in later & group.keys():
                del group[key]
        for state in saved["state"].values():
            if step_is_a_number and "step" in state:
                state["step"] = int(state["step"])
        optimizer = cls(params, **kwargs)
        optimizer.load_state_dict(through_a_file(saved))
        runs.append((params, optimizer))
    ours, theirs = (optimizer.param_groups for _, optimizer in runs)
    assert [{**g, "params": 0} for g in ours] == [{**g, "params": 0} for g in theirs]
    go_on(*runs)
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        if case.has_step:
            step = runs[0][1].state[a]["step"]
            assert step == 6
            assert_states_equal({"step": step}, {"step": runs[1][1].state[b]["step"]})


@EACH_CASE
def test_names_of_parameters_travel_as_torchs_do(case):
    """From a named optimizer to a nameless one and back."""
    for named_first in (True, False):
        groups = []
        for cls in (case.fused(), case.torch_class):
            params = make_params([(3,), (4,)])
            members = [("first", params[0]), ("second", params[1])]
            saver = cls(members if named_first else params, lr=0.25)
            loader = cls(params if named_first else members, lr=0.1)
            set_grads(params, 0)
            saver.step()
            loader.load_state_dict(through_a_file(saver.state_dict()))
            loader.step()
            groups.append([{**group, "params": 0} for group in loader.param_groups])
            assert groups[-1][0]["param_names"] == ["first", "second"]
            assert groups[-1][0]["lr"] == 0.25
        assert groups[0] == groups[1]


@EACH_CASE
def test_a_deepcopy_has_all_public_attributes(case):
    optimizer = run(case.fused(), make_params(), {"lr": 0.1})
    optimizer.own = "a user's"

    def public(obj):
        return {name for name in vars(obj) if not name.startswith("_")}

    theirs = run(case.torch_class, make_params(), {"lr": 0.1})
    assert public(copy.deepcopy(optimizer)) == public(optimizer) - {"own"}  # which torch drops
    assert public(copy.deepcopy(theirs)) <= public(copy.deepcopy(optimizer))


@EACH_CASE
def test_a_loaded_dict_is_shared_where_torch_shares_it(case):
    """Loading copies nothing that has the right dtype: a dict that is kept must be a copy."""
    shared = []
    for cls in (case.fused(), case.torch_class):
        params = make_params()
        saved = copy.deepcopy(run(cls, params, with_states(case)).state_dict())
        optimizer = cls(params, **with_states(case))
        optimizer.load_state_dict(saved)
        shared.append(
            [
                (number, name, optimizer.state[params[number]][name] is value)
                for number, state in saved["state"].items()
                for name, value in state.items()
            ]
        )
    assert shared[0] == shared[1]
    assert any(same for *_, same in shared[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_save_load_continue_is_bitwise_the_uninterrupted_run(case, sample, dtype):
    kwargs = case.kwargs(sample, dtype)
    params = make_params(dtype=dtype)
    optimizer = run(case.fused(), params, kwargs)
    resumed = clone_params(params)
    other = case.fused()(resumed, **kwargs)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for param in resumed:
        for key, value in other.state.get(param, {}).items():
            assert value.dtype == (torch.float32 if key == "step" else dtype)
    go_on((params, optimizer), (resumed, other), steps=3)
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
    go_on((params, optimizer), (twin_params, twin))
    assert_same((params, optimizer), (twin_params, twin))


def broken(case):
    """Checkpoints of two named parameters that do not fit, with what the error must say."""
    saved = run(case.fused(), make_params([(3,), (4, 5)]), with_states(case)).state_dict()
    saved["param_groups"][0]["lr"] = 7.0
    names = [name for name in saved["state"][1] if name != "step"]
    for name in names:
        for shape in ((5, 4), (20,), (4,), ()):
            bad = copy.deepcopy(saved)
            bad["state"][1][name] = torch.zeros(shape)
            yield bad, f"'second'.*'{name}' has shape .*Nothing was loaded"
        bad = copy.deepcopy(saved)
        bad["state"][1][name] = 0.5
        yield bad, f"'second'.*'{name}' is 0.5, wanted a tensor.*Nothing was loaded"
    if case.has_step:
        for name in [*names, "step"]:
            bad = copy.deepcopy(saved)
            del bad["state"][1][name]
            yield bad, f"'second'.*'{name}' is missing.*Nothing was loaded"


@EACH_CASE
def test_a_state_that_does_not_fit_names_the_parameter_and_loads_nothing(case):
    for bad, message in broken(case):
        runs = []
        for _ in range(2):
            params = make_params([(3,), (4, 5)])
            named = list(zip(("first", "second"), params, strict=True))
            optimizer = case.fused()(named, **with_states(case))
            go_on((params, optimizer))
            runs.append((params, optimizer))
        optimizer = runs[0][1]
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        go_on(*runs)
        assert_same(*runs)


def drop_a_group(saved):
    saved["param_groups"].append(saved["param_groups"][0])


def drop_a_parameter(saved):
    saved["param_groups"][0]["params"].pop()


@EACH_CASE
@pytest.mark.parametrize("damage", [drop_a_group, drop_a_parameter])
def test_groups_that_do_not_fit_give_torchs_own_error_and_load_nothing(case, damage):
    errors = []
    for cls in (case.fused(), case.torch_class):
        params = make_params()
        optimizer = run(cls, params, with_states(case))
        saved = copy.deepcopy(optimizer.state_dict())
        before = [states_of(optimizer, param) for param in params]
        damage(saved)
        with pytest.raises(ValueError, match="loaded state dict") as error:
            optimizer.load_state_dict(saved)
        errors.append(str(error.value))
        for param, state in zip(params, before, strict=True):
            assert_states_equal(states_of(optimizer, param), state)
    assert errors[0] == errors[1]


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


def test_a_zero_gradient_step_with_lr_zero_changes_nothing_later():
    """Distributed checkpoints initialise the state this way."""
    for case in CASES:
        params, others = make_params(), make_params()
        optimizer = case.fused()(params, lr=0.0)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for a, b in zip(params, others, strict=True):
            assert torch.equal(a, b)


def test_step_has_the_default_dtype_of_torch():
    torch.set_default_dtype(torch.float64)
    try:
        params = make_params([(3,)])
        optimizer = run(fusedopt.Adam, params, {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[params[0]]["step"].dtype == torch.float64
    assert optimizer.state[params[0]]["step"] == 4
