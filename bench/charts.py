"""Pictures of result files: who is faster, where, and by how much.

Each is drawn twice, for light pages and dark ones. Colours are Okabe and Ito's: fusedopt, torch and
other libraries are apart for colour-blind readers, too, and names stand beside every bar and line.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")  # a file is wanted, wherever this runs

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .providers import PROVIDERS
from .results import CANDIDATE, FLOOR, Figure
from .workloads import SWEEP, WORKLOADS, binary

DPI = 130


@dataclass(frozen=True)
class Theme:
    """Colours of a page.

    Attributes:
        paper: background.
        ink: text and axes.
        faint: grid lines.
        floor: the band that the floor is in sweeps.
        ours: fusedopt's bars and lines.
        torch: torch's.
        others: other libraries'.
    """

    paper: str
    ink: str
    faint: str
    floor: str
    ours: str
    torch: str
    others: str

    def colour(self, provider: str) -> str:
        """Of a provider's bars and lines."""
        if provider.startswith(CANDIDATE):
            return self.ours
        return self.torch if provider.startswith("torch-") else self.others


THEMES = {
    "light": Theme("#ffffff", "#1a1a1a", "#e8e8e8", "#cfd2d6", "#d55e00", "#0072b2", "#858585"),
    "dark": Theme("#16181d", "#e8e8e8", "#2c2f36", "#4a4e57", "#e69f00", "#56b4e9", "#9aa0aa"),
}
# Of the lines of one family, which colours do not tell apart.
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)))


def title_of(provider: str) -> str:
    """A provider's name in tables; that of a result file where this version knows no such one."""
    return PROVIDERS[provider].title if provider in PROVIDERS else provider


def png(canvas: Canvas) -> bytes:
    """The picture, and an end to its canvas."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=DPI)
    pyplot.close(canvas)
    return buffer.getvalue()


def _panels(
    count: int, across: int, size: tuple[float, float], theme: Theme
) -> tuple[Canvas, list[Axes]]:
    """A canvas with so many panels, the last row as full as it gets."""
    across = min(across, count)
    down = math.ceil(count / across)
    canvas, grid = pyplot.subplots(
        down, across, figsize=(size[0] * across, size[1] * down), squeeze=False,
        facecolor=theme.paper,
    )  # fmt: skip
    panels = [axes for line in grid for axes in line]
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.set_facecolor(theme.paper)
        axes.tick_params(colors=theme.ink, which="both", labelsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.ink)
        axes.set_axisbelow(True)
    return canvas, panels[:count]


def _headline(canvas: Canvas, title: str, below: str, shown: Figure, theme: Theme) -> None:
    """What is seen, and where it is from."""
    told = [
        f"{below} {shown.machine}",
        f"torch {shown.torch}, fusedopt {shown.fusedopt}; {shown.date}",
    ]
    height = canvas.get_figheight()
    canvas.text(0.012, 1 - 0.27 / height, title, color=theme.ink, fontsize=13, fontweight="bold",
                va="center")  # fmt: skip
    for place, text in enumerate(told):
        canvas.text(0.012, 1 - (0.55 + 0.2 * place) / height, text, color=theme.ink, fontsize=9,
                    va="center")  # fmt: skip
    canvas.tight_layout(rect=(0, 0, 1, 1 - 0.85 / height))


def source(figure: Figure) -> str:
    """Machine, versions and date of a picture."""
    return f"{figure.machine}; torch {figure.torch}, fusedopt {figure.fusedopt}; {figure.date}"


def label(figure: Figure) -> str:
    """Optimizer, and dtype where it is not the usual one."""
    return figure.optimizer + ("" if figure.dtype == "float32" else f" {figure.dtype}")


def in_sweep(figure: Figure) -> bool:
    """Whether it is a point of a sweep."""
    return figure.workload.startswith(f"{SWEEP}-")


def by_workload(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """The figures that are bars, by workload, in the order they were measured."""
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        if not in_sweep(figure):
            found.setdefault(figure.workload, []).append(figure)
    return found


def draw_times(figures: Sequence[Figure], theme: Theme) -> bytes:
    """Bars of one run and optimizer: a panel a workload, the fastest on top, the floor a line."""
    workloads = by_workload(figures)
    most = max(len(found) for found in workloads.values())
    canvas, panels = _panels(len(workloads), 2, (6.4, 0.9 + 0.3 * most), theme)
    for axes, (name, found) in zip(panels, workloads.items(), strict=True):
        ranked = sorted((f for f in found if f.provider != FLOOR), key=lambda f: -f.ms)
        labels = [
            f"{_number(f.ms)} ms" + (f"   {_number(f.times_faster)}x" if f.times_faster else "")
            for f in ranked
        ]
        _bars(axes, ranked, [f.ms for f in ranked], labels, theme)
        floor = next((f.ms for f in found if f.provider == FLOOR), None)
        if floor is not None:
            axes.axvline(floor, color=theme.ink, linewidth=1.4, linestyle=(0, (4, 2)))
            axes.annotate("floor", (floor, len(ranked) - 0.45), (3, 0), fontsize=8.5,
                          textcoords="offset points", color=theme.ink, va="center")  # fmt: skip
        axes.set_xlabel("milliseconds a step", color=theme.ink, fontsize=9)
        axes.set_title(_verdict(name, found), color=theme.ink, fontsize=10.5, loc="left")
    compared = f"x: times as fast as {against(figures[0].baseline)}."
    title = f"{label(figures[0])}: time of a step, shorter is better"
    _headline(canvas, title, compared, figures[0], theme)
    return png(canvas)


def against(baseline: str) -> str:
    """A baseline in words."""
    return "torch's fastest step" if baseline == "torch-best" else title_of(baseline)


def _verdict(workload: str, found: Sequence[Figure]) -> str:
    """A panel's title: what it shows, in a sentence."""
    tensors = f"{found[0].tensors:,} tensor{'s' * (found[0].tensors > 1)}"
    ours = next((f for f in found if f.provider == CANDIDATE), None)
    size = f"{workload} ({tensors})"
    if ours is None or ours.times_faster is None:
        return size
    whom = against(ours.baseline).removesuffix(" step")
    return f"{size}: fusedopt {faster(ours.times_faster)} {whom}"


def faster(ratio: float) -> str:
    """How a time compares, in words."""
    if 0.95 < ratio < 1.05:
        return "as fast as"
    return f"{ratio:.1f}x faster than" if ratio >= 1 else f"{1 / ratio:.1f}x slower than"


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def _bars(
    axes: Axes, ranked: Sequence[Figure], values: Sequence[float], labels: Sequence[str],
    theme: Theme,
) -> None:  # fmt: skip
    """Horizontal bars with names to the left and figures to the right."""
    places = range(len(ranked))
    axes.barh(places, values, 0.72, color=[theme.colour(f.provider) for f in ranked])
    axes.set_yticks(places, [title_of(f.provider) for f in ranked])
    for tick, figure in zip(axes.get_yticklabels(), ranked, strict=True):
        tick.set_fontweight("bold" if figure.provider == CANDIDATE else "normal")
    for place, value, text in zip(places, values, labels, strict=True):
        weight = "bold" if ranked[place].provider == CANDIDATE else "normal"
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center",
                      fontsize=8.5, color=theme.ink, fontweight=weight)  # fmt: skip
    axes.set_xlim(0, (max(values, default=0) or 1) * 1.34)
    axes.set_ylim(-0.6, len(ranked) - 0.1)
    axes.grid(True, axis="x", color=theme.faint, linewidth=0.8)
    axes.tick_params(axis="y", length=0)


def draw_sweep(figures: Sequence[Figure], theme: Theme) -> bytes:
    """Bandwidth against size, a panel an optimizer, the floor a broad line behind the others."""
    kinds = list(dict.fromkeys(label(f) for f in figures))
    canvas, panels = _panels(len(kinds), 2, (6.4, 4.1), theme)
    for axes, kind in zip(panels, kinds, strict=True):
        shown = [f for f in figures if label(f) == kind]
        _lines(axes, shown, theme)
        axes.set_title(kind, color=theme.ink, fontsize=10.5, loc="left")
    _headline(canvas, "Bandwidth of a step, by size of its tensor: higher is better",
              "The floor moves the same bytes without maths.", figures[0], theme)  # fmt: skip
    return png(canvas)


def _lines(axes: Axes, figures: Sequence[Figure], theme: Theme) -> None:
    """The lines of one optimizer, named at the right, as far apart as letters are high."""
    ends: list[tuple[float, str, str]] = []
    used: dict[str, int] = {}
    for name in dict.fromkeys(f.provider for f in figures):
        points = sorted((f.elements, f.gb_per_second) for f in figures if f.provider == name)
        colour = theme.colour(name)
        if name == FLOOR:
            axes.plot(*zip(*points, strict=True), color=theme.floor, linewidth=9, zorder=1,
                      solid_capstyle="round")  # fmt: skip
            colour = theme.ink
        else:
            style = DASHES[used.setdefault(colour, 0) % len(DASHES)]
            used[colour] += 1
            ours = name == CANDIDATE
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=style,
                      linewidth=2.4 if ours else 1.5, zorder=4 if ours else 3)  # fmt: skip
        ends.append((points[-1][1], title_of(name), colour))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({f.elements for f in figures})
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary(round(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(sizes[0], sizes[-1] * (sizes[-1] / sizes[0]) ** 0.42)
    axes.set_xlabel("elements of the tensor", color=theme.ink, fontsize=9)
    axes.set_ylabel("GB/s", color=theme.ink, fontsize=9)
    axes.grid(True, color=theme.faint, linewidth=0.8)
    places = spread([value for value, *_ in sorted(ends)], axes.get_ylim())
    for (value, title, colour), place in zip(sorted(ends), places, strict=True):
        bold = "bold" if title == title_of(CANDIDATE) else "normal"
        axes.annotate(title, (sizes[-1] * 1.7, 10**place), va="center", fontsize=8.5,
                      color=colour, fontweight=bold, annotation_clip=False)  # fmt: skip
        axes.plot([sizes[-1], sizes[-1] * 1.6], [value, 10**place], color=colour, linewidth=0.5)


def spread(values: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """Where ascending labels go, in the logarithm: near their values, none on another."""
    low, high = (math.log10(edge) for edge in limits)
    gap = (high - low) * 0.064
    placed: list[float] = []
    for value in values:
        placed.append(max(math.log10(value), placed[-1] + gap if placed else low))
    for index in range(len(placed) - 1, -1, -1):
        ceiling = placed[index + 1] - gap if index + 1 < len(placed) else high - gap / 2
        placed[index] = min(placed[index], ceiling)
    return placed


def draw_memory(figures: Sequence[Figure], theme: Theme) -> bytes:
    """Bars of one run and optimizer: peak memory above parameters and gradients."""
    workloads = {name: [f for f in found if f.peak_bytes is not None]
                 for name, found in by_workload(figures).items()}  # fmt: skip
    workloads = {name: found for name, found in workloads.items() if found}
    most = max(len(found) for found in workloads.values())
    canvas, panels = _panels(len(workloads), 2, (6.4, 0.9 + 0.3 * most), theme)
    for axes, (name, found) in zip(panels, workloads.items(), strict=True):
        ranked = sorted(found, key=lambda f: -(f.peak_bytes or 0))
        values = [(f.peak_bytes or 0) / 1e6 for f in ranked]
        labels = [f"{_number(value)} MB" for value in values]
        _bars(axes, ranked, values, labels, theme)
        axes.set_xlabel("megabytes above parameters and gradients", color=theme.ink, fontsize=9)
        axes.set_title(f"{name} ({found[0].elements / 1e6:.3g}M parameters)", color=theme.ink,
                       fontsize=10.5, loc="left")  # fmt: skip
    _headline(canvas, f"{label(figures[0])}: peak memory of a step, shorter is better",
              "Each in a fresh process; states are in it.", figures[0], theme)  # fmt: skip
    return png(canvas)


def known(workload: str) -> str:
    """What a workload is; empty for one that this version does not know."""
    return WORKLOADS[workload].summary if workload in WORKLOADS else ""
