"""The picture of the digits job: loss curves of torch.optim with fusedopt's drawn over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is wanted, wherever this runs

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from . import train

# Okabe and Ito's colours: apart for colour-blind readers, each in a light and a dark shade.
COLOURS = {
    "SGD": ("#f3cf85", "#a86f00"),
    "Adagrad": ("#a9d9f5", "#1f78a8"),
    "RMSprop": ("#8ed6bf", "#006b4e"),
    "Adam": ("#f0b27f", "#a34300"),
    "AdamW": ("#e5b9d2", "#8f3d6b"),
}
OTHER_COLOURS = ("#cccccc", "#555555")


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
