"""Steps in the backward: windows of accumulation, what step() does meanwhile, exceptions."""

import copy
import warnings

import pytest
import torch
from backwards import (
    BUCKETS,
    SHAPES,
    Backward,
    adamw_pair,
    in_order,
    layers,
    loop,
    loss_of,
    micro_batches,
    ordinary_loop,
    sgd_in_backward,
    step_after,
    steps_of,
    unchanged,
)
from cases import CASES
from harness import assert_same, make_params

import fusedopt

# ---- Windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_backward_is_a_micro_batch(case):
    for bucket, reduction in zip(BUCKETS, ("mean", "sum", "mean"), strict=True):
        runs = []
        for run in (ordinary_loop, lambda *args, bucket=bucket: loop(*args, bucket)):
            params = make_params(SHAPES)
            optimizer = case.fused()(
                params, lr=0.1, accumulation_steps=3, accumulation_reduction=reduction
            )
            run(optimizer, params, 8)  # ends in the middle of a window
            optimizer.state_dict()  # makes the window's entries true
            runs.append((params, optimizer))
        assert_same(*runs)
        assert not any(unchanged(params))
        assert optimizer.state[params[0]]["window"].tolist()[:2] == [2, 2]


def test_windows_anywhere_with_gradients_that_come_and_go(anywhere):
    missing = [(1,), (0, 1), (2,), (1, 3), (0, 1, 2), (1, 2), (0,), (), (3, 2, 1)]
    buckets = (1, 200, 2**20) if anywhere.name == "cpu" else (200,)
    for bucket in buckets:
        runs = []
        for run in (
            ordinary_loop,
            lambda *args, bucket=bucket, **named: loop(*args, bucket, **named),
        ):
            params = make_params(SHAPES, device=anywhere.device)
            optimizer = fusedopt.AdamW(
                params, lr=0.1, accumulation_steps=3, ema_decay=0.5, backend=anywhere.backend
            )
            run(optimizer, params, 9, leave_out=missing.__getitem__)
            runs.append((params, optimizer))
        assert_same(*runs)
        assert steps_of(optimizer, params) == [3, 2, 3, 3]


def test_only_the_last_backward_of_a_window_updates():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params, accumulation_steps=3)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    for backward in range(6):
        before = [p.detach().clone() for p in params]
        assert optimizer.will_step == (backward % 3 == 2)
        loss_of(params, backward).backward()
        for old, param in zip(before, params, strict=True):
            assert torch.equal(old, param) == (backward % 3 != 2)
        for _ in range(2):  # counts no micro-batch
            optimizer.step()
        assert micro_batches(optimizer) == (backward + 1) % 3


def test_a_window_goes_on_through_a_checkpoint_and_with_ordinary_steps():
    (params, optimizer), (theirs, reference) = adamw_pair(accumulation_steps=3)
    ordinary_loop(reference, theirs, 6)
    with fusedopt.step_in_backward(optimizer, bucket_bytes=1):
        loss_of(params, 0).backward()
        loss_of(params, 1).backward()
        saved = copy.deepcopy(optimizer.state_dict())
        loss_of(params, 5).backward()  # forgotten
        with torch.no_grad():
            for param, value in zip(params, make_params(SHAPES), strict=True):
                param.copy_(value)
        optimizer.load_state_dict(saved)
        loss_of(params, 2).backward()
        loss_of(params, 3).backward()
    for step in (4, 5):
        step_after(optimizer, loss_of(params, step))
    optimizer.state_dict(), reference.state_dict()  # makes the window's entries true
    assert_same((params, optimizer), (theirs, reference))


def test_backwards_nested_in_each_other_are_one():
    model = layers(3)
    first, second, third = model

    def inner(x):
        return Backward.apply(second, lambda: None, first(x))

    def middle(x):
        return Backward.apply(inner, lambda: None, x * 2.0)

    optimizer = fusedopt.AdamW(model.parameters(), accumulation_steps=2)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    for backwards in range(1, 5):  # none of the parameters is in the outermost graph
        x = torch.ones(1, 10, requires_grad=True)
        Backward.apply(lambda y: third(middle(y)), lambda: None, x).sum().backward()
        assert micro_batches(optimizer) == backwards % 2
    assert steps_of(optimizer, list(model.parameters())) == [2] * 3


def test_accumulate_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    fusedopt.step_in_backward(optimizer)
    loss_of(params, 0).backward()
    with pytest.raises(RuntimeError, match=r"accumulate\(\) under step_in_backward"):
        optimizer.accumulate()
    assert not any("accumulated_grad" in state for state in optimizer.state.values())


def test_a_window_that_accumulate_began_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    loss_of(params, 0).backward()
    optimizer.accumulate()
    with pytest.raises(RuntimeError, match="begun a window of 1 micro-batches"):
        fusedopt.step_in_backward(optimizer)
    optimizer.step()
    fusedopt.step_in_backward(optimizer)


# ---- step() ------------------------------------------------------------------------------------


def test_step_does_nothing_more_and_its_hooks_fire_around_it_alone():
    calls = []
    params, optimizer, _ = sgd_in_backward(momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    loss_of(params, 0).backward()
    before = copy.deepcopy((params, optimizer))
    assert calls == []
    optimizer.step()
    assert calls == ["pre", "post"]
    assert_same((params, optimizer), before)


def test_step_with_a_closure_steps_in_its_backward():
    (params, optimizer), (theirs, reference) = adamw_pair()

    def closure(some):
        def call():
            loss = loss_of(some, 0)
            loss.backward()
            return loss

        return call

    reference.step(closure(theirs))
    fusedopt.step_in_backward(optimizer)
    assert optimizer.step(closure(params)) == loss_of(make_params(SHAPES), 0)
    assert_same((params, optimizer), (theirs, reference))


def test_step_uses_gradients_that_were_set_by_hand():
    params, optimizer, _ = sgd_in_backward()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[0], make_params(SHAPES)[0] - 1.0)


@pytest.mark.parametrize("calls_step", [False, True])
def test_schedulers_do_not_warn(calls_step):
    params, optimizer, _ = sgd_in_backward()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            loss_of(params, step).backward()
            if calls_step:
                optimizer.step()
            schedule.step()


def test_inside_of_swapped_averages_the_backward_raises():
    params, optimizer, _ = sgd_in_backward(ema_decay=0.5)
    loss_of(params, 0).backward()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="inside of swap_ema"):
        loss_of(params, 0).backward()


def test_under_torch_compile():
    torch._dynamo.reset()
    runs = []
    for in_backward in (False, True):
        params = make_params([(4, 8), (8, 2)])
        optimizer = fusedopt.AdamW(params, lr=0.1)
        if in_backward:
            fusedopt.step_in_backward(optimizer, bucket_bytes=1)

        def train(x, params=params, optimizer=optimizer):
            step_after(optimizer, ((x @ params[0]).relu() @ params[1]).square().mean())

        with torch._dynamo.config.patch(error_on_recompile=True):
            train = torch.compile(train, backend="aot_eager")
            for step in range(4):
                train(torch.full((3, 4), 1.0 + step))
        runs.append((params, optimizer))
        torch._dynamo.reset()
    assert_same(*runs)
    assert runs[1][1].state[runs[1][0][0]]["step"] == 4


def test_step_does_not_know_the_micro_batch_of_gradients_that_were_set_by_hand():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, accumulation_steps=2)
    fusedopt.step_in_backward(optimizer)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="gradients that no backward made"):
        optimizer.step()


# ---- Exceptions --------------------------------------------------------------------------------


def test_an_exception_in_the_backward_drops_what_was_collected():
    (params, optimizer), (theirs, reference) = adamw_pair([(3,)] * 4)
    fusedopt.step_in_backward(optimizer)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no"):
            in_order(params, 1.0, fails=True)
        assert all(param.grad is None for param in params)
        assert not optimizer.state
    for seed in (2.0, 3.0):
        in_order(params, seed)
        in_order(theirs, seed)
        reference.step()
        reference.zero_grad()
    assert_same((params, optimizer), (theirs, reference))


def test_an_exception_leaves_updated_what_was_updated():
    (params, optimizer), _ = adamw_pair([(3,)] * 4)
    fusedopt.step_in_backward(optimizer, bucket_bytes=24)
    with pytest.raises(ArithmeticError):
        in_order(params, 1.0, fails=True)
    assert steps_of(optimizer, params) == [0, 0, 1, 1]
    in_order(params, 1.0)
    assert steps_of(optimizer, params) == [1, 1, 2, 2]


def test_an_exception_inside_of_a_nested_backward():
    model = layers(3)
    params = list(model.parameters())
    optimizer = fusedopt.AdamW(params)
    fusedopt.step_in_backward(optimizer)

    def no():
        raise ArithmeticError("no")

    x = torch.ones(1, 10, requires_grad=True)
    kept = Backward.apply(model, no, x).sum()  # a graph that stays alive
    with pytest.raises(ArithmeticError):
        kept.backward()
    optimizer.zero_grad()
    assert not optimizer.state
    Backward.apply(model, lambda: None, x).sum().backward()
    assert steps_of(optimizer, params) == [1, 1, 1]
    assert all(p.grad is None for p in params)


def test_a_step_that_fails_leaves_a_clean_state(place):
    (params, optimizer), (theirs, reference) = (
        (params, fusedopt.AdamW(params, lr=0.1, backend=place.backend))
        for params in (make_params(SHAPES, device=place.device) for _ in range(2))
    )
    ordinary_loop(reference, theirs, 1)
    fusedopt.step_in_backward(optimizer, bucket_bytes=200)
    place.fail_next(b"no such luck")
    with pytest.raises(RuntimeError, match="no such luck"):
        loss_of(params, 0).backward()
    optimizer.zero_grad()
    assert not optimizer.state
    loss_of(params, 0).backward()
    assert_same((params, optimizer), (theirs, reference))


@pytest.mark.parametrize("at", [0, 1], ids=["first", "closing"])
@pytest.mark.parametrize("bucket", [2**20, 24], ids=["nothing was added", "some was"])
def test_an_exception_in_a_window_leaves_it_as_it_was_or_empty(at, bucket):
    (params, optimizer), (theirs, reference) = adamw_pair([(3,)] * 4, accumulation_steps=2)
    fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    for step in range(at):
        in_order(params, step)
    with pytest.raises(ArithmeticError):
        in_order(params, 5.0, fails=True)
    kept = at if bucket == 2**20 else 0
    assert micro_batches(optimizer) == kept
    if bucket == 24 and at == 1:  # some took their step of the window
        assert steps_of(optimizer, params) == [0, 0, 1, 1]
        for param in params:
            assert not optimizer.state[param]["accumulated_grad"].any()
        return
    for some, any_of, seeds in (
        (params, optimizer, (6, 7, 8, 9)[kept:]),
        (theirs, reference, (*range(kept), *(6, 7, 8, 9)[kept:])),
    ):
        for seed in seeds:
            in_order(some, seed)
            any_of.step()
            any_of.zero_grad()
    assert micro_batches(optimizer) == 0
    reference.state_dict()
    assert_same((params, optimizer), (theirs, reference))
