"""Four processes of torch.distributed that the distributed tests run in.

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
from torch.distributed.device_mesh import DeviceMesh

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
