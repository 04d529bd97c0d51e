"""Steps in the backward, and all that holds an optimizer: handles, scalers, wrappers, copies."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from backwards import (
    SHAPES,
    adamw_pair,
    assert_ordinary,
    layers,
    loss_of,
    ordinary_loop,
    sgd_in_backward,
    step_after,
    steps_of,
    unchanged,
)
from distributed_runs import ddp, local
from harness import assert_same, make_params
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard

import fusedopt


def hooks_of(params):
    return [len(p._post_accumulate_grad_hooks or ()) for p in params]


# ---- What it cannot do -------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [0, -1, 1.5, True, None, "32MB", float("inf")])
def test_bucket_bytes_must_be_a_whole_number_above_zero(bucket):
    params = make_params(SHAPES)
    with pytest.raises(ValueError, match=r"bucket_bytes=.* must be a whole number"):
        fusedopt.step_in_backward(fusedopt.SGD(params), bucket_bytes=bucket)
    assert_ordinary(params)


def test_other_optimizers_raise():
    with pytest.raises(TypeError, match=r"optimizer is a SGD; .* needs a fusedopt optimizer"):
        fusedopt.step_in_backward(torch.optim.SGD(make_params(SHAPES)))


@pytest.mark.parametrize(
    "option",
    [
        {"max_grad_norm": 1.0},
        {"max_grad_norm": float("inf")},
        {"skip_nonfinite": True},
        {"zero_grads": True},
    ],
    ids=str,
)
def test_options_that_need_all_gradients_raise(option):
    params = make_params(SHAPES)
    with pytest.raises(ValueError, match=next(iter(option))):
        fusedopt.step_in_backward(fusedopt.SGD(params, **option))
    assert_ordinary(params)


@pytest.mark.parametrize(
    ("option", "value"), [("max_grad_norm", 1.0), ("skip_nonfinite", True), ("zero_grads", True)]
)
def test_such_an_option_set_later_raises_in_the_backward(option, value):
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    setattr(optimizer, option, value)
    with pytest.raises(ValueError, match=f"{option}={value} cannot be had"):
        loss_of(params, 0).backward()
    assert all(unchanged(params))


@pytest.mark.parametrize(
    ("scaler_class", "unscaled", "fused"),
    [
        (fusedopt.GradScaler, False, None),
        (fusedopt.GradScaler, True, True),
        (torch.amp.GradScaler, False, True),
        (torch.amp.GradScaler, True, None),
    ],
)
def test_grad_scalers_raise(scaler_class, unscaled, fused):
    params, optimizer, handle = sgd_in_backward(fused=fused)
    scaler = scaler_class("cpu")
    scaler.scale(loss_of(params, 0)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler cannot serve an optimizer under"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    loss_of(params, 1).backward()  # nothing has changed for steps without it
    assert all(param.grad is None for param in params)
    handle.remove()
    assert getattr(optimizer, "_step_supports_amp_scaling", None) is fused


def test_a_grad_scaler_that_is_off_does_no_harm():
    params, optimizer, _ = sgd_in_backward()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(params, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not any(unchanged(params))


def test_an_optimizer_that_a_grad_scaler_has_stepped_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(loss_of(params, 0)).backward()
    scaler.step(optimizer)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="a GradScaler has stepped this optimizer"):
        fusedopt.step_in_backward(optimizer)


# ---- Wrappers that reduce gradients --------------------------------------------------------------


@on_ranks(2)
def test_distributed_data_parallel_raises_on_every_rank(world, mesh):
    model = layers(2)
    wrapped = ddp(mesh, model)
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel: .* after hooks"):
        fusedopt.step_in_backward(fusedopt.SGD(wrapped.parameters()))
    wrapped(torch.ones(1, 10)).sum().backward()
    assert all(param.grad is not None for param in model.parameters())
    fusedopt.step_in_backward(fusedopt.SGD(layers(1).parameters()))  # of another model

    # One that is gone does no harm, though it lives until a collection.
    wrapped.itself = [wrapped]
    del wrapped
    fusedopt.step_in_backward(fusedopt.SGD(model.parameters())).remove()


@on_ranks(2)
def test_distributed_data_parallel_that_comes_later_raises_in_the_first_backward(world, mesh):
    model = layers(2)
    optimizer = fusedopt.SGD(model.parameters())
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    wrapped = ddp(mesh, model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        wrapped(torch.ones(1, 10)).sum().backward()
    assert all(map(torch.equal, model.parameters(), layers(2).parameters()))


@on_ranks(2)
def test_fsdp2_steps_in_the_backward(world, mesh):
    for accumulation_steps, bucket in ((1, 1), (2, 500), (1, 2**20)):
        runs = []
        for in_backward in (False, True):
            model = layers(3)
            for module in (*model, model):
                fully_shard(module, mesh=mesh)
            params = list(model.parameters())
            optimizer = fusedopt.AdamW(params, lr=0.1, accumulation_steps=accumulation_steps)
            if in_backward:
                fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
            for step in range(4):
                model(torch.full((1, 10), 1.0 + step + world.rank)).sum().backward()
                assert in_backward == all(p.grad is None for p in params)
                optimizer.step()
                optimizer.zero_grad()
            runs.append((params, optimizer))
        (params, optimizer), (theirs, reference) = runs
        for param, other in zip(params, theirs, strict=True):
            assert torch.equal(local(param), local(other))
            state, wanted = optimizer.state[param], reference.state[other]
            assert state["step"] == wanted["step"] == 4 // accumulation_steps
            assert torch.equal(local(state["exp_avg"]), local(wanted["exp_avg"]))


def test_objects_are_not_asked_for_their_class():
    class Proxy:
        @property
        def __class__(self):
            raise AssertionError("asked")

    proxy = Proxy()
    sgd_in_backward()
    assert type(proxy) is Proxy


# ---- The handle --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_block", [False, True])
def test_after_remove_steps_are_ordinary(with_block):
    (params, optimizer), (theirs, reference) = adamw_pair()
    ordinary_loop(reference, theirs, 4)
    handle = fusedopt.step_in_backward(optimizer)
    if with_block:
        with handle as same:
            loss_of(params, 0).backward()
            loss_of(params, 1).backward()
        assert same is handle
    else:
        loss_of(params, 0).backward()
        loss_of(params, 1).backward()
        handle.remove()
        handle.remove()
    assert_ordinary(params)
    for step in (2, 3):
        step_after(optimizer, loss_of(params, step))
    assert_same((params, optimizer), (theirs, reference))


def test_remove_inside_of_a_backward_raises():
    params, _optimizer, handle = sgd_in_backward()
    params[0].register_hook(lambda grad: handle.remove())
    with pytest.raises(RuntimeError, match=r"remove\(\) inside of a backward"):
        loss_of(params, 0).backward()


def test_twice_on_one_optimizer_raises():
    params, optimizer, handle = sgd_in_backward()
    with pytest.raises(RuntimeError, match="steps in the backward already"):
        fusedopt.step_in_backward(optimizer)
    assert hooks_of(params) == [1] * len(params)
    handle.remove()
    fusedopt.step_in_backward(optimizer)


def test_two_optimizers_of_one_parameter_raise():
    params, _optimizer, handle = sgd_in_backward()
    second = fusedopt.SGD(params[1:])
    with pytest.raises(RuntimeError, match="by another optimizer"):
        fusedopt.step_in_backward(second)
    assert hooks_of(params) == [1] * len(params)
    handle.remove()
    fusedopt.step_in_backward(second)


def test_two_optimizers_of_one_backward():
    (params, optimizer), (theirs, reference) = adamw_pair()
    ordinary_loop(reference, theirs, 3)
    first = fusedopt.AdamW(params[:2], lr=0.1)
    second = fusedopt.AdamW(params[2:], lr=0.1)
    fusedopt.step_in_backward(first)
    fusedopt.step_in_backward(second, bucket_bytes=1)
    for step in range(3):
        loss_of(params, step).backward()
    optimizer.state.update({**first.state, **second.state})
    assert_same((params, optimizer), (theirs, reference))


def test_parameters_of_a_group_that_is_added_later_are_stepped():
    (params, optimizer), (theirs, reference) = [
        (p, fusedopt.AdamW(p[:2], lr=0.1)) for p in (make_params(SHAPES), make_params(SHAPES))
    ]
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    for some, group_of in ((params, optimizer), (theirs, reference)):
        step_after(group_of, loss_of(some[:2], 0))
        group_of.add_param_group({"params": some[2:], "lr": 0.3})
        loss_of(some[2:], 1).backward()  # of the new ones alone
        assert (group_of is optimizer) == all(param.grad is None for param in some)
        group_of.step()
    assert_same((params, optimizer), (theirs, reference))
    assert steps_of(optimizer, params) == [1] * 4


def test_a_group_that_cannot_be_had_is_not_added():
    params = make_params(SHAPES)
    optimizer, other = fusedopt.SGD(params[:2]), fusedopt.SGD(params[2:])
    fusedopt.step_in_backward(optimizer)
    fusedopt.step_in_backward(other)
    with pytest.raises(RuntimeError, match="by another optimizer"):
        optimizer.add_param_group({"params": params[2:]})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_that_cannot_have_hooks_raises_and_leaves_none():
    with torch.inference_mode():
        inference = torch.ones(3)
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD([*params, inference])
    with pytest.raises(RuntimeError, match="inference tensor"):
        fusedopt.step_in_backward(optimizer)
    assert hooks_of(params) == [0] * len(params)
    assert_ordinary(params)


def test_parameters_that_are_put_into_or_taken_out_of_a_group_are_noticed():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params[:2], lr=1.0)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    optimizer.param_groups[0]["params"][:] = params[1:3]
    for _ in range(2):
        loss_of(params, 0).backward()
    assert unchanged(params) == [True, False, False, True]
    assert [param.grad is None for param in params] == [False, True, True, False]
    loss_of(params[2:3], 0).backward()  # it has the hook
    assert params[2].grad is None


def test_a_parameter_that_is_frozen_at_first_is_stepped_when_it_is_trained():
    params = make_params(SHAPES)
    params[0].requires_grad_(False)
    optimizer = fusedopt.SGD(params, lr=1.0)
    fusedopt.step_in_backward(optimizer)
    assert not params[0].requires_grad
    params[0].requires_grad_(True)
    loss_of(params[:1], 0).backward()
    assert params[0].grad is None
    assert unchanged(params) == [False, True, True, True]


# ---- Copies and lifetimes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_copies_carry_no_hooks(copied):
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params, lr=0.1)
    fusedopt.step_in_backward(optimizer)
    loss_of(params, 0).backward()
    others, other = copied((params, optimizer))
    assert hooks_of(others) == [0] * len(others)
    assert_ordinary(others)
    step_after(other, loss_of(others, 1))
    loss_of(params, 1).backward()
    assert_same((params, optimizer), (others, other))
    fusedopt.step_in_backward(other)


def test_loading_a_state_keeps_the_hooks():
    (params, optimizer), (theirs, reference) = adamw_pair()
    ordinary_loop(reference, theirs, 3)
    fusedopt.step_in_backward(optimizer)
    loss_of(params, 0).backward()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loss_of(params, 1).backward()
    loss_of(params, 2).backward()
    assert_same((params, optimizer), (theirs, reference))


def test_a_dropped_model_is_freed_without_a_collection():
    gc.collect()
    gc.disable()
    try:
        model = layers(2)
        optimizer = fusedopt.AdamW(model.parameters())
        handle = fusedopt.step_in_backward(optimizer)
        model(torch.ones(1, 10)).sum().backward()
        gone = [weakref.ref(p) for p in model.parameters()]
        del model, optimizer, handle
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("keeps_handle", [False, True])
def test_a_backward_without_the_optimizer_raises(keeps_handle):
    params = make_params(SHAPES)
    handle = fusedopt.step_in_backward(fusedopt.SGD(params))
    if not keeps_handle:
        del handle
    with pytest.raises(RuntimeError, match="keep a reference to the optimizer"):
        loss_of(params, 0).backward()
    if keeps_handle:
        handle.remove()
        loss_of(params, 0).backward()
    params[0].grad = None
    optimizer = fusedopt.SGD(params, lr=1.0)  # takes the place of the one that is gone
    fusedopt.step_in_backward(optimizer)
    loss_of(params, 0).backward()
    assert params[0].grad is None
    assert hooks_of(params) == [1] * len(params)
