"""Checkpoints: torch.optim's and ours, mid-run, in both directions, and copies of optimizers."""

import copy
import pickle

import pytest
import torch
from cases import CASES, case_samples
from devices import ANYWHERE
from harness import (
    DTYPES,
    assert_same,
    assert_states_equal,
    clone_params,
    go_on,
    make_params,
    run,
    set_grads,
    states_of,
    through_a_file,
)
from pairs import pairwise, samples_in

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


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


@pairwise(anywhere=ANYWHERE, case=CASES, implementation=IMPLEMENTATIONS)
def test_every_implementation_of_torch_interchanges_everywhere(anywhere, case, implementation):
    """Three runs that are one: torch's alone, ours from torch's checkpoint, torch's from ours."""
    kwargs = {**case.stateful, "weight_decay": 0.1}
    flags = IMPLEMENTATIONS[implementation]
    if "fused" in flags and "fused" not in case.takes:
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


@pytest.mark.parametrize("case", [c for c in CASES if c.capturable], ids=lambda case: case.name)
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


@pairwise(anywhere=ANYWHERE, case=CASES, dtype=DTYPES)
def test_dtype_and_device_of_a_loaded_state_are_torchs(anywhere, case, dtype):
    """Whatever was saved: torch's cast to the parameter's dtype, and step counts as they were."""
    params = make_params([(5,), (3, 4)], torch.float32)
    saved = run(case.fused(), params, case.stateful).state_dict()
    loaded = []
    for cls, kwargs in ((case.fused(), {"backend": anywhere.backend}), (case.torch_class, {})):
        others = make_params([(5,), (3, 4)], dtype, device=anywhere.device)
        optimizer = cls(others, **case.stateful, **kwargs)
        optimizer.load_state_dict(through_a_file(saved))
        loaded.append([states_of(optimizer, param) for param in others])
    for ours, theirs in zip(*loaded, strict=True):
        assert ours
        assert_states_equal(ours, theirs)


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
        saved = copy.deepcopy(run(cls, params, case.stateful).state_dict())
        optimizer = cls(params, **case.stateful)
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


@samples_in(DTYPES)
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
