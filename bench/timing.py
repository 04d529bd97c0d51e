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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.utils.benchmark import timer

MIN_ROUNDS = 5

Step = Callable[[], object]


@dataclass(frozen=True)
class Stats:
    """Median and spread of a sample.

    Attributes:
        median: the 50th percentile.
        p20: the 20th percentile.
        p80: the 80th percentile.
        rounds: number of values.
    """

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

    def scaled(self, factor: float) -> Stats:
        """The same statistics in another unit."""
        return Stats(self.median * factor, self.p20 * factor, self.p80 * factor, self.rounds)


@dataclass
class Race:
    """Times of the steps of several providers over the same rounds.

    Attributes:
        seconds: by provider, or by `stage_of` one, then by round; nan in rounds it sat out.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def stats(self, name: str) -> Stats:
        """Median and spread of one provider's step, in seconds."""
        return Stats.of([value for value in self.seconds[name] if not math.isnan(value)])

    def ratio(self, numerator: str, denominator: str) -> Stats:
        """Median and spread of numerator / denominator over the rounds both ran in."""
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return Stats.of([a / b for a, b in pairs if not (math.isnan(a) or math.isnan(b))])


def stage_of(name: str, stage: str) -> str:
    """The name that the times of a provider's stage have in a race."""
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
    on_round: Callable[[int], None] = lambda index: None,
    before: Mapping[str, Step] | None = None,
) -> None:
    """Warms every step up twice and times it, round-robin.

    Args:
        race: receives the times round by round, so that an interrupted race keeps its whole rounds.
        steps: by name, what to time; or its stages in their order, timed one by one.
        rounds: number of rounds.
        budget: seconds a single step may take over all rounds before it sits some out.
        on_round: called before each round with its index, to move a progress bar.
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
            on_round(index)
            times = {}
            for name in order_of_round(list(steps), index):
                times |= (
                    attempt(name) if runs[name][index] else dict.fromkeys(names[name], math.nan)
                )
            for name in [timed for step in steps for timed in names[step]]:
                race.seconds.setdefault(name, []).append(times[name])
    finally:
        gc.enable()
