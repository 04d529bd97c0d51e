"""The step job: how long is the bare ``optimizer.step()``, and how close to memory speed?

A task is one workload, optimizer and dtype. Its providers race round-robin in this process, each on
parameters and states of its own and on the same, fixed gradients. Nothing is kept from task to task
but the gradients, so memory is bounded by the largest.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from . import optimizers, parity
from .providers import PROVIDERS, why_not
from .rows import BEST, CANDIDATE, FLOOR, Row
from .timing import Race, look, run_race
from .workloads import WORKLOADS, Workload, members

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# By provider, optimizer and dtype, columns of its rows.
Known = Mapping[tuple[str, str, str], Row]


@dataclass(frozen=True)
class Task:
    """What to measure: names of a workload, an optimizer and a dtype."""

    workload: str
    optimizer: str
    dtype: str = "float32"
    device: str = "cpu"

    def memory(self, providers: Sequence[str]) -> int:
        """Bytes that are needed meanwhile, at most."""
        elements = WORKLOADS[self.workload].elements
        # A copy of the parameters and the states for each provider, the gradients once, and two
        # temporary lists of that size inside torch's foreach step.
        runs = [name for name in providers if PROVIDERS[name].offers(self.optimizer, self.device)]
        arrays = len(runs) * (1 + optimizers.count_states(self.optimizer)) + 1 + 2
        return elements * DTYPES[self.dtype].itemsize * arrays

    def bytes_per_parameter(self) -> int:
        """What a step has to move: it reads all of them and writes all but the gradient."""
        return DTYPES[self.dtype].itemsize * (3 + 2 * optimizers.count_states(self.optimizer))

    def columns(self) -> Row:
        """Those that all rows of the task have."""
        workload = WORKLOADS[self.workload]
        return {
            "job": "step", **asdict(self), "tensors": len(workload.shapes),
            "elements": workload.elements, "bytes": self.bytes_per_parameter(),
        }  # fmt: skip


def plan(
    workloads: Sequence[str], names: Sequence[str], dtypes: Sequence[str] | None, device: str
) -> list[Task]:
    """The tasks, workload by workload; without dtypes, float32, and bfloat16 where bytes decide."""
    tasks = []
    for workload in [member for name in workloads for member in members(name)]:
        for dtype in dtypes or ["float32"]:
            tasks += [Task(workload, optimizer, dtype, device) for optimizer in names]
        if dtypes is None and workload in ("huge", "many") and "AdamW" in names:
            tasks.append(Task(workload, "AdamW", "bfloat16", device))
    return tasks


def measure(
    tasks: Sequence[Task],
    providers: Sequence[str],
    rounds: int,
    seconds: float,
    advance: Callable[[str], None] = lambda label: None,
    baseline: str = BEST,
    known: Known | None = None,
    peaks: Mapping[tuple[str, Task], int] | None = None,
) -> Iterator[list[Row]]:
    """Times every task and yields its rows; an interrupt yields those of whole rounds first.

    Args:
        tasks: what to measure, those of one workload and dtype next to each other.
        providers: names in ``PROVIDERS``.
        rounds: rounds of a task.
        seconds: what one provider may take of a task's time before it sits rounds out.
        advance: called before each round with a label, to move a progress bar.
        baseline: whom the others are compared with.
        known: columns by provider, optimizer and dtype, such as of its arithmetic.
        peaks: memory by provider and task, where it was measured.
    """
    gradients: list[torch.Tensor] = []
    made_for: tuple[str, str] | None = None
    for task in tasks:
        if made_for != (task.workload, task.dtype):
            gradients.clear()  # before the next are made: the largest task decides the peak
            workload = WORKLOADS[task.workload]
            gradients += make_gradients(workload, DTYPES[task.dtype], task.device)
            made_for = (task.workload, task.dtype)
        race, told = Race(), dict[str, Row]()
        interrupted = None
        try:
            _race(task, race, told, gradients, providers, rounds, seconds, advance)
        except KeyboardInterrupt as error:
            interrupted = error
        rows = []
        for name in providers:
            row = {**task.columns(), "provider": name, **told.get(name, {})}
            if name in race.seconds:
                whom = best_torch(race) if baseline == BEST else baseline
                row |= {"baseline": baseline, **race.columns(name, whom, FLOOR)}
                row |= (known or {}).get((name, task.optimizer, task.dtype), {})
                if (peak := (peaks or {}).get((name, task))) is not None:
                    row["peak_bytes"] = peak
            if "ms" in row or "missing" in row:
                rows.append(row)
        yield rows
        if interrupted:
            raise interrupted


def best_torch(race: Race) -> str | None:
    """The torch provider with the shortest step; None when none ran."""
    ran = [name for name in race.seconds if name.startswith("torch-")]
    return min(ran, key=lambda name: race.stats(name).median, default=None)


def _race(
    task: Task, race: Race, told: dict[str, Row], gradients: Sequence[torch.Tensor],
    providers: Sequence[str], rounds: int, seconds: float, advance: Callable[[str], None],
) -> None:  # fmt: skip
    """Builds the contestants of a task, races them, looks at each on a GPU, and drops them."""
    workload, contestants = WORKLOADS[task.workload], {}
    for name in providers:
        if reason := why_not(name, task.optimizer, DTYPES[task.dtype], task.device, len(gradients)):
            told[name] = {"missing": reason}
        else:
            contestants[name] = PROVIDERS[name].build(task.optimizer, gradients, workload.grouped)
    if not contestants:
        return
    label = f"{task.workload} / {task.optimizer}"
    label += "" if task.dtype == "float32" else f" {task.dtype}"
    steps = {name: contestant.step for name, contestant in contestants.items()}
    run_race(race, steps, rounds, seconds, lambda: advance(label))
    for name, contestant in contestants.items():
        told[name] = {"backend": contestant.backends()} if contestant.backends() else {}
        if task.device == "cuda":
            told[name] |= look(contestant.step)
    contestants.clear()
    steps.clear()
    gc.collect()  # optimizers hang in reference cycles: their memory would outlive the task


def check_arithmetic(
    tasks: Sequence[Task], providers: Sequence[str], advance: Callable[[str], None]
) -> dict[tuple[str, str, str], Row]:
    """Parity of whom the tasks need; who is not available or only moves bytes has no entry."""
    found = {}
    kinds = dict.fromkeys((task.optimizer, task.dtype, task.device) for task in tasks)
    for name in [name for name in providers if name != FLOOR]:
        advance(f"arithmetic / {name}")
        for optimizer, dtype, where in kinds:
            provider = PROVIDERS[name]
            if not provider.unavailable(optimizer, DTYPES[dtype], where):
                maker = partial(provider.optimizer, optimizer)
                told = parity.check(maker, optimizer, DTYPES[dtype], where)
                found[name, optimizer, dtype] = {
                    "parity": told.verdict, "ulps": max(told.ulps.values(), default=None)
                }  # fmt: skip
    return found


def summary(rows: Sequence[Row]) -> str:
    """One sentence on the optimizer people use most, or on the first that was measured."""
    ours = [row for row in rows if row["provider"] == CANDIDATE and "ms" in row]
    if not ours:
        return "fusedopt was not timed."
    optimizer = optimizers.most_used([row["optimizer"] for row in ours])
    parts = []
    for row in ours:
        if row["optimizer"] != optimizer or row["dtype"] != ours[0]["dtype"]:
            continue
        said = []
        if row.get("floor_share"):
            said.append(f"{1 / row['floor_share']:.2f}x the floor")
        if row.get("faster"):
            whom = "torch's best" if row["baseline"] == BEST else row["baseline"]
            said.append(f"{compared(row['faster'])} {whom}")
        if said and not WORKLOADS[row["workload"]].family:
            parts.append(f"on {row['workload']} {' and '.join(said)}")
    return f"fusedopt's {optimizer} step: {'; '.join(parts) or 'nothing to compare it with'}."


def compared(ratio: float) -> str:
    """A ratio of times in words, such as ``7.9x faster than``."""
    if 0.95 < ratio < 1.05:
        return "as fast as"
    return f"{ratio:.1f}x faster than" if ratio >= 1 else f"{1 / ratio:.1f}x slower than"


def make_gradients(
    workload: Workload, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """Normal random gradients of a standard deviation of 0.01, the same on every run."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.01, generator=generator)
        for shape in workload.shapes
    ]
