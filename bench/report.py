"""The ``report`` job: a page with pictures of result files, and the tables of the documentation.

Between their markers README.md, docs/benchmarks.md and docs/gpu-status.md are written by
``report --update-docs`` (``make bench-docs``) from bench/results and by nobody's hand; a test says
so when they are not what the files say.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import rows as results
from . import tables
from .rows import ResultError, Row
from .tables import Table, number

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = {"README.md": ["front"], "docs/benchmarks.md": ["all"],
         "docs/gpu-status.md": ["gpu-machine", "gpu-goals", "gpu-step", "gpu-device"]}  # fmt: skip
BEGIN, END = "<!-- bench: {name}; `make bench-docs` writes what follows -->", "<!-- /bench -->"


# ---- the page ----


def write_page(rows: Sequence[Row], changes: Sequence[Row], out: Path) -> Path:
    """Writes report.html, which needs nothing else, and its pictures beside it."""
    import jinja2

    from . import plots

    shown, runs = [], results.runs(rows)
    for place, run in enumerate(runs):
        prefix = "" if len(runs) == 1 else f"{place + 1}-"
        drawn = plots.step_pictures(run, out, prefix)
        shown.append({
            "machine": run[0]["machine"],
            "source": results.source(run[0]),
            "verdict": tables.verdict_table(run),
            "pictures": {
                says: base64.b64encode(path.read_bytes()).decode() for says, path in drawn.items()
            },
            "tables": [tables.step_table(found) for found in by_workload(run)],
        })  # fmt: skip
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = pages.get_template("report.html.jinja").render(
        runs=shown,
        changes=tables.change_table(changes) if changes else None,
        compared_with=changes[0]["date_before"] if changes else "",
    )
    path = out / "report.html"
    path.write_text(page)
    return path


def by_workload(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each workload."""
    return [*results.grouped(rows, "workload").values()]


# ---- the documentation ----


def update(files: Sequence[Path]) -> list[Path]:
    """Keeps the files, writes the pages' tables anew, and returns what was written."""
    pages = {ROOT / page: names for page, names in PAGES.items()}
    for page, names in pages.items():  # before anything is written
        if not page.is_file():
            raise ResultError(f"--update-docs: there is no {page}; wanted: to run in a checkout")
        for name in names:
            if BEGIN.format(name=name) not in page.read_text():
                raise ResultError(f"--update-docs: {page} has lost its marker of {name!r}")
    kept = [keep(path) for path in files if path.resolve().parent != RESULTS]
    blocks = made_blocks(committed())
    for page in pages:
        page.write_text(replaced(page.read_text(), blocks))
    return [*kept, *pages]


def keep(path: Path) -> Path:
    """Copies a result file into bench/results, without curves, under its machine and date."""
    found = [{k: v for k, v in row.items() if k != "curve"} for row in results.read(path)]
    first = next(row for row in found if "machine" in row)
    name = re.sub(r"[^a-z0-9]+", "-", first["machine"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"{name}-{first['date']}.jsonl"
    results.write(kept, found)
    return kept


def committed() -> list[list[Row]]:
    """The rows of each file in bench/results."""
    return [results.read(path) for path in sorted(RESULTS.glob("*.jsonl"))]


def made_blocks(files: Sequence[Sequence[Row]]) -> dict[str, str]:
    """What the pages have between their markers, by name."""
    rows = [row for file in files for row in results.steps(file)]
    newest: dict[str, str] = {}
    for row in rows:
        newest[row["machine"]] = max(row["date"], newest.get(row["machine"], ""))
    latest = [row for row in rows if row["date"] == newest[row["machine"]]]
    blocks = {"front": tables.front_table(latest).to_markdown(), "all": full_tables(rows)}
    checks = [file for file in files if any(row["job"] == "part" for row in file)]
    if checks:
        check = max(checks, key=lambda file: str(file[0]["date"]))
        blocks |= {f"gpu-{name}": make(check) for name, make in GPU.items()}
    return blocks


def replaced(page: str, blocks: dict[str, str]) -> str:
    """The page with these texts between its markers."""
    for name, text in blocks.items():
        begin = BEGIN.format(name=name)
        pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(END)})", re.DOTALL)
        page = pattern.sub(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page)
    return page


def full_tables(rows: Sequence[Row]) -> str:
    """Every figure of every file: a section a run, a table a workload."""
    parts = []
    for run in results.runs(rows):
        parts.append(f"## {run[0]['machine']}, {run[0]['date']}")
        compared = tables.against(run[0]["baseline"])
        versions = f"torch {run[0]['torch']}, fusedopt {results.version(run[0])}"
        parts.append(f"{versions}. Times faster: than {compared}.")
        for found in by_workload(run):
            first = found[0]
            size = f"{first['tensors']:,} tensors, {first['elements']:,} parameters"
            parts.append(f"### {first['workload']}: {size}")
            parts.append(tables.step_table(found).to_markdown())
    return "\n\n".join(parts)


# ---- docs/gpu-status.md, out of a GPU check ----

LIBRARIES = {"torch-default": "torch default", "torch-fused": "torch fused", "fusedopt": "CUDA",
             "fusedopt-triton": "Triton", "floor": "floor"}  # fmt: skip


def _machine(rows: Sequence[Row]) -> str:
    """What ran, in a line."""
    told = next(row for row in rows if row["job"] == "machine")
    return (f"{told['machine']}, driver {told['driver']}, torch {told['torch']}, Triton "
            f"{told['triton']}, nvcc {told['nvcc']}, {told['date']}, revision "
            f"{told['revision']}")  # fmt: skip


def _wall(rows: Sequence[Row]) -> str:
    """Wall milliseconds of a step, and its ratio."""
    table = Table("", ["workload", "optimizer"], [*LIBRARIES.values(), "best torch / CUDA"])
    for found in results.grouped(results.steps(rows), "workload", "optimizer", "dtype").values():
        told = {row["provider"]: row for row in found}
        table.add(found[0]["workload"], tables.label(found[0]),
                  *(number(told[name]["ms"]) if name in told else None for name in LIBRARIES),
                  f"{told['fusedopt']['faster']:.1f}")  # fmt: skip
    return table.to_markdown()


def _device(rows: Sequence[Row]) -> str:
    """Microseconds that a step's kernels and copies take on the device, and the host's."""
    heads = [*LIBRARIES.values(), "host, CUDA", "host, Triton"]
    table = Table("", ["workload", "optimizer"], heads)
    for found in results.grouped(results.steps(rows), "workload", "optimizer", "dtype").values():
        told = {row["provider"]: row for row in found}
        table.add(
            found[0]["workload"], tables.label(found[0]),
            *(number(told[name]["device_us"]) if name in told else None for name in LIBRARIES),
            *(number(told[name]["host_us"]) for name in ("fusedopt", "fusedopt-triton")),
        )  # fmt: skip
    return table.to_markdown()


def goals(rows: Sequence[Row]) -> Table:
    """What was promised for a GPU, and what was measured."""
    found = {(r["workload"], r["optimizer"], r["provider"]): r for r in results.steps(rows)
             if r["device"] == "cuda"}  # fmt: skip
    replays = {(r["workload"], r["provider"]): r["ms"] for r in rows if r["job"] == "graph"}
    shares = [row["prefetcher_share"] for row in rows
              if row["job"] == "transfer" and row["batch_mib"] >= 4]  # fmt: skip

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
         lambda: min(shares)),
    ]  # fmt: skip
    table = Table("Promises", ["what"], ["goal", "measured", ""])
    for what, bound, goal, measure in wanted:
        try:
            measured = measure()
        except (KeyError, ValueError):  # nothing was measured
            table.add(what, f"{bound} {goal:g}", None, "not measured")
            continue
        kept = measured >= goal if bound == least else measured <= goal
        table.add(what, f"{bound} {goal:g}", number(measured), "kept" if kept else "**not kept**",
                  style="" if kept else "bad")  # fmt: skip
    return table


GPU = {"machine": _machine, "goals": lambda rows: goals(rows).to_markdown(), "step": _wall,
       "device": _device}  # fmt: skip
