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
        seconds: by provider, then by round; nan in rounds it sat out.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def stats(self, name: str) -> Stats:
        """Median and spread of one provider's step, in seconds."""
        return Stats.of([value for value in self.seconds[name] if not math.isnan(value)])

    def ratio(self, numerator: str, denominator: str) -> Stats:
        """Median and spread of numerator / denominator over the rounds both ran in."""
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return Stats.of([a / b for a, b in pairs if not (math.isnan(a) or math.isnan(b))])


def time_once(step: Callable[[], object]) -> float:
    """Seconds of one call of `step`."""
    start = timer()
    step()
    return timer() - start


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
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    budget: float,
    on_round: Callable[[int], None] = lambda index: None,
) -> None:
    """Warms every step up twice and times it, round-robin.

    Args:
        race: receives the times round by round, so that an interrupted race keeps its whole rounds.
        steps: by name, what to time.
        rounds: number of rounds.
        budget: seconds a single step may take over all rounds before it sits some out.
        on_round: called before each round with its index, to move a progress bar.
    """
    runs = {}
    for name, step in steps.items():
        step()  # allocates states, builds the plan
        runs[name] = rounds_to_run(time_once(step), rounds, budget)
    gc.collect()
    gc.disable()  # a collection inside a step would be billed to it
    try:
        for index in range(rounds):
            on_round(index)
            times = {
                name: time_once(steps[name]) if runs[name][index] else math.nan
                for name in order_of_round(list(steps), index)
            }
            for name in steps:
                race.seconds.setdefault(name, []).append(times[name])
    finally:
        gc.enable()
