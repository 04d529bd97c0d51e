"""The tables of docs/gpu-status.md, out of what the GPU check wrote.

`documents` puts them into the page, each between the comments that name it, for ``make
bench-docs``. No figure of a GPU comes another way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .gpu_check import promises

# Libraries of the step's tables, and how they are headed.
LIBRARIES = {
    "torch-default": "torch default",
    "torch-fused": "torch fused",
    "fusedopt": "CUDA",
    "fusedopt-triton": "Triton",
    "floor": "floor",
}


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, all before the point; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def markdown(words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: words to the left, numbers to the right."""
    lines = [[*words, *numbers], [*["---"] * len(words), *["---:"] * len(numbers)], *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("| ---", "|---").replace("--- |", "---|")
                     .replace("---: |", "---:|") for line in lines)  # fmt: skip


def machine(result: dict[str, Any]) -> str:
    """What ran, in a line."""
    told = result["machine"]
    return (
        f"{told['device']}, driver {told['driver']}, torch {told['torch']}, Triton "
        f"{told['triton']}, nvcc {told['nvcc']}, {told['date'][:10]}, revision "
        f"{told['git_revision']}"
    )


def step_table(result: dict[str, Any]) -> str:
    """Wall milliseconds of a step, and its ratios."""
    rows = []
    for row in result["parts"]["figures"]["rows"]:
        wall = {name: row["step_ms"].get(name, {}).get("median") for name in LIBRARIES}
        optimizer = row["optimizer"] + (" bf16" if row["dtype"] == "bfloat16" else "")
        best = row["ratios"]["best_torch_over_fusedopt"]["median"]
        rows.append([row["workload"], optimizer, *(number(value) for value in wall.values()),
                     f"{best:.1f}"])  # fmt: skip
    heads = [*LIBRARIES.values(), "best torch / CUDA"]
    return markdown(["workload", "optimizer"], heads, rows)


def device_table(result: dict[str, Any]) -> str:
    """Microseconds that a step's kernels and copies take on the device, and the host's."""
    rows = []
    for row in result["parts"]["figures"]["rows"]:
        seen = row["device"]
        optimizer = row["optimizer"] + (" bf16" if row["dtype"] == "bfloat16" else "")
        times = [number(seen[name]["device_us"] if name in seen else None) for name in LIBRARIES]
        hosts = [number(seen[name]["host_us"]) for name in ("fusedopt", "fusedopt-triton")]
        rows.append([row["workload"], optimizer, *times, *hosts])
    heads = [*LIBRARIES.values(), "host, CUDA", "host, Triton"]
    return markdown(["workload", "optimizer"], heads, rows)


def goals_table(result: dict[str, Any]) -> str:
    """What was promised and what was measured."""
    rows = []
    for what, measured, bound, wanted in promises(result):
        kept = "not measured"
        if measured is not None:
            kept = "kept"
            if not (measured >= wanted if bound == "at least" else measured <= wanted):
                kept = "**not kept**"
        rows.append([what, f"{bound} {wanted:g}", number(measured), kept])
    return markdown(["what"], ["goal", "measured", ""], rows)


TABLES = {
    "machine": machine,
    "goals": goals_table,
    "step": step_table,
    "device": device_table,
}


def put(page: str, result: dict[str, Any]) -> str:
    """The page with its tables out of this run."""
    for name, table in TABLES.items():
        begin, end = f"<!-- gpu: {name} -->\n", "\n<!-- /gpu -->"
        if begin not in page:
            continue
        pattern = re.compile(f"({begin}).*?({end})", re.DOTALL)
        made = table(result)
        page = pattern.sub(lambda found, made=made: f"{found[1]}{made}{found[2]}", page)
    return page
