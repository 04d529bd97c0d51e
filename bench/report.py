"""What the reader gets: tables, verdicts in plain words, and the result file.

The step job has its tables in `tables`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from . import pipeline, step, train
from .providers import PROVIDERS
from .timing import Stats

SCHEMA = 1  # of the result file; raised when a key changes its meaning
ABSENT = "-"


# Columns the widest table takes. A narrower terminal breaks its lines, which loses nothing; rich
# would cut off the figures instead.
WIDTH = 112


def make_console() -> Console:
    """The console of a run, never too narrow for the tables."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    return console


def make_table(first: str = "optimizer") -> Table:
    """An empty table with a first column for names."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column(first, vertical="bottom", no_wrap=True)
    return table


def titled(title: str, table: Table) -> Group:
    """A table under its title, which may be wider than the table."""
    return Group(Text(title, style="bold"), table)


def add_figures(table: Table, *headers: str, style: str | None = None) -> None:
    """Adds columns of figures."""
    for header in headers:
        table.add_column(header, justify="right", vertical="bottom", no_wrap=True, style=style)


def print_machine(console: Console, machine: dict[str, Any]) -> None:
    """One line that says where the figures come from."""
    console.print(
        f"fusedopt {machine['fusedopt']} (CPU tier {machine['tier']}), torch {machine['torch']}, "
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores",
        soft_wrap=True,
    )
    if machine["load_average"] > machine["cores"] / 2:
        console.print(
            f"The machine has just been busy (load average {machine['load_average']:.1f}): "
            "if it still is, times are too long and ratios unsteady.",
            style="yellow",
            soft_wrap=True,
        )


# ---- the digits job ----


def train_table(rows: Sequence[train.Row]) -> Group:
    """The rows of the digits job, a section for each network."""
    table = make_table()
    add_figures(
        table,
        "loss\ntorch", "loss\nours", "acc. %\ntorch", "acc. %\nours",
        "diff.\nepoch 1", "diff.\nall", "torch's\ndrift",
        "step us\ntorch", "step us\nours", "\nratio", "bound\nholds",
    )  # fmt: skip
    model = None
    for row in rows:
        if row.model != model:
            model = row.model
            table.add_section()
            table.add_row(Text(model, style="bold"))
        mark = "*" if row.drift_source == train.NUDGED else " "
        times = [row.times.stats(name).median * 1e6 for name in (train.REFERENCE, train.CANDIDATE)]
        table.add_row(
            f"  {row.optimizer}",
            f"{row.final_loss(train.REFERENCE):.4f}",
            f"{row.final_loss(train.CANDIDATE):.4f}",
            f"{row.accuracy[train.REFERENCE]:.2f}",
            f"{row.accuracy[train.CANDIDATE]:.2f}",
            f"{row.difference.first_epoch:.1e}",
            f"{row.difference.whole_run:.1e}",
            f"{row.drift.whole_run:.1e}{mark}",
            f"{times[0]:.1f}",
            f"{times[1]:.1f}",
            f"{row.times.ratio(train.REFERENCE, train.CANDIDATE).median:.1f}x",
            "no" if row.failures() else "yes",
            style="red" if row.failures() else None,
        )
    title = "Handwritten digits: torch.optim (default step) and fusedopt (ours) side by side"
    return titled(title, table)


def train_legend(rows: Sequence[train.Row]) -> str:
    """What the columns of the table mean."""
    legend = (
        "loss: training loss, mean of the last epoch; acc.: on the test images; ours: fusedopt; "
        "diff.: largest |torch - ours| / torch of any batch's loss; torch's drift: the same "
        "between torch's default and its foreach and fused steps; step: median time of "
        "optimizer.step() in training; ratio: how many times faster ours is."
    )
    if any(row.drift_source == train.NUDGED for row in rows):
        legend += (
            "\n*: torch's steps are bit for bit the same here, so its drift is that of the default "
            "step from weights one rounding away."
        )
    return legend


def train_verdict(rows: Sequence[train.Row]) -> str:
    """Whether fusedopt trained as torch.optim does, and where it did not."""
    bound = (
        f"loss curves within {train.FIRST_EPOCH_BOUND:.0e} relative over the first epoch and "
        f"afterwards within that or {train.DRIFT_FACTOR:.0f} times torch's own drift; accuracies "
        f"within {train.ACCURACY_POINTS} points"
    )
    failures = [failure for row in rows for failure in row.failures()]
    if not failures:
        return f"The bound holds for all {len(rows)} rows: {bound}."
    return "\n".join([f"The bound does NOT hold ({bound}):", *(f"  {line}" for line in failures)])


# ---- words and numbers ----


def speed(ratio: float) -> str:
    """A ratio of times in words, such as ``7.9x faster than``."""
    if 0.95 < ratio < 1.05:
        return "as fast as"
    return f"{ratio:.1f}x faster than" if ratio >= 1 else f"{1 / ratio:.1f}x slower than"


def milliseconds(stats: Stats) -> str:
    """Milliseconds of a time in seconds, three digits."""
    return three_digits(stats.median * 1e3)


def three_digits(value: float) -> str:
    """Three digits of a number above 0, none of them beyond the third decimal."""
    return f"{value:.{min(3, max(0, 2 - math.floor(math.log10(value))))}f}"


def times_factor(ratio: Stats | None, digits: int = 1) -> str:
    """A ratio as a table cell."""
    return f"{ratio.median:.{digits}f}x" if ratio else ABSENT


# ---- the pipeline job ----


def pipeline_table(rows: Sequence[pipeline.Row]) -> Group:
    """The rows of one workload, each with its bytes beneath."""
    workload = rows[0].workload
    rounds = max(len(times) for row in rows for times in row.race.seconds.values())
    stages = max((list(row.torch_bytes) for row in rows), key=len)
    table = make_table("optimizer, chain")
    add_figures(table, *(f"torch\n{stage}" for stage in stages), "torch\nall")
    add_figures(table, "ours\none call", style="bold")
    add_figures(table, "\nfloor", "torch\n/ ours", "ours\n/ floor")
    for row in rows:
        theirs, ours = row.torch_bytes, sum(row.fused_bytes.values())
        table.add_row(
            f"{row.task.optimizer} {row.task.chain}",
            *(three_digits(row.nanoseconds(name)) if name in theirs else ABSENT for name in stages),
            *(
                three_digits(row.nanoseconds(name))
                for name in (pipeline.TORCH, pipeline.CANDIDATE, pipeline.FLOOR)
            ),
            times_factor(row.speedup()),
            times_factor(row.over_floor(), 2),
        )
        table.add_row(
            "  bytes",
            *(str(theirs[name]) if name in theirs else ABSENT for name in stages),
            str(sum(theirs.values())),
            str(ours),
            str(ours),
            f"{sum(theirs.values()) / ours:.1f}x",
            style="dim",
        )
    size = f"{workload.elements:,} elements in all"
    unit = f"ns a parameter, median of {rounds} rounds"
    return titled(f"{workload.name}: {workload.summary}, {size}; {unit}", table)


def pipeline_notes(rows: Sequence[pipeline.Row]) -> list[str]:
    """Where torch has no fused step, and which races were shortened."""
    notes = [
        f"{row.task.optimizer}: torch has no fused step, its default was timed"
        for row in rows
        if row.torch_step != PROVIDERS[step.FUSED].title
    ]
    slow = [
        f"{name} on {row.task.workload} ({row.task.chain})"
        for row in rows
        for name in (pipeline.TORCH, pipeline.STAGED, pipeline.CANDIDATE, pipeline.FLOOR)
        if row.race.stats(name).rounds < len(row.race.seconds[name])
    ]
    if slow:
        notes.append(f"slow, so timed in fewer rounds: {', '.join(slow)}")
    return list(dict.fromkeys(notes))


def pipeline_legend(rows: Sequence[pipeline.Row]) -> str:
    """What the chains and the columns are."""
    chains = {row.task.chain: row.chain.summary for row in rows}
    listed = "; ".join(f"{name}: {summary}" for name, summary in chains.items())
    return (
        f"Chains: {listed}. bytes: a parameter, what each stage has to read and write. ours: "
        "fusedopt; torch / ours: how many times faster the one call is; ours / floor: 1.00x is the "
        "time of moving its bytes without maths. Ratios are medians over rounds."
    )


def pipeline_summary(rows: Sequence[pipeline.Row]) -> list[str]:
    """One sentence for each chain and optimizer."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        faster, floor = row.speedup().median, row.over_floor().median
        said.setdefault((row.task.optimizer, row.task.chain), []).append(
            f"on {row.workload.name} {speed(faster)} torch's chain and {floor:.2f}x the floor"
        )
    return [
        f"fusedopt's {optimizer} with {chain}: {'; '.join(parts)}."
        for (optimizer, chain), parts in said.items()
    ]


# ---- the result file ----


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`; values that JSON has no number for (a diverged loss) become null."""
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """`value` with every nan and infinity inside it replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
