"""Every table, as lines of cells made of rows; and the three ways to write one.

A `Table` is printed with rich, written as Markdown, or handed to the page's template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import rows as results
from .rows import BEST, CANDIDATE, FLOOR, Row, label
from .workloads import SWEEP, WORKLOADS, Workload, binary

ABSENT = "-"
# Columns the widest table takes on a console. A narrower terminal breaks its lines, which loses
# nothing; rich would cut off the figures instead.
WIDTH = 150
# Styles of a line or a cell, as rich has them.
RICH = {"ours": "bold", "bad": "red", "good": "blue", "dim": "dim", "": ""}


@dataclass
class Table:
    """Heads of columns of words and of numbers, and lines of as many cells, with a style each."""

    title: str
    words: Sequence[str]
    numbers: Sequence[str] = ()
    lines: list[tuple[list[str], str]] = field(default_factory=list)

    @property
    def heads(self) -> list[str]:
        """Of all columns."""
        return [*self.words, *self.numbers]

    def add(self, *cells: str | None, style: str = "") -> None:
        """Adds a line; None is a cell without a figure."""
        self.lines.append(([ABSENT if cell is None else cell for cell in cells], style))

    def repeats(self, index: int) -> bool:
        """Whether a line's first cell is that of the line before, which need not be shown."""
        return index > 0 and self.lines[index][0][0] == self.lines[index - 1][0][0]

    def to_rich(self) -> Any:
        """For a console."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for head in self.words:
            made.add_column(head, vertical="bottom", overflow="fold", no_wrap=bool(self.numbers))
        for head in self.numbers:
            made.add_column(head.replace(" ", "\n"), justify="right", vertical="bottom",
                            no_wrap=True)  # fmt: skip
        sections = any(self.repeats(index) for index in range(len(self.lines)))
        for index, (cells, style) in enumerate(self.lines):
            again = self.repeats(index)
            if index and not again and sections:
                made.add_section()
            made.add_row(*([""] if again else cells[:1]), *cells[1:], style=RICH[style])
        return Group(Text(self.title, style="bold"), made)

    def to_markdown(self) -> str:
        """For a page of the documentation, without the title."""
        rule = "|" + "---|" * len(self.words) + "---:|" * len(self.numbers)
        lines = [f"| {' | '.join(cells)} |" for cells, _ in [(self.heads, ""), *self.lines]]
        return "\n".join([lines[0], rule, *lines[1:]])


def number(value: float | None, digits: int = 3) -> str | None:
    """So many significant digits, all before the point."""
    if value is None:
        return None
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def times(value: float | None, digits: int = 2) -> str | None:
    """A ratio."""
    return None if value is None else f"{value:.{digits}f}x"


def against(baseline: str) -> str:
    """A baseline in words."""
    from .providers import title_of

    return "torch's fastest step" if baseline == BEST else title_of(baseline)


# ---- the step job ----


def step_table(rows: Sequence[Row], title: str = "") -> Table:
    """All figures of one workload: a line a provider, by optimizer."""
    from .providers import title_of

    shown, first = [row for row in rows if "ms" in row], rows[0]
    on_gpu = any(row.get("device_us") is not None for row in shown)
    numbers = ["ms", "p20", "p80", "ns/ param.", "GB/s", "% of floor", "times faster", "p20", "p80",
               "memory MB"]  # fmt: skip
    known = WORKLOADS[first["workload"]].summary if first["workload"] in WORKLOADS else "a model"
    table = Table(
        title
        or f"{first['workload']}: {known}, {first['elements']:,} elements in all; a step, "
        f"medians of up to {max((row['rounds'] for row in shown), default=0)} rounds",
        ["optimizer", "provider", "arithmetic"],
        numbers + ["launches", "host us", "device us"] * on_gpu,
    )
    for row in shown:
        share, peak = row.get("floor_share"), row.get("peak_bytes")
        faster = {} if row["provider"] == FLOOR else row
        parity = row.get("parity") or ABSENT
        cells = [label(row), title_of(row["provider"]), parity]
        cells += [number(row[key]) for key in ("ms", "p20", "p80")]
        cells += [number(results.nanoseconds(row)), number(results.bandwidth(row))]
        cells.append(None if share is None else f"{100 * share:.0f}")
        cells += [times(faster.get(key)) for key in ("faster", "faster_p20", "faster_p80")]
        cells.append(None if peak is None else f"{peak / 1e6:,.1f}")
        if on_gpu:
            launches = None if row.get("kernels") is None else row["kernels"] + row["copies"]
            cells += [None if launches is None else f"{launches:.0f}"]
            cells += [number(row.get("host_us")), number(row.get("device_us"))]
        style = "ours" if row["provider"] == CANDIDATE else ""
        table.add(*cells, style=style if parity in ("same", ABSENT) else "bad")
    return table


def sweep_table(rows: Sequence[Row]) -> Table:
    """Bandwidth of a sweep, a column a size."""
    from .providers import title_of

    sizes = list(dict.fromkeys(row["elements"] for row in rows))
    table = Table(f"{SWEEP}: one tensor of so many elements; GB/s, medians",
                  ["optimizer", "provider"], [binary(size) for size in sizes])  # fmt: skip
    for found in results.grouped([r for r in rows if "ms" in r], "optimizer", "dtype",
                                 "provider").values():  # fmt: skip
        told = {row["elements"]: number(results.bandwidth(row)) for row in found}
        style = "ours" if found[0]["provider"] == CANDIDATE else ""
        table.add(label(found[0]), title_of(found[0]["provider"]),
                  *(told.get(size) for size in sizes), style=style)  # fmt: skip
    return table


def in_sweep(row: Row) -> bool:
    """Whether it is a point of a sweep."""
    return str(row["workload"]).startswith(f"{SWEEP}-")


def verdict_table(rows: Sequence[Row]) -> Table:
    """How many times faster fusedopt is: a line an optimizer, a column a workload."""
    ours = [row for row in rows if row["provider"] == CANDIDATE and not in_sweep(row)]
    workloads = list(dict.fromkeys(row["workload"] for row in ours))
    compared = against(ours[0]["baseline"]) if ours else ""
    table = Table(f"fusedopt's step: how many times as fast as {compared}", [""], workloads)
    for found in results.grouped(ours, "optimizer", "dtype").values():
        told = {row["workload"]: times(row.get("faster")) for row in found}
        table.add(label(found[0]), *(told.get(name) for name in workloads))
    return table


def change_table(changes: Sequence[Row]) -> Table:
    """What two runs have in common, and how it changed."""
    from .providers import title_of

    table = Table(
        "Speed now over speed before. Against each run's own floor where both have one: the "
        "machine's own speed then cancels.",
        ["workload", "optimizer", "provider"], ["ms before", "ms now", "speed", "in units of"],
    )  # fmt: skip
    for row in changes:
        style = "good" if row["speed"] >= 1.05 else "bad" if row["speed"] <= 0.95 else ""
        table.add(row["workload"], label(row), title_of(row["provider"]), number(row["ms_before"]),
                  number(row["ms"]), times(row["speed"]), "floor" if row["by_floor"] else "time",
                  style=style)  # fmt: skip
    return table


FRONT = ("huge", "gpt2", "many", "tiny", "billion", "swarm", "thousand")
FRONT_PROVIDERS = ("torch-default", "torch-foreach", "torch-fused", CANDIDATE, FLOOR)


def front_table(rows: Sequence[Row]) -> Table:
    """README's table: milliseconds of torch's steps, fusedopt's and the floor."""
    from .providers import title_of

    heads = [*map(title_of, FRONT_PROVIDERS), "% of floor", "best torch / fusedopt"]
    table = Table("", ["workload", "optimizer"], [*heads, "machine, versions, date"])
    for found in results.grouped(rows, "machine", "workload", "optimizer", "dtype").values():
        told = {row["provider"]: row for row in found}
        ours = told.get(CANDIDATE)
        if ours is None or ours["workload"] not in FRONT or ours["baseline"] != BEST:
            continue
        share, faster = ours.get("floor_share"), ours.get("faster")
        table.add(ours["workload"], label(ours),
                  *(number(told[n]["ms"]) if n in told else None for n in FRONT_PROVIDERS),
                  None if share is None else f"{100 * share:.0f}",
                  None if faster is None else f"{faster:.1f}", results.source(ours))  # fmt: skip
    return table


# ---- the other jobs ----


def train_table(rows: Sequence[Row]) -> Table:
    """The digits job: a line a network and optimizer, torch's default step beside fusedopt's."""
    from . import train

    table = Table(
        "Handwritten digits: torch.optim (default step) and fusedopt (ours) side by side",
        ["network", "optimizer"],
        ["loss torch", "loss ours", "acc.% torch", "acc.% ours", "diff. epoch1", "diff. all",
         "torch's drift", "us torch", "us ours", "ratio", "bound holds"],
    )  # fmt: skip
    for row in [row for row in rows if row["provider"] == CANDIDATE]:
        failed = bool(train.failures(row))
        table.add(
            row["workload"], row["optimizer"], f"{row['loss_of_torch']:.4f}", f"{row['loss']:.4f}",
            f"{row['accuracy_of_torch']:.2f}", f"{row['accuracy']:.2f}",
            f"{row['difference_first_epoch']:.1e}", f"{row['difference']:.1e}",
            f"{row['drift']:.1e}" + ("*" if row["drift_of"] == train.NUDGED else " "),
            f"{row['ms_of_torch'] * 1e3:.1f}", f"{row['ms'] * 1e3:.1f}", times(row["faster"], 1),
            "no" if failed else "yes", style="bad" if failed else "",
        )  # fmt: skip
    return table


def pipeline_table(rows: Sequence[Row]) -> Table:
    """One workload: nanoseconds a parameter of torch's stages, of both, and bytes beneath."""
    first = rows[0]
    chains = results.grouped(rows, "optimizer", "chain")
    longest = max(chains.values(), key=len)
    stages = [row["stage"] for row in longest if "stage" in row]
    table = Table(
        f"{first['workload']}: {first['elements']:,} elements; ns a "
        f"parameter, medians of up to {max(row['rounds'] for row in rows)} rounds",
        ["optimizer, chain"],
        [*(f"torch {stage}" for stage in stages), "torch all", "ours one call", "floor",
         "torch / ours", "ours / floor"],
    )  # fmt: skip
    for found in chains.values():
        told = {row.get("stage") or row["provider"]: row for row in found}
        ns = {name: number(results.nanoseconds(row)) for name, row in told.items()}
        ours, columns = told[CANDIDATE], [*stages, "torch", CANDIDATE, FLOOR]
        share, theirs = ours.get("floor_share"), told["torch"]["bytes"]
        table.add(f"{ours['optimizer']} {ours['chain']}", *(ns.get(name) for name in columns),
                  times(ours.get("faster"), 1), times(1 / share if share else None))  # fmt: skip
        table.add("  bytes", *(str(told[n]["bytes"]) if n in told else None for n in columns),
                  f"{theirs / ours['bytes']:.1f}x", "", style="dim")  # fmt: skip
    return table


def device_table(rows: Sequence[Row], words: Sequence[str]) -> Table:
    """What a step, or a chain, does on a GPU, and what it costs the host."""
    keys = ["kernels", "copies", "device_us", "host_us"]
    table = Table("one of them on the device", words, keys)
    for row in [row for row in rows if row.get("device_us") is not None]:
        table.add(*(str(row[word]) for word in words), *(f"{row[key]:.1f}" for key in keys))
    return table


def load_table(rows: Sequence[Row]) -> Table:
    """Samples and bytes a second of one set of rows, and the factor by which ours is faster."""
    from .load import FEEDS, WORKLOADS

    work, first = WORKLOADS[rows[0]["workload"]], rows[0]
    batch = f"{work.batch_size} a batch ({work.batch_size * work.row_bytes / 1e6:.2g} MB)"
    table = Table(f"{work.name}: {work.summary}, {batch}, to {first['device']}", ["feed"],
                  ["ms an epoch", "samples/s", "GB/s", "TensorLoader is"])  # fmt: skip
    for row in [row for row in rows if "ms" in row]:
        ours, ratio = row["provider"] == CANDIDATE, row.get("over_fusedopt")
        table.add(FEEDS[row["provider"]].title, f"{row['ms']:.1f}",
                  f"{row['rows'] / row['ms'] * 1e3:,.0f}", f"{row['bytes'] / row['ms'] / 1e6:.2f}",
                  "" if ours or ratio is None else f"{ratio:.2f} times as fast",
                  style="ours" if ours else "")  # fmt: skip
    return table


def transfer_table(rows: Sequence[Row]) -> Table:
    """The way to the GPU, by size of a batch."""
    heads = ["memcpy GB/s", "DevicePrefetcher GB/s", "of memcpy", "TensorLoader GB/s", "of memcpy",
             "hidden behind a kernel", "host us"]  # fmt: skip
    table = Table("batches on their way to the GPU, medians", ["MiB a batch"], heads)
    for row in rows:
        rate = {name: f"{value / 1e9:.1f}" for name, value in row["bytes_per_second"].items()}
        table.add(str(row["batch_mib"]), rate["memcpy"], rate["prefetcher"],
                  f"{row['prefetcher_share']:.0%}", rate["loader"], f"{row['loader_share']:.0%}",
                  f"{row['hidden']:.0%}", f"{row['host_us']:.0f}")  # fmt: skip
    return table


def parity_table(rows: Sequence[Row]) -> Table:
    """Errors of the parity job, a line an optimizer and dtype."""
    from . import parity

    names = [scenario.name for scenario in parity.SCENARIOS]
    table = Table(f"Largest error of {parity.STEPS} steps against torch.optim in float64, in ulps",
                  ["who", "optimizer", "dtype"], [*names, "arithmetic"])  # fmt: skip
    for row in rows:
        errors = [row["ulps"].get(name) for name in names]
        table.add(row["provider"], row["optimizer"], row["dtype"],
                  *(None if error is None else f"{error:.3g}" for error in errors), row["parity"],
                  style="" if row["parity"] == "same" else "bad")  # fmt: skip
    return table


def workload_table(workloads: Sequence[Workload]) -> Table:
    """Every workload and its size."""
    table = Table(f"Workloads (*: only by name; {SWEEP}: all of its sizes that fit)",
                  ["workload", "what"], ["tensors", "elements", "fp32 MB"])  # fmt: skip
    for work in workloads:
        table.add(work.name + ("" if work.standard else " *"), work.summary,
                  f"{len(work.shapes):,}", f"{work.elements:,}",
                  f"{work.elements * 4 / 1e6:,.1f}")  # fmt: skip
    return table
