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

from . import rows as results
from . import train
from .providers import title_of
from .rows import CANDIDATE, FLOOR, Row, label
from .step_tables import in_sweep
from .tables import against, compared, number
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
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
         "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.8, "axes.titlesize": 10.5,
         "axes.labelsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
         "legend.frameon": False, "figure.titlesize": 11, "savefig.dpi": 140,
         "figure.constrained_layout.use": True}  # fmt: skip


def _panels(count: int, size: tuple[float, float], across: int = 2, **keywords: Any) -> Any:
    """A canvas and so many panels, in rows of `across`, each of this size in inches."""
    across = min(across, count)
    down = math.ceil(count / across)
    figsize = (size[0] * across, size[1] * down)
    canvas, grid = pyplot.subplots(down, across, squeeze=False, figsize=figsize, **keywords)
    for axes in grid.flat[count:]:
        axes.remove()
    return canvas, grid.flat[:count]


def _save(canvas: Any, path: Path, title: str) -> Path:
    canvas.suptitle(title)
    canvas.savefig(path)
    pyplot.close(canvas)
    return path


def _colour(provider: str) -> str:
    if provider.startswith(CANDIDATE):
        return OURS
    return TORCH if provider.startswith("torch-") else OTHERS


# ---- the digits job ----


@pyplot.rc_context(STYLE)
def loss_curves(rows: Sequence[Row], path: Path) -> Path:
    """A panel a network and a colour an optimizer: fusedopt's thin curve on torch's broad one."""
    models = results.grouped(rows, "workload")
    canvas, panels = _panels(len(models), (6.5, 5.2), len(models), sharey=True)
    for axes, ((model,), found) in zip(panels, models.items(), strict=True):
        handles = [Line2D([], [], color="#cccccc", linewidth=7, label="torch.optim"),
                   Line2D([], [], color="#444444", linewidth=1.2, label="fusedopt")]  # fmt: skip
        for place, ((name,), runs) in enumerate(results.grouped(found, "optimizer").items()):
            told = results.by(runs, "provider")
            ours, theirs = told[CANDIDATE], told[train.REFERENCE]
            light, dark = SHADES[min(place, len(SHADES) - 1)]
            epochs = [(index + 1) / ours["per_epoch"] for index in range(len(ours["curve"]))]
            axes.plot(epochs, theirs["curve"], color=light, linewidth=7, solid_capstyle="round")
            dashes = "--" if train.failures(ours) else "-"
            axes.plot(epochs, ours["curve"], dashes, color=dark, linewidth=1.2)
            said = f"{name} ({ours['accuracy']:.1f}% right on test images)"
            handles.append(Line2D([], [], color=dark, linewidth=4, label=said))
        axes.set(yscale="log", xlabel="epoch", title=train.MODEL_TITLES[model])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(handles=handles)
    mean = "mean of the epoch" if rows[0]["per_epoch"] == 1 else "each batch"
    panels[0].set_ylabel(f"training loss ({mean}, log)")
    ours = [row for row in rows if row["provider"] == CANDIDATE]
    title = "Handwritten digits: fusedopt's loss curves lie on torch.optim's"
    if any(train.failures(row) for row in ours):
        title = "Handwritten digits: fusedopt's curves that differ from torch.optim's are dashed"
    worst = max(row["difference"] for row in ours)
    below = f"(same seed and batches; largest relative difference of a batch: {worst:.1e})"
    return _save(canvas, path, f"{title}\n{below}")


# ---- the pipeline job ----


@pyplot.rc_context(STYLE)
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
            told = results.by([row for row in chain if "stage" not in row], "provider")
            bottom = 0.0
            for row in [row for row in chain if "stage" in row]:
                height = results.nanoseconds(row)
                axes.bar(place - width / 2, height, width * 0.94, bottom,
                         color=STAGES[row["stage"]], edgecolor="white", linewidth=0.6)  # fmt: skip
                bottom += height
                used[row["stage"]] = None
            ours = axes.bar(place + width / 2, results.nanoseconds(told[CANDIDATE]), width * 0.94,
                            color=CALL)  # fmt: skip
            axes.bar_label(ours, [f"{told[CANDIDATE]['faster']:.1f}x"], padding=3, fontsize=9)
            if FLOOR in told:
                floor = results.nanoseconds(told[FLOOR])
                axes.hlines(floor, place + 0.01, place + width - 0.01, color=INK, linewidth=2)
        axes.set_xticks(range(len(chains)), [chain for (chain,) in chains])
        axes.set(xlim=(-0.6, len(chains) - 0.4), xlabel="chain", ylabel="nanoseconds a parameter",
                 title=f"{workload}, {optimizer}")  # fmt: skip
        axes.grid(visible=False, axis="x")
    handles: list[Any] = [Patch(color=STAGES[stage], label=f"torch: {stage}") for stage in used]
    handles.append(Patch(color=CALL, label="fusedopt: one call"))
    handles.append(Line2D([], [], color=INK, linewidth=2, label="traffic floor of the call"))
    canvas.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _save(
        canvas, path,
        "The step and what is around it: torch's chain of passes and fusedopt's one call\n"
        "(medians; above fusedopt's bars: how many times faster)",
    )  # fmt: skip


@pyplot.rc_context(STYLE)
def pipeline_passes(rows: Sequence[Row], path: Path) -> Path:
    """The passes over memory of the longest chain and of fusedopt's call, wide as their bytes."""
    theirs = max((row for row in rows if "stages" in row), key=lambda row: row["bytes"])
    key = label(theirs)
    ours = next(row for row in rows if row["provider"] == CANDIDATE and label(row) == key)
    canvas, (axes,) = _panels(1, (9, 2.9))
    for place, row in enumerate((ours, theirs)):
        left = 0
        for stage, count in [(stage, count) for stage, count in row["stages"].items() if count]:
            bar = axes.barh(place, count, 0.62, left, color=STAGES[stage], edgecolor="white")
            ink = "white" if STAGES[stage] == TORCH else "black"
            axes.bar_label(bar, [f"{stage}\n{count}"], label_type="center", fontsize=9, color=ink)
            left += count
        axes.annotate(f"{left} bytes", (left, place), (6, 0), textcoords="offset points",
                      va="center", fontsize=10, fontweight="bold")  # fmt: skip
    axes.set_yticks(range(2), ["fusedopt", "torch"])
    axes.grid(visible=False)
    axes.set(xlim=(0, theirs["bytes"] * 1.14), xlabel="bytes read and written a parameter, fp32")
    return _save(canvas, path, f"Passes over memory: {theirs['optimizer']} and what is around it")


# ---- the step job ----


def step_pictures(rows: Sequence[Row], folder: Path, prefix: str = "") -> dict[str, Path]:
    """All pictures of one run of the step job, by what they show, those of AdamW first."""
    found = {}
    kinds = results.grouped([row for row in rows if not in_sweep(row)], "optimizer", "dtype")
    for shown in sorted(kinds.values(), key=lambda shown: label(shown[0]) != "AdamW"):
        kind = label(shown[0])
        weighed = [row for row in shown if row.get("peak_bytes") is not None]
        for what, bars in (("times", shown), ("memory", weighed)):
            if bars:
                path = folder / f"{prefix}{what}-{kind.replace(' ', '-')}.png"
                found[f"{kind}'s step: {what}"] = step_bars(bars, path, memory=what == "memory")
    if swept := [row for row in rows if in_sweep(row)]:
        name = "Bandwidth of a step against the size of a tensor"
        found[name] = sweep_lines(swept, folder / f"{prefix}sweep.png")
    return found


@pyplot.rc_context(STYLE)
def step_bars(rows: Sequence[Row], path: Path, memory: bool = False) -> Path:
    """Bars of one optimizer, a panel a workload, the best on top: times, or memory."""
    workloads = results.grouped(rows, "workload")
    most = max(len(found) for found in workloads.values())
    canvas, panels = _panels(len(workloads), (6.4, 0.9 + 0.3 * most))

    def value(row: Row) -> float:
        return float(row["peak_bytes"] / 1e6 if memory else row["ms"])

    def said(row: Row) -> str:
        ratio = f"   {number(row['faster'])}x" if row.get("faster") and not memory else ""
        return f"{number(value(row))} {'MB' if memory else 'ms'}{ratio}"

    for axes, ((workload,), found) in zip(panels, workloads.items(), strict=True):
        ranked = sorted((row for row in found if row["provider"] != FLOOR), key=value, reverse=True)
        places, values = range(len(ranked)), [*map(value, ranked)]
        bars = axes.barh(places, values, 0.72, color=[_colour(row["provider"]) for row in ranked])
        labels = axes.bar_label(bars, [*map(said, ranked)], padding=4, fontsize=8.5)
        axes.set_yticks(places, [title_of(row["provider"]) for row in ranked])
        for row, text, tick in zip(ranked, labels, axes.get_yticklabels(), strict=True):
            for shown in (text, tick):
                shown.set_fontweight("bold" if row["provider"] == CANDIDATE else "normal")
        floor = [row["ms"] for row in found if row["provider"] == FLOOR]
        if floor and not memory:
            axes.axvline(floor[0], color=INK, linewidth=1.4, linestyle=(0, (4, 2)))
            axes.annotate("floor", (floor[0], len(ranked) - 0.45), (3, 0), fontsize=8.5,
                          textcoords="offset points", va="center")  # fmt: skip
        unit = "megabytes above parameters and gradients" if memory else "milliseconds a step"
        title = f"{workload} ({found[0]['tensors']:,} tensor{'s' * (found[0]['tensors'] > 1)})"
        ours = results.by(found, "provider").get(CANDIDATE, {})
        if ours.get("faster") and not memory:
            whom = against(ours["baseline"]).removesuffix(" step")
            title += f": fusedopt {compared(ours['faster'])} {whom}"
        axes.set(xlim=(0, (max(values, default=0) or 1) * 1.34), ylim=(-0.6, len(ranked) - 0.1),
                 xlabel=unit)  # fmt: skip
        axes.set_title(title, loc="left")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    what = "peak memory of a step, states included" if memory else "time of a step"
    below = "" if memory else f"x: times as fast as {against(rows[0]['baseline'])}. "
    return _save(canvas, path, f"{label(rows[0])}: {what}, shorter is better\n"
                 f"{below}{results.source(rows[0])}")  # fmt: skip


@pyplot.rc_context(STYLE)
def sweep_lines(rows: Sequence[Row], path: Path) -> Path:
    """Bandwidth against size, a panel an optimizer, the floor a broad line behind the others."""
    kinds = results.grouped(rows, "optimizer", "dtype")
    canvas, panels = _panels(len(kinds), (6.4, 4.1))
    for axes, found in zip(panels, kinds.values(), strict=True):
        used: dict[str, int] = {}
        for (name,), points in results.grouped(found, "provider").items():
            colour, ours = _colour(name), name == CANDIDATE
            style: dict[str, Any] = {"color": colour, "linewidth": 2.4 if ours else 1.5}
            style["linestyle"] = DASHES[used.setdefault(colour, 0) % len(DASHES)]
            used[colour] += 1
            if name == FLOOR:
                style = {"color": "#cfd2d6", "linewidth": 9, "solid_capstyle": "round"}
            zorder = 4 if ours else 1 if name == FLOOR else 3
            sizes = sorted((row["elements"], results.bandwidth(row)) for row in points)
            axes.plot(*zip(*sizes, strict=True), label=title_of(name), zorder=zorder, **style)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="elements of the tensor", ylabel="GB/s")
        axes.set_xticks(sorted({row["elements"] for row in found}))
        axes.xaxis.set_major_formatter(lambda value, _: binary(round(value)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_title(label(found[0]), loc="left")
        axes.legend(loc="lower right", handlelength=3.5)
    title = "Bandwidth of a step, by size of its tensor: higher is better"
    below = "The floor moves the same bytes without maths. "
    return _save(canvas, path, f"{title}\n{below}{results.source(rows[0])}")
