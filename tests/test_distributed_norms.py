"""Norms, checks, averages and windows of DTensors: parts of one gradient lie on several ranks.

Runs over ranks are compared with one process that sees all of the data, or whole tensors. Models
are float64 where sums over ranks are compared with sums of one process, whose order is another.
"""

from __future__ import annotations

import gc

import pytest
import torch
from distributed_runs import (
    CLOSE,
    NAN,
    Net,
    cut,
    cut_like,
    gathered,
    loss_of,
    optimizer_of,
    rows,
    set_sharded_grads,
    sharded,
    whole,
)
from harness import set_grads
from ranks import on_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt


def pair(mesh, dtype=torch.float32, name="AdamW", **options):
    networks = sharded(mesh, dtype), Net(dtype)
    return networks, [optimizer_of(n, name, **options) for n in networks]


def assert_close_params(networks, rtol=2e-6, atol=2e-7):
    for a, b in zip(*(n.parameters() for n in networks), strict=True):
        torch.testing.assert_close(whole(a), b, rtol=rtol, atol=atol)


def assert_close_pair(networks, optimizers):
    """Closer than a step by far; where no sums over ranks are involved, bits are equal."""
    assert_close_params(networks)
    for a, b in zip(*(n.parameters() for n in networks), strict=True):
        states = [o.state[p] for o, p in zip(optimizers, (a, b), strict=True)]
        assert list(states[0]) == list(states[1])
        for name in states[0]:  # in one order on all ranks, which may have to gather them
            if name != "window":
                values = [whole(state[name]) for state in states]
                torch.testing.assert_close(*values, rtol=2e-6, atol=2e-7)


@on_ranks(1, 3, 4)
def test_the_norm_is_of_all_shards_and_clips_them_alike(world, mesh):
    """Of four ranks, one has nothing of any tensor but the first, and two nothing of others."""
    for limit in (0.5, float("inf"), 1e6):
        networks, optimizers = pair(mesh, max_grad_norm=limit, ema_decay=0.75)
        for seed in range(2):
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
            assert_close_params(networks)
        assert_close_params(networks)


@on_ranks(2, 4)
def test_a_nan_in_one_ranks_shard_skips_on_all(world, mesh):
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


@on_ranks(2, 3)
def test_every_reduced_micro_batch_is_consumed(world, mesh):
    """And where FSDP2 reduces the last one alone, that one has the gradients of all."""
    for name, reduces_all, lr in (
        ("SGD", True, 0.02),
        ("AdamW", False, 0.02),
        ("SGD", False, 0.0),  # a first micro-batch without gradients, at the rate of a warm-up
        ("AdamW", True, 0.0),
    ):
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
                everything = [rows(window, r, number, 4) for r in range(mesh.size())]
                loss_of(alone, torch.cat(everything)).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            norms = [optimizer.grad_norm for optimizer in optimizers]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
            assert_close_params(networks, **CLOSE)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.02


@on_ranks(2)
def test_weighed_micro_batches_of_shards(world, mesh):
    """A micro-batch has the same weight on all ranks, which have parts of its gradient."""
    networks, optimizers = pair(mesh, torch.float64)
    sizes = list(enumerate((4, 2, 6)))
    for window in range(2):
        for number, size in sizes:
            loss_of(networks[0], rows(window, world.rank, number, size)).backward()
            optimizers[0].accumulate(weight=2 * size)
            assert all(p.grad is None for p in networks[0].parameters())
        everything = [
            rows(window, rank, number, size) for rank in range(2) for number, size in sizes
        ]
        loss_of(networks[1], torch.cat(everything)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_close_params(networks, **CLOSE)


@on_ranks(4)
def test_a_norm_counts_every_element_once_however_it_is_distributed(world, line):
    """Of sums by layout, those of shards are added up over the ranks that hold other parts."""
    square = DeviceMesh("cpu", [[0, 1], [2, 3]])
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
            torch.nn.Parameter(v.clone() if at is None else cut(v, *at))
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
                params[0].grad = cut_like(params[0], others[0].grad)
            for optimizer in optimizers:
                optimizer.step()
            assert all(bool(o.step_was_skipped) == (seed == 1) for o in optimizers)
            norms = [o.grad_norm for o in optimizers]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0, equal_nan=True)
            for a, b in zip(params, others, strict=True):
                torch.testing.assert_close(whole(a), b.detach(), rtol=2e-6, atol=2e-7)


@on_ranks(3)
def test_a_norm_is_refused_on_a_rank_that_cannot_know_it(world, mesh):
    """One that holds nothing of a parameter, and is not asked by those that do."""
    params = [torch.nn.Parameter(cut(torch.ones(5), world.meshes[2], [Shard(0)]))]
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


@on_ranks(4)
def test_shards_of_replicas_train_as_one_process(world, line):
    """HSDP: two replicas of two shards."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
    options = {"max_grad_norm": 0.05, "skip_nonfinite": True, "accumulation_steps": 2}
    networks, optimizers = pair(mesh, torch.float64, ema_decay=0.5, **options)
    for window in range(2):
        for number in range(2):
            everything = [rows(window, rank, number, 4) for rank in range(4)]
            loss_of(networks[0], everything[world.rank]).backward()
            loss_of(networks[1], torch.cat(everything)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
        norms = gathered(line, optimizers[0].grad_norm)
        assert all(torch.equal(norm, norms[0]) for norm in norms)
        assert_close_params(networks, **CLOSE)


@on_ranks(4)
def test_steps_of_many_dtensors_keep_no_objects(world, line):
    """Of two meshes, one of replicas; rows that one rank alone has, no dimension, empty shards."""
    square = DeviceMesh("cpu", [[0, 1], [2, 3]])
    layouts = [(line, [Shard(0)]), (square, [Replicate(), Shard(0)])]
    shapes = [(1, 6), (5, 2), (3,), (8, 1), (0, 4)]
    params = [
        torch.nn.Parameter(cut(torch.randn(shape, generator=torch.Generator().manual_seed(n)), *at))
        for n in range(20)
        for shape in shapes
        for at in layouts
    ]
    params.append(torch.nn.Parameter(cut(torch.ones(()), line, [Replicate()])))
    others = [torch.nn.Parameter(whole(param).detach().clone()) for param in params]
    options = {"lr": 0.01, "max_grad_norm": 0.5}
    optimizers = [fusedopt.AdamW(p, **options) for p in (params, others)]
    set_sharded_grads(params, 0)
    set_grads(others, 0)

    def steps(count):
        for _ in range(count):
            for optimizer in optimizers:
                optimizer.step()
        gc.collect()
        return len(gc.get_objects())

    before = steps(3)
    assert steps(30) - before < 30, "a step leaves objects behind"
    torch.testing.assert_close(*(o.grad_norm for o in optimizers), rtol=1e-6, atol=0)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(whole(a), b.detach(), rtol=2e-6, atol=2e-7)
