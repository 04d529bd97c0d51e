"""torch.distributed on gloo: every check runs in real processes (ranks.py).

What is sharded is compared, bit by bit, with the same optimizer over whole tensors: a step is
elementwise, so cutting a tensor must not change it. That one is held against the oracle elsewhere.
"""

from __future__ import annotations

import copy

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from cases import CASES, Case, Sample
from harness import set_grads
from ranks import Checks, Net, set_sharded_grads, shard_like, sharded, whole
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fusedopt

# The most state a class can have, and nothing zero that could hide a mistake.
RICHEST = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "adagrad": {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    "rmsprop": {"centered": True, "momentum": 0.9, "weight_decay": 0.1},
    "adam": {"amsgrad": True, "weight_decay": 0.1},
    "adamw": {"amsgrad": True, "weight_decay": 0.1},
}

CHECKS = Checks()
check, on_meshes = CHECKS.add, CHECKS.on_meshes


def assert_equal_run(params, optimizer, other_params, other):
    """Fails unless a sharded run has the bits of one over whole tensors, its states cut alike."""
    for param, wanted in zip(params, other_params, strict=True):
        assert torch.equal(whole(param), wanted), f"parameters of shape {tuple(wanted.shape)}"
        state, wanted_state = optimizer.state.get(param, {}), other.state.get(wanted, {})
        assert list(state) == list(wanted_state)
        for key, value in wanted_state.items():
            assert torch.equal(whole(state[key]), value), f"{key} of shape {tuple(wanted.shape)}"
            assert state[key].dtype == value.dtype
            if key == "step":
                assert type(state[key]) is torch.Tensor
            else:
                assert isinstance(state[key], DTensor)
                assert state[key].placements == param.placements
                assert state[key]._local_tensor.shape == param._local_tensor.shape


def assert_ours(optimizer):
    for route in optimizer.routes():
        assert (route.backend, route.reason) == ("cpu", "")


def pair(case: Case, mesh, kwargs, dtype=torch.float32, **ours):
    """A sharded network and a whole one, each with fusedopt's optimizer."""
    networks = sharded(mesh, dtype), Net(dtype)
    optimizers = [case.fused()(n.parameters(), **copy.deepcopy(kwargs), **ours) for n in networks]
    return networks, optimizers


def step_pair(networks, optimizers, seeds):
    for seed in seeds:
        set_sharded_grads(networks[0].parameters(), seed)
        set_grads(networks[1].parameters(), seed)
        for optimizer in optimizers:
            optimizer.step()


def assert_equal_pair(networks, optimizers):
    assert_equal_run(
        networks[0].parameters(), optimizers[0], networks[1].parameters(), optimizers[1]
    )


@on_meshes(2, 3)
def fsdp_has_the_bits_of_whole_tensors(world, mesh):
    for case in CASES:
        for sample in (*case.samples, Sample(RICHEST[case.name], "richest")):
            networks, optimizers = pair(case, mesh, case.kwargs(sample))
            step_pair(networks, optimizers, [0])
            plan = optimizers[0]._packed
            step_pair(networks, optimizers, range(1, 4))
            assert optimizers[0]._packed is plan, "the plan was rebuilt"
            assert_ours(optimizers[0])
            assert_equal_pair(networks, optimizers)


@on_meshes(2)
def fsdp_trains_beside_torch(world, mesh):
    """Forward, backward and reduction are FSDP2's; states are DTensors, as torch.optim's are."""
    for case in CASES:
        kwargs = RICHEST[case.name]
        networks = [sharded(mesh), sharded(mesh)]
        optimizers = [
            cls(net.parameters(), **kwargs)
            for cls, net in zip((case.fused(), case.torch_class), networks, strict=True)
        ]
        plans = set()
        generator = torch.Generator().manual_seed(world.rank)
        for _ in range(5):
            x = torch.randn(7, 4, generator=generator)
            for net, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
            plans.add(optimizers[0]._packed)
        assert len(plans) == 1, "the plan was rebuilt"
        assert_ours(optimizers[0])
        for ours, theirs in zip(*(net.parameters() for net in networks), strict=True):
            torch.testing.assert_close(ours.to_local(), theirs.to_local(), rtol=2e-6, atol=2e-6)
            states = optimizers[0].state[ours], optimizers[1].state[theirs]
            assert list(states[0]) == list(states[1])
            for a, b in zip(states[0].values(), states[1].values(), strict=True):
                assert type(a) is type(b)
                assert getattr(a, "placements", None) == getattr(b, "placements", None)
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (a, b))
                torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@on_meshes(2)
def everything_replaced_is_seen(world, mesh):
    """Unsharding and resharding, new local memory, replaced states, gradients that come and go."""
    adamw = next(case for case in CASES if case.name == "adamw")
    networks, optimizers = pair(adamw, mesh, {"lr": 0.1, "amsgrad": True})
    params = [list(net.parameters()) for net in networks]
    step_pair(networks, optimizers, [0])

    networks[0].unshard()
    networks[0].reshard()
    step_pair(networks, optimizers, [1])
    assert_equal_pair(networks, optimizers)

    networks[0].double().float()  # FSDP2 takes over the new local tensors
    step_pair(networks, optimizers, [2])
    assert_equal_pair(networks, optimizers)

    param = params[0][0]
    stale = param._local_tensor
    before = stale.clone()
    param._local_tensor = stale.clone()
    step_pair(networks, optimizers, [3])
    assert_equal_pair(networks, optimizers)
    assert torch.equal(stale, before), "memory that is no longer the parameter's was written"

    for optimizer, (param, *_) in zip(optimizers, params, strict=True):
        optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"] * 2
    step_pair(networks, optimizers, [4])
    state = optimizers[0].state[params[0][0]]["exp_avg_sq"]
    state._local_tensor = state._local_tensor.clone()
    step_pair(networks, optimizers, [5])
    assert_equal_pair(networks, optimizers)

    kept = [param.grad for param in params[0]]  # what a stale pointer would still find
    for optimizer, (param, *others) in zip(optimizers, params, strict=True):
        param.grad = None
        for other in others:
            other.grad = other.grad * 2
        optimizer.step()
    assert_equal_pair(networks, optimizers)

    kept += [param.grad for param in params[0]]
    step_pair(networks, optimizers, [6])
    assert_equal_pair(networks, optimizers)
    del kept

    optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    step_pair(networks, optimizers, [7])
    assert_equal_pair(networks, optimizers)
    assert_ours(optimizers[0])


@on_meshes(2)
def gradients_of_other_placements_are_torchs(world, mesh):
    for placement in (Replicate(), Partial()):
        param = torch.nn.Parameter(distribute_tensor(torch.ones(5, 2), mesh, [Shard(0)]))
        other = torch.nn.Parameter(torch.ones(5, 2))
        optimizers = [fusedopt.AdamW([p], lr=0.1) for p in (param, other)]
        networks = [torch.nn.ParameterList([p]) for p in (param, other)]
        step_pair(networks, optimizers, range(2))
        assert_ours(optimizers[0])
        set_grads([other], 2)
        local = other.grad / 2 if placement.is_partial() else other.grad
        param.grad = DTensor.from_local(local, mesh, [placement])
        (route,) = optimizers[0].routes()
        assert route.backend == "torch"
        assert route.reason == "its gradient is distributed over the ranks in another way"
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(whole(optimizers[0].state[param]["step"]), torch.tensor(3.0))
        torch.testing.assert_close(whole(param), other.detach(), rtol=2e-6, atol=2e-6)

        grad, param.grad = param.grad, None
        named = fusedopt.AdamW([param], lr=0.1, backend="cpu")
        param.grad = grad
        before = param.to_local().clone()
        with pytest.raises(ValueError, match="distributed over the ranks in another way"):
            named.step()
        assert torch.equal(param.to_local(), before)
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
        assert route.reason == "a state is distributed over the ranks in another way"
        step_pair(networks, optimizers, [4])
        assert optimizers[0]._packed.rows == 0
        torch.testing.assert_close(whole(param), other.detach(), rtol=2e-6, atol=2e-6)

    # Of one element, the first rank holds the same under either placement, and must not go its own
    # way: what torch does takes all ranks.
    param = torch.nn.Parameter(distribute_tensor(torch.ones(1), mesh, [Shard(0)]))
    optimizer = fusedopt.AdamW([param])
    set_sharded_grads([param], 0)
    optimizer.step()
    for placement in (Replicate(), Partial()):
        param.grad = DTensor.from_local(torch.ones(1), mesh, [placement])
        assert optimizer._packed.refresh() is not None
        assert optimizer.routes()[0].backend == "torch"
    set_sharded_grads([param], 0)
    assert optimizer._packed.refresh() is None
    replicated = DTensor.from_local(torch.ones(1), mesh, [Replicate()])
    optimizer.state[param]["exp_avg"] = replicated
    assert optimizer._packed.refresh() is not None
    assert optimizer.routes()[0].backend == "torch"

    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    (route,) = fusedopt.AdamW([partial]).routes()
    assert (route.backend, route.reason) == ("torch", "its ranks hold partial sums of it")


@check
def one_optimizer_for_all_meshes(world):
    """Sharded on another dimension, replicated, over other meshes, not distributed: one table.

    The last rank is in none of these meshes: it holds nothing of the tensors, and steps them too.
    """
    mesh, square = world.meshes[2], DeviceMesh("cpu", [[0, 1]])
    layouts = [
        (mesh, [Shard(0)]),
        (mesh, [Shard(1)]),
        (mesh, [Replicate()]),
        (square, [Replicate(), Shard(1)]),
        (square, [Shard(0), Replicate()]),
        None,
    ]
    values = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    params = [
        torch.nn.Parameter(
            v.clone() if layout is None else distribute_tensor(v, *layout, src_data_rank=None)
        )
        for v, layout in zip(values, layouts, strict=True)
    ]
    others = [torch.nn.Parameter(v.clone()) for v in values]
    lr = torch.tensor(0.1)
    optimizers = [fusedopt.AdamW(p, lr=lr) for p in (params, others)]
    for seed in range(3):
        lr.mul_(0.5)
        set_grads(others, seed)
        for param, other in zip(params, others, strict=True):
            distributed = isinstance(param, DTensor)
            param.grad = shard_like(param, other.grad) if distributed else other.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    (table,) = optimizers[0]._packed.plan.describe()
    assert table["rows"] == 6
    assert_ours(optimizers[0])
    assert torch.equal(params[-1], others[-1])
    if world.rank == 2:
        assert all(param.to_local().numel() == 0 for param in params[:-1])
        return
    assert_equal_run(params[:-1], optimizers[0], others[:-1], optimizers[1])


@on_meshes(2)
def versions_are_bumped_as_torchs_step_does(world, mesh):
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
        counts.append(
            [
                (a > c, b > d)
                for (a, b), (c, d) in zip(versions(optimizer, param), before, strict=True)
            ]
        )
        assert torch.equal(view.detach(), param.to_local().detach())
        assert torch.isfinite(view.sum())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert counts[0] == counts[1]


@on_meshes(2)
def grad_scaler_with_fused(world, mesh):
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
            torch.testing.assert_close(ours.to_local(), theirs.to_local(), rtol=2e-6, atol=2e-6)
            a, b = ours.grad.to_local(), theirs.grad.to_local()
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert_ours(runs[0][1])


@check
def ddp_ranks_are_equal_to_one_process(world):
    group = world.meshes[2].get_group() if world.rank < 2 else None
    if group is None:
        return
    batches = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    for case in CASES:
        net, alone = Net(), Net()
        model = DistributedDataParallel(net, process_group=group)
        kwargs = RICHEST[case.name]
        optimizers = [case.fused()(n.parameters(), **kwargs) for n in (net, alone)]
        for both in zip(batches[::2], batches[1::2], strict=True):
            optimizers[0].zero_grad()
            model(both[world.rank]).square().mean().backward()
            optimizers[0].step()
            grads = []
            for batch in both:
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


@check
def zero_redundancy_optimizer(world):
    group = world.meshes[2].get_group() if world.rank < 2 else None
    if group is None:
        return
    for case in CASES:
        net, alone = Net(), Net()
        kwargs = RICHEST[case.name]
        zero = ZeroRedundancyOptimizer(
            net.parameters(), optimizer_class=case.fused(), process_group=group, **kwargs
        )
        plain = case.fused()(alone.parameters(), **kwargs)
        for seed in range(3):
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


def saved(net, optimizer):
    return {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer),
    }


CHECKPOINTED = [
    *((case, RICHEST[case.name], torch.float32, {}) for case in CASES),
    *((case, RICHEST[case.name], torch.bfloat16, {"state_dtype": torch.float32}) for case in CASES),
    (CASES[-1], {"lr": torch.tensor(0.01)}, torch.float32, {}),
]


@check
def a_checkpoint_of_two_ranks_goes_on_with_one_two_and_three(world):
    for number, (case, kwargs, dtype, ours) in enumerate(CHECKPOINTED):
        folder = world.folder / str(number)
        mesh = world.mesh(2)
        uninterrupted, other = Net(dtype), None
        other = case.fused()(uninterrupted.parameters(), **copy.deepcopy(kwargs), **ours)
        for seed in range(5):
            set_grads(uninterrupted.parameters(), seed)
            other.step()
        if mesh is not None:
            networks, optimizers = pair(case, mesh, kwargs, dtype, **ours)
            step_pair(networks, optimizers, range(3))
            assert_equal_pair(networks, optimizers)
            state = saved(networks[0], optimizers[0])
            dcp.save(state, checkpoint_id=folder, process_group=mesh.get_group())
        torch.distributed.barrier()
        for size in (1, 2, 3):
            mesh = world.mesh(size)
            if mesh is None:
                continue
            net = sharded(mesh, dtype)
            with torch.no_grad():
                for param in net.parameters():
                    param.zero_()
            optimizer = case.fused()(net.parameters(), **copy.deepcopy(kwargs), **ours)
            state = saved(net, optimizer)  # the optimizer's after a step that torch makes up
            dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
            set_model_state_dict(net, state["model"])
            set_optimizer_state_dict(net, optimizer, state["optimizer"])
            for seed in (3, 4):
                set_sharded_grads(net.parameters(), seed)
                optimizer.step()
            assert_ours(optimizer)
            assert_equal_run(net.parameters(), optimizer, uninterrupted.parameters(), other)


@on_meshes(2)
def the_step_that_initialises_a_checkpoint_changes_nothing(world, mesh):
    """It is made up by torch, with zero gradients and lr = 0, where the state is empty."""
    for case in CASES:
        for kwargs in (RICHEST[case.name], {"lr": torch.tensor(0.05), "weight_decay": 0.1}):
            networks = [sharded(mesh), sharded(mesh)]
            optimizers = [
                cls(net.parameters(), **copy.deepcopy(kwargs))
                for cls, net in zip((case.fused(), case.torch_class), networks, strict=True)
            ]
            before = [p.to_local().clone() for p in networks[0].parameters()]
            lr = optimizers[0].param_groups[0]["lr"]
            states = [
                get_optimizer_state_dict(net, optimizer)
                for net, optimizer in zip(networks, optimizers, strict=True)
            ]
            assert optimizers[0].param_groups[0]["lr"] is lr
            assert states[0]["state"].keys() == states[1]["state"].keys()
            for name, entry in states[1]["state"].items():
                for key, value in entry.items():
                    a, b = (
                        t.to_local() if isinstance(t, DTensor) else t
                        for t in (states[0]["state"][name][key], value)
                    )
                    torch.testing.assert_close(a, b)
            for param, value in zip(networks[0].parameters(), before, strict=True):
                assert torch.equal(param.to_local(), value)
                assert param.grad is None
            for seed in range(3):  # no checkpoint is loaded after all
                for net, optimizer in zip(networks, optimizers, strict=True):
                    set_sharded_grads(net.parameters(), seed)
                    optimizer.step()
            for ours, theirs in zip(*(net.parameters() for net in networks), strict=True):
                torch.testing.assert_close(ours.to_local(), theirs.to_local(), rtol=2e-6, atol=2e-6)


@on_meshes(2)
def sixteen_bit_shards_with_wide_states(world, mesh):
    for case in CASES:
        kwargs, ours = RICHEST[case.name], {"state_dtype": torch.float32}
        networks, optimizers = pair(case, mesh, kwargs, torch.bfloat16, **ours)
        step_pair(networks, optimizers, range(4))
        assert_ours(optimizers[0])
        assert_equal_pair(networks, optimizers)
        for state in optimizers[0].state.values():
            assert {v.dtype for v in state.values()} == {torch.float32}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run(CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_on_three_ranks(results, name):
    assert results[name] == "", results[name]
