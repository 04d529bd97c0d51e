"""Steps of what is distributed over processes: DTensors, FSDP2, DistributedDataParallel, ZeRO.

What is sharded is compared, bit by bit, with the same optimizer over whole tensors: a step is
elementwise, so cutting a tensor must not change it. That one is held against the oracle elsewhere.
"""

from __future__ import annotations

import copy
import sys
import time

import pytest
import torch
import torch.distributed as dist
from cases import ADAMW, CASES, Case
from distributed_runs import (
    Net,
    assert_equal_runs,
    cut,
    ddp,
    local,
    set_sharded_grads,
    sharded,
    whole,
)
from harness import public, set_grads
from ranks import on_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusedopt

# The most state a class can have; one with a learning rate in a tensor.
RICHEST = {case.name: dict(case.richest.kwargs) for case in CASES}
RICHEST[ADAMW.name]["lr"] = torch.tensor(0.01)
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def assert_ours(optimizer):
    for route in optimizer.routes():
        assert (route.backend, route.reason) == ("cpu", "")


def both(networks, classes, kwargs, **ours):
    return [
        cls(net.parameters(), **copy.deepcopy(kwargs), **ours)
        for net, cls in zip(networks, classes, strict=True)
    ]


def pair(case: Case, mesh, kwargs, dtype=torch.float32, **ours):
    """A sharded network and a whole one, each with fusedopt's optimizer."""
    networks = sharded(mesh, dtype), Net(dtype)
    return networks, both(networks, [case.fused()] * 2, kwargs, **ours)


def step_pair(networks, optimizers, seeds):
    for seed in seeds:
        set_sharded_grads(networks[0].parameters(), seed)
        set_grads(networks[1].parameters(), seed)
        for optimizer in optimizers:
            optimizer.step()


def assert_equal_pair(networks, optimizers):
    assert_equal_runs(*zip(networks, optimizers, strict=True))


def python_calls(function):
    """How many Python functions are called: thousands where a plan is made, none where it fits."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@on_ranks(2, 4)
def test_fsdp_has_the_bits_of_whole_tensors(world, mesh):
    for case in CASES:
        for kwargs, dtype, ours in (
            (RICHEST[case.name], torch.float32, {}),
            ({}, torch.float32, {}),
            (RICHEST[case.name], torch.bfloat16, {"state_dtype": torch.float32}),
        ):
            networks, optimizers = pair(case, mesh, kwargs, dtype, **ours)
            step_pair(networks, optimizers, range(2))
            set_sharded_grads(networks[0].parameters(), 2)
            set_grads(networks[1].parameters(), 2)
            assert python_calls(optimizers[0].step) < 100, "the plan was made again"
            optimizers[1].step()
            assert_ours(optimizers[0])
            assert_equal_pair(networks, optimizers)
            for state in optimizers[0].state.values():
                assert {value.dtype for value in state.values()} <= {torch.float32}


@on_ranks(2)
def test_fsdp_trains_beside_torch(world, mesh):
    """Forward, backward and reduction are FSDP2's; states are DTensors, as torch.optim's are."""
    for case in CASES:
        networks = [sharded(mesh), sharded(mesh)]
        optimizers = both(networks, (case.fused(), case.torch_class), RICHEST[case.name])
        generator = torch.Generator().manual_seed(world.rank)
        for _ in range(3):
            x = torch.randn(7, 4, generator=generator)
            for net, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
        assert_ours(optimizers[0])
        for ours, theirs in zip(*(net.parameters() for net in networks), strict=True):
            torch.testing.assert_close(local(ours), local(theirs), **CLOSE)
            states = public(optimizers[0].state[ours]), optimizers[1].state[theirs]
            assert list(states[0]) == list(states[1])
            for a, b in zip(states[0].values(), states[1].values(), strict=True):
                assert type(a) is type(b)
                assert getattr(a, "placements", None) == getattr(b, "placements", None)
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                torch.testing.assert_close(local(a), local(b), **CLOSE)


@on_ranks(2)
def test_everything_replaced_is_seen(world, mesh):
    """Unsharding and resharding, new local memory, replaced states, gradients that come and go."""
    networks, optimizers = pair(CASES[-1], mesh, {"lr": 0.1, "amsgrad": True})
    params = [list(net.parameters()) for net in networks]
    seeds = iter(range(20))

    def step():
        step_pair(networks, optimizers, [next(seeds)])
        assert_equal_pair(networks, optimizers)

    step()
    networks[0].unshard()
    networks[0].reshard()
    step()

    networks[0].double().float()  # FSDP2 takes over the new local tensors
    step()

    param = params[0][0]
    stale = param._local_tensor
    before = stale.clone()
    param._local_tensor = stale.clone()
    step()
    assert torch.equal(stale, before), "memory that is no longer the parameter's was written"

    for optimizer, (param, *_) in zip(optimizers, params, strict=True):
        optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"] * 2
    step()
    state = optimizers[0].state[params[0][0]]["exp_avg_sq"]
    state._local_tensor = state._local_tensor.clone()
    step()

    kept = [param.grad for param in params[0]]  # what a stale pointer would still find
    for optimizer, (param, *others) in zip(optimizers, params, strict=True):
        param.grad = None
        for other in others:
            other.grad = other.grad * 2
        optimizer.step()
    assert_equal_pair(networks, optimizers)

    kept += [param.grad for param in params[0]]
    step()
    del kept

    optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    step()
    assert_ours(optimizers[0])


@on_ranks(2)
def test_gradients_of_other_placements_are_torchs(world, mesh):
    for placement in (Replicate(), Partial()):
        param = torch.nn.Parameter(distribute_tensor(torch.ones(5, 2), mesh, [Shard(0)]))
        other = torch.nn.Parameter(torch.ones(5, 2))
        optimizers = [fusedopt.AdamW([p], lr=0.1) for p in (param, other)]
        networks = [torch.nn.ParameterList([p]) for p in (param, other)]
        step_pair(networks, optimizers, range(2))
        assert_ours(optimizers[0])
        set_grads([other], 2)
        part = other.grad / 2 if placement.is_partial() else other.grad
        param.grad = DTensor.from_local(part, mesh, [placement])
        (route,) = optimizers[0].routes()
        assert route.backend == "torch"
        assert route.reason == "its gradient is distributed over the ranks in another way"
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(whole(optimizers[0].state[param]["step"]), torch.tensor(3.0))
        torch.testing.assert_close(whole(param), other.detach(), **CLOSE)

        grad, param.grad = param.grad, None
        named = fusedopt.AdamW([param], lr=0.1, backend="cpu")
        param.grad = grad
        before = local(param).clone()
        with pytest.raises(ValueError, match="distributed over the ranks in another way"):
            named.step()
        assert torch.equal(local(param), before)
        assert not named.state

        with torch.no_grad():
            other.copy_(whole(param))
        for key in ("exp_avg", "exp_avg_sq"):
            optimizers[1].state[other][key] = whole(optimizers[0].state[param][key]).clone()
        step_pair(networks, optimizers, [3])
        assert_ours(optimizers[0])
        assert_equal_pair(networks, optimizers)

        state = optimizers[0].state[param]
        state["exp_avg"] = state["exp_avg"].redistribute(placements=[Replicate()])
        (route,) = optimizers[0].routes()
        assert route.backend == "torch"
        assert route.reason == "a state is distributed over the ranks in another way"
        step_pair(networks, optimizers, [4])
        torch.testing.assert_close(whole(param), other.detach(), **CLOSE)

    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    (route,) = fusedopt.AdamW([partial]).routes()
    assert (route.backend, route.reason) == ("torch", "its ranks hold partial sums of it")


@on_ranks(2)
def test_of_one_element_a_rank_does_not_go_its_own_way(world, mesh):
    """The first rank holds the same under any placement; what torch does takes all ranks."""
    for odd in ("a replicated gradient", "a partial gradient", "a replicated state"):
        param = torch.nn.Parameter(distribute_tensor(torch.ones(1), mesh, [Shard(0)]))
        optimizer = fusedopt.AdamW([param])
        set_sharded_grads([param], 0)
        optimizer.step()
        assert_ours(optimizer)
        if odd == "a replicated state":
            state = optimizer.state[param]
            state["exp_avg"] = DTensor.from_local(torch.ones(1), mesh, [Replicate()])
        else:
            placement = Partial() if "partial" in odd else Replicate()
            param.grad = DTensor.from_local(torch.ones(1), mesh, [placement])
        assert optimizer.routes()[0].backend == "torch"
        with pytest.raises(RuntimeError, match="placement"):  # torch's, which cannot do it
            optimizer.step()


@on_ranks(4)
def test_one_optimizer_for_all_meshes(world, line):
    """Sharded on another dimension, replicated, over other meshes, not distributed: one table.

    The last ranks are in none of these meshes: they hold nothing of the tensors, and step them too.
    """
    mesh, square = world.meshes[2], DeviceMesh("cpu", [[0, 1]])
    layouts = [
        (mesh, [Shard(0)]),
        (mesh, [Shard(1)]),
        (mesh, [Replicate()]),
        (square, [Replicate(), Shard(1)]),
        (square, [Shard(0), Replicate()]),
    ]
    values = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    params = [torch.nn.Parameter(cut(v, *at)) for v, at in zip(values[:-1], layouts, strict=True)]
    params.append(torch.nn.Parameter(values[-1].clone()))
    others = [torch.nn.Parameter(value.clone()) for value in values]
    lr = torch.tensor(0.1)
    optimizers = [fusedopt.AdamW(p, lr=lr) for p in (params, others)]
    for seed in range(3):
        lr.mul_(0.5)
        set_grads(others, seed)
        set_sharded_grads(params, seed)
        for optimizer in optimizers:
            optimizer.step()
    assert_ours(optimizers[0])
    assert torch.equal(params[-1], others[-1])
    if world.rank >= 2:
        assert all(local(param).numel() == 0 for param in params[:-1])
    else:
        assert_equal_runs((params[:-1], optimizers[0]), (others[:-1], optimizers[1]))


@on_ranks(2)
def test_versions_are_bumped_as_torchs_step_does(world, mesh):
    """A backward over stale values raises; a view of the local tensor outlives a step."""

    def versions(optimizer, param):
        tensors = [param, *optimizer.state[param].values()]
        return [(t._version, getattr(t, "_local_tensor", t)._version) for t in tensors]

    counts = []
    for module in (fusedopt, torch.optim):
        param = torch.nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Shard(0)]))
        optimizer = module.Adam([param], lr=0.1, foreach=False)
        set_sharded_grads([param], 0)
        optimizer.step()
        loss, view, before = (param * param).sum(), param.to_local(), versions(optimizer, param)
        optimizer.step()
        after = versions(optimizer, param)
        counts.append([(a > c, b > d) for (a, b), (c, d) in zip(after, before, strict=True)])
        assert torch.equal(view.detach(), param.to_local().detach())
        assert torch.isfinite(view.sum())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert counts[0] == counts[1]


@on_ranks(2)
def test_grad_scaler_with_fused(world, mesh):
    """An overflow that one rank alone has skips the step on all of them."""
    networks = [sharded(mesh), sharded(mesh)]
    runs = [
        (net, module.AdamW(net.parameters(), lr=0.1, fused=True), torch.amp.GradScaler("cpu"))
        for net, module in zip(networks, (fusedopt, torch.optim), strict=True)
    ]
    for seed in range(4):
        for net, optimizer, scaler in runs:
            scaler.scale(torch.ones(()))  # as a backward would ask for the scale
            set_sharded_grads(net.parameters(), seed)
            for param in net.parameters():
                param.grad.to_local().mul_(scaler.get_scale())
                if seed == 2 and world.rank == 0:
                    param.grad.to_local().fill_(torch.inf)
            before = net.first.weight.to_local().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(net.first.weight.to_local(), before) == (seed == 2)
        assert runs[0][2].get_scale() == runs[1][2].get_scale()
        for ours, theirs in zip(*(net.parameters() for net in networks), strict=True):
            torch.testing.assert_close(local(ours), local(theirs), **CLOSE)
            torch.testing.assert_close(local(ours.grad), local(theirs.grad), **CLOSE)
    assert_ours(runs[0][1])


@on_ranks(2)
def test_ddp_ranks_are_equal_to_one_process(world, mesh):
    batches = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for case in CASES:
        networks = net, alone = Net(), Net()
        model = ddp(mesh, net)
        optimizers = both(networks, [case.fused()] * 2, RICHEST[case.name])
        for two in zip(batches[::2], batches[1::2], strict=True):
            optimizers[0].zero_grad()
            model(two[world.rank]).square().mean().backward()
            optimizers[0].step()
            grads = []
            for batch in two:
                alone.zero_grad()
                alone(batch).square().mean().backward()
                grads.append([p.grad for p in alone.parameters()])
            for param, a, b in zip(alone.parameters(), *grads, strict=True):
                param.grad = (a + b) / 2  # halving is exact, so its order does not matter
            optimizers[1].step()
        assert_ours(optimizers[0])
        for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, theirs), f"{case.name}: not the bits of one process"
            for key, value in optimizers[1].state[theirs].items():
                assert torch.equal(optimizers[0].state[ours][key], value)


@on_ranks(2)
def test_zero_redundancy_optimizer(world, mesh):
    for case in CASES:
        net, alone = Net(), Net()
        kwargs = RICHEST[case.name]
        zero = ZeroRedundancyOptimizer(
            net.parameters(),
            optimizer_class=case.fused(),
            process_group=mesh.get_group(),
            **copy.deepcopy(kwargs),
        )
        plain = case.fused()(alone.parameters(), **copy.deepcopy(kwargs))
        for seed in range(2):
            for optimizer, model in ((zero, net), (plain, alone)):
                set_grads(model.parameters(), seed)
                optimizer.step()
        assert isinstance(zero.optim, case.fused())
        assert_ours(zero.optim)
        for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        zero.consolidate_state_dict(to=0)
        if world.rank == 0:
            consolidated, wanted = zero.state_dict(), plain.state_dict()
            assert consolidated["state"].keys() == wanted["state"].keys()
            for number, state in wanted["state"].items():
                for key, value in state.items():
                    assert torch.equal(consolidated["state"][number][key], value)


# ---- The processes themselves --------------------------------------------------------------------


@on_ranks(2)
def fails_on_one(world, mesh):
    if world.rank == 1:
        raise ZeroDivisionError
    dist.barrier(group=mesh.get_group())


@on_ranks(2)
def hangs_on_one(world, mesh):
    time.sleep(60 * world.rank)


@on_ranks(2)
def succeeds(world, mesh):
    dist.barrier(group=mesh.get_group())


@pytest.mark.xdist_group("ranks")
def test_failures_are_reported_and_the_next_check_runs(four_ranks, tmp_path):
    report = four_ranks.run(fails_on_one, 2, tmp_path)
    assert report.startswith("rank 1: Traceback")
    assert "ZeroDivisionError" in report
    assert "rank 0: does not answer" in report
    assert four_ranks.run(succeeds, 2, tmp_path) == ""
    report = four_ranks.run(hangs_on_one, 2, tmp_path, seconds=0.5)
    assert report.startswith("rank 1: does not answer")
    assert "in hangs_on_one" in report
