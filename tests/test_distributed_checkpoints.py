"""Checkpoints of distributed runs: written by some ranks, read by others, in the middle of windows.

A resumed run is compared, bit by bit, with one over whole tensors that nobody interrupted.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES
from distributed_runs import (
    Net,
    assert_equal_runs,
    load,
    local,
    saved,
    set_sharded_grads,
    sharded,
    whole,
)
from ranks import on_ranks
from test_distributed import RICHEST
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

F32, BF16 = torch.float32, torch.bfloat16
WIDE = {"state_dtype": F32}
COUNTED = {"accumulation_steps": 3, "ema_decay": 0.5}
WEIGHED = {"accumulation_dtype": F32, "ema_decay": 0.5}
# A case, how many micro-batches were done when it was saved (1 is in the first window, 5 at the end
# of the second), dtype, options, and how many ranks go on with it: every value with every other.
SAVED = [(CASES[-1], 3, BF16, WIDE, 3)]
for i, case in enumerate(CASES):
    odd, dtypes = i % 2, (BF16, F32) if i // 2 % 2 else (F32, BF16)
    SAVED += [
        (case, 3, BF16 if odd else F32, WIDE if odd else {}, 1 + i % 3),
        (case, 5 if odd else 1, dtypes[0], COUNTED, 1 + (i + 1) % 3),
        (case, 1 if odd else 5, dtypes[1], WEIGHED, 1 + (i + 2) % 3),
    ]


def micro_batches(net, optimizer, numbers, options):
    for number in numbers:
        set_sharded_grads(net.parameters(), number)
        if options is WEIGHED:
            optimizer.accumulate(weight=1 + number)
        if options is not WEIGHED or number % 3 == 2:
            optimizer.step()
        optimizer.zero_grad()


@on_ranks(4)
def test_runs_of_two_ranks_go_on_with_one_two_and_three(world, line):
    for number, (case, done, dtype, options, size) in enumerate(SAVED):
        resume(world, case, done, dtype, options, size, world.folder / str(number))


def resume(world, case, done, dtype, options, size, folder):
    def optimizer_of(net):
        kwargs = copy.deepcopy(RICHEST[case.name])
        return case.fused()(net.parameters(), **kwargs, **options)

    uninterrupted = Net(dtype)
    other = optimizer_of(uninterrupted)
    micro_batches(uninterrupted, other, range(done + 4), options)
    other.state_dict()  # makes the numbers of the window true
    if world.rank < 2:
        net = sharded(world.meshes[2], dtype)
        optimizer = optimizer_of(net)
        micro_batches(net, optimizer, range(done), options)
        group = world.meshes[2].get_group()
        dcp.save(saved(net, optimizer), checkpoint_id=folder, process_group=group)
    dist.barrier()
    if world.rank < size:
        net = sharded(world.meshes[size], dtype)
        with torch.no_grad():
            for param in net.parameters():
                param.zero_()
        optimizer = optimizer_of(net)
        load(net, optimizer, folder, world.meshes[size])
        if options is COUNTED:
            assert optimizer.will_step == (done % 3 == 2)
        micro_batches(net, optimizer, range(done, done + 4), options)
        optimizer.state_dict()
        assert_equal_runs((net, optimizer), (uninterrupted, other))


@on_ranks(2)
def test_the_step_that_initialises_a_checkpoint_changes_nothing(world, mesh):
    """It is made up by torch, with zero gradients and lr = 0, where the state is empty."""
    for case in CASES:
        networks = [sharded(mesh), sharded(mesh)]
        optimizers = [
            cls(net.parameters(), **copy.deepcopy(RICHEST[case.name]))
            for cls, net in zip((case.fused(), case.torch_class), networks, strict=True)
        ]
        before = [local(p).clone() for p in networks[0].parameters()]
        lr = optimizers[0].param_groups[0]["lr"]
        ours, theirs = (
            get_optimizer_state_dict(net, optimizer)["state"]
            for net, optimizer in zip(networks, optimizers, strict=True)
        )
        assert optimizers[0].param_groups[0]["lr"] is lr
        assert ours.keys() == theirs.keys()
        for name, entry in theirs.items():
            for key, value in entry.items():
                torch.testing.assert_close(local(ours[name][key]), local(value))
        for param, value in zip(networks[0].parameters(), before, strict=True):
            assert torch.equal(local(param), value)
            assert param.grad is None
        for seed in range(2):  # no checkpoint is loaded after all
            for net, optimizer in zip(networks, optimizers, strict=True):
                set_sharded_grads(net.parameters(), seed)
                optimizer.step()
        for a, b in zip(*(net.parameters() for net in networks), strict=True):
            torch.testing.assert_close(local(a), local(b), rtol=2e-6, atol=2e-6)


@on_ranks(2)
def test_asking_a_fresh_optimizer_for_its_state_leaves_no_trace(world, mesh):
    for case in CASES:
        ends = []
        for asks in (True, False):
            net = sharded(mesh)
            optimizer = case.fused()(net.parameters(), **case.stateful, **COUNTED)
            if asks:
                state = get_optimizer_state_dict(net, optimizer)["state"]
                for name, param in net.named_parameters():
                    assert state[name]["window"].tolist()[:3] == [0.0, 0.0, 0.0]
                    assert torch.equal(whole(state[name]["ema"]), whole(param.detach()))
                    assert not whole(state[name]["accumulated_grad"]).any()
                    assert "step" not in state[name] or state[name]["step"] == 0
            micro_batches(net, optimizer, range(4), COUNTED)
            optimizer.state_dict()
            ends.append((net, optimizer))
        (net, optimizer), (other_net, other) = ends
        for a, b in zip(net.parameters(), other_net.parameters(), strict=True):
            assert torch.equal(local(a), local(b))
            for name, value in other.state[b].items():
                assert torch.equal(local(optimizer.state[a][name]), local(value)), name
