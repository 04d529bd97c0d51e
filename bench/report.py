"""The ``report`` job: a page with pictures of result files, and the tables of the documentation.

Between their markers README.md, docs/benchmarks.md and docs/gpu-status.md are written by
``report --update-docs`` (``make bench-docs``) from bench/results and by nobody's hand; a test says
so when they are not what the files say.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from . import gpu_tables, job_tables, step_tables, tables
from . import rows as results
from .rows import ResultError, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = {"README.md": ["front"], "docs/benchmarks.md": ["all"],
         "docs/gpu-status.md": ["gpu-machine", "gpu-goals", "gpu-step", "gpu-device"]}  # fmt: skip
BEGIN, END = "<!-- bench: {name}; `make bench-docs` writes what follows -->", "<!-- /bench -->"


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
            "verdict": step_tables.verdict_table(run),
            "pictures": {
                says: base64.b64encode(path.read_bytes()).decode() for says, path in drawn.items()
            },
            "tables": [step_tables.step_table(found)
                       for found in results.grouped(run, "workload").values()],
        })  # fmt: skip
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    changed = changes and {"before": changes[0]["date_before"],
                           "table": step_tables.change_table(changes)}  # fmt: skip
    legend = job_tables.LEGENDS["step"].format(baseline=tables.against(rows[0]["baseline"]))
    path = out / "report.html"
    path.write_text(
        pages.get_template("report.html.jinja").render(runs=shown, changes=changed, legend=legend)
    )
    return path


# ---- the documentation ----


def update(files: Sequence[Path]) -> list[Path]:
    """Keeps the files, writes the pages' tables anew, and returns what was written."""
    for name, blocks in PAGES.items():  # before anything is written
        page = ROOT / name
        if not page.is_file():
            raise ResultError(f"--update-docs: there is no {page}; wanted: to run in a checkout")
        for block in blocks:
            if BEGIN.format(name=block) not in page.read_text():
                raise ResultError(f"--update-docs: {page} has lost its marker of {block!r}")
    kept = [keep(path) for path in files if path.resolve().parent != RESULTS]
    made = made_blocks(committed())
    pages = [ROOT / name for name in PAGES]
    for page in pages:
        page.write_text(replaced(page.read_text(), made))
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
    blocks = {"front": step_tables.front_table(latest).to_markdown(), "all": full_tables(rows)}
    checks = [file for file in files if any(row["job"] == "part" for row in file)]
    if checks:
        check = max(checks, key=lambda file: str(file[0]["date"]))
        blocks |= {
            "gpu-machine": gpu_tables.machine(check),
            "gpu-goals": gpu_tables.goals(check).to_markdown(),
            "gpu-step": gpu_tables.wall(check).to_markdown(),
            "gpu-device": gpu_tables.device(check).to_markdown(),
        }
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
        for found in results.grouped(run, "workload").values():
            first = found[0]
            size = f"{first['tensors']:,} tensors, {first['elements']:,} parameters"
            parts.append(f"### {first['workload']}: {size}")
            parts.append(step_tables.step_table(found).to_markdown())
    return "\n\n".join(parts)
