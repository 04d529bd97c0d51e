"""The load job: how fast do batches come, and what of it does a GPU's loop notice?

Feeds race round-robin in this process over rows in memory, an epoch of shuffled batches each a
round: torch's loaders, torchdata's, a plain loop, ours, and a floor. To add one, append a function
to ``FEEDS``. What more there is to see on a GPU, `transfer` measures.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from timeit import default_timer
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from fusedopt.data import TensorLoader

from .rows import CANDIDATE, FLOOR, Row
from .timing import Advance, Entrant, Step, Task, measure

Batch = list[torch.Tensor]

SETTLING = 0.5  # seconds for the threads of one feed, before the next
STANDARD = ("mnist", "images", "table")


@dataclass(frozen=True)
class Rows:
    """A data set in memory, of rows of a shape and type, and how it is cut."""

    summary: str
    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_size: int

    def tensors(self) -> Batch:
        """Random rows and labels, the same on every run."""
        generator, shape = torch.Generator().manual_seed(0), (self.rows, *self.shape)
        if self.dtype.is_floating_point:
            rows = torch.empty(shape, dtype=self.dtype).uniform_(generator=generator)
        else:
            rows = torch.randint(0, 255, shape, generator=generator, dtype=self.dtype)
        return [rows, torch.randint(0, 10, (self.rows,), generator=generator)]

    @property
    def row_bytes(self) -> int:
        """Of a row and its label."""
        return self.dtype.itemsize * math.prod(self.shape) + torch.int64.itemsize


WORKLOADS = {
    "mnist": Rows("60,000 x 784, fp32", 60_000, (784,), torch.float32, 256),
    "images": Rows("4,096 x 3 x 96 x 96, uint8", 4096, (3, 96, 96), torch.uint8, 128),
    "features": Rows("16,384 x 4,096, fp32", 16_384, (4096,), torch.float32, 1024),
    "table": Rows("200,000 x 16, fp32", 200_000, (16,), torch.float32, 1024),
}


# ---- the feeds: each makes an epoch's function of (device, data, work) ----


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _drain(batches: Iterable[Any], device: str) -> None:
    """Goes through batches, and waits for the last to arrive."""
    for batch in batches:
        if device != "cpu":
            batch = [tensor.to(device, non_blocking=True) for tensor in batch]
    _wait(device)


def _dataloader(workers: int) -> Callable[[str, Batch, Rows], Step]:
    def build(device: str, data: Batch, work: Rows) -> Step:
        loader = DataLoader(
            TensorDataset(*data), work.batch_size, shuffle=True, num_workers=workers,
            pin_memory=device != "cpu", persistent_workers=workers > 0,
        )  # fmt: skip
        return lambda: _drain(loader, device)

    return build


def _batches_of(dataset: TensorDataset, work: Rows) -> BatchSampler:
    return BatchSampler(RandomSampler(dataset), work.batch_size, drop_last=False)


def _batched(device: str, data: Batch, work: Rows) -> Step:
    dataset = TensorDataset(*data)
    sampler = _batches_of(dataset, work)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler, pin_memory=device != "cpu")
    return lambda: _drain(loader, device)


def _torchdata(device: str, data: Batch, work: Rows) -> Step:
    from torchdata import nodes  # type: ignore[import-untyped]

    dataset = TensorDataset(*data)
    sampler = _batches_of(dataset, work)

    def epoch() -> None:
        # Anew each time, since one that is kept begins the next epoch in its threads at once.
        node = nodes.ParallelMapper(
            nodes.SamplerWrapper(sampler), dataset.__getitem__, num_workers=2, method="thread"
        )
        node = nodes.PinMemory(node) if device != "cpu" else node
        _drain(nodes.Loader(node, restart_on_stop_iteration=False), device)

    return epoch


def _index_select(device: str, data: Batch, work: Rows) -> Step:
    def batches() -> Iterator[Batch]:
        for index in torch.randperm(work.rows).split(work.batch_size):
            yield [tensor.index_select(0, index) for tensor in data]

    return lambda: _drain(batches(), device)


def _fusedopt(device: str, data: Batch, work: Rows) -> Step:
    loader = TensorLoader(*data, batch_size=work.batch_size, shuffle=True, device=device)

    def epoch() -> None:
        for batch in loader:
            del batch
        _wait(device)

    return epoch


def _floor(device: str, data: Batch, work: Rows) -> Step:
    """The same bytes, batch by batch, by memcpy: into one buffer, or from one to the GPU."""
    made = [torch.zeros_like(tensor[: work.batch_size], device=device) for tensor in data]
    parts = list(zip(*(tensor.split(work.batch_size) for tensor in data), strict=True))
    if device != "cpu":
        pinned = [torch.zeros_like(tensor[: work.batch_size]).pin_memory() for tensor in data]
        parts = [tuple(pinned)] * len(parts)

    def epoch() -> None:
        for part in parts:
            for to, tensor in zip(made, part, strict=True):
                to[: len(tensor)].copy_(tensor, non_blocking=True)
        _wait(device)

    return epoch


@dataclass(frozen=True)
class Feed:
    """A way to go through the batches of an epoch; `needs` is a package.

    One that lingers has threads or processes of its own, which do not end with an epoch and slow
    down whoever comes after them: it races against ours alone, before the others.
    """

    title: str
    build: Callable[[str, Batch, Rows], Step]
    needs: str = "torch"
    lingers: bool = False

    def unavailable(self) -> str:
        """Why it cannot be built here; empty if it can."""
        return "" if importlib.util.find_spec(self.needs) else f"{self.needs} is not installed"


FEEDS = {
    "dataloader": Feed("DataLoader", _dataloader(0)),
    "dataloader-2": Feed("DataLoader, 2 workers", _dataloader(2), lingers=True),
    "dataloader-batched": Feed("DataLoader, batches indexed", _batched),
    "torchdata": Feed("torchdata nodes", _torchdata, "torchdata", lingers=True),
    "index_select": Feed("index_select loop", _index_select),
    CANDIDATE: Feed("TensorLoader", _fusedopt),
    FLOOR: Feed("memcpy floor", _floor),
}


def plan(workload: str, feeds: Sequence[str], device: str) -> list[Task]:
    """The races over a set of rows: of the feeds that linger against ours, then of the others."""
    work = WORKLOADS[workload]
    lingering = [name for name in feeds if FEEDS[name].lingers]
    others = [name for name in feeds if name not in lingering]
    alone = lingering and [*lingering, *({CANDIDATE} & {*others})]

    def task(chosen: Sequence[str]) -> Task:
        def build() -> dict[str, Entrant | str]:
            data = work.tensors()
            return {
                name: FEEDS[name].unavailable()
                or Entrant(FEEDS[name].build(device, data, work), before=_settle)
                for name in chosen
            }

        size = work.rows * work.row_bytes
        columns = {"job": "load", "workload": workload, "device": device, "rows": work.rows,
                   "batch_size": work.batch_size, "bytes": size}  # fmt: skip
        return Task(columns, build, CANDIDATE, 2 * size)

    return [task(chosen) for chosen in (alone, others) if chosen]


def race(task: Task, rounds: int, seconds: float, advance: Advance) -> list[Row]:
    """The rows of a race, without ours where it ran beside feeds that linger."""
    found = measure(task, rounds, seconds, advance)
    slowed = any(FEEDS[row["provider"]].lingers for row in found)
    return [row for row in found if not (slowed and row["provider"] == CANDIDATE)]


def _settle() -> None:
    """Lets the threads of the feed before end: those of torchdata do so when they are collected."""
    gc.collect()
    deadline = default_timer() + SETTLING
    while threading.active_count() > 1 and default_timer() < deadline:
        time.sleep(0.01)
