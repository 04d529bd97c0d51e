"""SGD's parameters, shown on one neuron and four losses, with torch.optim's path below fusedopt's.

The neuron w * x + b learns 50 points of 0.75 x^2 + x + 2 plus noise, from w = 6 and b = -3. Each
panel is a map of a loss over (w, b), with the path of SGD with a learning rate alone, momentum 0.9,
Nesterov momentum, weight decay 2.0, or momentum with dampening 0.8. The wide light line is
torch.optim.SGD, the thin dark one fusedopt.SGD: they must coincide.
"""

from __future__ import annotations

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
COVERED = 1e-5  # largest distance between the two paths, as a share of the map's width

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
TORCH = {"color": "#f2b48c", "linewidth": 5.5}
Paths = dict[tuple[str, str], Tensor]  # for each loss and setting


def points() -> tuple[Tensor, Tensor]:
    """The 50 points."""
    x = torch.linspace(-2, 2, 50)
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0))
    return x, 0.75 * x**2 + x + 2 + 0.5 * noise


def descend(
    make: Callable[..., torch.optim.Optimizer], settings: dict[str, Any], loss: Loss
) -> Tensor:
    """The path (w, b), a row for the start and for each step."""
    x, y = points()
    neuron = torch.nn.Parameter(torch.tensor(START))
    optimizer = make([neuron], **{"lr": 0.1, **settings})
    path = [neuron.detach().clone()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(neuron[0] * x + neuron[1], y).backward()
        optimizer.step()
        path.append(neuron.detach().clone())
    return torch.stack(path)


def value(loss: Loss, w: Tensor | float, b: Tensor | float) -> float:
    """The loss of a neuron."""
    x, y = points()
    return loss(w * x + b, y).item()


def length(path: Tensor) -> float:
    """Length of a path in the plane."""
    return (path[1:] - path[:-1]).norm(dim=1).sum().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the maps; returns the exit status."""
    example = Example(__doc__, arguments)
    paths: Paths = {}
    theirs: Paths = {}
    pairs = [(loss, setting) for loss in LOSSES for setting in SETTINGS]
    for loss, setting in example.track(pairs, "descents"):
        arguments_of = SETTINGS[setting], LOSSES[loss]
        paths[loss, setting] = descend(fusedopt.SGD, *arguments_of)
        theirs[loss, setting] = descend(torch.optim.SGD, *arguments_of)
    draw(example, paths, theirs)

    apart = {pair: (paths[pair] - theirs[pair]).norm(dim=1).max() for pair in pairs}
    worst = torch.stack([*apart.values()]).max().item() / (W_RANGE[1] - W_RANGE[0])  # keeps NaN
    example.claim(f"All {len(pairs)} paths cover torch.optim's: never further apart than "
                  f"{COVERED:g} of the map's width",
                  worst <= COVERED, f"{worst:.1e} at most")  # fmt: skip
    ends = {pair: path[-1] for pair, path in paths.items()}
    for name, loss in LOSSES.items():
        start, end = value(loss, *START), value(loss, *ends[name, "momentum 0.9"])
        example.claim(f"{name}: momentum descends to below a quarter of the first loss",
                      end < start / 4, f"{start:.3g} to {end:.3g}")  # fmt: skip
        free, decayed = (ends[name, s].norm().item() for s in ("lr 0.1", "weight decay 2.0"))
        example.claim(f"{name}: weight decay 2.0 ends nearer to (0, 0)",
                      decayed < 0.8 * free, f"{decayed:.3g} against {free:.3g}")  # fmt: skip
        plain, damped = (length(paths[name, s]) for s in
                         ("momentum 0.9", "momentum 0.9, dampening 0.8"))  # fmt: skip
        example.claim(f"{name}: dampening 0.8 makes momentum's path shorter",
                      damped < plain, f"{damped:.3g} against {plain:.3g}")  # fmt: skip
    example.table(
        f"After {STEPS} steps",
        ("loss", "setting", "w", "b", "loss there", "path", "apart from torch"),
        [
            (*pair, *(f"{x:.3f}" for x in ends[pair]), f"{value(LOSSES[pair[0]], *ends[pair]):.4f}",
             f"{length(paths[pair]):.1f}", f"{apart[pair]:.1e}")
            for pair in pairs
        ],
    )  # fmt: skip
    return example.finish()


def draw(example: Example, paths: Paths, theirs: Paths) -> None:
    """Draws a row of panels for each loss, a column for each setting."""
    figure, panels = pyplot.subplots(
        len(LOSSES), len(SETTINGS), figsize=(13.5, 10), sharex=True, sharey=True
    )
    size = 24 if example.short else 60
    w, b = torch.linspace(*W_RANGE, size), torch.linspace(*B_RANGE, size)
    for row, (loss, function) in zip(panels, LOSSES.items(), strict=True):
        heights = [[value(function, w_, b_) for w_ in w] for b_ in b]
        row[0].set_ylabel(f"{loss}\nb (units of y)")
        for axes, setting in zip(row, SETTINGS, strict=True):
            axes.contourf(w, b, heights, levels=14, cmap="Greys", alpha=0.55)
            ours, tag = paths[loss, setting].tolist(), f"{loss}-{setting}"
            example.path(axes, f"{tag}/torch.optim", theirs[loss, setting].tolist(), **TORCH,
                         solid_capstyle="round", solid_joinstyle="round")  # fmt: skip
            example.path(axes, f"{tag}/fusedopt", ours, color=BLUE, linewidth=1.1, marker=".",
                         markersize=3)  # fmt: skip
            axes.plot(*ours[-1], marker="*", color=VERMILION, markersize=9)
            axes.grid(False)
    for axes, setting in zip(panels[0], SETTINGS, strict=True):
        axes.set_title(setting.replace(", ", ",\n"))
    for axes in panels[-1]:
        axes.set_xlabel("w (units of y a unit of x)")
    panels[0][0].set(xlim=W_RANGE, ylim=B_RANGE)
    handles = [
        Line2D([], [], label="torch.optim.SGD", **TORCH),
        Line2D([], [], color=BLUE, linewidth=1.1, marker=".", label="fusedopt.SGD, a dot a step"),
        Line2D([], [], color=VERMILION, linewidth=0, marker="*", markersize=9,
               label=f"after {STEPS} steps"),
    ]  # fmt: skip
    figure.suptitle("One neuron under four losses (darker: higher), from w = 6, b = -3; "
                    "learning rate 0.1 where none is named")  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=10)
    example.save(figure, "sgd_parameters", rect=(0, 0.03, 1, 1))


if __name__ == "__main__":
    sys.exit(main())
