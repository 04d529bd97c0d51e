"""Optimizers inside functions under torch.compile: called as they are, nothing compiled anew."""

import functools

import pytest
import torch
from cases import CASES, case_samples
from harness import assert_same, clone_params, make_params
from torch._dynamo.utils import counters

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# What compiles is torch's business: this backend runs the traced graphs through AOTAutograd.
compile_ = functools.partial(torch.compile, backend="aot_eager")


@pytest.fixture(autouse=True)
def _nothing_is_compiled_before_or_twice():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def make_step(params, optimizer):
    """A whole train step: forward, backward, the optimizer's step, zero_grad."""

    def train(x):
        loss = ((x @ params[0]).relu() @ params[1]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return train


def batches(count):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(6, 5, generator=generator) for _ in range(count)]


def both(make_optimizer, change=lambda optimizer, step: None, steps=4):
    """Trains in eager and compiled; asks for the same losses, parameters and states, bit by bit."""
    runs = []
    for wrap in (lambda function: function, compile_):
        params = make_params([(5, 8), (8, 3)])
        optimizer = make_optimizer(params)
        train = wrap(make_step(params, optimizer))
        losses = []
        for step, x in enumerate(batches(steps)):
            change(optimizer, step)
            losses.append(train(x).item())
        runs.append((losses, params, optimizer))
    assert runs[0][0] == runs[1][0]
    assert len(set(runs[0][0])) == steps, "the loss does not move"
    assert_same(runs[0][1:], runs[1][1:])


def set_lr(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (step + 1)


@EACH_CASE
def test_a_compiled_train_step_is_the_eager_one_while_lr_changes(case):
    both(lambda params: case.fused()(params, lr=0.1), set_lr)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_every_sample_compiled_is_the_eager_one(case, sample):
    both(lambda params: case.fused()(params, **case.kwargs(sample)), set_lr)


@EACH_CASE
def test_a_compiled_train_step_reads_a_tensor_lr_that_is_filled_or_replaced(case):
    def change(optimizer, step):
        if step == 2:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
        else:
            optimizer.param_groups[0]["lr"].mul_(0.5)

    both(lambda params: case.fused()(params, lr=torch.tensor(0.1)), change)


@pytest.mark.slow
@EACH_CASE
def test_inductor_trains_as_eager_does(case):
    runs = []
    for wrap in (lambda function: function, torch.compile):
        params = make_params([(5, 8), (8, 3)])
        train = wrap(make_step(params, case.fused()(params, lr=0.01)))
        runs.append([*(train(x).detach() for x in batches(4)), *params])
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


def test_a_state_a_group_and_a_member_may_change_between_compiled_steps():
    """What makes a new plan makes no new graph."""
    extra = make_params([(4,)], seed=3)[0]

    def change(optimizer, step):
        params = optimizer.param_groups[0]["params"]
        if step == 1:
            optimizer.load_state_dict(optimizer.state_dict())
        elif step == 2:
            new = torch.nn.Parameter(extra.detach().clone())
            new.grad = torch.ones(4)
            optimizer.add_param_group({"params": [new]})
        elif step == 3:
            optimizer.state[params[0]]["exp_avg"] = torch.ones(5, 8)

    both(lambda params: fusedopt.AdamW(params, lr=0.1), change, steps=6)


def test_no_frame_of_ours_is_looked_at():
    """As many frames as around a function that torch.compiler.disable wraps."""
    counts = []
    for disabled in (False, True):
        params = make_params([(5, 8), (8, 3)])
        optimizer = fusedopt.AdamW(params)
        if disabled:
            optimizer.step = torch.compiler.disable(optimizer.step)
        train = compile_(make_step(params, optimizer))
        torch._dynamo.reset()
        counters.clear()
        for x in batches(3):
            train(x)
        counts.append((dict(counters["frames"]), len(counters["graph_break"])))
    assert counts[0] == counts[1]


def test_the_graph_break_says_what_to_do_instead():
    params = make_params([(5, 8), (8, 3)])
    optimizer = fusedopt.AdamW(params)

    @compile_(fullgraph=True)
    def step():
        optimizer.step()

    with pytest.raises(Exception, match=r"FusedOptimizer\.step[\s\S]*call torch\.ops\.fusedopt"):
        step()


def test_eager_steps_after_compiled_ones_and_after_a_reset_go_on():
    params, others = make_params([(5, 8), (8, 3)]), make_params([(5, 8), (8, 3)])
    optimizer, other = fusedopt.AdamW(params), fusedopt.AdamW(others)
    eager, its_eager = make_step(params, optimizer), make_step(others, other)
    for x in batches(2):
        compile_(eager)(x)
        eager(x)
        torch._dynamo.reset()
        compile_(eager)(x)
        for _ in range(3):
            its_eager(x)
    assert_same((params, optimizer), (others, other))


def test_the_optimizer_alone_under_torch_compile_as_torchs_recipe_has_it():
    """With a scheduler, which patches `step`; and the method itself."""
    runs = []
    for wrap in (lambda function: function, compile_):
        params = make_params([(5, 8), (8, 3)])
        optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        for param in params:
            param.grad = torch.ones_like(param)
        step = wrap(optimizer.step)
        for _ in range(4):
            step()
            scheduler.step()
        runs.append((params, optimizer))
    assert_same(*runs)


def test_closures_hooks_and_overridden_steps_work_under_torch_compile():
    class Counting(fusedopt.SGD):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    runs = []
    for wrap in (lambda function: function, compile_):
        params = make_params([(5, 8), (8, 3)])
        optimizer = Counting(params, lr=0.1)
        fired = []
        optimizer.register_step_post_hook(lambda *_, fired=fired: fired.append(1))

        def train(x, params=params, optimizer=optimizer):
            def closure():
                optimizer.zero_grad()
                loss = (x @ params[0] @ params[1]).square().mean()
                loss.backward()
                return loss

            return optimizer.step(closure)

        train = wrap(train)
        with torch._dynamo.config.patch(error_on_recompile=False):  # `calls` is the user's
            losses = [train(x).item() for x in batches(3)]
        assert optimizer.calls == len(fired) == 3
        runs.append((losses, params, optimizer))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1:], runs[1][1:])


def test_two_optimizers_in_one_compiled_function():
    runs = []
    for wrap in (lambda function: function, compile_):
        params = make_params([(5, 8), (8, 3)])
        optimizers = [fusedopt.AdamW(params[:1]), fusedopt.SGD(params[1:], lr=0.1)]

        def train(x, params=params, optimizers=optimizers):
            (x @ params[0] @ params[1]).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        train = wrap(train)
        for x in batches(3):
            train(x)
        runs.append(clone_params(params))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_sparse_gradient_in_a_compiled_function_is_torchs():
    runs = []
    for wrap in (lambda function: function, compile_):
        params = make_params([(5, 8), (8, 3)])
        optimizer = fusedopt.SGD(params, lr=0.1)

        def train(optimizer=optimizer, params=params):
            optimizer.step()
            return params[0].sum()

        train = wrap(train)
        for step in range(3):
            for param in params:
                param.grad = torch.full_like(param, step + 1.0)
            params[0].grad = params[0].grad.to_sparse()
            train()
        runs.append((params, optimizer))
        assert [route.backend for route in optimizer.routes()] == ["torch", "cpu"]
    assert_same(*runs)


@EACH_CASE
def test_a_whole_training_function_compiled_is_the_eager_one(case):
    """The optimizer and its scheduler are made inside, saved and loaded."""
    runs = []
    for wrap in (lambda function: function, compile_):
        params = make_params([(5, 8), (8, 3)])

        def train(x, params=params):
            optimizer = case.fused()(params, lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            for _ in range(2):
                (x @ params[0] @ params[1]).square().mean().backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())
            (x @ params[0] @ params[1]).square().mean().backward()
            optimizer.step()
            return optimizer

        with torch._dynamo.config.patch(error_on_recompile=False):
            runs.append((params, wrap(train)(batches(1)[0])))
    assert_same(*runs)
