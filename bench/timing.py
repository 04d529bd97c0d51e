"""A fair race between steps: round-robin in one process, medians, ratios within a round.

Machines drift (frequency, neighbours, memory): two providers timed one after the other differ by
8% for no reason. So every round times each entrant once, in an order that changes from round to
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
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import timer

from .rows import BEST, FLOOR, Row, label

MIN_ROUNDS = 5

Step = Callable[[], object]
Advance = Callable[[str], None]


def nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Entrant:
    """A way to do the work of a race, ready to be timed.

    Attributes:
        call: does all of it once.
        before: makes its inputs what they were; called before each, not timed.
        stages: its parts in their order, where they are timed one by one instead.
        columns: what its rows have beside times.
        optimizer: what takes the step, where there is one.
        parameters: what is updated.
    """

    call: Step
    before: Step = nothing
    stages: Mapping[str, Step] = field(default_factory=dict)
    columns: Row = field(default_factory=dict)
    optimizer: Any = None
    parameters: Sequence[torch.nn.Parameter] = ()


@dataclass(frozen=True)
class Task:
    """What one race measures.

    Attributes:
        columns: of all its rows: job, workload, optimizer, dtype, device and sizes.
        build: makes the entrants; a text in place of one says why it does not take part.
        baseline: whom the others are compared with; `BEST`: the fastest of torch's.
        memory: bytes that are needed meanwhile, at most.
    """

    columns: Row
    build: Callable[[], dict[str, Entrant | str]]
    baseline: str
    memory: int


class Stats(NamedTuple):
    """Median, 20th and 80th percentile of a sample, and the number of its values."""

    median: float
    p20: float
    p80: float
    rounds: int

    @staticmethod
    def of(values: torch.Tensor) -> Stats:
        """Statistics of values, of which at least one is no nan."""
        fifths = values.nanquantile(torch.tensor([0.5, 0.2, 0.8], dtype=values.dtype))
        return Stats(*fifths.tolist(), int((~values.isnan()).sum()))


@dataclass
class Race:
    """Times of several entrants over the same rounds.

    Attributes:
        seconds: by entrant, or `stage_of` one, then by round; nan in rounds it sat out.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def stats(self, name: str) -> Stats:
        """Median and spread of one entrant, in seconds."""
        return Stats.of(torch.tensor(self.seconds[name], dtype=torch.float64))

    def ratio(self, numerator: str | None, denominator: str | None) -> Stats | None:
        """Median and spread of a ratio over the rounds both ran in; None if one did not run."""
        if numerator not in self.seconds or denominator not in self.seconds:
            return None
        times = torch.tensor(
            [self.seconds[n] for n in (numerator, denominator)], dtype=torch.float64
        )
        found = times[0] / times[1]
        return None if found.isnan().all() else Stats.of(found)

    def columns(self, name: str, baseline: str | None = None) -> Row:
        """An entrant's times as columns of a row: milliseconds, and ratios to two others.

        `faster` is how many times faster than the baseline it is, `floor_share` the part of its
        time that the floor takes.
        """
        told, rounds = self.stats(name), len(self.seconds[name])
        found: Row = {"ms": told.median * 1e3, "p20": told.p20 * 1e3, "p80": told.p80 * 1e3,
                      "rounds": told.rounds}  # fmt: skip
        if told.rounds < rounds:
            found["of_rounds"] = rounds
        if faster := self.ratio(baseline, name):
            found |= {"faster": faster.median, "faster_p20": faster.p20, "faster_p80": faster.p80}
        if share := self.ratio(FLOOR, name):
            found["floor_share"] = share.median
        return found

    def best_of_torch(self) -> str | None:
        """The torch provider with the shortest step; None when none ran."""
        ran = [name for name in self.seconds if name.startswith("torch-")]
        return min(ran, key=lambda name: self.stats(name).median, default=None)


def stage_of(name: str, stage: str) -> str:
    """The name that the times of an entrant's stage have in a race."""
    return f"{name}/{stage}"


def time_once(step: Step) -> float:
    """Seconds of one call of `step`."""
    start = timer()
    step()
    return timer() - start


def rounds_to_run(estimate: float, rounds: int, budget: float) -> list[bool]:
    """In which rounds a step takes part: evenly spread, as many as `budget` seconds allow.

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
    entrants: Mapping[str, Entrant], rounds: int, budget: float, on_round: Step = nothing
) -> Race:
    """Warms every entrant up twice and times it, round-robin.

    Args:
        entrants: by name.
        rounds: number of rounds.
        budget: seconds a single entrant may take over all rounds before it sits some out.
        on_round: called before each round, to move a progress bar.
    """

    def attempt(name: str) -> dict[str, float]:
        entrant = entrants[name]
        entrant.before()
        if not entrant.stages:
            return {name: time_once(entrant.call)}
        times = {stage_of(name, part): time_once(step) for part, step in entrant.stages.items()}
        return {name: sum(times.values()), **times}

    race, taking_part = Race(), {}
    for name in entrants:
        attempt(name)  # allocates states, builds the plan
        times = attempt(name)
        taking_part[name] = rounds_to_run(times[name], rounds, budget)
        race.seconds |= {timed: [math.nan] * rounds for timed in times}
    gc.collect()
    gc.disable()  # a collection inside a step would be billed to it
    try:
        for index in range(rounds):
            on_round()
            for name in order_of_round([*entrants], index):
                if taking_part[name][index]:
                    for timed, seconds in attempt(name).items():
                        race.seconds[timed][index] = seconds
    finally:
        gc.enable()
    return race


def measure(
    task: Task, rounds: int, seconds: float, advance: Advance = lambda label: None
) -> list[Row]:
    """Races the entrants of a task, looks at each on a GPU, drops them, and gives their rows.

    Args:
        task: what to measure.
        rounds: rounds of the race.
        seconds: what one entrant may take over all rounds before it sits some out.
        advance: called before each round with a label, to move a progress bar.
    """
    built = task.build()
    entrants = {name: made for name, made in built.items() if isinstance(made, Entrant)}
    said = f"{task.columns['workload']} {label(task.columns)}"
    race = run_race(entrants, rounds, seconds, lambda: advance(said)) if entrants else Race()
    found = [row for name, entrant in built.items() for row in rows_of(task, name, entrant, race)]
    built.clear()
    entrants.clear()
    gc.collect()  # optimizers hang in reference cycles: their memory would outlive the task
    torch.cuda.empty_cache()  # nothing without a GPU
    return found


def rows_of(task: Task, name: str, entrant: Entrant | str, race: Race) -> Iterator[Row]:
    """The row of an entrant, and one for each of its stages."""
    row = {**task.columns, "provider": name}
    if isinstance(entrant, str):
        yield {**row, "missing": entrant}
        return
    baseline = race.best_of_torch() if task.baseline == BEST else task.baseline
    told = {"baseline": task.baseline, **entrant.columns, **race.columns(name, baseline)}
    if task.columns["device"] == "cuda" and not entrant.stages:
        told |= look(entrant)
    yield {**row, **told}
    for stage in entrant.stages:
        moved = {"stage": stage, "bytes": entrant.columns["stages"][stage]}
        yield {**row, **moved, **race.columns(stage_of(name, stage))}


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Sets torch's number of threads (which fusedopt and the floor obey) for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def look(entrant: Entrant) -> Row:
    """What a wall clock blends: kernels, copies and microseconds on the GPU, and the host's call.

    What puts inputs back is not to be seen: with it there can be but one repeat of the first three.
    """
    step, before, times = entrant.call, entrant.before, []
    repeats = 5 if before is nothing else 1
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
