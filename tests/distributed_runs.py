"""What tests of distributed runs share: networks, sharded or wrapped, and runs to compare."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import public, set_grads
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fusedopt


class Net(torch.nn.Module):
    """Rows: 5, which no world divides, and 1, of which all ranks but the first hold nothing."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 5, dtype=dtype)
        self.second = torch.nn.Linear(5, 1, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def sharded(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> Net:
    net = Net(dtype)
    for module in (net.first, net.second, net):
        fully_shard(module, mesh=mesh)
    return net


def ddp(mesh, net, **kwargs):
    return DistributedDataParallel(net, process_group=mesh.get_group(), **kwargs)


def cut(value, mesh, placements):
    """A whole tensor, which every rank has, as a DTensor. No communication."""
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def cut_like(param, value):
    """A whole tensor as the parameter is: a DTensor of its layout, or a copy."""
    if isinstance(param, DTensor):
        return cut(value, param.device_mesh, param.placements)
    return value.clone()


def set_sharded_grads(params, seed):
    """The gradients of `harness.set_grads`, cut as the parameters are."""
    params = list(params)
    whole = [torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in params]
    set_grads(whole, seed)
    for param, other in zip(params, whole, strict=True):
        param.grad = cut_like(param, other.grad)


def whole(tensor):
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(mesh, tensor):
    """A tensor of every rank."""
    tensor = tensor.detach().contiguous()
    tensors = [torch.empty_like(tensor) for _ in range(mesh.size())]
    dist.all_gather(tensors, tensor, group=mesh.get_group())
    return tensors


def assert_equal_runs(ours, theirs):
    """Fails unless a sharded run has the bits of one over whole tensors, its states cut alike.

    Args:
        ours: A network or a list of parameters, and their optimizer.
        theirs: The same, of whole tensors.
    """
    (params, optimizer), (others, other) = (
        (list(n.parameters() if isinstance(n, torch.nn.Module) else n), o)
        for n, o in (ours, theirs)
    )
    for param, wanted in zip(params, others, strict=True):
        assert torch.equal(whole(param), wanted), f"parameters of shape {tuple(wanted.shape)}"
        state = public(optimizer.state.get(param, {}))
        wanted_state = public(other.state.get(wanted, {}))
        assert state.keys() == wanted_state.keys()
        for key, value in wanted_state.items():
            assert torch.equal(whole(state[key]), value), f"{key} of shape {tuple(wanted.shape)}"
            assert state[key].dtype == value.dtype
            if key in ("step", "window"):
                assert type(state[key]) is torch.Tensor
            else:
                assert isinstance(state[key], DTensor)
                assert state[key].placements == param.placements
                assert local(state[key]).shape == local(param).shape


def saved(net, optimizer):
    return {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer),
    }


def load(net, optimizer, folder, mesh):
    """Loads what `saved` and dcp.save wrote of a run on other ranks."""
    state = saved(net, optimizer)  # the optimizer's after a step that torch makes up
    dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, optimizer, state["optimizer"])


# ---- Runs that are compared with one process -----------------------------------------------------

NAN = float("nan")
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
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


def loss_of(model, x):
    return model(x).square().mean()


# Sizes of the micro-batches of a window, by rank: unequal in every way.
SIZES = [[3, 1, 2], [1, 4], [5]]


def window_of(window, rank, sizes=SIZES):
    return [rows(window, rank, number, size) for number, size in enumerate(sizes[rank])]


class Runs:
    """A network whose gradients are added up over ranks, and one that sees all of the data.

    Args:
        mesh: The ranks.
        name: Class of the optimizers.
        make: Of a network.
        alone: Options of the optimizer of one process; None: as the other one's.
        **options: Of the optimizer of a rank.
    """

    def __init__(self, mesh, name="AdamW", make=Net, alone=None, unused=False, **options):
        self.mesh = mesh
        self.net, self.alone = make().double(), make().double()
        self.model = ddp(mesh, self.net, find_unused_parameters=unused)
        self.optimizer = optimizer_of(self.net, name, **options)
        self.other = optimizer_of(self.alone, name, **(options if alone is None else alone))

    def step_alone(self, batches):
        loss_of(self.alone, torch.cat(batches)).backward()
        self.other.step()
        self.other.zero_grad()

    def values(self):
        return [param.detach().clone() for param in self.net.parameters()]

    def assert_unchanged(self, before):
        assert all(torch.equal(p, b) for p, b in zip(self.values(), before, strict=True))

    def assert_ranks_equal(self):
        for param in self.net.parameters():
            state = self.optimizer.state.get(param, {})
            names = sorted(name for name in state if name != "window")
            flags = torch.tensor([n in names for n in ("step", "exp_avg", "momentum_buffer")])
            for tensor in (flags.int(), param, *(state[name] for name in names)):
                assert all(torch.equal(tensor, other) for other in gathered(self.mesh, tensor))

    def assert_close(self):
        self.assert_ranks_equal()
        torch.testing.assert_close(self.values(), [p.detach() for p in self.alone.parameters()],
                                   **CLOSE)  # fmt: skip


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
