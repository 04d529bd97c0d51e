"""Steps in the backward: the trajectories of ordinary loops, with gradients freed on the way."""

import copy
import gc
import logging
import pickle
import warnings
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import CASES, case_samples
from devices import needs
from harness import assert_same, make_params
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fusedopt
from fusedopt.backward_parts import Streams
from fusedopt.in_backward import _Hook
from fusedopt.packing import Packed

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Every gradient by itself, some together, all at the end.
BUCKETS = (1, 200, 2**20)
EACH_BUCKET = pytest.mark.parametrize("bucket", BUCKETS, ids=["each", "some", "all"])
# Vectors with a tail, a scalar and a matrix: 4 bytes, 20, 148, 240.
SHAPES = ((37,), (), (5,), (3, 20))


@pytest.fixture
def launches(monkeypatch):
    """What was launched so far, a list of the numbers of gradients."""
    counted = []

    def counting(method):
        def call(packed, *args):
            groups = packed.optimizer.param_groups
            counted.append(sum(p.grad is not None for group in groups for p in group["params"]))
            return method(packed, *args)

        return call

    monkeypatch.setattr(Packed, "launch", counting(Packed.launch))
    monkeypatch.setattr(Packed, "launch_onepass", counting(Packed.launch_onepass))
    return counted


def loss_of(params, seed, leave_out=()):
    """A loss whose gradients are another random tensor for every parameter and seed."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), device=params[0].device)
    for index, param in enumerate(params):
        factor = torch.randn(param.shape, generator=generator)
        if index not in leave_out:
            total = total + (param * factor.to(param.device, param.dtype)).float().sum()
    return total


def ordinary_loop(optimizer, params, backwards, schedule=None, leave_out=lambda step: ()):
    for step in range(backwards):
        loss_of(params, step, leave_out(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def loop(optimizer, params, backwards, bucket, schedule=None, leave_out=lambda step: ()):
    with fusedopt.step_in_backward(optimizer, bucket_bytes=bucket):
        for step in range(backwards):
            loss_of(params, step, leave_out(step)).backward()
            assert all(param.grad is None for param in params)
            if schedule is not None:
                schedule.step()


def adamw_pair(shapes=SHAPES, **kwargs):
    """Two runs that should be the same: parameters and optimizers."""
    runs = []
    for _ in range(2):
        params = make_params(shapes)
        runs.append((params, fusedopt.AdamW(params, lr=0.1, **kwargs)))
    return runs


# ---- Trajectories ------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_trajectories_are_those_of_an_ordinary_loop_bit_for_bit(case, sample):
    theirs = make_params(SHAPES)
    reference = case.fused()(theirs, **case.kwargs(sample))
    ordinary_loop(reference, theirs, 4)
    for bucket in BUCKETS:
        params = make_params(SHAPES)
        optimizer = case.fused()(params, **case.kwargs(sample))
        loop(optimizer, params, 4, bucket)
        assert_same((params, optimizer), (theirs, reference))
        assert not torch.equal(params[0], make_params(SHAPES)[0])


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=["own", "fp32"])
def test_trajectories_in_other_dtypes(case, dtype, state_dtype):
    runs = []
    for run in (ordinary_loop, lambda *args: loop(*args, 100)):
        params = make_params(SHAPES, dtype)
        optimizer = case.fused()(params, lr=0.01, state_dtype=state_dtype)
        run(optimizer, params, 3)
        runs.append((params, optimizer))
    assert_same(*runs)


@EACH_CASE
def test_trajectories_anywhere(anywhere, case):
    runs = []
    for run in (ordinary_loop, lambda *args: loop(*args, 200)):
        params = make_params(SHAPES, device=anywhere.device)
        optimizer = case.fused()(params, lr=0.1, backend=anywhere.backend)
        run(optimizer, params, 3)
        runs.append((params, optimizer))
    assert_same(*runs)


@EACH_BUCKET
def test_step_counts_are_each_parameters_own(bucket):
    (params, optimizer), (theirs, reference) = adamw_pair()

    def leave_out(step):
        return {0: (1, 3), 1: (0,), 2: (1, 2)}.get(step, ())

    ordinary_loop(reference, theirs, 5, leave_out=leave_out)
    loop(optimizer, params, 5, bucket, leave_out=leave_out)
    assert_same((params, optimizer), (theirs, reference))
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 3, 4, 4]


@EACH_BUCKET
def test_param_groups_and_schedulers(bucket):
    runs = []
    for run in (ordinary_loop, lambda *args: loop(*args[:3], bucket, args[3])):
        params = make_params(SHAPES)
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.3}]
        optimizer = fusedopt.AdamW(groups, lr=0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        run(optimizer, params, 6, schedule)
        runs.append((params, optimizer))
    assert_same(*runs)
    assert runs[1][1].param_groups[0]["lr"] == 0.1 / 8


@EACH_BUCKET
def test_averages_are_those_of_an_ordinary_loop(bucket):
    (params, optimizer), (theirs, reference) = adamw_pair(ema_decay=0.5)
    ordinary_loop(reference, theirs, 4, leave_out=lambda step: (step,))
    loop(optimizer, params, 4, bucket, leave_out=lambda step: (step,))
    assert_same((params, optimizer), (theirs, reference))
    assert not torch.equal(optimizer.state[params[0]]["ema"], params[0])


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


# ---- Launches and memory -----------------------------------------------------------------------


def layers(count=20, width=10):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(count)))


def test_a_big_bucket_is_one_launch_a_backward(launches):
    model = layers()
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.step_in_backward(optimizer)
    for _ in range(3):
        model(torch.ones(1, 10)).sum().backward()
    assert launches == [20, 20, 20]


@pytest.mark.parametrize(
    ("bucket", "wanted"),
    [(1, [1] * 20), (400, [1] * 20), (401, [2] * 10), (1200, [3] * 6 + [2]), (8000, [20])],
)
def test_a_small_bucket_is_a_launch_whenever_it_is_full(launches, bucket, wanted):
    model = layers()  # of 400 bytes each
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    for _ in range(2):
        launches.clear()
        model(torch.ones(1, 10)).sum().backward()
        assert launches == wanted


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("bucket", [1, 1000, 4000])
def test_never_more_gradients_than_a_bucket_and_one_are_alive(bucket, accumulation_steps):
    model = layers()
    params = list(model.parameters())
    optimizer = fusedopt.AdamW(params, accumulation_steps=accumulation_steps)
    alive = []

    def measure(_):
        alive.append(sum(p.grad.nbytes for p in params if p.grad is not None))

    for param in params:  # before ours run, and after them
        param.register_post_accumulate_grad_hook(measure)
    handle = fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    for param in params:
        param.register_post_accumulate_grad_hook(measure)
    for _ in range(4):
        model(torch.ones(1, 10)).sum().backward()
        assert all(param.grad is None for param in params)
    before, after = alive[::2], alive[1::2]
    assert len(before) == 80
    assert max(before) < bucket + 400
    assert max(before) >= bucket  # it was used
    assert max(after) < bucket
    handle.remove()
    model(torch.ones(1, 10)).sum().backward()
    assert alive[-1] == 8000  # what it would be


def test_gradients_are_freed_not_only_forgotten():
    model = layers()
    optimizer = fusedopt.AdamW(model.parameters())
    alive, most = weakref.WeakSet(), []

    def watch(param):
        alive.add(param.grad.untyped_storage())
        most.append(len(alive))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(watch)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1200)
    model(torch.ones(1, 10)).sum().backward()
    assert len(most) == 20
    assert max(most) <= 3


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
@EACH_BUCKET
def test_gradients_of_several_streams_on_a_gpu(bucket):
    runs = []
    for run in (ordinary_loop, lambda *args: loop(*args, bucket)):
        params = make_params([(1 << 20,)] * 4, device="cuda")
        optimizer = fusedopt.AdamW(params, lr=0.1)
        with torch.cuda.stream(torch.cuda.Stream()):
            run(optimizer, params, 4)
        torch.cuda.synchronize()
        runs.append((params, optimizer))
    assert_same(*runs)


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


def train_tied(model, in_backward, bucket=2**20, backwards=3):
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1)
    if in_backward:
        fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    for step in range(backwards):
        model(torch.full((2, 6), 1.0 + step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters()), optimizer


@pytest.mark.parametrize("kind", [None, "non-reentrant"])
@EACH_BUCKET
def test_a_parameter_used_twice_is_stepped_once(kind, bucket):
    params, optimizer = train_tied(Tied(kind), in_backward=True, bucket=bucket)
    assert_same((params, optimizer), train_tied(Tied(kind), in_backward=False))
    assert all(optimizer.state[p]["step"] == 3 for p in params)


@EACH_BUCKET
def test_reentrant_checkpoints_are_one_backward(bucket):
    params, optimizer = train_tied(Tied("reentrant", uses=1), in_backward=True, bucket=bucket)
    assert_same((params, optimizer), train_tied(Tied("reentrant", uses=1), in_backward=False))
    assert all(optimizer.state[p]["step"] == 3 for p in params)


def test_a_parameter_of_two_reentrant_checkpoints_is_stepped_once_at_the_end(launches):
    # A byte more than there are gradients: the tied ones count once.
    params, optimizer = train_tied(Tied("reentrant"), in_backward=True, bucket=4 * 168 + 1)
    assert launches == [8, 8, 8]
    assert_same((params, optimizer), train_tied(Tied("reentrant"), in_backward=False))
    assert all(optimizer.state[p]["step"] == 3 for p in params)


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


class Backward(torch.autograd.Function):
    """What reentrant checkpointing does, around any function; runs `after` after its backward."""

    @staticmethod
    def forward(ctx, function, after, x):
        ctx.function, ctx.after = function, after
        ctx.save_for_backward(x)
        return function(x.detach()).detach()

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        x = saved.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, grad)
        ctx.after()
        return None, None, x.grad


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
        assert optimizer._onepass.micro_batches == backwards % 2
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())


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


# ---- Accumulation ------------------------------------------------------------------------------


@EACH_CASE
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@EACH_BUCKET
def test_every_backward_is_a_micro_batch(case, reduction, bucket):
    runs = []
    for run in (ordinary_loop, lambda *args: loop(*args, bucket)):
        params = make_params(SHAPES)
        optimizer = case.fused()(
            params, lr=0.1, accumulation_steps=3, accumulation_reduction=reduction
        )
        run(optimizer, params, 11)  # ends in the middle of a window
        optimizer.state_dict()  # makes the window's entries true
        runs.append((params, optimizer))
    assert_same(*runs)
    assert not torch.equal(runs[0][0][0], make_params(SHAPES)[0])
    assert runs[1][1].state[runs[1][0][0]]["window"].tolist()[:2] == [2, 2]


@EACH_BUCKET
def test_windows_anywhere_with_gradients_that_come_and_go(anywhere, bucket):
    missing = [(1,), (0, 1), (2,), (1, 3), (0, 1, 2), (1, 2), (0,), (), (3, 2, 1)]
    runs = []
    for run in (ordinary_loop, lambda *args, **named: loop(*args, bucket, **named)):
        params = make_params(SHAPES, device=anywhere.device)
        optimizer = fusedopt.AdamW(
            params, lr=0.1, accumulation_steps=3, ema_decay=0.5, backend=anywhere.backend
        )
        run(optimizer, params, 9, leave_out=missing.__getitem__)
        runs.append((params, optimizer))
    assert_same(*runs)
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 2, 3, 3]


def test_only_the_last_backward_of_a_window_updates(launches):
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params, accumulation_steps=3)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    for backward in range(6):
        before = [p.detach().clone() for p in params]
        assert optimizer.will_step == (backward % 3 == 2)
        loss_of(params, backward).backward()
        for old, param in zip(before, params, strict=True):
            assert torch.equal(old, param) == (backward % 3 != 2)
    assert launches == [1] * 24


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
        loss_of(params, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict(), reference.state_dict()  # makes the window's entries true
    assert_same((params, optimizer), (theirs, reference))


def test_step_does_not_count_a_micro_batch():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params, accumulation_steps=3)
    fusedopt.step_in_backward(optimizer)
    loss_of(params, 0).backward()
    for _ in range(3):
        optimizer.step()
    assert optimizer._onepass.micro_batches == 1


def test_accumulate_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    fusedopt.step_in_backward(optimizer)
    loss_of(params, 0).backward()
    with pytest.raises(RuntimeError, match=r"accumulate\(\) under step_in_backward"):
        optimizer.accumulate()
    assert optimizer._onepass is None


def test_a_window_that_accumulate_began_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    loss_of(params, 0).backward()
    optimizer.accumulate()
    with pytest.raises(RuntimeError, match="begun a window of 1 micro-batches"):
        fusedopt.step_in_backward(optimizer)
    optimizer.step()
    fusedopt.step_in_backward(optimizer)


# ---- What it cannot do -------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [0, -1, 1.5, True, None, "32MB", float("inf")])
def test_bucket_bytes_must_be_a_whole_number_above_zero(bucket):
    optimizer = fusedopt.SGD(make_params(SHAPES))
    with pytest.raises(ValueError, match=r"bucket_bytes=.* must be a whole number"):
        fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    assert optimizer._in_backward is None


def test_other_optimizers_raise():
    with pytest.raises(TypeError, match=r"optimizer is a SGD; .* needs a fusedopt optimizer"):
        fusedopt.step_in_backward(torch.optim.SGD(make_params(SHAPES)))


@pytest.mark.parametrize(
    "option",
    [
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": float("inf")},
        {"skip_nonfinite": True},
        {"zero_grads": True},
    ],
    ids=str,
)
def test_options_that_need_all_gradients_raise(option):
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        fusedopt.step_in_backward(optimizer)
    assert optimizer._in_backward is None
    loss_of(params, 0).backward()
    assert all(param.grad is not None for param in params)  # no hook is left


def test_a_norm_that_is_asked_for_later_raises_in_the_backward():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 cannot be had"):
        loss_of(params, 0).backward()
    assert all(torch.equal(p, old) for p, old in zip(params, make_params(SHAPES), strict=True))


@pytest.mark.parametrize("scaler_class", [fusedopt.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("fused", [None, True], ids=["plain", "fused"])
def test_grad_scalers_raise(scaler_class, unscaled, fused):
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, fused=fused)
    handle = fusedopt.step_in_backward(optimizer)
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
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    fusedopt.step_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(params, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(params[0], make_params(SHAPES)[0])


def test_an_optimizer_that_a_grad_scaler_has_stepped_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(loss_of(params, 0)).backward()
    scaler.step(optimizer)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="a GradScaler has stepped this optimizer"):
        fusedopt.step_in_backward(optimizer)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_raises(alone):
    model = layers(2)
    wrapped = DistributedDataParallel(model)
    optimizer = fusedopt.SGD(wrapped.parameters())
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel: .* after hooks"):
        fusedopt.step_in_backward(optimizer)
    wrapped(torch.ones(1, 10)).sum().backward()
    assert all(param.grad is not None for param in model.parameters())
    fusedopt.step_in_backward(fusedopt.SGD(layers(1).parameters()))  # of another model


def test_distributed_data_parallel_that_comes_later_raises_in_the_first_backward(alone):
    model = layers(2)
    optimizer = fusedopt.SGD(model.parameters())
    handle = fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        wrapped(torch.ones(1, 10)).sum().backward()
    assert all(map(torch.equal, model.parameters(), layers(2).parameters()))
    handle.remove()


def test_distributed_data_parallel_that_is_gone_does_no_harm(alone):
    model = layers(2)
    wrapped = DistributedDataParallel(model)
    wrapped.itself = [wrapped]  # lives until a collection
    del wrapped
    optimizer = fusedopt.SGD(model.parameters())
    fusedopt.step_in_backward(optimizer)


def test_objects_are_not_asked_for_their_class():
    class Proxy:
        @property
        def __class__(self):
            raise AssertionError("asked")

    proxy = Proxy()
    optimizer = fusedopt.SGD(make_params(SHAPES))
    fusedopt.step_in_backward(optimizer)
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
    assert not any(p._post_accumulate_grad_hooks for p in params)
    for step in (2, 3):
        loss_of(params, step).backward()
        assert all(param.grad is not None for param in params)
        optimizer.step()
        optimizer.zero_grad()
    assert_same((params, optimizer), (theirs, reference))


def test_remove_inside_of_a_backward_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    handle = fusedopt.step_in_backward(optimizer)
    params[0].register_hook(lambda grad: handle.remove())
    with pytest.raises(RuntimeError, match=r"remove\(\) inside of a backward"):
        loss_of(params, 0).backward()


def test_twice_on_one_optimizer_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    handle = fusedopt.step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="steps in the backward already"):
        fusedopt.step_in_backward(optimizer)
    assert [len(p._post_accumulate_grad_hooks) for p in params] == [1] * len(params)
    handle.remove()
    fusedopt.step_in_backward(optimizer)


def test_two_optimizers_of_one_parameter_raise():
    params = make_params(SHAPES)
    first, second = fusedopt.SGD(params), fusedopt.SGD(params[1:])
    handle = fusedopt.step_in_backward(first)
    with pytest.raises(RuntimeError, match="by another optimizer"):
        fusedopt.step_in_backward(second)
    assert second._in_backward is None
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
        loss_of(some[:2], 0).backward()
        group_of.step()
        group_of.zero_grad()
        group_of.add_param_group({"params": some[2:], "lr": 0.3})
        loss_of(some[2:], 1).backward()  # of the new ones alone
        group_of.step()
        group_of.zero_grad()
    assert_same((params, optimizer), (theirs, reference))
    assert [int(optimizer.state[p]["step"]) for p in params] == [1] * 4
    assert all(param.grad is None for param in params)


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
    assert not any(p._post_accumulate_grad_hooks for p in params)
    assert optimizer._in_backward is None


def test_parameters_that_are_put_into_or_taken_out_of_a_group_are_noticed():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params[:2], lr=1.0)
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    optimizer.param_groups[0]["params"][:] = params[1:3]
    for _ in range(2):
        loss_of(params, 0).backward()
    for param, old, stepped in zip(params, make_params(SHAPES), (0, 1, 1, 0), strict=True):
        assert torch.equal(param, old) != stepped
        assert (param.grad is None) == stepped
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
    assert not torch.equal(params[0], make_params(SHAPES)[0])


@EACH_BUCKET
def test_gradients_from_before_are_part_of_the_next_step(bucket):
    (params, optimizer), (theirs, reference) = adamw_pair()
    loss_of(params, 7).backward()
    loss_of(theirs, 7).backward()
    ordinary_loop(reference, theirs, 2, leave_out=lambda step: (1,))
    loop(optimizer, params, 2, bucket, leave_out=lambda step: (1,))
    assert_same((params, optimizer), (theirs, reference))
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1, 2, 2]


# ---- step() ------------------------------------------------------------------------------------


def test_step_does_nothing_more(launches):
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    fusedopt.step_in_backward(optimizer)
    loss_of(params, 0).backward()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert launches == [4]
    assert all(map(torch.equal, before, params))
    assert optimizer.state[params[0]]["step"] == 1


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
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, lr=1.0)
    fusedopt.step_in_backward(optimizer)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[0], make_params(SHAPES)[0] - 1.0)


def test_step_does_not_know_the_micro_batch_of_gradients_that_were_set_by_hand():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, accumulation_steps=2)
    fusedopt.step_in_backward(optimizer)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="gradients that no backward made"):
        optimizer.step()


@pytest.mark.parametrize("calls_step", [False, True])
def test_schedulers_do_not_warn(calls_step):
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fusedopt.step_in_backward(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            loss_of(params, step).backward()
            if calls_step:
                optimizer.step()
            schedule.step()


def test_step_hooks_fire_around_step_alone():
    calls = []
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    fusedopt.step_in_backward(optimizer, bucket_bytes=1)
    loss_of(params, 0).backward()
    assert calls == []
    optimizer.step()
    assert calls == ["pre", "post"]


def test_inside_of_swapped_averages_the_backward_raises():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, ema_decay=0.5)
    fusedopt.step_in_backward(optimizer)
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
            loss = ((x @ params[0]).relu() @ params[1]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with torch._dynamo.config.patch(error_on_recompile=True):
            train = torch.compile(train, backend="aot_eager")
            for step in range(4):
                train(torch.full((3, 4), 1.0 + step))
        runs.append((params, optimizer))
        torch._dynamo.reset()
    assert_same(*runs)
    assert runs[1][1].state[runs[1][0][0]]["step"] == 4


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
    assert not any(p._post_accumulate_grad_hooks for p in others)
    assert other._in_backward is None
    loss_of(others, 1).backward()
    assert all(param.grad is not None for param in others)
    other.step()
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
    hooks = [list(p._post_accumulate_grad_hooks.values()) for p in params]
    assert [len(h) for h in hooks] == [1] * len(params)
    assert all(isinstance(h, _Hook) for (h,) in hooks)


# ---- Exceptions --------------------------------------------------------------------------------


class Failing(torch.autograd.Function):
    """Fails in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("no")


def fail(params, seed):
    """A backward that fails when all but the first parameter have their gradients."""
    (Failing.apply(params[0]).sum() + loss_of(params[1:], seed)).backward()


def in_order(params, seed, fails):
    """A backward in which parameters get gradients from the last to the first, which may fail."""
    x = params[0].sum()
    if fails:
        x = Failing.apply(x)
    for param in params[1:]:
        x = x * 0.5 + (x.detach() + seed) * param.sum()
    x.backward()


def test_an_exception_in_the_backward_drops_what_was_collected():
    (params, optimizer), (theirs, reference) = adamw_pair([(3,)] * 4)
    fusedopt.step_in_backward(optimizer)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no"):
            in_order(params, 1.0, fails=True)
        assert all(param.grad is None for param in params)
        assert optimizer._in_backward._pending == {}
        assert optimizer._in_backward._tasks == {}
        assert not optimizer.state
    for seed in (2.0, 3.0):
        in_order(params, seed, fails=False)
        in_order(theirs, seed, fails=False)
        reference.step()
        reference.zero_grad()
    assert_same((params, optimizer), (theirs, reference))


def test_an_exception_leaves_updated_what_was_updated():
    (params, optimizer), _ = adamw_pair([(3,)] * 4)
    fusedopt.step_in_backward(optimizer, bucket_bytes=24)
    with pytest.raises(ArithmeticError):
        in_order(params, 1.0, fails=True)
    assert [int(optimizer.state[p]["step"]) for p in params if p in optimizer.state] == [1, 1]
    in_order(params, 1.0, fails=False)
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1, 2, 2]


def test_an_exception_inside_of_a_nested_backward():
    model = layers(3)
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.step_in_backward(optimizer)
    kept = []

    def no():
        raise ArithmeticError("no")

    for after in (no, lambda: None):
        x = torch.ones(1, 10, requires_grad=True)
        loss = Backward.apply(model, after, x).sum()
        kept.append(loss)  # graphs that stay alive
        if after is no:
            with pytest.raises(ArithmeticError):
                loss.backward()
            optimizer.zero_grad()
            assert not optimizer.state
        else:
            loss.backward()
    assert all(optimizer.state[p]["step"] == 1 for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_step_that_fails_leaves_a_clean_state(monkeypatch):
    (params, optimizer), (theirs, reference) = adamw_pair()
    ordinary_loop(reference, theirs, 1)
    fusedopt.step_in_backward(optimizer, bucket_bytes=200)
    with monkeypatch.context() as patch:
        patch.setattr(Packed, "launch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(params, 0).backward()
    assert not optimizer.state
    optimizer.zero_grad()
    loss_of(params, 0).backward()
    assert_same((params, optimizer), (theirs, reference))


@pytest.mark.parametrize("at", [0, 1], ids=["first", "closing"])
@pytest.mark.parametrize("bucket", [2**20, 24], ids=["nothing was added", "some was"])
def test_an_exception_in_a_window_leaves_it_as_it_was_or_empty(at, bucket):
    (params, optimizer), (theirs, reference) = adamw_pair([(3,)] * 4, accumulation_steps=2)
    fusedopt.step_in_backward(optimizer, bucket_bytes=bucket)
    for step in range(at):
        in_order(params, step, fails=False)
    with pytest.raises(ArithmeticError):
        in_order(params, 5.0, fails=True)
    kept = at if bucket == 2**20 else 0
    assert optimizer._onepass.micro_batches == kept if optimizer._onepass else kept == 0
    if bucket == 24 and at == 1:  # some took their step of the window
        assert [int(optimizer.state[p]["step"]) for p in params] == [0, 0, 1, 1]
        for param in params:
            assert not optimizer.state[param]["accumulated_grad"].any()
        return
    for step in range(kept):
        in_order(theirs, step, fails=False)
        reference.step()
        reference.zero_grad()
    for step in (6, 7, 8, 9)[kept:]:
        for some, any_of in ((params, optimizer), (theirs, reference)):
            in_order(some, step, fails=False)
            any_of.step()
            any_of.zero_grad()
    assert optimizer.state_dict()["state"][0]["window"].tolist()[0] == 0
    reference.state_dict()
    assert_same((params, optimizer), (theirs, reference))


# ---- FSDP2 -------------------------------------------------------------------------------------


def fsdp2_steps_in_the_backward(world):
    mesh = world.mesh(2)
    if mesh is None:
        return
    for accumulation_steps in (1, 2):
        for bucket in (1, 500, 2**20):
            runs = []
            for in_backward in (False, True):
                model = layers(4)
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
                assert torch.equal(param.to_local(), other.to_local())
                state, wanted = optimizer.state[param], reference.state[other]
                assert state["step"] == wanted["step"] == 4 // accumulation_steps
                assert torch.equal(state["exp_avg"].to_local(), wanted["exp_avg"].to_local())


def ddp_raises_on_every_rank(world):
    model = layers(2)
    wrapped = DistributedDataParallel(model)
    optimizer = fusedopt.SGD(model.parameters())
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        fusedopt.step_in_backward(optimizer)
    wrapped(torch.ones(1, 10)).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("check", [fsdp2_steps_in_the_backward, ddp_raises_on_every_rank])
def test_on_three_ranks(check, tmp_path):
    assert ranks.run([check], tmp_path)[check.__name__] == ""
