"""Tables of the step job, of parity and of what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from . import parity, step
from .providers import PROVIDERS, AnyProvider
from .report import ABSENT, add_figures, make_table, milliseconds, speed, three_digits, titled
from .results import verdict
from .workloads import Workload

# ---- the step job ----


def step_tables(rows: Sequence[step.Row]) -> Group:
    """The rows of one workload, or of one family of them."""
    if rows[0].workload.family:
        return sweep_table(rows)
    return step_table(rows)


def label(task: step.Task) -> str:
    """Optimizer, and dtype where it is not the usual one."""
    return task.optimizer + ("" if task.dtype == "float32" else f" {task.dtype}")


def step_table(rows: Sequence[step.Row]) -> Group:
    """The rows of one workload, a section an optimizer and a line a provider."""
    workload = rows[0].workload
    rounds = max((len(times) for row in rows for times in row.race.seconds.values()), default=0)
    table = make_table("optimizer")
    on_gpu = any(row.seen for row in rows)
    add_figures(table, "arith-\nmetic", "ms", "p20", "p80", "ns a\nparam.", "GB/s", "% of\nfloor")
    add_figures(table, "times\nfaster", "p20", "p80", "memory\nMB")
    if on_gpu:
        add_figures(table, "launches", "host\nus", "device\nus")
    for row in rows:
        table.add_section()
        table.add_row(label(row.task), style="bold")
        for name in [name for name in PROVIDERS if name in row.race.seconds]:
            style = "bold" if name == step.CANDIDATE else None
            told = row.parity.get(name)
            if told is not None and not told.same:
                style = "red"
            table.add_row(f"  {PROVIDERS[name].title}", *_cells(row, name, on_gpu), style=style)
    size = f"{workload.elements:,} elements in all"
    title = f"{workload.name}: {workload.summary}, {size}; a step, median of {rounds} rounds"
    return titled(title, table)


def _cells(row: step.Row, name: str, on_gpu: bool) -> list[str]:
    """The cells of one provider."""
    stats = row.race.stats(name)
    moved = row.task.bytes_per_parameter() * row.workload.elements
    told = row.parity.get(name)
    cells = [
        verdict(told.to_json()) if told else ABSENT,
        milliseconds(stats),
        three_digits(stats.p20 * 1e3),
        three_digits(stats.p80 * 1e3),
        three_digits(stats.median * 1e9 / row.workload.elements),
        three_digits(moved / stats.median / 1e9),
        _percent_of_floor(row, name),
    ]
    faster = row.times_faster(name)
    spread = (faster.median, faster.p20, faster.p80) if faster else ()
    cells += [f"{ratio:.2f}x" for ratio in spread] or [ABSENT] * 3
    peak = row.peak_bytes.get(name)
    cells.append(ABSENT if peak is None else f"{peak / 1e6:,.1f}")
    if on_gpu:
        cells += _on_gpu(row, name)
    return cells


def _on_gpu(row: step.Row, name: str) -> list[str]:
    """Launches, and host and device time; an interrupted row has none."""
    seen = row.seen.get(name)
    if seen is None:
        return [ABSENT] * 3
    launches = seen["kernels"] + seen["copies"]
    return [f"{launches:.0f}", f"{seen['host_us']:.1f}", f"{seen['device_us']:.1f}"]


def _percent_of_floor(row: step.Row, name: str) -> str:
    """The floor's time over the provider's, round by round."""
    ratio = row.ratio(step.FLOOR, name)
    return f"{100 * ratio.median:.0f}" if ratio else ABSENT


def sweep_table(rows: Sequence[step.Row]) -> Group:
    """The rows of a sweep: bandwidth, a column a size."""
    sizes = list(dict.fromkeys(row.workload.name for row in rows))
    table = make_table("optimizer")
    add_figures(table, *(name.partition("-")[2] for name in sizes))
    for task in dict.fromkeys((row.task.optimizer, row.task.dtype) for row in rows):
        shown = {row.workload.name: row for row in rows
                 if (row.task.optimizer, row.task.dtype) == task}  # fmt: skip
        table.add_section()
        table.add_row(label(next(iter(shown.values())).task), style="bold")
        ran = {name for row in shown.values() for name in row.race.seconds}
        for name in [name for name in PROVIDERS if name in ran]:
            cells = [_bandwidth(shown.get(size), name) for size in sizes]
            style = "bold" if name == step.CANDIDATE else None
            table.add_row(f"  {PROVIDERS[name].title}", *cells, style=style)
    title = f"{rows[0].workload.family}: one tensor of so many elements; GB/s, medians"
    return titled(title, table)


def _bandwidth(row: step.Row | None, name: str) -> str:
    """Bytes that have to be moved over the time of a step."""
    if row is None or name not in row.race.seconds:
        return ABSENT
    moved = row.task.bytes_per_parameter() * row.workload.elements
    return three_digits(moved / row.race.stats(name).median / 1e9)


def step_notes(rows: Sequence[step.Row]) -> list[str]:
    """Why cells are empty or rounds few, and parameters that did not take fusedopt's own step."""
    notes: list[str] = []
    slow: dict[str, dict[str, None]] = {}  # by provider, the workloads, in order
    for row in rows:
        notes += [_because(name, why) for name, why in row.unavailable.items()]
        for name, times in row.race.seconds.items():
            if row.race.stats(name).rounds < len(times):
                slow.setdefault(PROVIDERS[name].title, {})[row.workload.name] = None
        routes = row.details.get(step.CANDIDATE, "")
        if "torch" in routes:
            notes.append(f"fusedopt, {row.task.optimizer} {row.task.dtype}: tensors by {routes}")
    if slow:
        listed = "; ".join(f"{title} on {', '.join(where)}" for title, where in slow.items())
        notes.append(f"slow, so timed in fewer rounds: {listed}")
    return list(dict.fromkeys(notes))


STEP_LEGEND = (
    "arithmetic: of torch.optim in float64, within rounding; GB/s: of the bytes that have to be "
    "moved; % of floor: 100 is memory speed, the time of moving the same bytes without maths; "
    "times faster: than {baseline}; memory: peak above parameters and gradients, in a fresh "
    "process. Ratios are medians over rounds, p20 and p80 their spread."
)


def _because(name: str, why: str) -> str:
    """Why a provider did not run, with its name."""
    title = PROVIDERS[name].title
    return why if why.startswith(title) else f"{title}: {why}"


def step_legend(baseline: str) -> str:
    """What the columns are."""
    best = "the fastest of torch's own steps"
    return STEP_LEGEND.format(baseline=best if baseline == step.BEST else PROVIDERS[baseline].title)


def step_summary(rows: Sequence[step.Row]) -> str:
    """One sentence on the optimizer people use most, or on the first that was measured."""
    names = [row.task.optimizer for row in rows]
    optimizer = "AdamW" if "AdamW" in names else names[0]
    parts = []
    for row in rows:
        if row.workload.family and len(rows) > 1:
            continue  # its table says it better
        if row.task.optimizer != optimizer or row.task.dtype != rows[0].task.dtype:
            continue
        said = []
        if floor := row.over_floor():
            said.append(f"{floor.median:.2f}x the floor")
        against = "torch fused" if row.speedup_over_fused() else "torch's best"
        if speedup := row.speedup_over_fused() or row.speedup_over_best():
            said.append(f"{speed(speedup.median)} {against}")
        if said:
            parts.append(f"on {row.workload.name} {' and '.join(said)}")
    return f"fusedopt's {optimizer} step: {'; '.join(parts) or 'nothing to compare it with'}."


# ---- parity and list ----


def parity_table(rows: Sequence[dict[str, Any]]) -> Group:
    """Errors of the parity job, a line an optimizer and dtype."""
    table = make_table("who")
    for header in ("optimizer", "dtype"):
        table.add_column(header)
    add_figures(table, *(scenario.name for scenario in parity.SCENARIOS), "arithmetic")
    for row in rows:
        errors = [row["ulps"].get(scenario.name) for scenario in parity.SCENARIOS]
        cells = [ABSENT if error is None else f"{error:.3g}" for error in errors]
        style = None if row["same"] else "red"
        told = verdict(row)
        table.add_row(row["who"], row["optimizer"], row["dtype"], *cells, told, style=style)
    title = f"Largest error after {parity.STEPS} steps against torch.optim in float64, in ulps"
    return titled(title, table)


def parity_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the columns are, and who could not be compared."""
    most = ", ".join(f"{bound:.0f} in {str(dtype)[6:]}" for dtype, bound in parity.SAME.items())
    notes = [
        "from zeros: without decay, in ulps of the update; with decay: from normal weights, in "
        f"ulps of the weight and its update. The arithmetic is the same up to {most}."
    ]
    return notes + [f"{row['who']}, {row['optimizer']}: {row['error']}"
                    for row in rows if row["error"]]  # fmt: skip


def workload_table(workloads: Sequence[Workload], sweep: str) -> Group:
    """Every workload and its size."""
    table = make_table("workload")
    add_figures(table, "tensors", "elements", "fp32 MB")
    table.add_column("what")
    for workload in workloads:
        megabytes = f"{workload.elements * 4 / 1e6:,.1f}"
        name = workload.name + ("" if workload.standard else " *")
        cells = (f"{len(workload.shapes):,}", f"{workload.elements:,}", megabytes)
        table.add_row(name, *cells, workload.summary)
    return titled(f"Workloads (*: only by name; {sweep}: all of its sizes that fit)", table)


def provider_table(found: Sequence[tuple[AnyProvider, list[str], list[str]]]) -> Group:
    """Every provider, what it can step here, and why not the rest."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("provider", "steps", "why not"):
        table.add_column(header, header_style="bold", overflow="fold")
    for provider, able, reasons in found:
        name = provider.name + ("" if provider.default else " *")
        table.add_row(name, ", ".join(able) or "nothing", "; ".join(reasons))
    return titled("Providers (*: only by name)", table)
