"""Result files, read: one flat record a provider and row, whatever job or check wrote it.

The tables, the CSV file, the pictures, the page, the comparison and the documentation all see the
same records. Files of ``step --json`` and of the GPU check are understood.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .optimizers import count_states

FLOOR, CANDIDATE = "floor", "fusedopt"
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Figure:
    """One provider in one row of one run.

    Attributes:
        machine: processor or GPU, and threads where they count.
        date: of the run, day only.
        torch: its version.
        fusedopt: its version, or the git revision of the run.
        workload: name.
        elements: its parameters.
        tensors: how many tensors they are in.
        optimizer: torch's name.
        dtype: of parameters, gradients and states.
        provider: whose step.
        ms: median of a step.
        ms_p20: 20th percentile.
        ms_p80: 80th percentile.
        ns_per_parameter: of the median.
        gb_per_second: bytes that have to be moved, over the median.
        percent_of_floor: the floor's time over this one's, median over rounds.
        baseline: whom it is compared with.
        times_faster: than the baseline, median over rounds.
        times_faster_p20: 20th percentile.
        times_faster_p80: 80th percentile.
        parity: ``same``, ``differs``, ``decay differs``; empty if it was not checked.
        ulps: the largest error of its parity check.
        launches: kernels and copies of a step, on a GPU.
        host_us: microseconds until the call returns, on a GPU.
        device_us: microseconds of the kernels and copies, on a GPU.
        peak_bytes: memory above parameters and gradients.
    """

    machine: str
    date: str
    torch: str
    fusedopt: str
    workload: str
    elements: int
    tensors: int
    optimizer: str
    dtype: str
    provider: str
    ms: float
    ms_p20: float
    ms_p80: float
    ns_per_parameter: float
    gb_per_second: float
    percent_of_floor: float | None
    baseline: str
    times_faster: float | None
    times_faster_p20: float | None
    times_faster_p80: float | None
    parity: str
    ulps: float | None
    launches: float | None
    host_us: float | None
    device_us: float | None
    peak_bytes: int | None

    @property
    def row(self) -> tuple[str, str, str]:
        """What it is of: workload, optimizer and dtype."""
        return self.workload, self.optimizer, self.dtype

    @property
    def run(self) -> tuple[str, str, str, str]:
        """Where it is from: machine, date and versions."""
        return self.machine, self.date, self.torch, self.fusedopt


class ResultError(Exception):
    """A file holds no results; says why."""


def load(path: Path) -> list[Figure]:
    """The figures of a result file.

    Raises:
        ResultError: it cannot be read, or has no rows of the step job.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"cannot read {path}: {error}; wanted: a file of step --json") from None
    try:
        rows = rows_of(content)
        found = [figure for row in rows for figure in figures_of(row, content["machine"])]
    except (AttributeError, KeyError, TypeError) as error:
        why = f"{path} is no result file: {error!r}"
        raise ResultError(f"{why}; wanted: a file of step --json") from None
    if not found:
        raise ResultError(f"{path} has no rows of the step job; wanted: a file of step --json")
    return found


def rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the step job in the file of a run, or of a GPU check that was no rehearsal."""
    if "parts" in content:
        return [] if content["rehearsal"] else content["parts"].get("figures", {}).get("rows", [])
    rows: list[dict[str, Any]] = content["step"]["rows"]
    threads = content["step"].get("threads")
    return [{**row, "threads": threads} for row in rows]


def machine_name(row: dict[str, Any], machine: dict[str, Any]) -> str:
    """Processor or GPU of a row, with its threads where these take the steps."""
    if row.get("device") == "cpu":
        threads = row["threads"]
        return f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}"
    return str(machine.get("device") or machine["gpu"])


def figures_of(row: dict[str, Any], machine: dict[str, Any]) -> list[Figure]:
    """A row's figures, one a provider, in its order."""
    seen = row.get("seen") or (row["device"] if isinstance(row.get("device"), dict) else {})
    moved = row.get("bytes_per_parameter") or SIZES[row["dtype"]] * (
        3 + 2 * count_states(row["optimizer"])
    )
    times, found = row["step_ms"], []
    for name, stats in times.items():
        ms, ratio = stats["median"], _faster(row, name)
        parity = row.get("parity", {}).get(name, {})
        looked = seen.get(name, {})
        found.append(
            Figure(
                machine=machine_name(row, machine), date=machine["date"][:10],
                torch=machine["torch"],
                fusedopt=machine.get("git_revision") or machine.get("fusedopt", ""),
                workload=row["workload"], elements=row["elements"], tensors=row["tensors"],
                optimizer=row["optimizer"], dtype=row["dtype"], provider=name,
                ms=ms, ms_p20=stats["p20"], ms_p80=stats["p80"],
                ns_per_parameter=ms * 1e6 / row["elements"],
                gb_per_second=moved * row["elements"] / (ms * 1e6),
                percent_of_floor=_percent_of_floor(row, name),
                baseline=row.get("baseline", "torch-best"),
                times_faster=ratio.get("median"), times_faster_p20=ratio.get("p20"),
                times_faster_p80=ratio.get("p80"),
                parity=verdict(parity), ulps=max(parity.get("ulps", {}).values(), default=None),
                launches=looked["kernels"] + looked["copies"] if looked else None,
                host_us=looked.get("host_us"), device_us=looked.get("device_us"),
                peak_bytes=row.get("peak_bytes", {}).get(name),
            )
        )  # fmt: skip
    return found


def _percent_of_floor(row: dict[str, Any], name: str) -> float | None:
    """The floor's time over the provider's; a GPU check has medians alone."""
    times = row["step_ms"]
    if FLOOR not in times:
        return None
    known = row.get("floor_over", {}).get(name)
    ratio: float = known["median"] if known else times[FLOOR]["median"] / times[name]["median"]
    return 100 * ratio


def _faster(row: dict[str, Any], name: str) -> dict[str, float]:
    """How many times faster than the baseline; a GPU check has medians alone."""
    if "baseline_over" in row:
        found: dict[str, float] = row["baseline_over"].get(name, {})
        return found
    if row.get("best_torch") is None:
        return {}
    times = row["step_ms"]
    return {"median": times[row["best_torch"]]["median"] / times[name]["median"]}


def verdict(parity: dict[str, Any]) -> str:
    """A parity check in a word or two."""
    if not parity:
        return ""
    if parity["same"]:
        return "same"
    if parity["error"]:
        return "unknown"
    return "decay differs" if parity["same_update"] else "differs"


def write_csv(path: Path, figures: Iterable[Figure]) -> None:
    """Writes a line a figure, under the names of the attributes."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Figure)])
        writer.writeheader()
        writer.writerows(asdict(figure) for figure in figures)


def slower_than(figures: Sequence[Figure], bound: float) -> list[str]:
    """Rows in which fusedopt is less than `bound` times as fast as the baseline, in words."""
    return [
        f"{f.workload}, {f.optimizer} {f.dtype} on {f.machine}: {f.times_faster:.2f} times as fast "
        f"as {f.baseline}"
        for f in figures
        if f.provider == CANDIDATE and f.times_faster is not None and f.times_faster < bound
    ]


@dataclass(frozen=True)
class Change:
    """A provider's row in two runs.

    Attributes:
        now: the newer figure.
        before: the older one.
        speed: how many times as fast it is now. Where both runs have a floor, each time is taken
            in units of its run's: the speed of the machine then cancels.
        by_floor: whether that was possible.
    """

    now: Figure
    before: Figure
    speed: float
    by_floor: bool


def compare(now: Sequence[Figure], before: Sequence[Figure]) -> list[Change]:
    """Rows and providers that both runs have, on like machines where there are several."""
    old = {(f.machine, *f.row, f.provider): f for f in before}
    anywhere = {(*f.row, f.provider): f for f in before}
    found = []
    for figure in now:
        key = (*figure.row, figure.provider)
        other = old.get((figure.machine, *key)) or anywhere.get(key)
        if other is None:
            continue
        by_floor = (
            figure.provider != FLOOR
            and figure.percent_of_floor is not None
            and other.percent_of_floor is not None
        )
        if by_floor:
            assert figure.percent_of_floor is not None
            assert other.percent_of_floor is not None
            speed = figure.percent_of_floor / other.percent_of_floor
        else:
            speed = other.ms / figure.ms
        found.append(Change(figure, other, speed, by_floor))
    return found


def slowed(changes: Sequence[Change], bound: float) -> list[str]:
    """Rows in which fusedopt is less than `bound` times as fast as it was, in words."""
    return [
        f"{c.now.workload}, {c.now.optimizer} {c.now.dtype} on {c.now.machine}: {c.speed:.2f} "
        f"times as fast as on {c.before.date}"
        for c in changes
        if c.now.provider == CANDIDATE and c.speed < bound
    ]
