"""What do SGD's parameters do? One neuron, four losses, and torch.optim's path below each of ours.

The neuron w * x + b learns 50 points of 0.75 x^2 + x + 2 plus noise, from w = 6 and b = -3. A panel
is the map of a loss over (w, b), with the way down that SGD takes with a learning rate alone, with
momentum 0.9, Nesterov's momentum, weight decay 2.0, or momentum with dampening 0.8. The wide light
line is torch.optim.SGD, the thin dark one fusedopt.SGD: they must cover each other.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import BLUE, VERMILION, Example
from matplotlib import pyplot
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn import functional as F

import fusedopt

START = (6.0, -3.0)
STEPS = 100
COVERED = 1e-5  # largest distance between the two paths, of the map's width

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "MSE": F.mse_loss,
    "L1": F.l1_loss,
    "Huber": F.huber_loss,
    "SmoothL1 (beta 3)": lambda out, wanted: F.smooth_l1_loss(out, wanted, beta=3.0),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lr 0.1": {},
    "lr 0.3": {"lr": 0.3},
    "momentum 0.9": {"momentum": 0.9},
    "Nesterov 0.9": {"momentum": 0.9, "nesterov": True},
    "weight decay 2.0": {"weight_decay": 2.0},
    "momentum 0.9, dampening 0.8": {"momentum": 0.9, "dampening": 0.8},
}
W_RANGE, B_RANGE = (-4.0, 7.0), (-4.5, 9.0)


def points() -> tuple[Tensor, Tensor]:
    """The 50 points, of seed 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 50)
    return x, 0.75 * x**2 + x + 2 + 0.5 * torch.randn(50, generator=generator)


def descend(
    make: Callable[..., torch.optim.Optimizer], settings: dict[str, Any], loss: Loss, steps: int
) -> Tensor:
    """The path (w, b) from the start, a row a step."""
    x, y = points()
    neuron = torch.nn.Parameter(torch.tensor(START))
    optimizer = make([neuron], **{"lr": 0.1, **settings})
    path = [neuron.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(neuron[0] * x + neuron[1], y).backward()
        optimizer.step()
        path.append(neuron.detach().clone())
    return torch.stack(path)


def loss_map(loss: Loss, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """w, b and the loss there, on a grid."""
    x, y = points()
    w, b = torch.linspace(*W_RANGE, size), torch.linspace(*B_RANGE, size)
    rows = [[loss(w_ * x + b_, y) for w_ in w] for b_ in b]
    return w, b, torch.tensor(rows)


def value(loss: Loss, at: Tensor) -> float:
    """The loss of a neuron."""
    x, y = points()
    return loss(at[0] * x + at[1], y).item()


def length(path: Tensor) -> float:
    """Of the way, in the plane."""
    return (path[1:] - path[:-1]).norm(dim=1).sum().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the maps; the exit status."""
    example = Example(__doc__, arguments)
    torch.set_num_threads(1)  # 50 points are no work for two
    pairs = [(loss, setting) for loss in LOSSES for setting in SETTINGS]
    paths: dict[tuple[str, str], Tensor] = {}
    apart: dict[tuple[str, str], float] = {}
    theirs: dict[tuple[str, str], Tensor] = {}
    for pair in example.track(pairs, "descents"):
        settings, loss = SETTINGS[pair[1]], LOSSES[pair[0]]
        paths[pair] = descend(fusedopt.SGD, settings, loss, STEPS)
        theirs[pair] = descend(torch.optim.SGD, settings, loss, STEPS)
        apart[pair] = (paths[pair] - theirs[pair]).norm(dim=1).max().item()
    draw(example, paths, theirs)

    worst = max(apart.values(), key=lambda distance: math.inf if math.isnan(distance) else distance)
    width = W_RANGE[1] - W_RANGE[0]
    example.claim(
        f"All {len(pairs)} paths cover torch.optim's: never further apart than {COVERED:g} of the "
        "map's width",
        worst <= COVERED * width, f"{worst / width:.1e} at most",
    )  # fmt: skip
    ends = {pair: path[-1] for pair, path in paths.items()}
    for name, loss in LOSSES.items():
        start, end = value(loss, torch.tensor(START)), value(loss, ends[name, "momentum 0.9"])
        example.claim(f"{name}: momentum descends to below a quarter of the first loss",
                      end < start / 4, f"{start:.3g} to {end:.3g}")  # fmt: skip
        free, decayed = (ends[name, s].norm().item() for s in ("lr 0.1", "weight decay 2.0"))
        example.claim(f"{name}: weight decay 2.0 ends nearer to (0, 0)",
                      decayed < 0.8 * free, f"{decayed:.3g} against {free:.3g}")  # fmt: skip
        plain, damped = (length(paths[name, s]) for s in
                         ("momentum 0.9", "momentum 0.9, dampening 0.8"))  # fmt: skip
        example.claim(f"{name}: dampening 0.8 makes momentum's way shorter",
                      damped < plain, f"{damped:.3g} against {plain:.3g}")  # fmt: skip
    example.table(
        f"After {STEPS} steps",
        ("loss", "setting", "w", "b", "loss there", "way", "apart from torch"),
        [
            (pair[0], pair[1], f"{ends[pair][0]:.3f}", f"{ends[pair][1]:.3f}",
             f"{value(LOSSES[pair[0]], ends[pair]):.4f}", f"{length(paths[pair]):.1f}",
             f"{apart[pair]:.1e}")
            for pair in pairs
        ],
    )  # fmt: skip
    return example.finish()


def draw(
    example: Example,
    paths: dict[tuple[str, str], Tensor],
    theirs: dict[tuple[str, str], Tensor],
) -> None:
    """A row a loss, a column a setting."""
    figure, panels = pyplot.subplots(
        len(LOSSES), len(SETTINGS), figsize=(13.5, 10), sharex=True, sharey=True
    )
    for row, (loss, function) in enumerate(LOSSES.items()):
        w, b, heights = loss_map(function, 24 if example.short else 60)
        for column, setting in enumerate(SETTINGS):
            axes = panels[row][column]
            axes.contourf(w, b, heights, levels=14, cmap="Greys", alpha=0.55)
            tag = "".join(c if c.isalnum() or c == "." else "_" for c in f"{loss}-{setting}")
            points_of = theirs[loss, setting].tolist(), paths[loss, setting].tolist()
            example.path(axes, f"{tag}/torch.optim", points_of[0], color="#f2b48c", linewidth=5.5,
                         solid_capstyle="round", solid_joinstyle="round")  # fmt: skip
            example.path(axes, f"{tag}/fusedopt", points_of[1], color=BLUE, linewidth=1.1,
                         marker=".", markersize=3)  # fmt: skip
            axes.plot(*points_of[1][-1], marker="*", color=VERMILION, markersize=9)
            axes.grid(False)
            if row == 0:
                axes.set_title(setting.replace(", ", ",\n"))
        panels[row][0].set_ylabel(f"{loss}\nb (units of y)")
    for axes in panels[-1]:
        axes.set_xlabel("w (units of y a unit of x)")
    panels[0][0].set(xlim=W_RANGE, ylim=B_RANGE)
    handles = [
        Line2D([], [], color="#f2b48c", linewidth=5.5, label="torch.optim.SGD"),
        Line2D([], [], color=BLUE, linewidth=1.1, marker=".", label="fusedopt.SGD, a dot a step"),
        Line2D([], [], color=VERMILION, linewidth=0, marker="*", markersize=9,
               label=f"after {STEPS} steps"),
    ]  # fmt: skip
    figure.suptitle("One neuron under four losses (darker: higher), from w = 6, b = -3; "
                    "learning rate 0.1 where none is named")  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    example.save(figure, "sgd_parameters")


if __name__ == "__main__":
    sys.exit(main())
