"""Hooks of steps and state dicts: torch's, in torch's order, once each, with torch's arguments."""

import copy

import pytest
import torch
from cases import CASES
from harness import make_params, set_grads, states_of
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


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


@EACH_CASE
def test_a_pre_hook_may_replace_the_arguments_of_a_step(case):
    """Torch takes what a pre hook returns for the arguments: here, a closure."""
    for cls in (case.fused(), case.torch_class):
        params = make_params([(3,)])
        optimizer = cls(params, lr=0.1)
        optimizer.register_step_pre_hook(lambda self, *_: ((self, lambda: 0.25), {}))
        assert optimizer.step() == 0.25


@EACH_CASE
def test_a_hook_that_changes_gradients_states_and_groups_is_seen_by_the_step(anywhere, case):
    ends = []
    for cls, kwargs in ((case.fused(), {"backend": anywhere.backend}), (case.torch_class, {})):
        params = make_params([(5,), (3, 4)], device=anywhere.device)
        optimizer = cls(params, **case.stateful, **kwargs)

        def before(optimizer, args, kwargs):
            param, *_ = optimizer.param_groups[0]["params"]
            param.grad = param.grad * 2 + 1
            optimizer.param_groups[0]["lr"] *= 0.5
            for name, value in optimizer.state[param].items():
                if name != "step":
                    optimizer.state[param][name] = value * 0.5

        def after(optimizer, args, kwargs):
            for param in optimizer.param_groups[0]["params"]:
                param.data.mul_(0.75)

        handles = [optimizer.register_step_post_hook(after)]
        for step in range(5):
            set_grads(params, step)
            if step == 1:
                handles.append(optimizer.register_step_pre_hook(before))
            if step == 4:
                for handle in handles:
                    handle.remove()
            optimizer.step()
        ends.append([(p.detach(), states_of(optimizer, p)) for p in params])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def told(optimizer, calls):
    """Registers every hook of state dicts; each notes its name."""
    mark = calls.append
    optimizer.register_state_dict_pre_hook(lambda opt: mark("save: second"))
    optimizer.register_state_dict_pre_hook(lambda opt: mark("save: first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda opt, saved: mark("saved: first"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "note": "replaced"})
    optimizer.register_load_state_dict_pre_hook(lambda opt, loaded: mark("load: second"))
    optimizer.register_load_state_dict_pre_hook(
        lambda opt, loaded: mark("load: first"), prepend=True
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: mark("loaded: first"))
    optimizer.register_load_state_dict_post_hook(lambda opt: mark("loaded: second"))


@EACH_CASE
def test_hooks_of_state_dicts_are_called_as_in_torch(case):
    calls = {}
    for cls in (case.fused(), case.torch_class):
        params = make_params([(3,)])
        optimizer = cls(params, **case.stateful)
        set_grads(params, 0)
        optimizer.step()
        calls[cls] = []
        told(optimizer, calls[cls])
        saved = optimizer.state_dict()
        assert saved.pop("note") == "replaced"
        optimizer.load_state_dict(saved)
    ours, theirs = calls.values()
    assert ours == theirs
    assert len(ours) == 7


@EACH_CASE
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=["own", "fp32"])
def test_a_load_hook_that_returns_another_dict_decides_what_is_loaded(case, state_dtype):
    kwargs = case.stateful
    params = make_params([(3, 4)], torch.bfloat16)
    optimizer = case.fused()(params, **kwargs, state_dtype=state_dtype)
    set_grads(params, 0)
    optimizer.step()

    def doubled(optimizer, loaded):
        loaded = copy.deepcopy(loaded)
        loaded["param_groups"][0]["lr"] = 0.5
        for name, value in loaded["state"][0].items():
            loaded["state"][0][name] = value * 2
        return loaded

    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(doubled)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[params[0]]
    for name, value in optimizer.state[params[0]].items():
        assert torch.equal(value, saved["state"][0][name] * 2)
        assert value.dtype == saved["state"][0][name].dtype


def test_a_failing_hook_leaves_the_optimizer_usable():
    (param,) = make_params([(3,)])
    optimizer = fusedopt.Adam([param])

    def fail(*_):
        raise RuntimeError("no")

    handles = [optimizer.register_step_pre_hook(fail), optimizer.register_state_dict_pre_hook(fail)]
    handles.append(optimizer.register_load_state_dict_pre_hook(fail))
    param.grad = torch.ones(3)
    before = param.detach().clone()
    for call in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(RuntimeError, match="no"):
            call()
    assert torch.equal(param.detach(), before)
    for handle in handles:
        handle.remove()
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 0
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["step"] == 1
