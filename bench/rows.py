"""Results: one row a measurement, the same whatever job wrote it; files of one JSON object a line.

Every row says what was measured (``job``, ``workload``, ``optimizer``, ``dtype``, ``provider``,
``backend``), where and with what (`where`), and its metrics: ``ms``, ``p20`` and ``p80`` of the
median over ``rounds``, ``faster`` than the ``baseline``, ``floor_share``, and what else a job
finds. A provider that did not run has a row with ``missing``, the reason.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
FLOOR, CANDIDATE, BEST = "floor", "fusedopt", "torch-best"


class ResultError(Exception):
    """A file holds no results; says why."""


# ---- where it ran ----


def where(device: str = "cpu", threads: int = 0) -> Row:
    """What a figure is worth nothing without: machine, versions, revision and date."""
    import fusedopt

    threads = threads or torch.get_num_threads()
    name = f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}"
    return {
        "device": device,
        "machine": name if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "revision": git_revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def system_table(path: str) -> dict[str, str]:
    """The "key: value" lines of a file of Linux's /proc; empty on other systems."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":") for line in lines]
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """Model name of the processor."""
    told = system_table("/proc/cpuinfo").get("model name")
    return told or platform.processor() or platform.machine()


def available_memory(device: str = "cpu") -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not say."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    told = system_table("/proc/meminfo").get("MemAvailable")
    return int(told.split()[0]) * 1024 if told else None


def git_revision() -> str | None:
    """Revision of the checkout this file belongs to, ``-dirty`` if edited; None outside one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout: it has to be tracked there.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--exclude", "*")
    except (OSError, subprocess.SubprocessError):
        return None


# ---- files ----


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes a line a row; what JSON has no number for (a diverged loss) becomes null."""
    with path.open("w") as file:
        for row in rows:
            row = json.loads(json.dumps(row), parse_constant=lambda _: None)
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a result file.

    Raises:
        ResultError: it cannot be read, or is none.
    """
    wanted = "wanted: a file that --json has written, or a GPU check"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ResultError(f"cannot read {path}: {error}; {wanted}") from None
    if not rows or not all(isinstance(row, dict) and "job" in row for row in rows):
        raise ResultError(f"{path} holds no rows; {wanted}")
    return rows


def steps(rows: Iterable[Row]) -> list[Row]:
    """Those of the step job that were measured, and not in a rehearsal."""
    return [
        row for row in rows if row["job"] == "step" and "ms" in row and not row.get("rehearsal")
    ]


# ---- what rows say ----


def label(row: Row) -> str:
    """Optimizer, dtype where it is not the usual one, and chain where there is one."""
    dtype = row.get("dtype", "float32")
    parts = [row.get("optimizer"), "" if dtype == "float32" else dtype, row.get("chain")]
    return " ".join(filter(None, parts))


def version(row: Row) -> str:
    """Which fusedopt: the revision, or outside of a checkout the version."""
    return str(row["revision"] or row["fusedopt"])


def source(row: Row) -> str:
    """Machine, versions and date of a row."""
    return f"{row['machine']}; torch {row['torch']}, fusedopt {version(row)}; {row['date']}"


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by the values of some columns, in the order of their first ones."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def by(rows: Iterable[Row], name: str) -> dict[Any, Row]:
    """The last row for each value of a column."""
    return {row[name]: row for row in rows}


def runs(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each run: of a machine, a date and versions."""
    return [*grouped(rows, "machine", "date", "torch", "fusedopt", "revision").values()]


def nanoseconds(row: Row) -> float:
    """Of a step, a parameter."""
    return float(row["ms"] * 1e6 / row["elements"])


def bandwidth(row: Row) -> float:
    """GB/s: the bytes that have to be moved, over the time."""
    return float(row["bytes"] * row["elements"] / (row["ms"] * 1e6))


def slower_than(rows: Iterable[Row], bound: float) -> list[str]:
    """Rows in which fusedopt is less than `bound` times as fast as the baseline, in words."""
    return [
        f"{row['workload']}, {row['optimizer']} {row['dtype']} on {row['machine']}: "
        f"{row['faster']:.2f} times as fast as {row['baseline']}"
        for row in steps(rows)
        if row["provider"] == CANDIDATE and row.get("faster") is not None and row["faster"] < bound
    ]


def compare(now: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """Rows that both runs have, on like machines where there are several; the older is the base.

    `faster` is how many times as fast it is now. Where both runs have a floor, each time is taken
    in units of its run's (`by_floor`): the speed of the machine then cancels.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("workload", "optimizer", "dtype", "provider"))

    old = {key(row): row for row in before}
    old |= {(row["machine"], *key(row)): row for row in before}
    found = []
    for row in now:
        other = old.get((row["machine"], *key(row))) or old.get(key(row))
        if other is None:
            continue
        shares = row.get("floor_share"), other.get("floor_share")
        by_floor = row["provider"] != FLOOR and all(shares)
        speed = shares[0] / shares[1] if by_floor else other["ms"] / row["ms"]
        found.append(
            {**row, "faster": speed, "baseline": f"on {other['date']}", "by_floor": by_floor,
             "ms_before": other["ms"], "date_before": other["date"]}
        )  # fmt: skip
    return found
