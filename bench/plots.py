"""Every picture: loss curves, the pipeline's bars and passes, times, bandwidth and memory of steps.

Colours are Okabe and Ito's: fusedopt, torch and other libraries are apart for colour-blind readers,
too, and names stand beside every bar and line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is wanted, wherever this runs

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, MaxNLocator, NullLocator

from . import rows as results
from . import train
from .providers import title_of
from .rows import CANDIDATE, FLOOR, Row, label
from .step import compared
from .tables import against, in_sweep, number
from .workloads import binary

INK, FAINT, OURS, TORCH, OTHERS = "#1a1a1a", "#e6e6e6", "#d55e00", "#0072b2", "#858585"
# By optimizer, in turn: a light shade for torch, a dark one for fusedopt.
SHADES = (("#f3cf85", "#a86f00"), ("#a9d9f5", "#1f78a8"), ("#8ed6bf", "#006b4e"),
          ("#f0b27f", "#a34300"), ("#e5b9d2", "#8f3d6b"), ("#cccccc", "#555555"))  # fmt: skip
# Light beside dark, so that neighbours are apart in grey, too. What fusedopt's launches do belongs
# to torch's stages of the same kind.
STAGES = {"unscale": "#56b4e9", "clip": "#e69f00", "step": TORCH, "average": "#cc79a7",
          "zero": "#f0e442", "norm": "#e69f00", "update": TORCH}  # fmt: skip
CALL = "#009e73"
# Of the lines of one family, which colours do not tell apart.
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)))


def _panels(count: int, size: tuple[float, float], across: int = 2, **keywords: Any) -> Any:
    """A canvas and so many panels, in rows of `across`, each of this size in inches."""
    across = min(across, count)
    down = math.ceil(count / across)
    figsize = (size[0] * across, size[1] * down)
    canvas, grid = pyplot.subplots(down, across, squeeze=False, figsize=figsize, **keywords)
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
    return canvas, panels[:count]


def _save(canvas: Any, path: Path, **layout: Any) -> Path:
    canvas.tight_layout(**layout)
    canvas.savefig(path, dpi=140)
    pyplot.close(canvas)
    return path


def _headline(canvas: Any, title: str, below: str, row: Row) -> dict[str, Any]:
    """What is seen and where it is from, above the panels; gives their layout."""
    height = canvas.get_figheight()
    canvas.text(0.012, 1 - 0.27 / height, title, fontsize=13, fontweight="bold", va="center")
    told = (f"{below} {row['machine']}",
            f"torch {row['torch']}, fusedopt {results.version(row)}; {row['date']}")  # fmt: skip
    for place, text in enumerate(told):
        canvas.text(0.012, 1 - (0.55 + 0.2 * place) / height, text, fontsize=9, va="center")
    return {"rect": (0, 0, 1, 1 - 0.85 / height)}


def _colour(provider: str) -> str:
    if provider.startswith(CANDIDATE):
        return OURS
    return TORCH if provider.startswith("torch-") else OTHERS


# ---- the digits job ----


def loss_curves(rows: Sequence[Row], path: Path) -> Path:
    """A panel a network and a colour an optimizer: fusedopt's thin curve on torch's broad one."""
    models = results.grouped(rows, "workload")
    canvas, panels = _panels(len(models), (6.5, 5.2), len(models), sharey=True)
    for axes, ((model,), found) in zip(panels, models.items(), strict=True):
        handles = [Line2D([], [], color="#cccccc", linewidth=7, label="torch.optim"),
                   Line2D([], [], color="#444444", linewidth=1.2, label="fusedopt")]  # fmt: skip
        for place, ((name,), runs) in enumerate(results.grouped(found, "optimizer").items()):
            told = {row["provider"]: row for row in runs}
            ours, theirs = told[CANDIDATE], told[train.REFERENCE]
            light, dark = SHADES[min(place, len(SHADES) - 1)]
            epochs = [(index + 1) / ours["per_epoch"] for index in range(len(ours["curve"]))]
            axes.plot(epochs, theirs["curve"], color=light, linewidth=7, solid_capstyle="round")
            dashes = "--" if train.failures(ours) else "-"
            axes.plot(epochs, ours["curve"], dashes, color=dark, linewidth=1.2)
            said = f"{name} ({ours['accuracy']:.1f}% right on test images)"
            handles.append(Line2D([], [], color=dark, linewidth=4, label=said))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        whole = found[0]["per_epoch"] == 1
        axes.xaxis.set_major_locator(MaxNLocator(integer=whole, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epoch")
        axes.set_title(train.MODEL_TITLES[model], fontsize=11)
        axes.grid(True, color=FAINT, linewidth=0.8)
        axes.legend(handles=handles, frameon=False, fontsize=9)
    panels[0].set_ylabel(f"training loss ({'mean of the epoch' if whole else 'each batch'}, log)")
    ours = [row for row in rows if row["provider"] == CANDIDATE]
    title = "Handwritten digits: fusedopt's loss curves lie on torch.optim's"
    if any(train.failures(row) for row in ours):
        title = "Handwritten digits: fusedopt's curves that differ from torch.optim's are dashed"
    worst = max(row["difference"] for row in ours)
    canvas.suptitle(
        f"{title}\n(same seed and batches; largest relative difference of a batch: {worst:.1e})",
        fontsize=11,
    )
    return _save(canvas, path)


# ---- the pipeline job ----


def pipeline_bars(rows: Sequence[Row], path: Path) -> Path:
    """A panel a workload and optimizer: torch's stages stacked, fusedopt's call beside them."""
    kinds = results.grouped(rows, "optimizer", "workload")
    across = len({workload for _, workload in kinds})
    most = max(len({row["chain"] for row in found}) for found in kinds.values())
    canvas, panels = _panels(len(kinds), (max(7.5 / across, 2.4 + 0.9 * most), 5), across)
    width, used = 0.38, dict[str, None]()
    for axes, ((optimizer, workload), found) in zip(panels, kinds.items(), strict=True):
        chains = results.grouped(found, "chain")
        for place, chain in enumerate(chains.values()):
            told = {row["provider"]: row for row in chain if "stage" not in row}
            bottom = 0.0
            for row in [row for row in chain if "stage" in row]:
                height = results.nanoseconds(row)
                axes.bar(place - width / 2, height, width * 0.94, bottom,
                         color=STAGES[row["stage"]], edgecolor="white", linewidth=0.6)  # fmt: skip
                bottom += height
                used[row["stage"]] = None
            top = ours = results.nanoseconds(told[CANDIDATE])
            axes.bar(place + width / 2, ours, width * 0.94, color=CALL)
            if FLOOR in told:
                floor = results.nanoseconds(told[FLOOR])
                top = max(ours, floor)
                axes.hlines(floor, place + 0.01, place + width - 0.01, color=INK, linewidth=2)
            axes.annotate(f"{told[CANDIDATE]['faster']:.1f}x", (place + width / 2, top), (0, 3),
                          ha="center", textcoords="offset points", fontsize=9)  # fmt: skip
        axes.set_xticks(range(len(chains)), [chain for (chain,) in chains])
        axes.set_xlim(-0.6, len(chains) - 0.4)
        axes.set_xlabel("chain")
        axes.set_ylabel("nanoseconds a parameter")
        axes.set_title(f"{workload}, {optimizer}", fontsize=11)
        axes.grid(True, axis="y", color=FAINT, linewidth=0.8)
    handles: list[Any] = [Patch(color=STAGES[stage], label=f"torch: {stage}") for stage in used]
    handles.append(Patch(color=CALL, label="fusedopt: one call"))
    handles.append(Line2D([], [], color=INK, linewidth=2, label="traffic floor of the call"))
    canvas.suptitle(
        "The step and what is around it: torch's chain of passes and fusedopt's one call\n"
        "(medians; above fusedopt's bars: how many times faster)",
        fontsize=11,
    )
    canvas.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    return _save(canvas, path, rect=(0, 0.55 / canvas.get_figheight(), 1, 1))


def pipeline_passes(rows: Sequence[Row], path: Path) -> Path:
    """The passes over memory of the longest chain and of fusedopt's call, wide as their bytes."""
    theirs = max((row for row in rows if "stages" in row), key=lambda row: row["bytes"])
    same = [row for row in rows if row["provider"] == CANDIDATE]
    same = [row for row in same if row["optimizer"] == theirs["optimizer"]]
    ours = next(row for row in same if row["chain"] == theirs["chain"])
    canvas, (axes,) = _panels(1, (9, 2.9))
    for place, row in enumerate((ours, theirs)):
        left = 0
        for stage, count in [(stage, count) for stage, count in row["stages"].items() if count]:
            axes.barh(place, count, 0.62, left, color=STAGES[stage], edgecolor="white")
            ink = "white" if STAGES[stage] == TORCH else "black"
            axes.annotate(f"{stage}\n{count}", (left + count / 2, place), ha="center", va="center",
                          fontsize=9, color=ink)  # fmt: skip
            left += count
        axes.annotate(f"{left} bytes", (left, place), (6, 0), textcoords="offset points",
                      va="center", fontsize=10, fontweight="bold")  # fmt: skip
    axes.set_yticks(range(2), ["fusedopt", "torch"])
    axes.set_xlim(0, theirs["bytes"] * 1.14)
    axes.set_xlabel("bytes read and written a parameter, fp32")
    axes.set_title(f"Passes over memory: {theirs['optimizer']} and what is around it", fontsize=11)
    return _save(canvas, path)


# ---- the step job ----


def step_pictures(rows: Sequence[Row], folder: Path, prefix: str = "") -> dict[str, Path]:
    """All pictures of one run of the step job, by what they show, those of AdamW first."""
    found = {}
    kinds = results.grouped([row for row in rows if not in_sweep(row)], "optimizer", "dtype")
    for shown in sorted(kinds.values(), key=lambda shown: label(shown[0]) != "AdamW"):
        kind = label(shown[0])
        path = folder / f"{prefix}times-{kind.replace(' ', '-')}.png"
        found[f"Times of {kind}'s step"] = step_bars(shown, path)
        weighed = [row for row in shown if row.get("peak_bytes") is not None]
        if weighed:
            path = folder / f"{prefix}memory-{kind.replace(' ', '-')}.png"
            found[f"Peak memory of {kind}'s step"] = step_bars(weighed, path, memory=True)
    if swept := [row for row in rows if in_sweep(row)]:
        name = "Bandwidth of a step against the size of a tensor"
        found[name] = sweep_lines(swept, folder / f"{prefix}sweep.png")
    return found


def step_bars(rows: Sequence[Row], path: Path, memory: bool = False) -> Path:
    """Bars of one optimizer, a panel a workload, the best on top: times, or memory."""
    workloads = results.grouped(rows, "workload")
    most = max(len(found) for found in workloads.values())
    canvas, panels = _panels(len(workloads), (6.4, 0.9 + 0.3 * most))

    def value(row: Row) -> float:
        return float(row["peak_bytes"] / 1e6 if memory else row["ms"])

    for axes, ((workload,), found) in zip(panels, workloads.items(), strict=True):
        ranked = sorted((row for row in found if row["provider"] != FLOOR), key=value, reverse=True)
        places, values = range(len(ranked)), [value(row) for row in ranked]
        axes.barh(places, values, 0.72, color=[_colour(row["provider"]) for row in ranked])
        axes.set_yticks(places, [title_of(row["provider"]) for row in ranked])
        for place, tick in enumerate(axes.get_yticklabels()):
            row = ranked[place]
            weight = "bold" if row["provider"] == CANDIDATE else "normal"
            text = f"{number(values[place])} {'MB' if memory else 'ms'}"
            if not memory and row.get("faster"):
                text += f"   {number(row['faster'])}x"
            tick.set_fontweight(weight)
            axes.annotate(text, (values[place], place), (4, 0), textcoords="offset points",
                          va="center", fontsize=8.5, fontweight=weight)  # fmt: skip
        floor = [row["ms"] for row in found if row["provider"] == FLOOR]
        if floor and not memory:
            axes.axvline(floor[0], color=INK, linewidth=1.4, linestyle=(0, (4, 2)))
            axes.annotate("floor", (floor[0], len(ranked) - 0.45), (3, 0), fontsize=8.5,
                          textcoords="offset points", va="center")  # fmt: skip
        axes.set_xlim(0, (max(values, default=0) or 1) * 1.34)
        axes.set_ylim(-0.6, len(ranked) - 0.1)
        axes.grid(True, axis="x", color=FAINT, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        unit = "megabytes above parameters and gradients" if memory else "milliseconds a step"
        axes.set_xlabel(unit, fontsize=9)
        said = f"{workload} ({found[0]['tensors']:,} tensor{'s' * (found[0]['tensors'] > 1)})"
        ours = next((row for row in found if row["provider"] == CANDIDATE), None)
        if ours and ours.get("faster") and not memory:
            whom = against(ours["baseline"]).removesuffix(" step")
            said += f": fusedopt {compared(ours['faster'])} {whom}"
        axes.set_title(said, fontsize=10.5, loc="left")
    kind = label(rows[0])
    if memory:
        title, below = f"{kind}: peak memory of a step, shorter is better", "States are in it."
    else:
        title = f"{kind}: time of a step, shorter is better"
        below = f"x: times as fast as {against(rows[0]['baseline'])}."
    return _save(canvas, path, **_headline(canvas, title, below, rows[0]))


def sweep_lines(rows: Sequence[Row], path: Path) -> Path:
    """Bandwidth against size, a panel an optimizer, the floor a broad line behind the others."""
    kinds = results.grouped(rows, "optimizer", "dtype")
    canvas, panels = _panels(len(kinds), (6.4, 4.1))
    for axes, found in zip(panels, kinds.values(), strict=True):
        _lines(axes, found)
        axes.set_title(label(found[0]), fontsize=10.5, loc="left")
    layout = _headline(canvas, "Bandwidth of a step, by size of its tensor: higher is better",
                       "The floor moves the same bytes without maths.", rows[0])  # fmt: skip
    return _save(canvas, path, **layout)


def _lines(axes: Any, rows: Sequence[Row]) -> None:
    """The lines of one optimizer, named at the right, as far apart as letters are high."""
    ends: list[tuple[float, str, str]] = []
    used: dict[str, int] = {}
    for (name,), found in results.grouped(rows, "provider").items():
        points = sorted((row["elements"], results.bandwidth(row)) for row in found)
        colour, ours = _colour(name), name == CANDIDATE
        style: dict[str, Any] = {"linewidth": 2.4 if ours else 1.5, "zorder": 4 if ours else 3}
        if name == FLOOR:
            colour, style = INK, {"linewidth": 9, "zorder": 1, "solid_capstyle": "round"}
        else:
            style["linestyle"] = DASHES[used.setdefault(colour, 0) % len(DASHES)]
            used[colour] += 1
        axes.plot(*zip(*points, strict=True), color="#cfd2d6" if name == FLOOR else colour, **style)
        ends.append((points[-1][1], title_of(name), colour))
    sizes = sorted({row["elements"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary(round(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(sizes[0], sizes[-1] * max(sizes[-1] / sizes[0], 2) ** 0.42)
    axes.set_xlabel("elements of the tensor", fontsize=9)
    axes.set_ylabel("GB/s", fontsize=9)
    axes.grid(True, color=FAINT, linewidth=0.8)
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
