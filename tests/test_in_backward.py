"""Steps in the backward: the trajectories of ordinary loops, with gradients freed on the way."""

import logging
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from backwards import (
    BUCKETS,
    EACH_BUCKET,
    SHAPES,
    adamw_pair,
    layers,
    loop,
    loss_of,
    ordinary_loop,
    step_after,
    steps_of,
    unchanged,
)
from cases import CASES
from devices import needs
from harness import assert_same, make_params
from torch.utils.checkpoint import checkpoint

import fusedopt
from fusedopt.backward_parts import Streams

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# ---- Trajectories ------------------------------------------------------------------------------


def both_loops(make, params_of, backwards, bucket, **kwargs):
    """An ordinary run and one in the backward, which have the same bits; the latter."""
    runs = []
    for run in (ordinary_loop, lambda *args, **kwargs: loop(*args, bucket, **kwargs)):
        params = params_of()
        optimizer = make(params)
        run(optimizer, params, backwards, **kwargs)
        runs.append((params, optimizer))
    assert_same(*runs)
    return runs[1]


@EACH_CASE
def test_trajectories_are_those_of_an_ordinary_loop_bit_for_bit(case):
    for number, sample in enumerate(case.samples):

        def make(params, sample=sample):
            return case.fused()(params, **case.kwargs(sample))

        params, _ = both_loops(make, lambda: make_params(SHAPES), 3, BUCKETS[number % 3])
        assert not any(unchanged(params))


@pytest.mark.parametrize(
    ("case", "dtype", "state_dtype"),
    [
        (CASES[0], torch.bfloat16, torch.float32),
        (CASES[1], torch.float16, None),
        (CASES[2], torch.float64, None),
        (CASES[3], torch.float16, torch.float32),
        (CASES[4], torch.bfloat16, None),
        (CASES[4], torch.bfloat16, torch.float32),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_trajectories_in_other_dtypes(case, dtype, state_dtype):
    def make(params):
        return case.fused()(params, lr=0.01, state_dtype=state_dtype)

    both_loops(make, lambda: make_params(SHAPES, dtype), 3, 100)


@EACH_CASE
def test_trajectories_anywhere(anywhere, case):
    def make(params):
        return case.fused()(params, lr=0.1, backend=anywhere.backend)

    both_loops(make, lambda: make_params(SHAPES, device=anywhere.device), 3, 200)


@EACH_BUCKET
def test_step_counts_and_averages_are_each_parameters_own(bucket):
    missing = {0: (1, 3), 1: (0,), 2: (1, 2)}
    params, optimizer = both_loops(
        lambda params: fusedopt.AdamW(params, lr=0.1, ema_decay=0.5),
        lambda: make_params(SHAPES),
        5,
        bucket,
        leave_out=lambda step: missing.get(step, ()),
    )
    assert steps_of(optimizer, params) == [4, 3, 4, 4]
    assert not torch.equal(optimizer.state[params[0]]["ema"], params[0])


@EACH_BUCKET
def test_param_groups_and_schedulers(bucket):
    def make(params):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.3}]
        optimizer = fusedopt.AdamW(groups, lr=0.02)
        optimizer.schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return optimizer

    (params, optimizer), (theirs, reference) = (
        (params, make(params)) for params in (make_params(SHAPES), make_params(SHAPES))
    )
    with fusedopt.step_in_backward(optimizer, bucket_bytes=bucket):
        for step in range(6):
            loss_of(params, step).backward()
            step_after(reference, loss_of(theirs, step))
            optimizer.schedule.step()
            reference.schedule.step()
    assert_same((params, optimizer), (theirs, reference))
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8


def test_sparse_gradients_are_stepped_by_torch_as_in_an_ordinary_loop(caplog):
    caplog.set_level(logging.ERROR, "fusedopt")
    runs = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(9, 4, sparse=True)
        head = torch.nn.Linear(4, 2)
        params = [*embedding.parameters(), *head.parameters()]
        optimizer = fusedopt.Adagrad(params, lr=0.1)
        if in_backward:
            fusedopt.step_in_backward(optimizer, bucket_bytes=1)
        for step in range(3):
            head(embedding(torch.tensor([step, 7, step]))).square().sum().backward()
            assert in_backward == all(p.grad is None for p in params)
            optimizer.step()
            optimizer.zero_grad()
        runs.append((params, optimizer))
    assert_same(*runs)


@EACH_BUCKET
def test_gradients_from_before_are_part_of_the_next_step(bucket):
    (params, optimizer), (theirs, reference) = adamw_pair()
    loss_of(params, 7).backward()
    loss_of(theirs, 7).backward()
    ordinary_loop(reference, theirs, 2, leave_out=lambda step: (1,))
    loop(optimizer, params, 2, bucket, leave_out=lambda step: (1,))
    assert_same((params, optimizer), (theirs, reference))
    assert steps_of(optimizer, params) == [2, 1, 2, 2]


# ---- Launches and memory -----------------------------------------------------------------------


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize(
    ("bucket", "parts"),
    [(1, [1] * 20), (400, [1] * 20), (401, [2] * 10), (1200, [3] * 6 + [2]), (2**20, [20])],
)
def test_gradients_live_until_their_bucket_is_full(bucket, parts, accumulation_steps):
    model = layers()  # of 400 bytes each
    params = list(model.parameters())
    optimizer = fusedopt.AdamW(params, accumulation_steps=accumulation_steps)
    before, after, memory = [], [], weakref.WeakSet()

    def note_before(param):
        memory.add(param.grad.untyped_storage())
        before.append(len(memory))

    for param in params:
        param.register_post_accumulate_grad_hook(note_before)
    handle = fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    for param in params:
        param.register_post_accumulate_grad_hook(
            lambda _: after.append(sum(p.grad is not None for p in params))
        )
    for _ in range(2):
        before.clear(), after.clear()
        model(torch.ones(1, 10)).sum().backward()
        assert before == [alive for part in parts for alive in range(1, part + 1)]
        # A part that is full is used in the hook of its last gradient, the rest at the end.
        full = [part * 400 >= bucket for part in parts]
        assert after == [
            0 if is_full and alive == part else alive
            for part, is_full in zip(parts, full, strict=True)
            for alive in range(1, part + 1)
        ]
        assert all(param.grad is None for param in params)
    handle.remove()
    model(torch.ones(1, 10)).sum().backward()
    assert after[-1] == 20  # what it would be


@pytest.mark.parametrize(("bucket", "launches"), [(401, 5), (2**20, 1)])
def test_a_bucket_is_one_launch(place, bucket, launches):
    model = layers(10).to(place.device)
    optimizer = fusedopt.AdamW(model.parameters(), backend=place.backend)
    fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    x = torch.ones(1, 10, device=place.device)
    for _ in range(2):
        counted, _ = place.launches(lambda: model(x).sum().backward())
        assert counted == launches


class FakeStream:
    def __init__(self, name, done):
        self.name, self.done = name, done

    def wait_stream(self, other):
        self.done.append(f"{self.name} waits for {other.name}")


def test_launches_of_several_streams_follow_each_other_and_the_caller_follows_them(monkeypatch):
    """Of CUDA's part that needs no CUDA: who waits for whom."""
    done = []
    present = [None]

    @contextmanager
    def enter(stream):
        done.append(f"enters {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present[0])
    monkeypatch.setattr(torch.cuda, "stream", enter)
    left, right, caller = (FakeStream(name, done) for name in ("left", "right", "caller"))
    param = SimpleNamespace(is_cuda=True, device="cuda:0")
    grad = SimpleNamespace(is_cuda=True, is_sparse=False, device="cuda:0")
    grad.record_stream = lambda stream: done.append(f"kept for {stream.name}")
    streams = Streams()

    def launch(last=False):
        with streams.joined([grad], last=last):
            done.append("launch")

    def on(stream, call, *args):
        present[0] = stream
        call(*args)

    on(left, streams.change, param, launch)
    on(left, streams.change, param, launch)
    assert done == []
    on(right, streams.change, param, launch)
    assert done == ["enters left", "launch"]
    done.clear()
    on(right, launch)
    assert done == ["right waits for left", "enters right", "launch"]
    done.clear()
    on(left, streams.change, param, launch)
    on(caller, launch, True)
    waits = {"caller waits for left", "caller waits for right"}
    assert set(done[:2]) == waits
    assert done[2:] == ["enters caller", "kept for caller", "launch"]


@needs("cuda")
def test_gradients_of_several_streams_on_a_gpu():
    for bucket in BUCKETS:
        with torch.cuda.stream(torch.cuda.Stream()):
            both_loops(
                lambda params: fusedopt.AdamW(params, lr=0.1),
                lambda: make_params([(1 << 20,)] * 4, device="cuda"),
                4,
                bucket,
            )
        torch.cuda.synchronize()


# ---- Parameters with several gradients ---------------------------------------------------------


class Tied(torch.nn.Module):
    """One layer used several times among others, under no checkpoint or one of either kind."""

    def __init__(self, kind, uses=2):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.uses = kind, uses
        self.tied = torch.nn.Linear(6, 6)
        self.others = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))

    def call(self, function, x):
        if self.kind is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.kind == "reentrant")

    def forward(self, x):
        x = x * torch.ones(6, requires_grad=True)  # which a reentrant checkpoint needs
        for index, other in enumerate(self.others):
            x = self.call(other, x)
            if index < self.uses:
                x = self.call(lambda y: torch.tanh(self.tied(y)), x)
        return x.square().sum()


def train_tied(model, bucket=None):
    """Three backwards; in them, where a bucket is given. How many gradients there were, too."""
    params, alive = list(model.parameters()), []
    optimizer = fusedopt.AdamW(params, lr=0.1)
    if bucket is not None:
        fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    for param in params:
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in params))
        )
    for step in range(3):
        step_after(optimizer, model(torch.full((2, 6), 1.0 + step)))
    return params, optimizer, alive


@pytest.mark.parametrize(
    ("kind", "uses", "buckets"),
    [
        (None, 2, BUCKETS),
        ("non-reentrant", 2, BUCKETS),
        ("reentrant", 1, BUCKETS),  # one backward, with those inside of it
        ("reentrant", 2, [4 * 168 + 1]),  # a byte more than there are: the tied ones count once
    ],
)
def test_a_parameter_of_several_gradients_is_stepped_once(kind, uses, buckets):
    theirs = train_tied(Tied(kind, uses))[:2]
    for bucket in buckets:
        params, optimizer, alive = train_tied(Tied(kind, uses), bucket)
        assert_same((params, optimizer), theirs)
        assert steps_of(optimizer, params) == [3] * 8
        if bucket >= 4 * 168 + 1:
            assert max(alive) == 8, "some were used before the end"


def test_another_gradient_after_the_step_raises_and_the_next_backward_works():
    model = Tied("reentrant")
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    with pytest.raises(RuntimeError, match=r"parameter \d of shape .* got another gradient"):
        model(torch.ones(2, 6)).backward()
    optimizer.zero_grad()
    assert optimizer.state[model.tied.weight]["step"] == 1
    model.kind = None
    model(torch.ones(2, 6)).backward()
    assert optimizer.state[model.tied.weight]["step"] == 2
    assert all(p.grad is None for p in model.parameters())


def test_a_retained_graph_cannot_be_gone_through_again():
    model = layers(3)
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.step_in_backward(optimizer)
    loss = model(torch.ones(1, 10)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_each_of_two_backwards_is_a_step():
    (params, optimizer), (theirs, reference) = adamw_pair()
    ordinary_loop(reference, theirs, 2)
    with fusedopt.step_in_backward(optimizer):
        losses = [loss_of(params, 0), loss_of(params, 1)]
        for loss in losses:
            loss.backward()
    assert_same((params, optimizer), (theirs, reference))


def test_autograd_grad_steps_nothing():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    torch.autograd.grad(loss_of(params, 0), params)
    assert not optimizer.state
