"""`norm_group`: ranks that hold other parts of a model as plain tensors decide together.

Runs over ranks are compared with one process that holds everything. Sums over ranks have another
order, in double, so that values are close to the last bit and not equal.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from distributed_runs import NAN, cut, gathered, set_sharded_grads, whole
from harness import set_grads
from ranks import on_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard

import fusedopt

CPU = torch.device("cpu")
CLOSE = {"rtol": 2e-6, "atol": 2e-7}
SHAPES = [(5, 3), (7,), (40, 30), (), (2, 2), (1100,), (3,), (9, 1)]
OPTIONS = [
    {"max_grad_norm": 0.5},
    {"max_grad_norm": float("inf"), "skip_nonfinite": True},
    {"max_grad_norm": 0.5, "skip_nonfinite": True, "accumulation_steps": 2},
    {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.5, "zero_grads": True},
]


def values():
    return [torch.randn(s, generator=torch.Generator().manual_seed(7)) for s in SHAPES]


class Stages:
    """All parameters in an optimizer, and those of this rank's stage in another."""

    def __init__(self, mesh, rank, **options):
        self.mesh = mesh
        self.params, everything = ([torch.nn.Parameter(v) for v in values()] for _ in range(2))
        self.everything = everything
        self.mine = list(range(rank, len(SHAPES), mesh.size()))
        self.optimizer = fusedopt.AdamW(
            [self.params[n] for n in self.mine], lr=0.1, norm_group=mesh.get_group(), **options
        )
        self.other = fusedopt.AdamW(everything, lr=0.1, **options)
        self.optimizers = (self.optimizer, self.other)

    def set_grads(self, seed, *, without=(), nan=None, factor=1.0):
        set_grads(self.everything, seed)
        for number, (param, other) in enumerate(zip(self.params, self.everything, strict=True)):
            other.grad *= factor
            if number == nan:
                other.grad.fill_(NAN)
            if number in without:
                other.grad = None
            param.grad = None if other.grad is None else other.grad.clone()

    def assert_alike(self):
        for number in self.mine:
            torch.testing.assert_close(self.params[number], self.everything[number], **CLOSE)
        assert bool(self.optimizer.step_was_skipped) == bool(self.other.step_was_skipped)
        if self.other.grad_norm is not None:
            norms = gathered(self.mesh, self.optimizer.grad_norm)
            assert all(torch.equal(norm.nan_to_num(), norms[0].nan_to_num()) for norm in norms)
            torch.testing.assert_close(norms[0], self.other.grad_norm, rtol=2e-7, atol=0,
                                       equal_nan=True)  # fmt: skip


@on_ranks(2, 4)
def test_stages_clip_and_skip_as_one_process(world, mesh):
    """A rank whose parameters have no gradient, for the first time or again, takes part."""
    last = set(range(mesh.size() - 1, len(SHAPES), mesh.size()))
    for options in OPTIONS:
        stages = Stages(mesh, world.rank, **options)
        skips = options.get("skip_nonfinite")
        for seed in range(8):
            without = last if seed in (0, 1, 6) else ()
            stages.set_grads(seed, without=without, nan=0 if skips and seed in (1, 4) else None)
            for optimizer in stages.optimizers:
                optimizer.step()
            stages.assert_alike()


@on_ranks(2, 4)
def test_a_scaler_backs_off_on_all_ranks(world, mesh):
    """Also after `unscale_`, which finds out on this rank alone."""
    for unscales in (False, True):
        for options in ({}, {"max_grad_norm": 0.5, "fused": True}):
            stages = Stages(mesh, world.rank, **options)
            scalers = [fusedopt.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
            for seed in range(4):
                for scaler in scalers:
                    scaler.scale(torch.ones(()))
                bad = seed in (0, 2)
                stages.set_grads(seed, nan=1 if bad else None, factor=scalers[0].get_scale())
                for scaler, optimizer in zip(scalers, stages.optimizers, strict=True):
                    if unscales:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                scale = scalers[0].get_scale()
                assert scale == scalers[1].get_scale() == (4.0 if seed < 2 else 2.0)
                for number in stages.mine:
                    torch.testing.assert_close(
                        stages.params[number], stages.everything[number], **CLOSE
                    )


@on_ranks(2)
def test_accumulate_over_stages(world, mesh):
    stages = Stages(mesh, world.rank, max_grad_norm=0.5, skip_nonfinite=True)
    for window in range(3):
        for weight in (1, 3, 2):
            # Of the first micro-batch, rank 1 has nothing; the second one is left out.
            without = {1, 3, 5, 7} if weight == 1 else ()
            stages.set_grads(10 * window + weight, without=without, nan=0 if weight == 3 else None)
            for optimizer in stages.optimizers:
                optimizer.accumulate(weight=weight)
        for optimizer in stages.optimizers:
            optimizer.step()
        stages.assert_alike()


@on_ranks(2)
def test_torchs_scalers_are_asked_to_decide_together(world, mesh):
    group = mesh.get_group()
    stages = Stages(mesh, world.rank)
    for fused in (False, True):
        params = [torch.nn.Parameter(torch.ones(3))]
        optimizer = fusedopt.AdamW(params, lr=0.1, norm_group=group, fused=fused)
        for scaler in (torch.amp.GradScaler("cpu"), ShardedGradScaler("cpu", process_group=group)):
            scaler.scale(torch.ones(()))
            params[0].grad = torch.full((3,), NAN if world.rank else 1.0)
            with pytest.raises(RuntimeError, match=r"use fusedopt\.GradScaler"):
                scaler.step(optimizer)
        assert torch.equal(params[0], torch.ones(3))
    del optimizer.grad_scale, optimizer.found_inf  # which torch leaves there
    scaler = ShardedGradScaler("cpu", init_scale=1.0, process_group=group)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(params[0], torch.ones(3))
    assert scaler.get_scale() == 0.5
    assert stages.optimizer.norm_group == (group,)


@on_ranks(4)
def test_dtensors_are_counted_once(world, line):
    """Two stages of FSDP2 over two ranks each, and plain tensors of every rank's own."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("stage", "shard"))
    stage, shard = divmod(world.rank, 2)
    groups = [mesh.get_group("stage"), mesh.get_group("shard")]
    for norm_group, plain in (
        (groups[0], False),
        (groups, False),
        (groups, True),
        (dist.group.WORLD, True),
    ):
        everything = [torch.nn.Parameter(v) for v in values()]
        mine = [everything[stage], everything[2 + stage]]
        params = [torch.nn.Parameter(cut(v.detach(), mesh["shard"], [Shard(0)])) for v in mine[:1]]
        if plain:
            own = everything[4 + 2 * stage + shard]
            params.append(torch.nn.Parameter(own.detach().clone()))
        counted = everything[:2] + (everything[4:] if plain else [])
        options = {"lr": 0.1, "max_grad_norm": 0.5, "skip_nonfinite": True}
        optimizer = fusedopt.AdamW(params, norm_group=norm_group, **options)
        other = fusedopt.AdamW(counted, **options)
        for seed in range(3):
            set_grads(everything, seed)
            params[0].grad = cut(mine[0].grad, mesh["shard"], [Shard(0)])
            if plain:
                params[1].grad = own.grad.clone()
            for one in (optimizer, other):
                one.step()
            norms = gathered(line, optimizer.grad_norm)
            assert all(torch.equal(norm, norms[0]) for norm in norms)
            torch.testing.assert_close(norms[0], other.grad_norm, rtol=2e-7, atol=0)
            torch.testing.assert_close(whole(params[0]), mine[0].detach(), **CLOSE)
            if plain:
                torch.testing.assert_close(params[1], own, **CLOSE)


def layers(widths):
    torch.manual_seed(0)
    linear = (torch.nn.Linear(*both) for both in itertools.pairwise(widths))
    return torch.nn.Sequential(*linear).double()


@on_ranks(2, 4)
def test_shards_of_fsdp1_clip_as_one_process(world, mesh):
    """Also where a rank has no part of any parameter."""
    group = mesh.get_group()
    for originals, empty in ((False, False), (True, False), (True, True)):
        widths = (4, 1) if empty else (4, 5, 1)
        model = FullyShardedDataParallel(
            layers(widths),
            process_group=group,
            use_orig_params=originals,
            device_id=CPU,
        )
        alone = layers(widths)
        options = {"lr": 0.1, "max_grad_norm": 0.05, "skip_nonfinite": True}
        optimizer = fusedopt.SGD(model.parameters(), **options)
        other = fusedopt.SGD(alone.parameters(), **options)
        for seed in range(4):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).double()
            x[0, 0] = NAN if seed == 1 else x[0, 0]
            for net in (model, alone):
                net(x).square().mean().backward()
            if seed == 0:
                with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel.*norm_group"):
                    optimizer.step()
                optimizer.norm_group = group
            for one in (optimizer, other):
                one.step()
                one.zero_grad()
            assert bool(optimizer.step_was_skipped) == (seed == 1)
            norm = optimizer.grad_norm
            torch.testing.assert_close(norm, other.grad_norm, rtol=1e-6, atol=0, equal_nan=True)
            with FullyShardedDataParallel.summon_full_params(model):
                flat = torch.cat([p.detach().flatten() for p in model.parameters()])
            wanted = torch.cat([p.detach().flatten() for p in alone.parameters()])
            torch.testing.assert_close(flat[: len(wanted)], wanted)


@on_ranks(2, 4)
def test_zero_clips_as_one_process(world, mesh):
    """Also on ranks that have no share."""
    group = mesh.get_group()
    params, others = ([torch.nn.Parameter(v) for v in values()[1:4]] for _ in range(2))
    # Keywords of ZeRO's own become entries of param groups, in checkpoints, too.
    adamw = functools.partial(fusedopt.AdamW, max_grad_norm=0.5)
    zero = ZeroRedundancyOptimizer(params, optimizer_class=adamw, process_group=group, lr=0.1)
    plain = fusedopt.AdamW(others, lr=0.1, max_grad_norm=0.5)
    for seed in range(3):
        set_grads(params, seed)
        set_grads(others, seed)
        if seed == 0:
            with pytest.raises(RuntimeError, match=r"ZeroRedundancyOptimizer.*norm_group"):
                zero.step()
            zero.optim.norm_group = group
        zero.step()
        plain.step()
        for ours, theirs in zip(params, others, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
        torch.testing.assert_close(zero.optim.grad_norm, plain.grad_norm, rtol=2e-7, atol=0)
    zero.consolidate_state_dict(to=0)


@on_ranks(2)
def test_what_a_norm_group_may_be(world, mesh):
    params = [torch.nn.Parameter(torch.ones(3))]
    group = mesh.get_group()
    for wrong in (3, "all", mesh, [None], dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(ValueError, match=r"norm_group=.*must be a process group"):
            fusedopt.AdamW(params, norm_group=wrong)
    with pytest.raises(ValueError, match="share more than this rank"):
        fusedopt.AdamW(params, norm_group=[group, dist.group.WORLD])
    optimizer = fusedopt.AdamW(params, norm_group=[group], max_grad_norm=1.0)
    assert optimizer.norm_group == (group,)
    for same in (copy.copy(optimizer), copy.deepcopy(optimizer)):
        assert same.norm_group == (group,)
    with pytest.raises(TypeError, match="norm_group cannot be pickled"):
        pickle.dumps(optimizer)
    optimizer.norm_group = None
    assert pickle.loads(pickle.dumps(optimizer)).norm_group is None
    set_sharded_grads(params, world.rank)
    optimizer.step()  # decides alone again, and asks nobody
    torch.testing.assert_close(optimizer.grad_norm, params[0].grad.norm())
    dist.barrier(group=group)
