"""Processes of torch.distributed on this machine, and what checks that run in them share.

One set of processes runs every check: starting them costs more than all checks. A check is a
function of a `World`; smaller worlds are meshes over the first ranks, which the others sit out.
"""

from __future__ import annotations

import datetime
import functools
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from harness import set_grads
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

SIZE = 3
# A rank that waits for another one gives up after this, and the parent after the other.
COLLECTIVE_SECONDS = 60
TOTAL_SECONDS = 300


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

    def mesh(self, size: int) -> DeviceMesh | None:
        """The mesh of this size, None on ranks outside of it."""
        return self.meshes[size] if self.rank < size else None


Check = Callable[[World], None]


class Checks(list[Check]):
    """The checks of a module."""

    def add(self, function: Check) -> Check:
        """Registers a check that all ranks run."""
        self.append(function)
        return function

    def on_meshes(self, *sizes: int) -> Callable[[Callable[..., None]], Check]:
        """Makes a check of a function that gets a mesh too, run for each of these sizes."""

        def decorate(function: Callable[..., None]) -> Check:
            @functools.wraps(function)
            def run_on_meshes(world: World) -> None:
                for size in sizes:
                    mesh = world.mesh(size)
                    if mesh is not None:
                        function(world, mesh)

            return self.add(run_on_meshes)

        return decorate


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


def shard_like(param, tensor, placements=None):
    """A whole tensor, which every rank has, cut as a DTensor parameter is. No communication."""
    placements = placements or param.placements
    return distribute_tensor(tensor, param.device_mesh, placements, src_data_rank=None)


def set_sharded_grads(params, seed):
    """The gradients of `harness.set_grads`, cut as the parameters are."""
    params = list(params)
    whole = [torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in params]
    set_grads(whole, seed)
    for param, other in zip(params, whole, strict=True):
        param.grad = shard_like(param, other.grad) if isinstance(param, DTensor) else other.grad


def whole(tensor):
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _result(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank}"


def _work(rank: int, ranks: int, checks: Sequence[Check], folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    name = "the start"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
        meshes = {size: DeviceMesh("cpu", list(range(size))) for size in range(1, ranks + 1)}
        for check in checks:
            name = check.__name__
            (folder / name).mkdir(exist_ok=True)
            check(World(rank, meshes, folder / name))
            dist.barrier()  # a rank that sits a check out must not run ahead of its timeout
            _result(folder, name, rank).write_text("")
        dist.destroy_process_group()
    except BaseException:
        _result(folder, name, rank).write_text(traceback.format_exc())
        os._exit(1)  # without waiting for ranks that wait for this one


def run(checks: Sequence[Check], folder: Path, ranks: int = SIZE) -> dict[str, str]:
    """Runs checks one after the other on all ranks; ends all processes at the first failure.

    Returns:
        By the check's name, "" or what went wrong, with the rank.
    """
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(r, ranks, checks, folder)) for r in range(ranks)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + TOTAL_SECONDS
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        if any(worker.exitcode for worker in workers):
            break
        time.sleep(0.02)
    time.sleep(0.5 if any(worker.exitcode for worker in workers) else 0)  # for what others say
    for worker in workers:
        worker.kill()
        worker.join()

    written = [
        path
        for check in ["the start", *(c.__name__ for c in checks)]
        for path in folder.glob(f"{check}.[0-9]")
    ]
    failed = sorted((p for p in written if p.read_text()), key=lambda p: p.stat().st_mtime_ns)
    # The first one to fail; the others mostly say that they were left alone.
    what = "\n".join(f"{p.stem}, rank {p.suffix[1:]}:\n{p.read_text()}" for p in failed)
    codes = [worker.exitcode for worker in workers]
    what = what or f"ended after {TOTAL_SECONDS} s, or died, with exit codes {codes}"
    results = {}
    for check in checks:
        name = check.__name__
        done = all(_result(folder, name, rank) in written for rank in range(ranks))
        if done and not any(path.stem == name for path in failed):
            results[name] = ""
        elif not failed or failed[0].stem in (name, "the start"):
            results[name] = what
        else:
            results[name] = f"not run to its end, because {failed[0].stem} failed"
    return results
