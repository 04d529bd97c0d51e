"""The step job: how long is the bare ``optimizer.step()``, and how close to memory speed?

A row is one workload, optimizer and dtype. Its providers race round-robin in this process, each on
parameters and states of its own and on the same, fixed gradients. Nothing is kept from row to row
but the gradients, so memory is bounded by the largest row.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from . import device, optimizers, parity
from .contestant import Contestant
from .providers import PROVIDERS, FloorProvider, too_many
from .timing import Race, Stats, run_race
from .workloads import WORKLOADS, Workload, members

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

FLOOR, CANDIDATE, FUSED = "floor", "fusedopt", "torch-fused"
BEST = "torch-best"  # as a baseline: whichever of torch's steps is the fastest in a row


# By provider, optimizer and dtype.
Parities = dict[tuple[str, str, str], parity.Parity]


@dataclass(frozen=True)
class Task:
    """One row to measure: names of a workload, an optimizer and a dtype."""

    workload: str
    optimizer: str
    dtype: str = "float32"
    device: str = "cpu"

    def memory(self, providers: Sequence[str]) -> int:
        """Bytes the row needs while it runs, at most."""
        elements = WORKLOADS[self.workload].elements
        # A copy of the parameters and the states for each provider, the gradients once, and two
        # temporary lists of that size inside torch's foreach step.
        runs = [name for name in providers if PROVIDERS[name].offers(self.optimizer, self.device)]
        arrays = len(runs) * (1 + optimizers.count_states(self.optimizer)) + 1 + 2
        return elements * DTYPES[self.dtype].itemsize * arrays

    def bytes_per_parameter(self) -> int:
        """What a step has to move: it reads all of them and writes all but the gradient."""
        return DTYPES[self.dtype].itemsize * (3 + 2 * optimizers.count_states(self.optimizer))


@dataclass
class Row:
    """What was measured for one task.

    Attributes:
        task: what was asked.
        race: times by provider and round.
        unavailable: by provider that did not run, the reason.
        details: by provider, how it took its steps, where it says so.
        parity: by provider, whether it does torch's arithmetic.
        peak_bytes: by provider, memory above parameters and gradients.
        seen: by provider, what its step does on a GPU, and its host time.
        baseline: whom the others are compared with: a provider, or ``BEST``.
    """

    task: Task
    race: Race = field(default_factory=Race)
    unavailable: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    parity: dict[str, parity.Parity] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str = BEST

    @property
    def workload(self) -> Workload:
        """The workload itself."""
        return WORKLOADS[self.task.workload]

    def best_torch(self) -> str | None:
        """The torch provider with the shortest step; None when none ran."""
        ran = [name for name in self.race.seconds if name.startswith("torch-")]
        return min(ran, key=lambda name: self.race.stats(name).median, default=None)

    def ratio(self, numerator: str | None, denominator: str) -> Stats | None:
        """Ratio of two providers' steps; None when one of them did not run."""
        if numerator not in self.race.seconds or denominator not in self.race.seconds:
            return None
        return self.race.ratio(numerator, denominator)

    def over_floor(self) -> Stats | None:
        """Fusedopt's step over the traffic floor: 1 is memory speed."""
        return self.ratio(CANDIDATE, FLOOR)

    def speedup_over_best(self) -> Stats | None:
        """Torch's best step over fusedopt's."""
        return self.ratio(self.best_torch(), CANDIDATE)

    def speedup_over_fused(self) -> Stats | None:
        """Torch's fused step over fusedopt's."""
        return self.ratio(FUSED, CANDIDATE)

    def times_faster(self, name: str) -> Stats | None:
        """How many times faster than the baseline a provider is, round by round."""
        return self.ratio(self.best_torch() if self.baseline == BEST else self.baseline, name)

    def to_json(self) -> dict[str, Any]:
        """Everything measured, as it stands in the result file; times in milliseconds."""
        ratios = {
            "fusedopt_over_floor": self.over_floor(),
            "best_torch_over_fusedopt": self.speedup_over_best(),
            "torch_fused_over_fusedopt": self.speedup_over_fused(),
        }
        return {
            **asdict(self.task),
            "tensors": len(self.workload.shapes),
            "elements": self.workload.elements,
            "step_ms": {
                name: asdict(self.race.stats(name).scaled(1e3)) for name in self.race.seconds
            },
            "bytes_per_parameter": self.task.bytes_per_parameter(),
            "ratios": {name: asdict(ratio) for name, ratio in ratios.items() if ratio},
            "baseline": self.baseline,
            "baseline_over": {
                name: asdict(ratio)
                for name in self.race.seconds
                if (ratio := self.times_faster(name))
            },
            "floor_over": {
                name: asdict(ratio)
                for name in self.race.seconds
                if (ratio := self.ratio(FLOOR, name))
            },
            "parity": {name: found.to_json() for name, found in self.parity.items()},
            "peak_bytes": self.peak_bytes,
            "seen": self.seen,
            "best_torch": self.best_torch(),
            "unavailable": self.unavailable,
            "details": self.details,
            "seconds": {
                name: [None if math.isnan(value) else value for value in values]
                for name, values in self.race.seconds.items()
            },
        }


def plan_tasks(
    workloads: list[str], names: list[str], dtypes: list[str] | None, device: str = "cpu"
) -> list[Task]:
    """The rows to measure, workload by workload.

    Args:
        workloads: names in ``WORKLOADS``, or of families of them.
        names: names of optimizers.
        dtypes: names in ``DTYPES``; None for float32, and AdamW in bfloat16 where bytes decide.
        device: as torch names it.
    """
    tasks = []
    for workload in [member for name in workloads for member in members(name)]:
        for dtype in dtypes or ["float32"]:
            tasks += [Task(workload, optimizer, dtype, device) for optimizer in names]
        if dtypes is None and workload in ("huge", "many") and "AdamW" in names:
            tasks.append(Task(workload, "AdamW", "bfloat16", device))
    return tasks


def measure(
    tasks: list[Task],
    providers: list[str],
    rounds: int,
    seconds: float,
    on_round: Callable[[str], None] = lambda label: None,
    baseline: str = BEST,
    peaks: Mapping[Task, dict[str, int]] | None = None,
    parities: Parities | None = None,
) -> Iterator[Row]:
    """Times every task and yields its row; an interrupt yields the unfinished row first.

    Args:
        tasks: what to measure, those of one workload and dtype next to each other.
        providers: names in ``PROVIDERS``.
        rounds: rounds of a row.
        seconds: what one provider may take of a row's time before it sits rounds out.
        on_round: called before each round with a label, to move a progress bar.
        baseline: whom the others are compared with.
        peaks: memory by task and provider, where it was measured.
        parities: by provider, optimizer, dtype and device, where arithmetic was checked.
    """
    gradients: list[torch.Tensor] = []
    made_for: tuple[str, str] | None = None
    for task in tasks:
        if made_for != (task.workload, task.dtype):
            gradients.clear()  # before the next are made: the largest row decides the peak
            gradients.extend(
                make_gradients(WORKLOADS[task.workload], DTYPES[task.dtype], task.device)
            )
            made_for = (task.workload, task.dtype)
        row = Row(task, baseline=baseline, peak_bytes=(peaks or {}).get(task, {}))
        for name in providers:
            if found := (parities or {}).get((name, task.optimizer, task.dtype)):
                row.parity[name] = found

        def inspect(name: str, contestant: Contestant, row: Row = row) -> None:
            if row.task.device == "cuda":
                row.seen[name] = device.look(contestant.step)

        try:
            race_row(row, gradients, providers, rounds, seconds, on_round, inspect)
        except KeyboardInterrupt:
            if row.race.seconds:
                yield row
            raise
        yield row


def check_arithmetic(
    tasks: Sequence[Task], providers: Sequence[str], advance: Callable[[str], None]
) -> Parities:
    """Checks whom the tasks need; who is not available or only moves bytes has no entry."""
    found: Parities = {}
    kinds = dict.fromkeys((task.optimizer, task.dtype, task.device) for task in tasks)
    for name in providers:
        advance(f"arithmetic / {name}")
        provider = PROVIDERS[name]
        if isinstance(provider, FloorProvider):
            continue
        for optimizer, dtype, where in kinds:
            if not provider.unavailable(optimizer, DTYPES[dtype], where):
                maker = partial(provider.optimizer, optimizer)
                found[name, optimizer, dtype] = parity.check(maker, optimizer, DTYPES[dtype], where)
    return found


def race_row(
    row: Row,
    gradients: Sequence[torch.Tensor],
    providers: list[str],
    rounds: int,
    seconds: float,
    on_round: Callable[[str], None],
    inspect: Callable[[str, Contestant], None] = lambda name, contestant: None,
) -> None:
    """Builds the contestants of one row, races them, lets `inspect` see each and drops them."""
    task, contestants = row.task, {}
    for name in providers:
        reason = too_many(name, len(row.workload.shapes)) or PROVIDERS[name].unavailable(
            task.optimizer, DTYPES[task.dtype], task.device
        )
        if reason:
            row.unavailable[name] = reason
        else:
            contestants[name] = PROVIDERS[name].build(
                task.optimizer, gradients, row.workload.grouped
            )
    if not contestants:
        return
    suffix = "" if task.dtype == "float32" else f" {task.dtype}"
    label = f"{task.workload} / {task.optimizer}{suffix}"
    steps = {name: contestant.step for name, contestant in contestants.items()}
    run_race(row.race, steps, rounds, seconds, lambda _: on_round(label))
    for name, contestant in contestants.items():
        if detail := contestant.detail():
            row.details[name] = detail
        inspect(name, contestant)
    contestants.clear()
    steps.clear()
    gc.collect()  # optimizers hang in reference cycles: their memory would outlive the row


def make_gradients(
    workload: Workload, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """Normal random gradients of a standard deviation of 0.01, the same on every run."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.01, generator=generator)
        for shape in workload.shapes
    ]
