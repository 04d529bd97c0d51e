"""Clipping, checking, averaging and accumulating on gloo: every check runs in real processes.

Runs over ranks are compared with one process that sees all of the data, or whole tensors. Models
are float64 where sums over ranks are compared with sums of one process, whose order is another.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES
from harness import set_grads
from ranks import Checks, Net, set_sharded_grads, shard_like, sharded, whole
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import fusedopt

CHECKS = Checks()
check, on_meshes = CHECKS.add, CHECKS.on_meshes

NAN = float("nan")
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# Sizes of the micro-batches of a window, by rank: unequal in every way.
SIZES = [[3, 1, 2], [1, 4], [5]]
WITH_STATE = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
}


def optimizer_of(net, name="AdamW", **options):
    return getattr(fusedopt, name)(net.parameters(), **WITH_STATE[name], **options)


def rows(window, rank, micro_batch, size):
    """Inputs, the same in every process."""
    seed = 1000 * window + 10 * rank + micro_batch
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)).double()


def window_of(window, rank, sizes=SIZES):
    return [rows(window, rank, number, size) for number, size in enumerate(sizes[rank])]


def loss_of(model, x):
    return model(x).square().mean()


def ddp(mesh, net, **kwargs):
    return DistributedDataParallel(net, process_group=mesh.get_group(), **kwargs)


def gathered(mesh, tensor):
    """A tensor of every rank."""
    tensor = tensor.detach().contiguous()
    tensors = [torch.empty_like(tensor) for _ in range(mesh.size())]
    dist.all_gather(tensors, tensor, group=mesh.get_group())
    return tensors


def assert_ranks_equal(mesh, params, optimizer):
    for param in params:
        state = optimizer.state.get(param, {})
        names = sorted(name for name in state if name != "window")
        flags = torch.tensor([name in names for name in ("step", "exp_avg", "momentum_buffer")])
        for tensor in (flags.int(), param, *(state[name] for name in names)):
            assert all(torch.equal(tensor, other) for other in gathered(mesh, tensor))


@contextlib.contextmanager
def counted_collectives(model, done):
    """Counts those of a backward and those that Python asks for; a model takes one hook only."""

    def in_backward(state, bucket):
        done["backward"] += 1
        done["python"] -= 1  # which it calls as well
        return allreduce_hook(state, bucket)

    def all_reduce(*args, **kwargs):
        done["python"] += 1
        return original(*args, **kwargs)

    done.update(backward=0, python=0)
    with contextlib.suppress(RuntimeError):
        model.register_comm_hook(model.process_group, in_backward)
    original, dist.all_reduce = dist.all_reduce, all_reduce
    try:
        yield
    finally:
        dist.all_reduce = original


# ---- DistributedDataParallel ---------------------------------------------------------------------


@on_meshes(2, 3)
def unequal_weights_over_ranks_and_micro_batches_are_the_one_big_batch(world, mesh):
    for options in ({}, {"max_grad_norm": 0.05}):
        for inside in (True, False):
            net, alone = Net(torch.float64), Net(torch.float64)
            model = ddp(mesh, net)
            optimizers = [optimizer_of(n, **options) for n in (net, alone)]
            for window in range(3):
                with fusedopt.accumulating(model, optimizers[0]):
                    for x in window_of(window, world.rank):
                        loss_of(model, x).backward()
                        optimizers[0].accumulate(weight=len(x))
                    if inside:
                        optimizers[0].step()
                if not inside:
                    optimizers[0].step()
                assert_ranks_equal(mesh, net.parameters(), optimizers[0])
                everything = [window_of(window, rank) for rank in range(mesh.size())]
                loss_of(alone, torch.cat([x for part in everything for x in part])).backward()
                if options:
                    norm = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()])
                    assert norm > 0.05
                    for other in gathered(mesh, optimizers[0].grad_norm):
                        assert torch.equal(other, optimizers[0].grad_norm)
                        torch.testing.assert_close(other.double(), norm, rtol=1e-7, atol=0)
                optimizers[1].step()
                optimizers[1].zero_grad()
                ours, theirs = list(net.parameters()), list(alone.parameters())
                torch.testing.assert_close(ours, theirs, **CLOSE)


@on_meshes(2)
def weights_may_be_tensors(world, mesh):
    net, alone = Net(torch.float64), Net(torch.float64)
    model = ddp(mesh, net)
    optimizers = [optimizer_of(n) for n in (net, alone)]
    with fusedopt.accumulating(model, optimizers[0]):
        for x in window_of(0, world.rank):
            loss_of(model, x).backward()
            optimizers[0].accumulate(weight=torch.tensor(len(x)))
        optimizers[0].step()
    everything = [x for rank in range(2) for x in window_of(0, rank)]
    loss_of(alone, torch.cat(everything)).backward()
    optimizers[1].step()
    torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)


@on_meshes(2, 3)
def counted_windows_and_several_in_one_block(world, mesh):
    """The block is around the loop here: every window of it is added up."""
    sizes = [[4, 4, 4]] * 3
    for reduction in ("mean", "sum"):
        net, alone = Net(torch.float64), Net(torch.float64)
        model = ddp(mesh, net)
        options = {"accumulation_steps": 3, "accumulation_reduction": reduction}
        optimizers = [optimizer_of(net, "SGD", **options), optimizer_of(alone, "SGD")]
        divisor = 3 if reduction == "sum" else 1
        with fusedopt.accumulating(model, optimizers[0]):
            for window in range(3):
                for x in window_of(window, world.rank, sizes):
                    (loss_of(model, x) / divisor).backward()
                    optimizers[0].step()
                    optimizers[0].zero_grad()
                assert_ranks_equal(mesh, net.parameters(), optimizers[0])
        for window in range(3):
            everything = [window_of(window, rank, sizes) for rank in range(mesh.size())]
            loss_of(alone, torch.cat([x for part in everything for x in part])).backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
        torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)


@on_meshes(2)
def a_window_has_one_all_reduce_of_flags_and_one_of_every_bucket(world, mesh):
    net, done = Net(torch.float64), {}
    model = ddp(mesh, net)
    optimizer = optimizer_of(net, max_grad_norm=1.0)
    with counted_collectives(model, done):
        with fusedopt.accumulating(model, optimizer):
            for x in window_of(0, 0):
                loss_of(model, x).backward()
                optimizer.accumulate()
            assert done == {"backward": 0, "python": 0}
            optimizer.step()
        assert done == {"backward": 0, "python": 2}
        loss_of(model, window_of(0, 0)[0]).backward()
        assert done["backward"] >= 1, "the hook counts nothing"


@on_meshes(2)
def buckets_are_of_one_dtype_and_of_limited_size(world, mesh):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.bfloat16]
            shapes = [(30, 2), (7,), (5, 5), (3,)]
            self.params = torch.nn.ParameterList(
                torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
            )
            self.params[2] = torch.nn.Parameter(self.params[2].detach().t())  # not contiguous

        def forward(self, factors):
            return sum((p.double() * f).sum() for p, f in zip(self.params, factors, strict=True))

    ends, sizes = [], []
    for limit in (25 * 2**20, 200):
        model = Mixed()
        wrapped, done = ddp(mesh, model), {}
        optimizer = fusedopt.SGD(model.parameters(), lr=1.0)
        fusedopt.distributed._BUCKET_BYTES = limit
        with counted_collectives(wrapped, done), fusedopt.accumulating(wrapped, optimizer):
            wrapped([1.0 + world.rank] * 4).backward()
            optimizer.accumulate(weight=1 + world.rank)
            optimizer.step()
        fusedopt.distributed._BUCKET_BYTES = 25 * 2**20
        sizes.append(done["python"])
        ends.append([p.detach() for p in model.parameters()])
        for param, start in zip(model.parameters(), Mixed().parameters(), strict=True):
            # (1 * 1 + 2 * 2) / 3, rounded to the accumulator's dtype and to the parameter's
            torch.testing.assert_close(param, start - 5 / 3, rtol=2.0**-7, atol=2.0**-7)
    # Of 240, 28, 200 and 12 bytes, in float32 but for the third.
    assert sizes == [1 + 3, 1 + 4]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Branches(torch.nn.Module):
    """Layers of which a call uses those that it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(4, 2) for _ in range(4))
        self.double()

    def forward(self, x, used):
        return sum(self.branches[number](x) for number in used)


@on_meshes(2, 3)
def a_parameter_that_one_rank_alone_used_is_updated_on_all(world, mesh):
    # By window and rank; branch 3 is used nowhere, branch 2 in the second window for the first time
    # and by one rank alone, and in the third by none of these.
    used = [[[0, 1], [1], [1]], [[0], [2], [0, 1]], [[0], [0], [1]]]
    for name, states in (("SGD", ["momentum_buffer"]), ("AdamW", ["exp_avg", "step"])):
        net, alone = Branches(), Branches()
        model = ddp(mesh, net, find_unused_parameters=True)
        options = {"max_grad_norm": 0.5, "ema_decay": 0.5}
        optimizers = [optimizer_of(n, name, **options) for n in (net, alone)]
        for window, by_rank in enumerate(used):
            before = copy.deepcopy(list(net.parameters()))
            with fusedopt.accumulating(model, optimizers[0]):
                for x in window_of(window, world.rank):
                    model(x, by_rank[world.rank]).square().mean().backward()
                    optimizers[0].accumulate(weight=len(x))
                optimizers[0].step()
            assert all(p.grad is None for p in net.parameters())
            assert_ranks_equal(mesh, net.parameters(), optimizers[0])
            for rank in range(mesh.size()):
                for x in window_of(window, rank):
                    alone(x, by_rank[rank]).square().mean().backward()
                    optimizers[1].accumulate(weight=len(x))
            optimizers[1].step()
            anywhere = {number for branch in by_rank[: mesh.size()] for number in branch}
            for number in range(4):
                ours = list(net.branches[number].parameters())
                theirs = list(alone.branches[number].parameters())
                torch.testing.assert_close(ours, theirs, **CLOSE)
                for a, b in zip(ours, theirs, strict=True):
                    for state in [*states, "ema"]:
                        assert (state in optimizers[0].state[a]) == (
                            state in optimizers[1].state[b]
                        )
                        if state in optimizers[0].state[a]:
                            both = [
                                o.state[p][state] for o, p in zip(optimizers, (a, b), strict=True)
                            ]
                            torch.testing.assert_close(*both, **CLOSE)
                moved = not torch.equal(ours[0], before[2 * number])
                assert moved == (number in anywhere)


@on_meshes(2, 3)
def a_micro_batch_that_is_not_finite_is_left_out_on_its_rank_alone(world, mesh):
    bad = (1, 0)  # of rank 1, the first
    options = {"skip_nonfinite": True, "max_grad_norm": 0.05}
    net, alone = Net(torch.float64), Net(torch.float64)
    model = ddp(mesh, net)
    optimizers = [optimizer_of(n, **options) for n in (net, alone)]
    for window in range(2):
        with fusedopt.accumulating(model, optimizers[0]):
            for number, x in enumerate(window_of(window, world.rank)):
                factor = NAN if (world.rank, number) == bad else 1.0
                (loss_of(model, x) * factor).backward()
                optimizers[0].accumulate(weight=len(x))
            optimizers[0].step()
        assert not optimizers[0].step_was_skipped
        assert_ranks_equal(mesh, net.parameters(), optimizers[0])
        everything = [
            x
            for rank in range(mesh.size())
            for number, x in enumerate(window_of(window, rank))
            if (rank, number) != bad
        ]
        loss_of(alone, torch.cat(everything)).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)

    # Nothing is left of a window that is not finite anywhere.
    before = copy.deepcopy(list(net.parameters()))
    with fusedopt.accumulating(model, optimizers[0]):
        (loss_of(model, window_of(0, 0)[0]) * NAN).backward()
        optimizers[0].accumulate()
        optimizers[0].step()
    assert optimizers[0].step_was_skipped
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@on_meshes(2)
def a_scaler_hears_of_the_last_micro_batch_of_a_counted_window(world, mesh):
    """Which is accumulated and used up in one call."""
    for at in range(3):
        net, alone = Net(torch.float64), Net(torch.float64)
        model = ddp(mesh, net)
        optimizer = optimizer_of(net, accumulation_steps=3)
        reference = optimizer_of(alone)
        scaler = fusedopt.GradScaler("cpu", init_scale=8.0, growth_interval=100)
        for window in range(2):
            with fusedopt.accumulating(model, optimizer):
                for number in range(3):
                    x = rows(window, world.rank, number, 4)
                    overflows = window == 0 and number == at and world.rank == 1
                    scaler.scale(loss_of(model, x) * (NAN if overflows else 1.0)).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
            assert scaler.get_scale() == (4.0 if world.rank == 1 else 8.0)
            assert_ranks_equal(mesh, net.parameters(), optimizer)
            for rank in range(2):
                for number in range(3):
                    if (window, rank, number) != (0, 1, at):
                        loss_of(alone, rows(window, rank, number, 4)).backward()
                        reference.accumulate()
            reference.step()
            torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)


@on_meshes(2, 3)
def without_accumulating_every_micro_batch_is_added_up_by_itself(world, mesh):
    for options in ({"accumulation_steps": 2}, {}):
        limits = {"skip_nonfinite": True, "max_grad_norm": 0.05}
        net, alone = Net(torch.float64), Net(torch.float64)
        model, done = ddp(mesh, net), {}
        optimizers = [optimizer_of(net, **options, **limits), optimizer_of(alone, **limits)]
        for window in range(3):
            with counted_collectives(model, done):
                for number in range(2):
                    # The weight of a micro-batch is the same on all ranks.
                    x = rows(window, world.rank, number, 4)
                    factor = NAN if window == 1 and world.rank == 1 and number == 0 else 1.0
                    (loss_of(model, x) * factor).backward()
                    if options:
                        optimizers[0].step()
                        optimizers[0].zero_grad()
                    else:
                        optimizers[0].accumulate(weight=1 + number)
            if not options:
                optimizers[0].step()
            assert done["backward"] >= 2
            assert done["python"] == 0
            skipped = gathered(mesh, optimizers[0].step_was_skipped.int())
            assert not any(skipped)
            assert_ranks_equal(mesh, net.parameters(), optimizers[0])
            for number in range(2):
                if (window, number) == (1, 0):
                    continue  # one rank's NaN is in the mean of all
                everything = [rows(window, rank, number, 4) for rank in range(mesh.size())]
                loss_of(alone, torch.cat(everything)).backward()
                optimizers[1].accumulate(weight=1 if options else 1 + number)
            optimizers[1].step()
            torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)
            norms = gathered(mesh, optimizers[0].grad_norm)
            assert all(torch.equal(norm, norms[0]) for norm in norms)

    # Without accumulation, all skip together.
    optimizer = optimizer_of(net, skip_nonfinite=True)
    before = copy.deepcopy(list(net.parameters()))
    factor = NAN if world.rank == 0 else 1.0
    (loss_of(model, rows(0, world.rank, 0, 4)) * factor).backward()
    optimizer.step()
    assert optimizer.step_was_skipped
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@on_meshes(2)
def a_half_full_window_is_carried_from_block_to_block(world, mesh):
    net, alone = Net(torch.float64), Net(torch.float64)
    model = ddp(mesh, net)
    optimizers = [optimizer_of(n) for n in (net, alone)]
    for _ in range(2):
        for x in window_of(0, 0, [[1, 2, 3]]):
            with fusedopt.accumulating(model, optimizers[0]):
                loss_of(model, x + world.rank).backward()
                optimizers[0].accumulate(weight=len(x))
            for rank in range(2):
                loss_of(alone, x + rank).backward()
                optimizers[1].accumulate(weight=len(x))
        for optimizer in optimizers:
            optimizer.step()
        assert_ranks_equal(mesh, net.parameters(), optimizers[0])
        torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)
    # Outside of blocks, steps are of gradients that have been added up.
    loss_of(model, rows(0, world.rank, 0, 4)).backward()
    optimizers[0].step()
    assert_ranks_equal(mesh, net.parameters(), optimizers[0])


@on_meshes(2)
def accumulating_refuses_what_it_cannot_add_up(world, mesh):
    net = Net(torch.float64)
    model = ddp(mesh, net)
    optimizer = optimizer_of(net)
    with (
        pytest.raises(TypeError, match="model is a Net"),
        fusedopt.accumulating(net, optimizer),
    ):
        pass
    theirs = torch.optim.AdamW(net.parameters())
    with (
        pytest.raises(TypeError, match="optimizer is a AdamW"),
        fusedopt.accumulating(model, theirs),
    ):
        pass
    loss_of(model, rows(0, world.rank, 0, 4)).backward()
    optimizer.accumulate()
    with (
        pytest.raises(RuntimeError, match="1 micro-batches that are summed up"),
        fusedopt.accumulating(model, optimizer),
    ):
        pass
    assert model.require_backward_grad_sync
    optimizer.step()
    assert_ranks_equal(mesh, net.parameters(), optimizer)

    if world.rank == 0:
        other = ddp(world.meshes[1], Net(torch.float64))
        with (
            fusedopt.accumulating(model, optimizer),
            pytest.raises(RuntimeError, match="another process group"),
            fusedopt.accumulating(other, optimizer),
        ):
            pass


@on_meshes(2)
def an_exception_in_the_block_leaves_a_usable_optimizer(world, mesh):
    net, alone = Net(torch.float64), Net(torch.float64)
    model = ddp(mesh, net)
    optimizers = [optimizer_of(n) for n in (net, alone)]

    def fails(at):
        if at == 1:
            loss_of(model, rows(0, world.rank, 0, 4)).backward()
            optimizers[0].accumulate(weight=4)
        raise ZeroDivisionError

    for at in (0, 1):  # before the first micro-batch, and after it
        with (
            pytest.raises(ZeroDivisionError),
            fusedopt.accumulating(model, optimizers[0]),
        ):
            fails(at)
        assert model.require_backward_grad_sync
    with fusedopt.accumulating(model, optimizers[0]):
        loss_of(model, rows(0, world.rank, 1, 2)).backward()
        optimizers[0].accumulate(weight=2)
        optimizers[0].step()
    everything = [rows(0, rank, number, 4 - 2 * number) for rank in range(2) for number in range(2)]
    loss_of(alone, torch.cat(everything)).backward()
    optimizers[1].step()
    assert_ranks_equal(mesh, net.parameters(), optimizers[0])
    torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)
    optimizers[0].zero_grad()
    loss_of(model, rows(1, world.rank, 0, 4)).backward()
    optimizers[0].step()
    assert_ranks_equal(mesh, net.parameters(), optimizers[0])


@on_meshes(2, 3)
def what_one_rank_finds_wrong_raises_on_all_and_changes_nothing(world, mesh):
    """None is left waiting for the others."""
    net, alone = Net(torch.float64), Net(torch.float64)
    model = ddp(mesh, net)
    optimizers = [optimizer_of(n) for n in (net, alone)]
    before = copy.deepcopy(list(net.parameters()))
    with fusedopt.accumulating(model, optimizers[0]):
        x = rows(0, world.rank, 0, 4)
        loss_of(model, x).backward()
        if world.rank == 1:
            match = "was not given"
        else:
            match = "1 of the other ranks cannot step"
            optimizers[0].accumulate(weight=4)
        with pytest.raises(RuntimeError, match=match):
            optimizers[0].step()
        assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
        if world.rank == 1:
            optimizers[0].accumulate(weight=4)
        optimizers[0].step()
    everything = [rows(0, rank, 0, 4) for rank in range(mesh.size())]
    loss_of(alone, torch.cat(everything)).backward()
    optimizers[1].step()
    optimizers[1].zero_grad()
    assert_ranks_equal(mesh, net.parameters(), optimizers[0])
    torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)

    # A weight of 0 is a mistake if all ranks have it.
    with fusedopt.accumulating(model, optimizers[0]):
        loss_of(model, rows(1, world.rank, 0, 4)).backward()
        optimizers[0].accumulate(weight=0)
        with pytest.raises(ValueError, match=f"all {mesh.size()} accumulated micro-batches are 0"):
            optimizers[0].step()
        if world.rank == 1:
            loss_of(model, rows(1, world.rank, 0, 4)).backward()
            optimizers[0].accumulate(weight=4)
        optimizers[0].step()
    loss_of(alone, rows(1, 1, 0, 4)).backward()
    optimizers[1].step()
    assert_ranks_equal(mesh, net.parameters(), optimizers[0])
    torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)


@on_meshes(2, 3)
def a_rank_without_a_micro_batch_steps_like_the_others(world, mesh):
    for name in WITH_STATE:
        net, alone = Net(torch.float64), Net(torch.float64)
        model = ddp(mesh, net)
        optimizers = [optimizer_of(n, name, max_grad_norm=0.05) for n in (net, alone)]
        for window in range(3):
            idle = window % mesh.size()
            with fusedopt.accumulating(model, optimizers[0]):
                if world.rank != idle:
                    loss_of(model, rows(window, world.rank, 0, 4)).backward()
                    optimizers[0].accumulate(weight=4)
                optimizers[0].step()
            for rank in range(mesh.size()):
                if rank != idle:
                    loss_of(alone, rows(window, rank, 0, 4)).backward()
                    optimizers[1].accumulate(weight=4)
            optimizers[1].step()
            assert_ranks_equal(mesh, net.parameters(), optimizers[0])
            torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), **CLOSE)
        before = copy.deepcopy(list(net.parameters()))
        with fusedopt.accumulating(model, optimizers[0]):
            optimizers[0].step()  # of nothing anywhere
        assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@on_meshes(2)
def a_step_in_the_block_that_was_not_accumulated_raises(world, mesh):
    """It would be of this rank's gradients alone."""
    net = Net(torch.float64)
    model = ddp(mesh, net)
    optimizer = optimizer_of(net, max_grad_norm=1.0)
    with fusedopt.accumulating(model, optimizer):
        loss_of(model, rows(0, world.rank, 0, 4)).backward()
        with pytest.raises(RuntimeError, match="accumulate\\(\\) was not given"):
            optimizer.step()
        optimizer.accumulate()
        optimizer.step()
    assert_ranks_equal(mesh, net.parameters(), optimizer)


@on_meshes(2)
def each_ranks_half_full_window_is_resumed_inside_of_a_block(world, mesh):
    def go_on(model, optimizer):
        with fusedopt.accumulating(model, optimizer):
            for number in range(2, 4):
                loss_of(model, rows(0, world.rank, number, 4)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    net = Net(torch.float64)
    model = ddp(mesh, net)
    optimizer = optimizer_of(net, accumulation_steps=4)
    with fusedopt.accumulating(model, optimizer):
        for number in range(2):
            loss_of(model, rows(0, world.rank, number, 4)).backward()
            optimizer.step()
            optimizer.zero_grad()
    kept = copy.deepcopy((net, optimizer.state_dict()))
    wanted = go_on(model, optimizer)

    model = ddp(mesh, kept[0])
    optimizer = optimizer_of(kept[0], accumulation_steps=4)
    optimizer.load_state_dict(kept[1])
    again = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(again)  # what is still to be added up stays so
    ended = go_on(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(ended, wanted, strict=True))
    assert_ranks_equal(mesh, model.parameters(), optimizer)

    optimizer.load_state_dict(kept[1])
    for number in range(2):
        loss_of(model, rows(0, world.rank, number, 4)).backward()
        if number == 1:
            with pytest.raises(RuntimeError, match="inside of accumulating"):
                optimizer.step()
        else:
            optimizer.step()
            optimizer.zero_grad()


# ---- FSDP2 and DTensors --------------------------------------------------------------------------


def pair(mesh, dtype=torch.float32, name="AdamW", **options):
    networks = sharded(mesh, dtype), Net(dtype)
    return networks, [optimizer_of(n, name, **options) for n in networks]


def assert_close_pair(networks, optimizers):
    """Closer than a step by far; where no sums over ranks are involved, bits are equal."""
    for a, b in zip(*(n.parameters() for n in networks), strict=True):
        torch.testing.assert_close(whole(a), b, rtol=2e-6, atol=2e-7)
        states = [o.state[p] for o, p in zip(optimizers, (a, b), strict=True)]
        assert list(states[0]) == list(states[1])
        for name in states[0]:  # in one order on all ranks, which may have to gather them
            if name == "window":
                continue
            both = [whole(state[name]) for state in states]
            torch.testing.assert_close(*both, rtol=2e-6, atol=2e-7)


@on_meshes(1, 2, 3, 4)
def the_norm_is_of_all_shards_and_clips_them_alike(world, mesh):
    """Of four ranks, one has nothing of any tensor but the first, and two nothing of others."""
    for limit in (0.5, float("inf"), 1e6):
        networks, optimizers = pair(mesh, max_grad_norm=limit, ema_decay=0.75)
        for seed in range(3):
            set_sharded_grads(networks[0].parameters(), seed)
            set_grads(networks[1].parameters(), seed)
            norm = torch.nn.utils.get_total_norm([p.grad for p in networks[0].parameters()])
            for optimizer in optimizers:
                optimizer.step()
            norms = gathered(mesh, optimizers[0].grad_norm)
            assert all(torch.equal(n, norms[0]) for n in norms)
            torch.testing.assert_close(norms[0], norm.full_tensor(), rtol=1e-6, atol=0)
            torch.testing.assert_close(norms[0], optimizers[1].grad_norm, rtol=2e-7, atol=0)
            assert_close_pair(networks, optimizers)
        for param in networks[0].parameters():
            average = optimizers[0].state[param]["ema"]
            assert isinstance(average, DTensor)
            assert average.placements == param.placements
        with optimizers[0].swap_ema(), optimizers[1].swap_ema():
            for a, b in zip(*(n.parameters() for n in networks), strict=True):
                torch.testing.assert_close(whole(a), b, rtol=2e-6, atol=2e-7)
        assert_close_pair(networks, optimizers)


@on_meshes(2, 3, 4)
def a_nan_in_one_ranks_shard_skips_on_all(world, mesh):
    for options in ({}, {"max_grad_norm": 1.0}, {"accumulation_steps": 2}):
        networks, optimizers = pair(mesh, skip_nonfinite=True, **options)
        steps = options.get("accumulation_steps", 1)
        for seed in range(6):
            set_sharded_grads(networks[0].parameters(), seed)
            set_grads(networks[1].parameters(), seed)
            bad = seed in (2, 3)
            if bad:  # a row of the second rank's
                networks[0].first.weight.grad.to_local()[:1].mul_(NAN if world.rank == 1 else 1)
                networks[1].first.weight.grad.fill_(NAN)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if seed % steps == steps - 1:
                assert bool(optimizers[0].step_was_skipped) == bad
                assert all(gathered(mesh, optimizers[0].step_was_skipped.int())) == bad
            assert_close_pair(networks, optimizers)


@on_meshes(2, 3)
def every_reduced_micro_batch_is_consumed(world, mesh):
    """And where FSDP2 reduces the last one alone, that one has the gradients of all."""
    for name in WITH_STATE:
        for reduces_all in (True, False):
            for lr in (
                0.02,
                0.0,
            ):  # a first micro-batch without gradients, at the rate of a warm-up
                options = {"accumulation_steps": 3, "max_grad_norm": 0.05}
                networks, optimizers = pair(mesh, torch.float64, name, **options)
                model, alone = networks
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = lr
                for window in range(2):
                    for number in range(3):
                        model.set_requires_gradient_sync(reduces_all or number == 2)
                        loss_of(model, rows(window, world.rank, number, 4)).backward()
                        has_grads = any(p.grad is not None for p in model.parameters())
                        assert has_grads == (reduces_all or number == 2)
                        assert optimizers[0].will_step == (number == 2)
                        optimizers[0].step()
                        optimizers[0].zero_grad()
                        everything = [rows(window, r, number, 4) for r in range(mesh.size())]
                        loss_of(alone, torch.cat(everything)).backward()
                        optimizers[1].step()
                        optimizers[1].zero_grad()
                    torch.testing.assert_close(
                        optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-6, atol=0
                    )
                    for a, b in zip(*(n.parameters() for n in networks), strict=True):
                        torch.testing.assert_close(whole(a), b, **CLOSE)
                    for optimizer in optimizers:
                        optimizer.param_groups[0]["lr"] = 0.02


@on_meshes(2)
def weighed_micro_batches_of_shards(world, mesh):
    """A micro-batch has the same weight on all ranks, which have parts of its gradient."""
    networks, optimizers = pair(mesh, torch.float64)
    for window in range(2):
        for number, size in enumerate((4, 2, 6)):
            loss_of(networks[0], rows(window, world.rank, number, size)).backward()
            optimizers[0].accumulate(weight=2 * size)
            assert all(p.grad is None for p in networks[0].parameters())
        everything = [
            rows(window, rank, number, size)
            for rank in range(2)
            for number, size in enumerate((4, 2, 6))
        ]
        loss_of(networks[1], torch.cat(everything)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(*(n.parameters() for n in networks), strict=True):
            torch.testing.assert_close(whole(a), b, **CLOSE)


@check
def a_norm_counts_every_element_once_however_it_is_distributed(world):
    """Of sums by layout, those of shards are added up over the ranks that hold other parts."""
    line, square = world.meshes[4], DeviceMesh("cpu", [[0, 1], [2, 3]])
    layouts = [
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (line, [Replicate()]),
        (square, [Replicate(), Shard(0)]),
        (square, [Shard(0), Replicate()]),
        (square, [Shard(0), Shard(1)]),
        (square, [Replicate(), Replicate()]),
        None,
    ]
    for chosen in (*([layout] for layout in layouts), layouts):
        values = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(8)]
        params = [
            torch.nn.Parameter(v.clone() if at is None else cut(v, at))
            for v, at in zip(values, chosen, strict=False)
        ]
        others = [torch.nn.Parameter(v.clone()) for v in values[: len(params)]]
        options = {"max_grad_norm": 0.5, "skip_nonfinite": True}
        optimizers = [fusedopt.AdamW(p, lr=0.1, **options) for p in (params, others)]
        for seed in range(3):
            set_sharded_grads(params, seed)
            set_grads(others, seed)
            if seed == 1:  # one element, which one shard has
                others[0].grad[0, 0] = NAN
                cut_alike = isinstance(params[0], DTensor)
                params[0].grad = (
                    shard_like(params[0], others[0].grad) if cut_alike else others[0].grad.clone()
                )
            for optimizer in optimizers:
                optimizer.step()
            assert all(bool(o.step_was_skipped) == (seed == 1) for o in optimizers)
            norms = [o.grad_norm for o in optimizers]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0, equal_nan=True)
            for a, b in zip(params, others, strict=True):
                torch.testing.assert_close(whole(a), b.detach(), rtol=2e-6, atol=2e-7)


def cut(value, layout):
    mesh, placements = layout
    return torch.distributed.tensor.distribute_tensor(value, mesh, placements, src_data_rank=None)


@check
def a_norm_is_refused_on_a_rank_that_cannot_know_it(world):
    """One that holds nothing of a parameter, and is not asked by those that do."""
    params = [torch.nn.Parameter(cut(torch.ones(5), (world.meshes[2], [Shard(0)])))]
    params.append(torch.nn.Parameter(torch.ones(3)))
    optimizer = fusedopt.AdamW(params, lr=0.1, max_grad_norm=0.5)
    set_sharded_grads(params, 0)
    if world.rank < 2:
        optimizer.step()
        assert len(optimizer.state) == 2
        return
    with pytest.raises(RuntimeError, match="not in the device mesh"):
        optimizer.step()
    assert torch.equal(params[1], torch.ones(3))
    assert not optimizer.state


@check
def shards_of_replicas_train_as_one_process(world):
    """HSDP: two replicas of two shards."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
    options = {"max_grad_norm": 0.05, "skip_nonfinite": True, "accumulation_steps": 2}
    networks, optimizers = pair(mesh, torch.float64, ema_decay=0.5, **options)
    for window in range(2):
        for number in range(2):
            loss_of(networks[0], rows(window, world.rank, number, 4)).backward()
            loss_of(
                networks[1], torch.cat([rows(window, r, number, 4) for r in range(4)])
            ).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
        norms = gathered(world.meshes[4], optimizers[0].grad_norm)
        assert all(torch.equal(norm, norms[0]) for norm in norms)
        for a, b in zip(*(n.parameters() for n in networks), strict=True):
            torch.testing.assert_close(whole(a), b, **CLOSE)


# ---- Distributed checkpoints ---------------------------------------------------------------------


def saved(net, optimizer):
    return {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer),
    }


COUNTED = {"accumulation_steps": 3, "ema_decay": 0.5}
WEIGHED = {"accumulation_dtype": torch.float32, "ema_decay": 0.5}


def micro_batch(net, optimizer, number, *, counted):
    set_sharded_grads(net.parameters(), number)
    if counted:
        optimizer.step()
    else:
        optimizer.accumulate(weight=1 + number)
        if number % 3 == 2:
            optimizer.step()
    optimizer.zero_grad()


def assert_equal_runs(net, optimizer, other_net, other):
    for a, b in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(whole(a), b)
        assert optimizer.state[a].keys() == other.state[b].keys()
        for name in optimizer.state[a]:
            assert torch.equal(whole(optimizer.state[a][name]), other.state[b][name]), name
            assert optimizer.state[a][name].dtype == other.state[b][name].dtype, name


@check
def half_full_windows_of_two_ranks_go_on_with_one_two_and_three(world):
    number = 0
    for case in CASES:
        for options in (COUNTED, WEIGHED):
            for dtype in (torch.float32, torch.bfloat16):
                for done in (1, 5):  # in the first window, and at the end of the second
                    number += 1
                    resume(world, case, options, dtype, done, world.folder / str(number))


def resume(world, case, options, dtype, done, folder):
    counted = options is COUNTED
    kwargs = {"lr": 0.1, **({"momentum": 0.9} if case.name == "sgd" else {})}

    def run(net, numbers, optimizer=None):
        optimizer = optimizer or case.fused()(net.parameters(), **kwargs, **options)
        for number in numbers:
            micro_batch(net, optimizer, number, counted=counted)
        return optimizer

    uninterrupted = Net(dtype)
    other = run(uninterrupted, range(done + 4))
    other.state_dict()  # makes the numbers of the window true
    mesh = world.mesh(2)
    if mesh is not None:
        net = sharded(mesh, dtype)
        optimizer = run(net, range(done))
        dcp.save(saved(net, optimizer), checkpoint_id=folder, process_group=mesh.get_group())
    dist.barrier()
    for size in (1, 2, 3):
        mesh = world.mesh(size)
        if mesh is None:
            continue
        net = sharded(mesh, dtype)
        with torch.no_grad():
            for param in net.parameters():
                param.zero_()
        optimizer = case.fused()(net.parameters(), **kwargs, **options)
        state = saved(net, optimizer)
        dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
        set_model_state_dict(net, state["model"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        assert optimizer._onepass.micro_batches == done % 3
        run(net, range(done, done + 4), optimizer)
        optimizer.state_dict()
        assert_equal_runs(net, optimizer, uninterrupted, other)


@on_meshes(1, 2)
def asking_a_fresh_optimizer_for_its_state_leaves_no_trace(world, mesh):
    for case in CASES:
        for options in (COUNTED, {**COUNTED, "accumulation_dtype": torch.float32}):
            ends = []
            for asks in (True, False):
                net = sharded(mesh)
                kwargs = {"lr": 0.1, **({"momentum": 0.9} if case.name == "sgd" else {})}
                optimizer = case.fused()(net.parameters(), **kwargs, **options)
                if asks:
                    state = get_optimizer_state_dict(net, optimizer)["state"]
                    assert optimizer._onepass.micro_batches == 0
                    for name, param in net.named_parameters():
                        assert state[name]["window"].tolist()[:3] == [0.0, 0.0, 0.0]
                        assert torch.equal(whole(state[name]["ema"]), whole(param.detach()))
                        assert not whole(state[name]["accumulated_grad"]).any()
                        assert "step" not in state[name] or state[name]["step"] == 0
                for number in range(4):
                    micro_batch(net, optimizer, number, counted=True)
                optimizer.state_dict()
                ends.append((net, optimizer))
            (net, optimizer), (other_net, other) = ends
            for a, b in zip(net.parameters(), other_net.parameters(), strict=True):
                assert torch.equal(a.to_local(), b.to_local())
                for name, value in other.state[b].items():
                    mine = optimizer.state[a][name]
                    both = [getattr(t, "_local_tensor", t) for t in (mine, value)]
                    assert torch.equal(*both), name


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run(CHECKS, tmp_path_factory.mktemp("ranks"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_on_four_ranks(results, name):
    assert results[name] == "", results[name]
