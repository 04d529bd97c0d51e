"""The pictures: loss curves with fusedopt's drawn over torch.optim's; bars of the pipeline job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is wanted, wherever this runs

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from . import pipeline, train

# Okabe and Ito's colours: apart for colour-blind readers, each in a light and a dark shade.
COLOURS = {
    "SGD": ("#f3cf85", "#a86f00"),
    "Adagrad": ("#a9d9f5", "#1f78a8"),
    "RMSprop": ("#8ed6bf", "#006b4e"),
    "Adam": ("#f0b27f", "#a34300"),
    "AdamW": ("#e5b9d2", "#8f3d6b"),
}
OTHER_COLOURS = ("#cccccc", "#555555")

# The same palette, light beside dark, so that neighbours are apart in grey, too.
STAGE_COLOURS = {
    "unscale": "#56b4e9",
    "clip": "#e69f00",
    "step": "#0072b2",
    "average": "#cc79a7",
    "zero": "#f0e442",
}
CALL_COLOUR = "#009e73"


def save_loss_curves(rows: Sequence[train.Row], path: Path) -> None:
    """Draws one panel a network and one colour an optimizer, and writes a PNG.

    Args:
        rows: at least one row of the digits job.
        path: of the PNG.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(6.5 * len(models), 5.2), sharey=True, squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        _draw_panel(axes, model, [row for row in rows if row.model == model])
    scale = "mean of the epoch" if _by_epoch(rows[0]) else "each batch"
    panels[0][0].set_ylabel(f"training loss ({scale}, log scale)")
    worst = max(row.difference.whole_run for row in rows)
    title = "Handwritten digits: fusedopt's loss curves lie on torch.optim's"
    if any(row.failures() for row in rows):
        title = "Handwritten digits: fusedopt's curves that differ from torch.optim's are dashed"
    figure.suptitle(
        f"{title}\n(same seed and batches; largest relative difference of a batch: {worst:.1e})",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _by_epoch(row: train.Row) -> bool:
    """Whether there are epochs enough to draw their means instead of every batch."""
    return len(row.epoch_losses(train.REFERENCE)) >= 5


def _curve(row: train.Row, run: str) -> tuple[list[float], list[float]]:
    """Epochs, as a fraction where batches are drawn, and losses of one run."""
    if _by_epoch(row):
        losses = row.epoch_losses(run)
        return [float(epoch) for epoch in range(1, len(losses) + 1)], losses
    losses = row.curves[run]
    return [(batch + 1) / row.batches_per_epoch for batch in range(len(losses))], losses


def _draw_panel(axes: Axes, model: str, rows: Sequence[train.Row]) -> None:
    """Draws the curves of one network."""
    handles = [
        Line2D([], [], color="#cccccc", linewidth=7, label="torch.optim"),
        Line2D([], [], color="#444444", linewidth=1.2, label="fusedopt"),
    ]
    for row in rows:
        light, dark = COLOURS.get(row.optimizer, OTHER_COLOURS)
        reference, candidate = _curve(row, train.REFERENCE), _curve(row, train.CANDIDATE)
        axes.plot(*reference, color=light, linewidth=7, solid_capstyle="round")
        style = "--" if row.failures() else "-"
        axes.plot(*candidate, style, color=dark, linewidth=1.2)
        accuracy = row.accuracy[train.CANDIDATE]
        label = f"{row.optimizer} ({accuracy:.1f}% right on test images)"
        handles.append(Line2D([], [], color=dark, linewidth=4, label=label))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=_by_epoch(rows[0]), steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")
    axes.set_title(train.MODEL_TITLES[model], fontsize=11)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, frameon=False, fontsize=9)


def save_pipeline(rows: Sequence[pipeline.Row], path: Path) -> None:
    """Draws a panel a workload and optimizer: torch's stages stacked, fusedopt's call beside them.

    Args:
        rows: at least one row of the pipeline job.
        path: of the PNG.
    """
    workloads = list(dict.fromkeys(row.task.workload for row in rows))
    names = list(dict.fromkeys(row.task.optimizer for row in rows))
    most = max(sum(row.task.workload == workload for row in rows) for workload in workloads)
    width = 2.4 + 0.9 * most / len(names)
    figure, panels = pyplot.subplots(
        len(names), len(workloads), figsize=(max(7.5, width * len(workloads)), 5 * len(names)),
        squeeze=False,
    )  # fmt: skip
    for line, name in zip(panels, names, strict=True):
        for axes, workload in zip(line, workloads, strict=True):
            shown = [row for row in rows if (row.task.workload, row.task.optimizer)
                     == (workload, name)]  # fmt: skip
            _draw_bars(axes, shown, f"{workload}, {name}")
        line[0].set_ylabel("nanoseconds a parameter")
    used = {stage for row in rows for stage in row.torch_bytes}
    handles: list[Patch | Line2D] = [
        Patch(color=colour, label=f"torch: {stage}")
        for stage, colour in STAGE_COLOURS.items()
        if stage in used
    ]
    handles.append(Patch(color=CALL_COLOUR, label="fusedopt: one call"))
    handles.append(Line2D([], [], color="black", linewidth=2, label="traffic floor of the call"))
    figure.suptitle(
        "The step and what is around it: torch's chain of passes and fusedopt's one call\n"
        "(medians; above fusedopt's bars: how many times faster)",
        fontsize=11,
    )
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 4), frameon=False,
                  fontsize=9)  # fmt: skip
    figure.tight_layout(rect=(0, 0.09 / len(names) + 0.02, 1, 1))
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def save_passes(row: pipeline.Row, path: Path) -> None:
    """Draws the passes over memory of torch's chain and of fusedopt's call, as wide as their bytes.

    Args:
        row: of the pipeline job, whose chain and optimizer are drawn.
        path: of the PNG.
    """
    # What fusedopt's launches do belongs to torch's stages of the same name.
    colours = {**STAGE_COLOURS, "norm": STAGE_COLOURS["clip"], "update": STAGE_COLOURS["step"]}
    figure, axes = pyplot.subplots(figsize=(9, 2.9))
    chains = {"fusedopt": row.fused_bytes, "torch": row.torch_bytes}
    for place, (name, stages) in enumerate(chains.items()):
        left = 0
        for stage, count in stages.items():
            if count == 0:
                continue
            axes.barh(place, count, 0.62, left, color=colours[stage], edgecolor="white")
            dark = stage in ("step", "update")
            axes.annotate(f"{stage}\n{count}", (left + count / 2, place), ha="center", va="center",
                          fontsize=9, color="white" if dark else "black")  # fmt: skip
            left += count
        axes.annotate(f"{left} bytes", (left, place), (6, 0), textcoords="offset points",
                      va="center", fontsize=10, fontweight="bold")  # fmt: skip
        chains[name] = {**stages, "": left}
    axes.set_yticks(range(len(chains)), list(chains))
    axes.set_xlim(0, max(stages[""] for stages in chains.values()) * 1.14)
    axes.set_xlabel("bytes read and written a parameter, fp32")
    axes.set_title(f"Passes over memory: {row.task.optimizer} and what is around it", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _draw_bars(axes: Axes, rows: Sequence[pipeline.Row], title: str) -> None:
    """Draws a pair of bars for each chain."""
    width = 0.38
    for place, row in enumerate(rows):
        bottom = 0.0
        for stage in row.torch_bytes:
            height = row.nanoseconds(stage)
            axes.bar(place - width / 2, height, width * 0.94, bottom,
                     color=STAGE_COLOURS[stage], edgecolor="white", linewidth=0.6)  # fmt: skip
            bottom += height
        ours, floor = row.nanoseconds(pipeline.CANDIDATE), row.nanoseconds(pipeline.FLOOR)
        axes.bar(place + width / 2, ours, width * 0.94, color=CALL_COLOUR)
        axes.hlines(floor, place + 0.01, place + width - 0.01, color="black", linewidth=2)
        label = f"{row.speedup().median:.1f}x"
        axes.annotate(label, (place + width / 2, max(ours, floor)), (0, 3), ha="center",
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set_xticks(range(len(rows)), [row.task.chain for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("chain")
    axes.set_title(title, fontsize=11)
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
