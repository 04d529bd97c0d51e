"""Checkpoints of older versions, which load as in torch.optim, and ones that do not fit."""

import copy

import pytest
import torch
from cases import CASES
from harness import (
    assert_same,
    assert_states_equal,
    go_on,
    make_params,
    run,
    set_grads,
    states_of,
    through_a_file,
)

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# What all classes of torch have gained since their first release; older checkpoints lack it.
LATER = {"foreach", "maximize", "capturable", "fused", "differentiable"}


@EACH_CASE
@pytest.mark.parametrize("step_is_a_number", [False, True], ids=["tensor step", "number step"])
def test_older_checkpoints_load_as_in_torch(case, step_is_a_number):
    kwargs = {"lr": 0.1, "weight_decay": 0.1}
    later = LATER | {*case.later}
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


def broken(case):
    """Checkpoints of two named parameters that do not fit, with what the error must say."""
    saved = run(case.fused(), make_params([(3,), (4, 5)]), case.stateful).state_dict()
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
            optimizer = case.fused()(named, **case.stateful)
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
        optimizer = run(cls, params, case.stateful)
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
