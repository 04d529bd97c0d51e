"""The report's page: one HTML file that needs nothing else, readable in light and in dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from . import charts
from .results import CANDIDATE, FLOOR, Change, Figure

STYLE = """
:root { --paper: #fff; --ink: #1a1a1a; --faint: #e3e3e3; --soft: #666; --good: #0072b2;
        --ours: #fdf0e6; --bad: #b3261e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181d; --ink: #e8e8e8; --faint: #3a3d44; --soft: #a5a9b0; --good: #56b4e9;
          --ours: #33291a; --bad: #ff8a80; } }
body { background: var(--paper); color: var(--ink); margin: 2rem auto; max-width: 74rem;
       padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
p.source, caption, footer { color: var(--soft); font-size: 0.87rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.3rem; white-space: nowrap; }
th, td { padding: 0.15rem 0.6rem; text-align: right; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; }
tr.ours td { background: var(--ours); font-weight: 600; }
td.faster { color: var(--good); font-weight: 600; } td.slower { color: var(--bad); }
td.differs { color: var(--bad); font-weight: 600; }
table.verdict td { font-size: 1.05rem; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture for light pages and the same for dark ones.

    Attributes:
        name: of its file, without the suffix.
        says: what it shows, for those who do not see it.
        light: PNG.
        dark: PNG.
    """

    name: str
    says: str
    light: bytes
    dark: bytes

    def to_html(self) -> str:
        """Both inside the page; the reader's setting chooses."""
        dark, light = (
            f"data:image/png;base64,{base64.b64encode(data).decode()}"
            for data in (self.dark, self.light)
        )
        return (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{html.escape(self.says)}"></picture>'
        )


def runs_of(figures: Sequence[Figure]) -> dict[tuple[str, ...], list[Figure]]:
    """The figures of each run, in the order they were given."""
    found: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.run, []).append(figure)
    return found


def draw(figures: Sequence[Figure], prefix: str = "") -> list[Picture]:
    """The pictures of one run."""
    found = []

    def add(name: str, says: str, draw_one: object, shown: Sequence[Figure]) -> None:
        assert callable(draw_one)
        light, dark = (draw_one(shown, charts.THEMES[theme]) for theme in ("light", "dark"))
        found.append(Picture(f"{prefix}{name}", says, light, dark))

    kinds: dict[str, list[Figure]] = {}
    for figure in figures:
        kinds.setdefault(charts.label(figure), []).append(figure)
    # What people use most comes first.
    for kind in sorted(kinds, key=lambda kind: kind != "AdamW"):
        shown, name = kinds[kind], kind.replace(" ", "-")
        if charts.by_workload(shown):
            add(f"times-{name}", f"Times of {kind}'s step", charts.draw_times, shown)
        if any(f.peak_bytes is not None for f in shown):
            add(f"memory-{name}", f"Peak memory of {kind}'s step", charts.draw_memory, shown)
    swept = [f for f in figures if charts.in_sweep(f)]
    if swept:
        add("sweep", "Bandwidth of a step against the size of a tensor", charts.draw_sweep, swept)
    return found


def cell(text: str, style: str = "") -> str:
    """A table cell."""
    attribute = f' class="{style}"' if style else ""
    return f"<td{attribute}>{html.escape(text)}</td>"


def table(caption: str, heads: Sequence[str], rows: Sequence[str], style: str = "") -> str:
    """A table that scrolls where the page is narrow."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    return (
        f'<div class="wide"><table class="{style}"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def ratio_cell(ratio: float | None, missing: str = "-") -> str:
    """How many times faster, coloured."""
    if ratio is None:
        return cell(missing)
    style = "faster" if ratio >= 1.05 else "slower" if ratio <= 0.95 else ""
    return cell(f"{ratio:.2f}x", style)


def verdict_table(figures: Sequence[Figure]) -> str:
    """How many times faster fusedopt is: a line an optimizer, a column a workload."""
    ours = [f for f in figures if f.provider == CANDIDATE and not charts.in_sweep(f)]
    workloads = list(dict.fromkeys(f.workload for f in ours))
    found = {(charts.label(f), f.workload): f.times_faster for f in ours}
    rows = [
        f"<tr>{cell(kind)}{''.join(ratio_cell(found.get((kind, name))) for name in workloads)}</tr>"
        for kind in dict.fromkeys(charts.label(f) for f in ours)
    ]
    compared = charts.against(ours[0].baseline) if ours else ""
    return table(f"fusedopt's step: how many times as fast as {compared}", ["", *workloads], rows,
                 "verdict")  # fmt: skip


HEADS = ("provider", "arithmetic", "ms", "p20", "p80", "ns a parameter", "GB/s", "% of floor",
         "times faster", "memory MB")  # fmt: skip
ON_GPU = ("launches", "host us", "device us")


def workload_table(workload: str, figures: Sequence[Figure]) -> str:
    """Every figure of one workload."""
    on_gpu = any(f.device_us is not None for f in figures)
    rows, kind = [], ""
    heads = HEADS + (ON_GPU if on_gpu else ())
    for f in figures:
        if charts.label(f) != kind:
            kind = charts.label(f)
            rows.append(f'<tr><th colspan="{len(heads)}">{html.escape(kind)}</th></tr>')
        style = ' class="ours"' if f.provider == CANDIDATE else ""
        rows.append(f"<tr{style}>{''.join(_cells(f, on_gpu))}</tr>")
    size = f"{figures[0].tensors:,} tensors, {figures[0].elements:,} parameters"
    known = charts.known(workload)
    return table(f"{workload}: {known or 'a model of its own'}; {size}", heads, rows)


def _cells(f: Figure, on_gpu: bool) -> list[str]:
    """The cells of one provider."""

    def plain(value: float | None, form: str) -> str:
        return cell("-" if value is None else format(value, form))

    cells = [
        cell(charts.title_of(f.provider)),
        cell(f.parity or "-", "differs" if "differs" in f.parity else ""),
        *(plain(value, ".3g") for value in (f.ms, f.ms_p20, f.ms_p80)),
        plain(f.ns_per_parameter, ".3g"),
        plain(f.gb_per_second, ".3g"),
        plain(f.percent_of_floor, ".0f"),
        ratio_cell(None if f.provider == FLOOR else f.times_faster),
        plain(None if f.peak_bytes is None else f.peak_bytes / 1e6, ",.1f"),
    ]
    if on_gpu:
        cells += [plain(f.launches, ".0f"), plain(f.host_us, ".1f"), plain(f.device_us, ".1f")]
    return cells


def change_table(changes: Sequence[Change]) -> str:
    """What two runs have in common, and how it changed."""
    rows = [
        f"<tr{' class=ours' if c.now.provider == CANDIDATE else ''}>"
        f"{cell(c.now.workload)}{cell(charts.label(c.now))}{cell(charts.title_of(c.now.provider))}"
        f"{cell(f'{c.before.ms:.3g}')}{cell(f'{c.now.ms:.3g}')}{ratio_cell(c.speed)}"
        f"{cell('floor' if c.by_floor else 'time')}</tr>"
        for c in changes
    ]
    heads = ("workload", "optimizer", "provider", "ms before", "ms now", "speed", "in units of")
    caption = (
        "Speed now over speed before. Against each run's own floor where both have one: the "
        "machine's own speed then cancels."
    )
    return table(caption, heads, rows)


def make(
    figures: Sequence[Figure], pictures: Sequence[Sequence[Picture]], changes: Sequence[Change]
) -> str:
    """The page: for every run its verdict, pictures and tables; the comparison first, if any."""
    parts = []
    if changes:
        parts.append(f"<h2>Compared with {html.escape(changes[0].before.date)}</h2>")
        parts.append(change_table(changes))
    for found, drawn in zip(runs_of(figures).values(), pictures, strict=True):
        parts.append(f"<h2>{html.escape(found[0].machine)}</h2>")
        parts.append(f'<p class="source">{html.escape(charts.source(found[0]))}</p>')
        parts.append(verdict_table(found))
        parts += [picture.to_html() for picture in drawn]
        parts.append("<h3>All figures</h3>")
        workloads = dict.fromkeys(f.workload for f in found)
        parts += [workload_table(name, [f for f in found if f.workload == name])
                  for name in workloads]  # fmt: skip
    note = (
        "Providers race round-robin in one process; medians, with the 20th and 80th percentile. "
        "% of floor: 100 is the time of moving the same bytes without maths, in the same rounds. "
        "Arithmetic: whether a provider computes what torch.optim computes in float64."
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<link rel="icon" href="data:,">'
        f"<title>fusedopt: the optimizer step, measured</title><style>{STYLE}</style></head>"
        f"<body><h1>The optimizer step, measured</h1>{''.join(parts)}<footer><p>{note}</p></footer>"
        "</body></html>\n"
    )
