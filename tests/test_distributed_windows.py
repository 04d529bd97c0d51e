"""Windows of accumulation over DistributedDataParallel's ranks, inside of `accumulating` or not.

Runs over ranks are compared with one process that sees all of the data. Models are float64, because
sums over ranks have another order than sums of one process.
"""

from __future__ import annotations

import copy

import pytest
import torch
from distributed_runs import (
    CLOSE,
    NAN,
    WITH_STATE,
    Net,
    Runs,
    counted_collectives,
    ddp,
    gathered,
    loss_of,
    optimizer_of,
    rows,
    window_of,
)
from ranks import on_ranks

import fusedopt
from fusedopt import accumulating

# ---- Inside of accumulating() --------------------------------------------------------------------


@on_ranks(2, 3)
def test_unequal_weights_over_ranks_and_micro_batches_are_the_one_big_batch(world, mesh):
    for options, inside, kind in (({}, True, torch.tensor), ({"max_grad_norm": 0.05}, False, int)):
        runs = Runs(mesh, **options)
        for window in range(2):
            with accumulating(runs.model, runs.optimizer):
                for x in window_of(window, world.rank):
                    loss_of(runs.model, x).backward()
                    runs.optimizer.accumulate(weight=kind(len(x)))
                if inside:
                    runs.optimizer.step()
            if not inside:
                runs.optimizer.step()
            runs.step_alone([x for rank in range(mesh.size()) for x in window_of(window, rank)])
            runs.assert_close()
            if options:
                assert runs.other.grad_norm > 0.05
                for norm in gathered(mesh, runs.optimizer.grad_norm):
                    assert torch.equal(norm, runs.optimizer.grad_norm)
                    torch.testing.assert_close(norm, runs.other.grad_norm, rtol=1e-7, atol=0)


@on_ranks(2, 3)
def test_counted_windows_and_several_in_one_block(world, mesh):
    """The block is around the loop here: every window of it is added up."""
    sizes = [[4, 4, 4]] * 3
    for reduction, divisor in (("mean", 1), ("sum", 3)):
        options = {"accumulation_steps": 3, "accumulation_reduction": reduction}
        runs = Runs(mesh, "SGD", alone={}, **options)
        with accumulating(runs.model, runs.optimizer):
            for window in range(2):
                for x in window_of(window, world.rank, sizes):
                    (loss_of(runs.model, x) / divisor).backward()
                    runs.optimizer.step()
                    runs.optimizer.zero_grad()
        for window in range(2):
            ranks = range(mesh.size())
            runs.step_alone([x for rank in ranks for x in window_of(window, rank, sizes)])
        runs.assert_close()


@on_ranks(2)
def test_a_window_has_one_all_reduce_of_flags_and_one_of_every_bucket(world, mesh):
    runs, done = Runs(mesh, max_grad_norm=1.0), {}
    with counted_collectives(runs.model, done):
        with accumulating(runs.model, runs.optimizer):
            for x in window_of(0, 0):
                loss_of(runs.model, x).backward()
                runs.optimizer.accumulate()
            assert done == {"backward": 0, "python": 0}
            runs.optimizer.step()
        assert done == {"backward": 0, "python": 2}
        loss_of(runs.model, window_of(0, 0)[0]).backward()
        assert done["backward"] >= 1, "the hook counts nothing"


@on_ranks(2)
def test_buckets_are_of_one_dtype_and_of_limited_size(world, mesh):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            # In float32 but for the fourth, of 240 bytes, 16 MiB twice, 200 and 12 bytes.
            dtypes = [torch.bfloat16, torch.float32, torch.float32, torch.float64, torch.bfloat16]
            shapes = [(30, 2), (1 << 22,), (1 << 22,), (5, 5), (3,)]
            self.params = torch.nn.ParameterList(
                torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
            )
            self.params[3] = torch.nn.Parameter(self.params[3].detach().t())  # not contiguous

        def forward(self, factor):
            return sum((p * factor).sum().double() for p in self.params)

    model = Mixed()
    start = copy.deepcopy(list(model.parameters()))
    wrapped, done = ddp(mesh, model), {}
    optimizer = fusedopt.SGD(model.parameters(), lr=1.0)
    with counted_collectives(wrapped, done), accumulating(wrapped, optimizer):
        wrapped(1.0 + world.rank).backward()
        optimizer.accumulate(weight=1 + world.rank)
        optimizer.step()
    # The first goes with the second, the third, which would make more than 25 MiB of them, with the
    # fifth, the fourth by itself.
    assert done["python"] == 1 + 3
    for param, before in zip(model.parameters(), start, strict=True):
        # (1 * 1 + 2 * 2) / 3, rounded to the accumulator's dtype and to the parameter's
        torch.testing.assert_close(param, before - 5 / 3, rtol=2.0**-7, atol=2.0**-7)


class Branches(torch.nn.Module):
    """Layers of which a call uses those that it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(4, 2) for _ in range(4))

    def forward(self, x, used):
        return sum(self.branches[number](x) for number in used)


@on_ranks(2, 3)
def test_a_parameter_that_one_rank_alone_used_is_updated_on_all(world, mesh):
    # By window and rank; branch 3 is used nowhere, branch 2 in the second window for the first time
    # and by one rank alone, and in the third by none of these.
    used = [[[0, 1], [1], [1]], [[0], [2], [0, 1]], [[0], [0], [1]]]
    for name, states in (("SGD", ["momentum_buffer"]), ("AdamW", ["exp_avg", "step"])):
        runs = Runs(mesh, name, Branches, unused=True, max_grad_norm=0.5, ema_decay=0.5)
        for window, by_rank in enumerate(used):
            before = runs.values()
            with accumulating(runs.model, runs.optimizer):
                for x in window_of(window, world.rank):
                    runs.model(x, by_rank[world.rank]).square().mean().backward()
                    runs.optimizer.accumulate(weight=len(x))
                runs.optimizer.step()
            assert all(p.grad is None for p in runs.net.parameters())
            for rank in range(mesh.size()):
                for x in window_of(window, rank):
                    runs.alone(x, by_rank[rank]).square().mean().backward()
                    runs.other.accumulate(weight=len(x))
            runs.other.step()
            runs.assert_close()
            anywhere = {number for branch in by_rank[: mesh.size()] for number in branch}
            for number in range(4):
                ours = list(runs.net.branches[number].parameters())
                theirs = list(runs.alone.branches[number].parameters())
                for a, b in zip(ours, theirs, strict=True):
                    for key in [*states, "ema"]:
                        state, wanted = runs.optimizer.state[a], runs.other.state[b]
                        assert (key in state) == (key in wanted)
                        if key in state:
                            torch.testing.assert_close(state[key], wanted[key], **CLOSE)
                moved = not torch.equal(ours[0], before[2 * number])
                assert moved == (number in anywhere)


@on_ranks(2, 3)
def test_a_micro_batch_that_is_not_finite_is_left_out_on_its_rank_alone(world, mesh):
    bad = (1, 0)  # of rank 1, the first
    runs = Runs(mesh, skip_nonfinite=True, max_grad_norm=0.05)
    for window in range(2):
        with accumulating(runs.model, runs.optimizer):
            for number, x in enumerate(window_of(window, world.rank)):
                factor = NAN if (world.rank, number) == bad else 1.0
                (loss_of(runs.model, x) * factor).backward()
                runs.optimizer.accumulate(weight=len(x))
            runs.optimizer.step()
        assert not runs.optimizer.step_was_skipped
        runs.step_alone(
            [
                x
                for rank in range(mesh.size())
                for number, x in enumerate(window_of(window, rank))
                if (rank, number) != bad
            ]
        )
        runs.assert_close()
        torch.testing.assert_close(runs.optimizer.grad_norm, runs.other.grad_norm)

    # Nothing is left of a window that is not finite anywhere.
    before = runs.values()
    with accumulating(runs.model, runs.optimizer):
        (loss_of(runs.model, window_of(0, 0)[0]) * NAN).backward()
        runs.optimizer.accumulate()
        runs.optimizer.step()
    assert runs.optimizer.step_was_skipped
    runs.assert_unchanged(before)


@on_ranks(2)
def test_a_scaler_hears_of_the_last_micro_batch_of_a_counted_window(world, mesh):
    """Which is accumulated and used up in one call."""
    for at in range(3):
        runs = Runs(mesh, alone={}, accumulation_steps=3)
        scaler = fusedopt.GradScaler("cpu", init_scale=8.0, growth_interval=100)
        for window in range(2):
            with accumulating(runs.model, runs.optimizer):
                for number in range(3):
                    x = rows(window, world.rank, number, 4)
                    overflows = (window, world.rank, number) == (0, 1, at)
                    scaler.scale(loss_of(runs.model, x) * (NAN if overflows else 1.0)).backward()
                    scaler.step(runs.optimizer)
                    scaler.update()
                    runs.optimizer.zero_grad()
            assert scaler.get_scale() == (4.0 if world.rank == 1 else 8.0)
            for rank in range(2):
                for number in range(3):
                    if (window, rank, number) != (0, 1, at):
                        loss_of(runs.alone, rows(window, rank, number, 4)).backward()
                        runs.other.accumulate()
            runs.other.step()
            runs.assert_close()


@on_ranks(2)
def test_a_half_full_window_is_carried_from_block_to_block(world, mesh):
    runs = Runs(mesh)
    for _ in range(2):
        for x in window_of(0, 0, [[1, 2, 3]]):
            with accumulating(runs.model, runs.optimizer):
                loss_of(runs.model, x + world.rank).backward()
                runs.optimizer.accumulate(weight=len(x))
            for rank in range(2):
                loss_of(runs.alone, x + rank).backward()
                runs.other.accumulate(weight=len(x))
        runs.optimizer.step()
        runs.other.step()
        runs.assert_close()
    # Outside of blocks, steps are of gradients that have been added up.
    loss_of(runs.model, rows(0, world.rank, 0, 4)).backward()
    runs.optimizer.step()
    runs.assert_ranks_equal()


@on_ranks(2, 3)
def test_a_rank_without_a_micro_batch_steps_like_the_others(world, mesh):
    for name in WITH_STATE:
        runs = Runs(mesh, name, max_grad_norm=0.05)
        for window in range(3):
            idle = window % mesh.size()
            with accumulating(runs.model, runs.optimizer):
                if world.rank != idle:
                    loss_of(runs.model, rows(window, world.rank, 0, 4)).backward()
                    runs.optimizer.accumulate(weight=4)
                runs.optimizer.step()
            for rank in range(mesh.size()):
                if rank != idle:
                    loss_of(runs.alone, rows(window, rank, 0, 4)).backward()
                    runs.other.accumulate(weight=4)
            runs.other.step()
            runs.assert_close()
        before = runs.values()
        with accumulating(runs.model, runs.optimizer):
            runs.optimizer.step()  # of nothing anywhere
        runs.assert_unchanged(before)


@on_ranks(2)
def test_each_ranks_half_full_window_is_resumed_inside_of_a_block(world, mesh):
    def half(model, optimizer, numbers):
        with accumulating(model, optimizer):
            for number in numbers:
                loss_of(model, rows(0, world.rank, number, 4)).backward()
                optimizer.step()
                optimizer.zero_grad()

    runs = Runs(mesh, accumulation_steps=4)
    half(runs.model, runs.optimizer, range(2))
    net, state = copy.deepcopy((runs.net, runs.optimizer.state_dict()))
    half(runs.model, runs.optimizer, range(2, 4))

    model, optimizer = ddp(mesh, net), optimizer_of(net, accumulation_steps=4)
    optimizer.load_state_dict(state)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # to be added up still
    half(model, optimizer, range(2, 4))
    runs.assert_unchanged(net.parameters())
    runs.assert_ranks_equal()

    optimizer.load_state_dict(state)
    loss_of(model, rows(0, world.rank, 0, 4)).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, rows(0, world.rank, 1, 4)).backward()
    with pytest.raises(RuntimeError, match="inside of accumulating"):
        optimizer.step()


# ---- Errors --------------------------------------------------------------------------------------


@on_ranks(2)
def test_accumulating_refuses_what_it_cannot_add_up(world, mesh):
    def refused(error, match, model, optimizer):
        with pytest.raises(error, match=match), accumulating(model, optimizer):
            pass

    runs = Runs(mesh)
    refused(TypeError, "model is a Net", runs.net, runs.optimizer)
    theirs = torch.optim.AdamW(runs.net.parameters())
    refused(TypeError, "optimizer is a AdamW", runs.model, theirs)
    loss_of(runs.model, rows(0, world.rank, 0, 4)).backward()
    runs.optimizer.accumulate()
    told = "1 micro-batches that are summed up"
    refused(RuntimeError, told, runs.model, runs.optimizer)
    assert runs.model.require_backward_grad_sync
    runs.optimizer.step()
    runs.assert_ranks_equal()

    if world.rank == 0:
        other = ddp(world.meshes[1], Net())
        with accumulating(runs.model, runs.optimizer):
            refused(RuntimeError, "another process group", other, runs.optimizer)


@on_ranks(2)
def test_an_exception_in_the_block_leaves_a_usable_optimizer(world, mesh):
    runs = Runs(mesh)

    def fails(at):
        if at == 1:
            loss_of(runs.model, rows(0, world.rank, 0, 4)).backward()
            runs.optimizer.accumulate(weight=4)
        raise ZeroDivisionError

    for at in (0, 1):  # before the first micro-batch, and after it
        with pytest.raises(ZeroDivisionError), accumulating(runs.model, runs.optimizer):
            fails(at)
        assert runs.model.require_backward_grad_sync
    with accumulating(runs.model, runs.optimizer):
        loss_of(runs.model, rows(0, world.rank, 1, 2)).backward()
        runs.optimizer.accumulate(weight=2)
        runs.optimizer.step()
    runs.step_alone([rows(0, rank, number, 4 - 2 * number) for rank in (0, 1) for number in (0, 1)])
    runs.assert_close()
    runs.optimizer.zero_grad()
    loss_of(runs.model, rows(1, world.rank, 0, 4)).backward()
    runs.optimizer.step()
    runs.assert_ranks_equal()


@on_ranks(2, 3)
def test_what_one_rank_finds_wrong_raises_on_all_and_changes_nothing(world, mesh):
    """None is left waiting for the others."""
    runs = Runs(mesh)
    before = runs.values()
    with accumulating(runs.model, runs.optimizer):
        loss_of(runs.model, rows(0, world.rank, 0, 4)).backward()
        if world.rank == 1:  # its step would be of this rank's gradients alone
            match = "accumulate\\(\\) was not given"
        else:
            match = "1 of the other ranks cannot step"
            runs.optimizer.accumulate(weight=4)
        with pytest.raises(RuntimeError, match=match):
            runs.optimizer.step()
        runs.assert_unchanged(before)
        if world.rank == 1:
            runs.optimizer.accumulate(weight=4)
        runs.optimizer.step()
    runs.step_alone([rows(0, rank, 0, 4) for rank in range(mesh.size())])
    runs.assert_close()

    # A weight of 0 is a mistake if all ranks have it.
    with accumulating(runs.model, runs.optimizer):
        loss_of(runs.model, rows(1, world.rank, 0, 4)).backward()
        runs.optimizer.accumulate(weight=0)
        with pytest.raises(ValueError, match=f"all {mesh.size()} accumulated micro-batches are 0"):
            runs.optimizer.step()
        if world.rank == 1:
            loss_of(runs.model, rows(1, world.rank, 0, 4)).backward()
            runs.optimizer.accumulate(weight=4)
        runs.optimizer.step()
    runs.step_alone([rows(1, 1, 0, 4)])
    runs.assert_close()


# ---- Without it ----------------------------------------------------------------------------------


@on_ranks(2, 3)
def test_without_accumulating_every_micro_batch_is_added_up_by_itself(world, mesh):
    limits = {"skip_nonfinite": True, "max_grad_norm": 0.05}
    for options in ({"accumulation_steps": 2}, {}):
        runs, done = Runs(mesh, alone=limits, **options, **limits), {}
        for window in range(3):
            with counted_collectives(runs.model, done):
                for number in range(2):
                    # The weight of a micro-batch is the same on all ranks.
                    x = rows(window, world.rank, number, 4)
                    factor = NAN if (window, world.rank, number) == (1, 1, 0) else 1.0
                    (loss_of(runs.model, x) * factor).backward()
                    if options:
                        runs.optimizer.step()
                        runs.optimizer.zero_grad()
                    else:
                        runs.optimizer.accumulate(weight=1 + number)
            if not options:
                runs.optimizer.step()
            assert done["backward"] >= 2
            assert done["python"] == 0
            assert not any(gathered(mesh, runs.optimizer.step_was_skipped.int()))
            for number in range(2):
                if (window, number) == (1, 0):
                    continue  # one rank's NaN is in the mean of all
                everything = [rows(window, rank, number, 4) for rank in range(mesh.size())]
                loss_of(runs.alone, torch.cat(everything)).backward()
                runs.other.accumulate(weight=1 if options else 1 + number)
            runs.other.step()
            runs.assert_close()
            norms = gathered(mesh, runs.optimizer.grad_norm)
            assert all(torch.equal(norm, norms[0]) for norm in norms)

    # Without accumulation, all skip together.
    optimizer = optimizer_of(runs.net, skip_nonfinite=True)
    before = runs.values()
    factor = NAN if world.rank == 0 else 1.0
    (loss_of(runs.model, rows(0, world.rank, 0, 4)) * factor).backward()
    optimizer.step()
    assert optimizer.step_was_skipped
    runs.assert_unchanged(before)
