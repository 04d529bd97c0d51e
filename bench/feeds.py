"""What feeds a training loop: torch's loaders, torchdata's, a plain loop, ours, and a floor.

A feed is built over the rows of a workload and gives a function that goes through one epoch of
shuffled batches and puts each where it is wanted: in host memory, or on a GPU. To add one, append a
function to ``FEEDS``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from fusedopt.data import TensorLoader

Batch = list[torch.Tensor]
Epoch = Callable[[], None]


@dataclass(frozen=True)
class Rows:
    """A data set in memory, and how it is cut.

    Attributes:
        name: as given to ``--workloads``.
        summary: what it is.
        rows: how many.
        shape: of a row.
        dtype: of its numbers.
        batch_size: rows of a batch.
    """

    name: str
    summary: str
    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_size: int

    def tensors(self) -> Batch:
        """Random rows and labels, the same on every run."""
        generator = torch.Generator().manual_seed(0)
        if self.dtype.is_floating_point:
            rows = torch.empty(self.rows, *self.shape, dtype=self.dtype).uniform_(
                generator=generator
            )
        else:
            rows = torch.randint(
                0, 255, (self.rows, *self.shape), generator=generator, dtype=self.dtype
            )
        return [rows, torch.randint(0, 10, (self.rows,), generator=generator)]

    @property
    def row_bytes(self) -> int:
        """Of a row and its label."""
        return self.dtype.itemsize * torch.Size(self.shape).numel() + torch.int64.itemsize

    @property
    def epoch_bytes(self) -> int:
        """Of all rows and labels."""
        return self.rows * self.row_bytes

    @property
    def batch_bytes(self) -> int:
        """Of a whole batch."""
        return self.batch_size * self.row_bytes


WORKLOADS = {
    work.name: work
    for work in (
        Rows("mnist", "60,000 x 784, fp32", 60_000, (784,), torch.float32, 256),
        Rows("images", "4,096 x 3 x 96 x 96, uint8", 4096, (3, 96, 96), torch.uint8, 128),
        Rows("features", "16,384 x 4,096, fp32", 16_384, (4096,), torch.float32, 1024),
        Rows("table", "200,000 x 16, fp32", 200_000, (16,), torch.float32, 1024),
    )
}


def drained(batches: Iterable[Any], device: str) -> None:
    """Goes through batches, and waits for the last to arrive."""
    for batch in batches:
        if device != "cpu":
            batch = [tensor.to(device, non_blocking=True) for tensor in batch]
    if device != "cpu":
        torch.cuda.synchronize()


def _dataloader(workers: int, device: str, data: Batch, work: Rows) -> Epoch:
    pinned = device != "cpu"
    loader = DataLoader(TensorDataset(*data), work.batch_size, shuffle=True, num_workers=workers,
                        pin_memory=pinned, persistent_workers=workers > 0)  # fmt: skip
    return lambda: drained(loader, device)


def _batched(device: str, data: Batch, work: Rows) -> Epoch:
    dataset = TensorDataset(*data)
    sampler = BatchSampler(RandomSampler(dataset), work.batch_size, drop_last=False)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler, pin_memory=device != "cpu")
    return lambda: drained(loader, device)


def _torchdata(device: str, data: Batch, work: Rows) -> Epoch:
    from torchdata import nodes  # type: ignore[import-untyped]

    dataset = TensorDataset(*data)
    sampler = BatchSampler(RandomSampler(dataset), work.batch_size, drop_last=False)

    def epoch() -> None:
        # Anew each time, since one that is kept begins the next epoch in its threads at once.
        node = nodes.ParallelMapper(
            nodes.SamplerWrapper(sampler), dataset.__getitem__, num_workers=2, method="thread"
        )
        node = nodes.PinMemory(node) if device != "cpu" else node
        drained(nodes.Loader(node, restart_on_stop_iteration=False), device)

    return epoch


def _index_select(device: str, data: Batch, work: Rows) -> Epoch:
    def batches() -> Iterable[Batch]:
        for index in torch.randperm(work.rows).split(work.batch_size):
            yield [tensor.index_select(0, index) for tensor in data]

    return lambda: drained(batches(), device)


def _fusedopt(device: str, data: Batch, work: Rows) -> Epoch:
    loader = TensorLoader(*data, batch_size=work.batch_size, shuffle=True, device=device)

    def epoch() -> None:
        for batch in loader:
            del batch
        if device != "cpu":
            torch.cuda.synchronize()

    return epoch


def _floor(device: str, data: Batch, work: Rows) -> Epoch:
    """The same bytes, batch by batch, by memcpy: into one buffer, or from one to the GPU."""
    shapes = [(work.batch_size, *tensor.shape[1:]) for tensor in data]
    kinds = [tensor.dtype for tensor in data]
    made = [torch.zeros(s, dtype=d, device=device) for s, d in zip(shapes, kinds, strict=True)]
    if device == "cpu":
        parts = [
            [t[i : i + work.batch_size] for t in data] for i in range(0, work.rows, work.batch_size)
        ]
    else:
        pinned = [torch.zeros(s, dtype=d).pin_memory() for s, d in zip(shapes, kinds, strict=True)]
        parts = [pinned] * -(-work.rows // work.batch_size)

    def epoch() -> None:
        for part in parts:
            for to, tensor in zip(made, part, strict=True):
                to[: len(tensor)].copy_(tensor, non_blocking=True)
        if device != "cpu":
            torch.cuda.synchronize()

    return epoch


@dataclass(frozen=True)
class Feed:
    """A way to go through the batches of an epoch.

    Attributes:
        name: as given to ``--providers``.
        title: as printed in tables.
        build: makes an epoch's function of (device, rows, workload).
        needs: a package it needs.
        lingers: it has threads or processes of its own, which do not end with an epoch.
    """

    name: str
    title: str
    build: Callable[[str, Batch, Rows], Epoch]
    needs: str = "torch"
    lingers: bool = False

    def unavailable(self) -> str:
        """Why it cannot be built here; empty if it can."""
        return "" if importlib.util.find_spec(self.needs) else f"{self.needs} is not installed"


CANDIDATE, FLOOR = "fusedopt", "floor"
FEEDS = {
    feed.name: feed
    for feed in (
        Feed("dataloader", "DataLoader", lambda *a: _dataloader(0, *a)),
        Feed("dataloader-2", "DataLoader, 2 workers", lambda *a: _dataloader(2, *a), lingers=True),
        Feed("dataloader-batched", "DataLoader, batches indexed", _batched),
        Feed("torchdata", "torchdata nodes", _torchdata, "torchdata", lingers=True),
        Feed("index_select", "index_select loop", _index_select),
        Feed(CANDIDATE, "TensorLoader", _fusedopt),
        Feed(FLOOR, "memcpy floor", _floor),
    )
}
