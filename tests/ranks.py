"""Four processes of torch.distributed that the distributed tests run in, and what these share.

The processes start once in a session, because starting them costs more than the tests do. A test
that `on_ranks` makes of a function sends them the function's name, and waits for their answers.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import set_grads
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

SIZE = 4
SECONDS = 120  # that a check may take
COLLECTIVE_SECONDS = 60  # after which a rank that waits for another one fails
GRACE_SECONDS = 3  # for the other ranks, after one has failed
PRELOADED = ["fusedopt", "numpy", "pytest", "torch.distributed.checkpoint.state_dict"]
PRELOADED += ["torch.distributed.optim", "torch.nn.parallel"]


@dataclass(frozen=True)
class World:
    """What a check knows of its process.

    Attributes:
        rank: This process's.
        meshes: By size, a mesh over as many ranks, from rank 0 on.
        folder: Shared by all ranks.
    """

    rank: int
    meshes: dict[int, DeviceMesh]
    folder: Path


Check = Callable[[World, DeviceMesh], None]


def on_ranks(*sizes: int) -> Callable[[Check], Callable[..., None]]:
    """Makes a test of a check, run once on the first `size` ranks for each of these sizes.

    A check that makes process groups needs all four ranks, as all have to take part.
    """

    def decorate(check: Check) -> Callable[..., None]:
        @pytest.mark.xdist_group("ranks")
        @pytest.mark.parametrize("size", sizes)
        def test(four_ranks, size, tmp_path):
            failure = four_ranks.run(test, size, tmp_path)
            assert not failure, failure

        test.__name__, test.__module__, test.__doc__ = (
            check.__name__,
            check.__module__,
            check.__doc__,
        )
        test.check = check
        return test

    return decorate


class Ranks:
    """The processes, started when they are needed, and again after a check has failed."""

    def __init__(self) -> None:
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def run(self, test: Callable[..., None], size: int, folder: Path, seconds=SECONDS) -> str:
        """Runs a test's check on the first `size` ranks.

        Returns:
            "", or what went wrong, by rank.
        """
        failure = ""
        if not self._processes:
            self._start(folder)
            failure = self._answers(folder, SECONDS)
        if not failure:
            for pipe in self._pipes:
                pipe.send((test.__module__, test.__name__, size, folder, seconds))
            failure = self._answers(folder, seconds)
        if failure:
            self.stop()
        return failure

    def stop(self) -> None:
        """Ends the processes. Nothing of theirs outlives a check."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self, folder: Path) -> None:
        # Imports once, in a process without threads that all four are forked from.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, folder), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _answers(self, folder: Path, seconds: float) -> str:
        """Waits for all ranks; says what those said that failed, the first one first."""
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        said = []
        deadline = time.monotonic() + seconds + 1  # ranks write down where they are before it
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in multiprocessing.connection.wait(list(waiting), left):
                rank = waiting.pop(pipe)
                try:
                    answer = pipe.recv()
                except EOFError:
                    self._processes[rank].join()
                    answer = f"ended with exit code {self._processes[rank].exitcode}"
                if answer:
                    said.append(f"rank {rank}: {answer}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank in waiting.values():
            stack = _stack_file(folder, rank)
            place = stack.read_text() if stack.exists() else ""
            said.append(f"rank {rank}: does not answer\n{place}")
        return "\n".join(said)


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}_hangs_here"


def _serve(rank: int, pipe: multiprocessing.connection.Connection, folder: Path) -> None:
    """A rank's process: starts, and runs checks until the other end of the pipe is gone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meshes = {}

    def start() -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=SIZE,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
        meshes.update({n: DeviceMesh("cpu", list(range(n))) for n in range(1, SIZE + 1)})

    def check(module: str, name: str, size: int, folder: Path, seconds: float) -> None:
        with _stack_file(folder, rank).open("w") as file:
            faulthandler.dump_traceback_later(seconds, file=file)
            try:
                if rank < size:
                    function = getattr(importlib.import_module(module), name).check
                    function(World(rank, meshes, folder), meshes[size])
            finally:
                faulthandler.cancel_dump_traceback_later()

    def answer(function: Callable[..., None], *args) -> None:
        try:
            function(*args)
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send("")

    answer(start)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            os._exit(0)
        answer(check, *task)


# ---- What checks share ---------------------------------------------------------------------------


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
        state, wanted_state = optimizer.state.get(param, {}), other.state.get(wanted, {})
        assert list(state) == list(wanted_state)
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
