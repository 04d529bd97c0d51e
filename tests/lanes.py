"""Ways of batches to a device, for tests of the prefetcher: a GPU's, and one rehearsed on the host.

The rehearsed lane is as asynchronous as a GPU: copies are made later, by a thread of its own that
takes its time, so that a buffer which is written to too early shows.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from devices import needs_cuda

from fusedopt import _C
from fusedopt.data import DevicePrefetcher
from fusedopt.data.lanes import DeviceLane
from fusedopt.data.prefetching import is_plain

SPECKS = 2e-4  # seconds that a copy of the rehearsed device takes, at most


class Reached:
    """A point in a rehearsed stream."""

    def __init__(self):
        self._event = threading.Event()
        self.set = self._event.set
        self.query = self._event.is_set

    def synchronize(self):
        assert self._event.wait(20), "nobody gets there"


class Stream:
    """Does what it is given, in order, later."""

    def __init__(self):
        self._tasks = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            task = self._tasks.get()
            time.sleep(random.random() * SPECKS)
            task()

    def launch(self, task):
        self._tasks.put(task)

    def record(self):
        point = Reached()
        self.launch(point.set)
        return point


class RehearsedLane:
    """A device that is the host: its memory is other memory, its copies come late."""

    name = "rehearsed"
    pinned = True

    def __init__(self):
        self._copies, self._consumer = Stream(), Stream()
        self.handed_over = 0

    def working(self):
        return nullcontext()

    def send(self, tensor):
        if not is_plain(tensor):
            return tensor.clone()
        arrived = torch.full_like(tensor, -1)
        self._copies.launch(lambda: arrived.copy_(tensor))
        return arrived

    def wait_for_others(self):
        self._copies.record().synchronize()

    def done(self):
        return self._copies.record()

    def hand_over(self, done, tensors):
        reached = self._consumer.record()
        done.synchronize()
        self.handed_over += len(list(tensors))
        return reached


def rehearsed(loader, depth=2, ring=None, **kwargs):
    """A prefetcher to the rehearsed device."""
    prefetcher = DevicePrefetcher(loader, "cpu", depth, **kwargs)
    prefetcher._lane = RehearsedLane()
    prefetcher._ring = ring or _C.Ring(depth + 3, False)
    return prefetcher


def to_cpu(loader, depth=2, **kwargs):
    """A prefetcher that stays on the host."""
    return DevicePrefetcher(loader, "cpu", depth, **kwargs)


def to_cuda(loader, depth=2, **kwargs):
    """A prefetcher to the GPU."""
    prefetcher = DevicePrefetcher(loader, "cuda", depth, **kwargs)
    assert isinstance(prefetcher._lane, DeviceLane)
    return prefetcher


WAYS = [
    pytest.param(to_cpu, id="cpu"),
    pytest.param(rehearsed, id="rehearsed"),
    pytest.param(to_cuda, id="cuda", marks=needs_cuda),
]


class PoisonedRing:
    """A ring whose buffers are full of -7 for a while before they are what was asked for.

    Whoever reads a buffer that the ring took too early reads that, or the next batch.
    """

    def __init__(self, ring):
        self.ring = ring

    def _poisoned(self, batch, made):
        for tensor, values in zip(batch, made, strict=True):
            tensor.fill_(-7)
            time.sleep(random.random() * SPECKS)
            tensor.copy_(values)
        return batch

    def copy(self, tensors):
        poison = [torch.full_like(tensor, -7) for tensor in tensors]
        return self._poisoned(self.ring.copy(poison), tensors)

    def gather(self, sources, index, first, count):
        batch = self.ring.gather(sources, index, first, count)
        return self._poisoned(batch, [tensor.clone() for tensor in batch])

    @property
    def allocations(self):
        return self.ring.allocations


class EarlyRing:
    """A ring with the fault it must not have: its buffers are taken in turn, held or not."""

    def __init__(self, buffers):
        self.buffers = buffers
        self.turn = 0
        self.kept = {}

    def _take(self, tensors):
        self.turn += 1
        made = self.kept.setdefault(
            self.turn % self.buffers, [torch.empty_like(tensor) for tensor in tensors]
        )
        return [buffer[: len(tensor)] for buffer, tensor in zip(made, tensors, strict=True)]

    def copy(self, tensors):
        taken = self._take(tensors)
        for buffer, tensor in zip(taken, tensors, strict=True):
            buffer.copy_(tensor)
        return taken

    def gather(self, sources, index, first, count):
        rows = slice(first, first + count) if index is None else index[first : first + count]
        return self.copy([source[rows] for source in sources])
