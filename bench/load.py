"""The load job: how fast do batches come, and what of it does a GPU's loop notice?

Feeds race round-robin in this process over rows in memory, an epoch each a round. On a GPU
there is more to see: how close the way to the device comes to a memcpy from page-locked memory, how
much of the copying hides behind a kernel, and what a batch costs the host.
"""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from timeit import default_timer
from typing import Any

import torch

from fusedopt.data import DevicePrefetcher, TensorLoader

from . import feeds
from .feeds import CANDIDATE, FEEDS, Rows
from .timing import Race, Stats, run_race, time_once

MIB = 2**20
SETTLING = 0.5  # seconds for the threads of one feed, before the next
TRANSFERS = (1, 4, 16, 64)  # MiB of a batch
BATCHES = 256  # of a pass over a batch size on a GPU: it begins once for all of them


@dataclass
class Row:
    """What was measured of one set of rows.

    Attributes:
        work: the rows.
        device: where batches went.
        race: seconds an epoch, by feed and round.
        apart: the same of feeds with threads or processes of their own, which slow down whoever
            comes after them: they race against ours alone, afterwards.
        unavailable: by feed that did not run, the reason.
    """

    work: Rows
    device: str
    race: Race = field(default_factory=Race)
    apart: Race = field(default_factory=Race)
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, Stats]:
        """What an epoch takes, by feed; ours among those without threads."""
        return {
            name: race.stats(name)
            for race in (self.apart, self.race)
            for name in race.seconds
            if race is self.race or name != CANDIDATE
        }

    def ratio(self, name: str) -> Stats | None:
        """A feed's epoch over ours in the same race; None if one of them did not run."""
        race = self.race if name in self.race.seconds else self.apart
        if name not in race.seconds or CANDIDATE not in race.seconds:
            return None
        return race.ratio(name, CANDIDATE)

    def to_json(self) -> dict[str, Any]:
        """Everything measured, as it stands in a result file."""
        seconds = self.seconds
        medians = {name: stats.median for name, stats in seconds.items()}
        return {
            "workload": self.work.name,
            "device": self.device,
            "rows": self.work.rows,
            "batch_size": self.work.batch_size,
            "batch_bytes": self.work.batch_bytes,
            "epoch_seconds": {name: asdict(stats) for name, stats in seconds.items()},
            "samples_per_second": {n: self.work.rows / s for n, s in medians.items()},
            "bytes_per_second": {n: self.work.epoch_bytes / s for n, s in medians.items()},
            "over_fusedopt": {
                n: asdict(ratio) for n in medians if (ratio := self.ratio(n)) is not None
            },
            "unavailable": self.unavailable,
        }


def measure(
    names: list[str],
    wanted: list[str],
    device: str,
    rounds: int,
    seconds: float,
    on_round: Callable[[str], None] = lambda label: None,
) -> Iterator[Row]:
    """Races the feeds over each set of rows.

    Args:
        names: of ``feeds.WORKLOADS``.
        wanted: names of ``FEEDS``.
        device: where batches go.
        rounds: of a row.
        seconds: what a feed may take of a row before it sits rounds out.
        on_round: called before each round with a label, to move a progress bar.
    """
    for name in names:
        row = Row(feeds.WORKLOADS[name], device)
        data = row.work.tensors()
        epochs = {}
        for feed in wanted:
            if reason := FEEDS[feed].unavailable():
                row.unavailable[feed] = reason
            else:
                epochs[feed] = FEEDS[feed].build(device, data, row.work)
        alone = {feed: epoch for feed, epoch in epochs.items() if FEEDS[feed].lingers}
        together = {feed: epoch for feed, epoch in epochs.items() if feed not in alone}
        if alone and CANDIDATE in together:
            alone[CANDIDATE] = together[CANDIDATE]
        for race, entrants in ((row.race, together), (row.apart, alone)):
            if entrants:
                run_race(race, entrants, rounds, seconds, lambda _, label=name: on_round(label),
                         dict.fromkeys(entrants, settle))  # fmt: skip
        yield row


def settle() -> None:
    """Lets the threads of the feed before end: those of torchdata do so when they are collected."""
    gc.collect()
    deadline = default_timer() + SETTLING
    while threading.active_count() > 1 and default_timer() < deadline:
        time.sleep(0.01)


# ---- on a GPU ------------------------------------------------------------------------------------


class Repeated:
    """A loader of one batch, in page-locked memory or not, many times over."""

    def __init__(self, tensor: torch.Tensor, count: int) -> None:
        self.tensor = tensor
        self.count = count

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.count):
            yield self.tensor


def transfer(mib: int, rounds: int = 5) -> dict[str, Any]:
    """Bytes a second of batches on their way to the GPU, beside a memcpy; and what hides of it."""
    bytes_each = mib * MIB
    pinned = torch.zeros(bytes_each, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(pinned, device="cuda")
    rows = torch.zeros(16 * 1024, bytes_each // 1024, dtype=torch.uint8)
    index = torch.zeros(1, device="cuda")

    def copies() -> None:
        for _ in range(BATCHES):
            there.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    def passes(loader: Any, work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for batch in loader:
                work()
                del batch
            torch.cuda.synchronize()

        return run

    def compute() -> None:
        for _ in range(BATCHES):
            sleep()
        torch.cuda.synchronize()

    def idle() -> None:
        pass

    copy_seconds = statistics.median(time_once(copies) for _ in range(5)) / BATCHES
    cycles = int(1.5 * copy_seconds * 1.7e9)  # a kernel half as long again as a copy

    def sleep() -> None:
        torch.cuda._sleep(cycles)
        index.add_(1)

    ready = DevicePrefetcher(Repeated(pinned, BATCHES), "cuda")
    gathered = TensorLoader(rows, batch_size=1024, shuffle=True, device="cuda")
    in_rows = BATCHES / len(gathered)
    race = Race()
    steps = {
        "memcpy": copies,
        "prefetcher": passes(ready, idle),
        "loader": passes(gathered, idle),
        "compute": compute,
        "prefetcher, compute": passes(ready, sleep),
    }
    run_race(race, steps, rounds, 10.0)
    seconds = {name: race.stats(name).median / BATCHES for name in steps}
    seconds["loader"] *= in_rows
    rates = {n: bytes_each / seconds[n] for n in ("memcpy", "prefetcher", "loader")}
    share = race.ratio("memcpy", "prefetcher")
    hidden = [
        (copied + computed - both) / copied
        for copied, computed, both in zip(
            race.seconds["memcpy"], race.seconds["compute"], race.seconds["prefetcher, compute"],
            strict=True,
        )
        if not math.isnan(copied + computed + both)
    ]  # fmt: skip
    return {
        "batch_mib": mib,
        "bytes_per_second": rates,
        "prefetcher_over_memcpy": asdict(share),
        "loader_over_memcpy": rates["loader"] / rates["memcpy"],
        "hidden": asdict(Stats.of(hidden)),
        "host_us": host_microseconds(ready),
    }


def host_microseconds(loader: Any) -> float:
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
