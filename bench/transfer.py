"""The way of batches to a GPU: how close it comes to a memcpy from page-locked memory.

Also how much of it hides behind a kernel, and what a batch costs the host.
"""

from __future__ import annotations

import math
import statistics
from timeit import default_timer
from typing import Any

import torch

from fusedopt.data import DevicePrefetcher, TensorLoader

from .rows import Row
from .timing import Entrant, Step, nothing, run_race, time_once

SIZES = (1, 4, 16, 64)  # MiB of a batch
BATCHES = 256  # of a pass over a batch size: it begins once for all of them


def measure(mib: int, rounds: int = 5) -> Row:
    """Bytes a second of batches on their way to the GPU, beside a memcpy; and what hides of it."""
    bytes_each = mib * 2**20
    pinned = torch.zeros(bytes_each, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(pinned, device="cuda")
    rows = torch.zeros(16 * 1024, bytes_each // 1024, dtype=torch.uint8)
    index = torch.zeros(1, device="cuda")

    def copies() -> None:
        for _ in range(BATCHES):
            there.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    def passes(loader: Any, work: Step = nothing) -> Entrant:
        def run() -> None:
            for batch in loader:
                work()
                del batch
            torch.cuda.synchronize()

        return Entrant(run)

    copy_seconds = statistics.median(time_once(copies) for _ in range(5)) / BATCHES
    cycles = int(1.5 * copy_seconds * 1.7e9)  # a kernel half as long again as a copy

    def sleep() -> None:
        torch.cuda._sleep(cycles)
        index.add_(1)

    ready = DevicePrefetcher([pinned] * BATCHES, "cuda")
    gathered = TensorLoader(rows, batch_size=1024, shuffle=True, device="cuda")
    entrants = {
        "memcpy": Entrant(copies),
        "prefetcher": passes(ready),
        "loader": passes(gathered),
        "compute": passes(range(BATCHES), sleep),
        "prefetcher, compute": passes(ready, sleep),
    }
    race = run_race(entrants, rounds, 10.0)
    seconds = {name: race.stats(name).median / BATCHES for name in entrants}
    seconds["loader"] *= BATCHES / len(gathered)
    rates = {n: bytes_each / seconds[n] for n in ("memcpy", "prefetcher", "loader")}
    share = race.ratio("memcpy", "prefetcher")
    assert share is not None
    columns = ("memcpy", "compute", "prefetcher, compute")
    hidden = [
        (copied + computed - both) / copied
        for copied, computed, both in zip(*map(race.seconds.get, columns), strict=True)
        if not math.isnan(copied + computed + both)
    ]
    return {
        "job": "transfer", "device": "cuda", "batch_mib": mib, "bytes_per_second": rates,
        "prefetcher_share": share.median, "loader_share": rates["loader"] / rates["memcpy"],
        "hidden": statistics.median(hidden), "host_us": _host_microseconds(ready),
    }  # fmt: skip


def _host_microseconds(loader: Any) -> float:
    """Median of what asking for a batch takes that has been ready for long."""
    times = []
    iterator = iter(loader)
    next(iterator)
    for _ in range(20):
        torch.cuda._sleep(2_000_000)
        torch.cuda.synchronize()
        start = default_timer()
        next(iterator)
        times.append(default_timer() - start)
    iterator.close()
    return statistics.median(times) * 1e6
