"""A fair race between steps: round-robin in one process, medians, ratios within a round.

Machines drift (frequency, neighbours, memory): two providers timed one after the other differ by
8% for no reason. So every round times each provider once, in an order that changes from round to
round, and a ratio is taken between times of the *same* round before the median is.

The clock is torch.utils.benchmark's, which waits for an accelerator where there is one. Its Timer
is not used: it repeats one statement many times in a row, the opposite of a round-robin.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from timeit import default_timer  # torch.utils.benchmark's waits for the device
from typing import Any

import torch
from torch.utils.benchmark import timer

MIN_ROUNDS = 5

Step = Callable[[], object]


@dataclass(frozen=True)
class Stats:
    """Median, 20th and 80th percentile of a sample, and the number of its values."""

    median: float
    p20: float
    p80: float
    rounds: int

    @staticmethod
    def of(values: Sequence[float]) -> Stats:
        """Statistics of at least one value."""
        if len(values) == 1:
            return Stats(values[0], values[0], values[0], 1)
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return Stats(statistics.median(values), fifths[0], fifths[3], len(values))


@dataclass
class Race:
    """Times of several entrants over the same rounds.

    Attributes:
        seconds: by entrant, or `stage_of` one, then by round; nan in rounds it sat out.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def stats(self, name: str) -> Stats:
        """Median and spread of one entrant, in seconds."""
        return Stats.of([value for value in self.seconds[name] if not math.isnan(value)])

    def ratio(self, numerator: str | None, denominator: str | None) -> Stats | None:
        """Median and spread of a ratio over the rounds both ran in; None if one did not run."""
        if numerator not in self.seconds or denominator not in self.seconds:
            return None
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        found = [a / b for a, b in pairs if not (math.isnan(a) or math.isnan(b))]
        return Stats.of(found) if found else None

    def columns(
        self, name: str, baseline: str | None = None, floor: str | None = None
    ) -> dict[str, Any]:
        """An entrant's times as columns of a row: milliseconds, and ratios to two others.

        `faster` is how many times faster than the baseline it is, `floor_share` the part of its
        time that the floor takes.
        """
        told, rounds = self.stats(name), len(self.seconds[name])
        found: dict[str, Any] = {"ms": told.median * 1e3, "p20": told.p20 * 1e3,
                                 "p80": told.p80 * 1e3, "rounds": told.rounds}  # fmt: skip
        if told.rounds < rounds:
            found["of_rounds"] = rounds
        if faster := self.ratio(baseline, name):
            found |= {"faster": faster.median, "faster_p20": faster.p20, "faster_p80": faster.p80}
        if share := self.ratio(floor, name):
            found["floor_share"] = share.median
        return found


def stage_of(name: str, stage: str) -> str:
    """The name that the times of an entrant's stage have in a race."""
    return f"{name}/{stage}"


def time_once(step: Step) -> float:
    """Seconds of one call of `step`."""
    start = timer()
    step()
    return timer() - start


def time_all(name: str, step: Step | Mapping[str, Step]) -> dict[str, float]:
    """Seconds of a step, and of its stages where it has some, by their names in a race."""
    if not isinstance(step, Mapping):
        return {name: time_once(step)}
    times = {stage_of(name, stage): time_once(part) for stage, part in step.items()}
    return {name: sum(times.values()), **times}


def rounds_to_run(estimate: float, rounds: int, budget: float) -> list[bool]:
    """In which of `rounds` a step of `estimate` seconds runs, to stay within `budget` seconds.

    A slow step sits rounds out evenly, but runs in at least MIN_ROUNDS of them and in the first.

    Example:
        >>> rounds_to_run(estimate=1.0, rounds=8, budget=4.0)  # 4 would be too few: 5
        [True, True, False, True, True, False, True, False]
    """
    affordable = int(budget / estimate) if estimate > 0 else rounds
    count = min(rounds, max(affordable, MIN_ROUNDS))
    chosen = {i * rounds // count for i in range(count)}
    return [index in chosen for index in range(rounds)]


def order_of_round(names: Sequence[str], index: int) -> list[str]:
    """Names rotated by `index`, every second time backwards: neighbours change as places do."""
    shift = index % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if index % 2 else rotated


def run_race(
    race: Race,
    steps: Mapping[str, Step | Mapping[str, Step]],
    rounds: int,
    budget: float,
    on_round: Step = lambda: None,
    before: Mapping[str, Step] | None = None,
) -> None:
    """Warms every step up twice and times it, round-robin.

    Args:
        race: receives the times round by round, so that an interrupted race keeps its whole rounds.
        steps: by name, what to time; or its stages in their order, timed one by one.
        rounds: number of rounds.
        budget: seconds a single step may take over all rounds before it sits some out.
        on_round: called before each round, to move a progress bar.
        before: by name, what makes a step's inputs what they were; called before each, not timed.
    """

    def attempt(name: str) -> dict[str, float]:
        if before is not None and name in before:
            before[name]()
        return time_all(name, steps[name])

    runs, names = {}, {}
    for name in steps:
        attempt(name)  # allocates states, builds the plan
        times = attempt(name)
        runs[name] = rounds_to_run(times[name], rounds, budget)
        names[name] = list(times)
    gc.collect()
    gc.disable()  # a collection inside a step would be billed to it
    try:
        for index in range(rounds):
            on_round()
            times = {}
            for name in order_of_round(list(steps), index):
                times |= (
                    attempt(name) if runs[name][index] else dict.fromkeys(names[name], math.nan)
                )
            for name in [timed for step in steps for timed in names[step]]:
                race.seconds.setdefault(name, []).append(times[name])
    finally:
        gc.enable()


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Sets torch's number of threads (which fusedopt and the floor obey) for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- on a GPU, what a wall clock blends ----


def look(step: Step, before: Step = lambda: None, repeats: int = 5) -> dict[str, Any]:
    """Kernels, copies and microseconds of a step on the GPU, and microseconds of the host's call.

    With `before`, which is not to be seen, there can be but one repeat of the first three.
    """
    times = []
    for _ in range(20):
        before()
        torch.cuda.synchronize()
        start = default_timer()
        step()
        times.append(default_timer() - start)
    before()
    step()
    before()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    return {
        "kernels": (len(events) - len(copies)) / repeats,
        "copies": len(copies) / repeats,
        "device_us": sum(event.device_time_total for event in events) / repeats,
        "host_us": statistics.median(times) * 1e6,
    }
