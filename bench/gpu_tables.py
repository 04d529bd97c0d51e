"""What docs/gpu-status.md shows of a GPU check: machine, goals, times on wall and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import rows as results
from .rows import CANDIDATE, Row
from .tables import KIND, Column, Table, by_provider, column, number, of_group, table

LIBRARIES = {"torch-default": "torch default", "torch-fused": "torch fused", "fusedopt": "CUDA",
             "fusedopt-triton": "Triton", "floor": "floor"}  # fmt: skip


def _columns(key: str, names: Sequence[str] = tuple(LIBRARIES), before: str = "") -> list[Column]:
    """One figure of several libraries, by their names here."""
    cell = column("", key)[1]
    return [of_group(name, cell, f"{before}{LIBRARIES[name]}") for name in names]


def machine(rows: Sequence[Row]) -> str:
    """What ran, in a line."""
    told = next(row for row in rows if row["job"] == "machine")
    return (f"{told['machine']}, driver {told['driver']}, torch {told['torch']}, Triton "
            f"{told['triton']}, nvcc {told['nvcc']}, {told['date']}, revision "
            f"{told['revision']}")  # fmt: skip


def wall(rows: Sequence[Row]) -> Table:
    """Wall milliseconds of a step, and its ratio."""
    best = of_group(CANDIDATE, column("", "faster", "{:.1f}")[1], "best torch / CUDA")
    return table("", by_provider(results.steps(rows)), KIND, [*_columns("ms"), best])


def device(rows: Sequence[Row]) -> Table:
    """Microseconds that a step's kernels and copies take on the device, and the host's."""
    host = _columns("host_us", ("fusedopt", "fusedopt-triton"), "host, ")
    return table("", by_provider(results.steps(rows)), KIND, [*_columns("device_us"), *host])


def goals(rows: Sequence[Row]) -> Table:
    """What was promised for a GPU, and what was measured."""
    found = {(r["workload"], r["optimizer"], r["provider"]): r for r in results.steps(rows)
             if r["device"] == "cuda"}  # fmt: skip
    replays = {(r["workload"], r["provider"]): r["ms"] for r in rows if r["job"] == "graph"}

    def of(workload: str, key: str, provider: str = "fusedopt", optimizer: str = "AdamW") -> float:
        return float(found[workload, optimizer, provider][key])

    def device(workload: str, provider: str) -> float:
        return of(workload, "device_us", provider)

    most, least = "at most", "at least"
    wanted: list[tuple[str, str, float, Callable[[], float]]] = [
        ("AdamW, 1B elements: share of the floor's speed", least, 0.92,
         lambda: device("billion", "floor") / device("billion", "fusedopt")),
        ("AdamW, 1B elements: times torch fused", least, 1.05,
         lambda: of("billion", "ms", "torch-fused") / of("billion", "ms")),
        ("AdamW, 1B elements: Triton's share of CUDA's speed", least, 0.95,
         lambda: device("billion", "fusedopt") / device("billion", "fusedopt-triton")),
        ("AdamW, 10,000 x 64: ms wall", most, 0.6, lambda: of("swarm", "ms")),
        ("AdamW, 10,000 x 64: us on the host that Triton takes more", most, 30,
         lambda: of("swarm", "host_us", "fusedopt-triton") - of("swarm", "host_us")),
        ("AdamW, 10,000 x 64 in a graph: ms", most, 0.1, lambda: replays["swarm", "fusedopt"]),
        ("AdamW, 1,000 x 1,024: ms wall", most, 0.12, lambda: of("thousand", "ms")),
        ("AdamW, 465 groups of one: ms wall", most, 0.25, lambda: of("groups", "ms")),
        ("AdamW, 1M elements: us on the device", most, 9, lambda: device("one", "fusedopt")),
        ("RMSprop, 100M elements: times torch's best", least, 2.3,
         lambda: of("hundred", "faster", optimizer="RMSprop")),
        ("AdamW, 10,000 x 64: launches", most, 1, lambda: of("swarm", "kernels")),
        ("AdamW, 465 groups of one: launches", most, 1, lambda: of("groups", "kernels")),
        ("batches of 4 MiB and more: share of a pinned memcpy's rate", least, 0.95,
         lambda: min(row["prefetcher_share"] for row in rows
                     if row["job"] == "transfer" and row["batch_mib"] >= 4)),
    ]  # fmt: skip
    lines = []
    for what, bound, goal, measure in wanted:
        try:
            measured = measure()
            kept = measured >= goal if bound == least else measured <= goal
            verdict = "kept" if kept else "**not kept**"
        except (KeyError, ValueError):
            measured, verdict = None, "not measured"
        lines.append({"what": what, "goal": f"{bound} {goal:g}", "measured": number(measured),
                      "": verdict})  # fmt: skip
    columns = [column(head, head, str) for head in lines[0]]
    return table("Promises", lines, columns[:1], columns[1:],
                 lambda line: "bad" if line[""] == "**not kept**" else "")  # fmt: skip
