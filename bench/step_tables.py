"""Tables of the step job: every figure, sweeps, verdicts, changes, and README's."""

from __future__ import annotations

from collections.abc import Sequence

from . import rows as results
from .providers import title_of
from .rows import BEST, CANDIDATE, FLOOR, Row, label
from .tables import (
    KIND,
    MS,
    OF_FLOOR,
    OPTIMIZER,
    PROVIDER,
    WORKLOAD,
    Table,
    against,
    bandwidth,
    by_provider,
    column,
    is_ours,
    nanoseconds,
    of_group,
    table,
    times,
)
from .workloads import SWEEP, WORKLOADS, binary

STEP = [
    MS,
    column("p20", "p20"),
    column("p80", "p80"),
    ("ns/ param.", nanoseconds),
    ("GB/s", bandwidth),
    OF_FLOOR,
    *(
        (head, lambda row, key=key: None if row["provider"] == FLOOR else times(row.get(key)))
        for head, key in (("times faster", "faster"), ("p20", "faster_p20"), ("p80", "faster_p80"))
    ),
    column("memory MB", "peak_bytes", lambda value: f"{value / 1e6:,.1f}"),
]
ON_A_GPU = [
    ("launches", lambda row: f"{row['kernels'] + row['copies']:.0f}" if "kernels" in row else None),
    column("host us", "host_us"),
    column("device us", "device_us"),
]  # fmt: skip


def step_table(rows: Sequence[Row]) -> Table:
    """All figures of one workload: a line a provider, by optimizer."""
    shown, first = [row for row in rows if "ms" in row], rows[0]
    known = WORKLOADS[first["workload"]].summary if first["workload"] in WORKLOADS else "a model"
    rounds = max((row["rounds"] for row in shown), default=0)
    title = f"{first['workload']}: {known}, {first['elements']:,} elements in all; a step, medians"
    seen = any(row.get("device_us") is not None for row in shown)

    def style(row: Row) -> str:
        return is_ours(row) if row.get("parity", "same") == "same" else "bad"

    return table(f"{title} of up to {rounds} rounds", shown,
                 [OPTIMIZER, PROVIDER, column("arithmetic", "parity", str)],
                 STEP + ON_A_GPU * seen, style)  # fmt: skip


def in_sweep(row: Row) -> bool:
    """Whether it is a point of a sweep."""
    return str(row["workload"]).startswith(f"{SWEEP}-")


def sweep_table(rows: Sequence[Row]) -> Table:
    """Bandwidth of a sweep, a column a size."""
    rows = [row for row in rows if "ms" in row]
    sizes = dict.fromkeys(row["elements"] for row in rows)
    lines = results.grouped(rows, "optimizer", "dtype", "provider").values()
    return table(
        f"{SWEEP}: one tensor of so many elements; GB/s, medians",
        [{"": found[0], **results.by(found, "elements")} for found in lines],
        [KIND[1], ("provider", lambda told: title_of(told[""]["provider"]))],
        [of_group(size, bandwidth, binary(size)) for size in sizes],
        lambda told: is_ours(told[""]),
    )  # fmt: skip


def verdict_table(rows: Sequence[Row]) -> Table:
    """How many times faster fusedopt is: a line an optimizer, a column a workload."""
    ours = [row for row in rows if row["provider"] == CANDIDATE and not in_sweep(row)]
    compared_with = against(ours[0]["baseline"]) if ours else ""
    lines = results.grouped(ours, "optimizer", "dtype").values()
    return table(
        f"fusedopt's step: how many times as fast as {compared_with}",
        [{"": found[0], **results.by(found, "workload")} for found in lines],
        [("", lambda told: label(told[""]))],
        [of_group(name, lambda row: times(row.get("faster")), name)
         for name in dict.fromkeys(row["workload"] for row in ours)],
    )  # fmt: skip


def change_table(changes: Sequence[Row]) -> Table:
    """What two runs have in common, and how it changed."""
    return table(
        "Speed now over speed before. Against each run's own floor where both have one: the "
        "machine's own speed then cancels.",
        changes,
        [WORKLOAD, OPTIMIZER, PROVIDER],
        [column("ms before", "ms_before"), column("ms now", "ms"),
         column("speed", "faster", times),
         ("in units of", lambda row: "floor" if row["by_floor"] else "time")],
        lambda row: "good" if row["faster"] >= 1.05 else "bad" if row["faster"] <= 0.95 else "",
    )  # fmt: skip


FRONT = ("huge", "gpt2", "many", "tiny", "billion", "swarm", "thousand")
FRONT_PROVIDERS = ("torch-default", "torch-foreach", "torch-fused", CANDIDATE, FLOOR)


def front_table(rows: Sequence[Row]) -> Table:
    """README's table: milliseconds of torch's steps, fusedopt's and the floor."""
    shown = [
        told
        for told in by_provider(rows, "machine")
        if CANDIDATE in told
        and told[""]["workload"] in FRONT
        and told[CANDIDATE]["baseline"] == BEST
    ]
    return table(
        "", shown, KIND,
        [*(of_group(name, MS[1], title_of(name)) for name in FRONT_PROVIDERS),
         of_group(CANDIDATE, OF_FLOOR[1], OF_FLOOR[0]),
         of_group(CANDIDATE, column("", "faster", "{:.1f}")[1], "best torch / fusedopt"),
         of_group(CANDIDATE, results.source, "machine, versions, date")],
    )  # fmt: skip
