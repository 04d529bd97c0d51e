"""The tables of README.md, docs/benchmarks.md and docs/gpu-status.md, from bench/results.

Between their markers these pages are written by ``report --update-docs`` (``make bench-docs``) and
by nobody's hand; a test says so when they are not what the files say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from . import gpu_report
from .charts import against, label, title_of
from .page import runs_of
from .results import CANDIDATE, FLOOR, Figure, ResultError, load, rows_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
STATUS = ROOT / "docs" / "gpu-status.md"
BEGIN = "<!-- written by `make bench-docs`: edits are lost -->"
END = "<!-- end of what `make bench-docs` writes -->"
NOTHING = "No result file has been kept yet.\n"
# What the front page has room for.
FRONT = ("huge", "gpt2", "many", "tiny", "billion", "swarm", "thousand")
COLUMNS = ("torch-default", "torch-foreach", "torch-fused", CANDIDATE, FLOOR)


def keep(path: Path) -> Path:
    """Copies a result file into bench/results without its single rounds, which nobody reads."""
    content = json.loads(path.read_text())
    for row in rows_of(content):
        row.pop("seconds", None)
    for part in ("step", "pipeline"):
        for row in content.get(part, {}).get("rows", []):
            row.pop("seconds", None)
    first = load(path)[0]
    name = re.sub(r"[^a-z0-9]+", "-", first.machine.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"{name}-{first.date}.json"
    kept.write_text(json.dumps(content, indent=1) + "\n")
    return kept


def update(files: Sequence[Path]) -> list[Path]:
    """Keeps the files, writes the pages' tables anew, and returns what was written."""
    if not PAGE.is_file():
        raise ResultError(f"--update-docs: there is no {PAGE}; wanted: to run in a checkout")
    for path in (README, PAGE):
        replaced(path.read_text(), "")  # both have their markers, before anything is written
    kept = [keep(path) for path in files if path.resolve().parent != RESULTS]
    figures = committed()
    for path, text in ((README, front_table(figures)), (PAGE, full_tables(figures))):
        path.write_text(replaced(path.read_text(), text))
    if (checked := newest_check()) is not None:
        STATUS.write_text(gpu_report.put(STATUS.read_text(), json.loads(checked.read_text())))
    return [*kept, README, PAGE, STATUS]


def newest_check() -> Path | None:
    """The GPU check's newest file; None if none was kept."""
    checks = [path for path in RESULTS.glob("*.json") if "parts" in json.loads(path.read_text())]
    return max(
        checks, key=lambda path: path.stem[-10:], default=None
    )  # the names end with the date


def committed() -> list[Figure]:
    """The figures of all files in bench/results."""
    paths = sorted(RESULTS.glob("*.json"))
    return [figure for path in paths if has_rows(path) for figure in load(path)]


def has_rows(path: Path) -> bool:
    """Whether a file has rows of the step job: the others are kept for other reasons."""
    content = json.loads(path.read_text())
    return ("parts" not in content and "step" not in content) or bool(rows_of(content))


def replaced(page: str, text: str) -> str:
    """The page with this text between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ResultError(f"--update-docs: a page has lost its markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |\n"


def rule(words: int, numbers: int) -> str:
    """The line under the heads of a Markdown table."""
    return "|" + "---|" * words + "---:|" * numbers + "\n"


def latest(figures: Sequence[Figure]) -> list[Figure]:
    """Those of the newest run on every machine."""
    newest: dict[str, str] = {}
    for figure in figures:
        newest[figure.machine] = max(figure.date, newest.get(figure.machine, ""))
    return [figure for figure in figures if figure.date == newest[figure.machine]]


def front_table(figures: Sequence[Figure]) -> str:
    """README's table: milliseconds of torch's steps, fusedopt's and the floor."""
    heads = ["workload", "optimizer", *map(title_of, COLUMNS), "% of floor"]
    heads.append("best torch / fusedopt")
    if not figures:
        return NOTHING
    text = line([*heads, "machine, versions, date"])
    text += rule(2, len(heads) - 2).rstrip("\n") + "---|\n"
    rows: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, Figure]] = {}
    for figure in latest(figures):
        if figure.workload in FRONT:
            rows.setdefault((figure.run, figure.row), {})[figure.provider] = figure
    for found in rows.values():
        if CANDIDATE not in found or found[CANDIDATE].baseline != "torch-best":
            continue
        ours = found[CANDIDATE]
        times = [f"{found[name].ms:.3g}" if name in found else "-" for name in COLUMNS]
        share = "-" if ours.percent_of_floor is None else f"{ours.percent_of_floor:.0f}"
        best = f"{ours.times_faster:.1f}" if ours.times_faster else "-"
        text += line([ours.workload, label(ours), *times, share, best, where(ours)])
    return text


def where(figure: Figure) -> str:
    """Machine, versions and date, as every row has them."""
    return f"{figure.machine}; torch {figure.torch}, fusedopt {figure.fusedopt}; {figure.date}"


def full_tables(figures: Sequence[Figure]) -> str:
    """The page's tables: every figure of every file, a section a run and workload."""
    heads = ("optimizer", "provider", "arithmetic", "ms", "p20", "p80", "ns a parameter", "GB/s",
             "% of floor", "times faster", "memory MB")  # fmt: skip
    text = ""
    for found in runs_of(figures).values():
        first = found[0]
        text += f"## {first.machine}, {first.date}\n\n"
        text += f"Times faster: than {against(first.baseline)}.\n\n"
        for workload in dict.fromkeys(f.workload for f in found):
            shown = [f for f in found if f.workload == workload]
            on_gpu = any(f.device_us is not None for f in shown)
            size = f"{shown[0].tensors:,} tensors, {shown[0].elements:,} parameters"
            text += f"### {workload}: {size}\n\n"
            extra = ("launches", "host us", "device us") if on_gpu else ()
            text += line([*heads, *extra, "machine, versions, date"])
            text += rule(3, len(heads) - 3 + len(extra)).rstrip("\n") + "---|\n"
            text += "".join(line([*_cells(f, on_gpu), where(f)]) for f in shown) + "\n"
    return text.rstrip("\n") + "\n" if text else NOTHING


def _cells(f: Figure, on_gpu: bool) -> list[str]:
    """The cells of one figure."""

    def plain(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    faster = None if f.provider == FLOOR else f.times_faster
    cells = [label(f), title_of(f.provider), f.parity or "-"]
    cells += [plain(value, ".3g") for value in (f.ms, f.ms_p20, f.ms_p80)]
    cells += [plain(f.ns_per_parameter, ".3g"), plain(f.gb_per_second, ".3g")]
    cells += [plain(f.percent_of_floor, ".0f"), plain(faster, ".2f")]
    cells.append("-" if f.peak_bytes is None else f"{f.peak_bytes / 1e6:,.1f}")
    if on_gpu:
        cells += [plain(f.launches, ".0f"), plain(f.host_us, ".1f"), plain(f.device_us, ".1f")]
    return cells
