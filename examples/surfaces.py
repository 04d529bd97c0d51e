"""Descents on a surface with a valley and a plateau: tanh(w0)^2 + 0.01 |w1| + sigmoid(w1).

Across the valley (w0) the surface is steep near the middle and flat far away; along it (w1) a
gentle slope leads to a minimum at w1 = -4.6. Four pictures: learning rates that are too small, good
and too large; a plateau that SGD does not leave and momentum, RMSprop and Adam cross; the noise of
mini-batches and what reduces it (accumulation, step decay, warm restarts); and the range test,
which suggests a learning rate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import BLUE, COLOURS, DASHES, GREEN, ORANGE, VERMILION, Example
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor
from torch.optim import lr_scheduler

import fusedopt

W0_LABEL, W1_LABEL, HEIGHT_LABEL = "w0 (no unit)", "w1 (no unit)", "loss (no unit)"
SAMPLES, BATCH, TEST_BATCH = 256, 4, 32
Range = tuple[float, float]


def surface(w0: Tensor, w1: Tensor) -> Tensor:
    """The loss."""
    return torch.tanh(w0) ** 2 + 0.01 * w1.abs() + torch.sigmoid(w1)


def lowest() -> float:
    """The loss at the minimum: on w0 = 0, where the slopes of sigmoid(w1) and 0.01 |w1| cancel."""
    s = (1 - math.sqrt(1 - 0.04)) / 2  # s (1 - s) = 0.01
    return s - 0.01 * math.log(s / (1 - s))


def tilts() -> Tensor:
    """The slope that each sample adds to the surface; their sum is zero."""
    tilts = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    return (tilts - tilts.mean(0)) * torch.tensor([0.6, 0.1])


class Descent:
    """A point that an optimizer moves, and its path.

    Args:
        make: The optimizer's class.
        start: Where the point is.
        batch: Samples in a step's loss; 0 takes all, whose mean is the surface.
        **settings: Of the optimizer.

    Attributes:
        path: Points from the start on.
        losses: Loss of the batch at every step.
        rates: Learning rate of every step.
    """

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], start: Sequence[float], batch: int = 0,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.point = torch.nn.Parameter(torch.tensor(start))
        self.optimizer = make([self.point], **settings)
        self.batch = batch
        self.path = [self.point.tolist()]
        self.losses: list[float] = []
        self.rates: list[float] = []

    def go(
        self, steps: int, make_scheduler: Callable[[Any], lr_scheduler.LRScheduler] | None = None
    ) -> Descent:
        """Makes steps; returns itself."""
        scheduler = make_scheduler(self.optimizer) if make_scheduler else None
        samples, generator = tilts(), torch.Generator().manual_seed(1)
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = surface(*self.point)
            if self.batch:
                chosen = torch.randint(SAMPLES, (self.batch,), generator=generator)
                loss = loss + (samples[chosen] @ self.point).mean()
            loss.backward()
            self.losses.append(loss.item())
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.path.append(self.point.tolist())
            if scheduler is not None:
                scheduler.step()
        return self

    def excess(self) -> Tensor:
        """Loss above the minimum, without noise, along the path."""
        return surface(*torch.tensor(self.path).T) - lowest()


def grid(w0: Range, w1: Range) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates and heights of a part of the surface."""
    x, y = torch.meshgrid(torch.linspace(*w0, 80), torch.linspace(*w1, 80), indexing="xy")
    return x, y, surface(x, y)


def contours(axes: Axes, w0: Range, w1: Range, title: str) -> None:
    """Draws a map of a part of the surface."""
    axes.contourf(*grid(w0, w1), levels=16, cmap="Greys", alpha=0.55)
    axes.grid(False)
    axes.set(xlabel=W0_LABEL, ylabel=W1_LABEL, title=title, xlim=w0, ylim=w1)


def map_and_relief(
    example: Example, name: str, ways: dict[str, Descent], w0: Range, w1: Range, title: str,
    legend: str,
) -> None:  # fmt: skip
    """Draws paths on a map and in three dimensions."""
    figure = pyplot.figure(figsize=(11.5, 4.9))
    flat = figure.add_subplot(1, 2, 1)
    relief: Any = figure.add_subplot(1, 2, 2, projection="3d")
    contours(flat, w0, w1, "from above: darker is higher, a dot is a step")
    relief.plot_surface(*grid(w0, w1), cmap="Greys", alpha=0.5, linewidth=0)
    for index, (label, way) in enumerate(ways.items()):
        example.path(flat, f"{name}/{label}", way.path, color=COLOURS[index], linewidth=1,
                     linestyle=DASHES[index], marker=".", markersize=4, label=label)  # fmt: skip
        x, y = zip(*way.path, strict=True)
        relief.plot(x, y, way.excess() + lowest() + 0.01, color=COLOURS[index], linewidth=1.1,
                    zorder=10)  # fmt: skip
    flat.legend(loc=legend)
    relief.set(xlabel=W0_LABEL, ylabel=W1_LABEL, zlabel=HEIGHT_LABEL,
               title="the same paths on the surface")  # fmt: skip
    relief.view_init(elev=42, azim=-60)
    relief.set_box_aspect((1, 1, 0.75), zoom=0.95)
    relief.locator_params(nbins=5)
    figure.suptitle(title)
    example.save(figure, f"surfaces_{name}")


def show_rates(example: Example) -> None:
    """SGD with three learning rates."""
    rates = (1.4, 0.5, 0.03)  # the widest path is drawn first
    ways = {f"SGD, lr {lr:g}": Descent(fusedopt.SGD, (1.2, 3.0), lr=lr).go(100) for lr in rates}
    map_and_relief(example, "rates", ways, (-2.0, 2.0), (-5.0, 4.0),
                   "Learning rates: too small, good, too large (100 steps of SGD)",
                   "lower right")  # fmt: skip
    _, good, small = (way.excess()[-1].item() for way in ways.values())
    example.claim("lr 0.5 gets within 0.1 of the minimum, lr 0.03 stays above 0.5",
                  good < 0.1 and small > 0.5, f"{good:.3f}, {small:.3f}")  # fmt: skip
    sides = torch.tensor(ways["SGD, lr 1.4"].path)[-20:, 0]
    bounces = bool((sides[1:] * sides[:-1] < 0).all() and (sides.abs() > 0.3).all())
    example.claim("lr 1.4 still bounces from side to side of the valley at the end",
                  bounces, f"w0 between {sides.min():.2f} and {sides.max():.2f}")  # fmt: skip


def show_plateau(example: Example) -> None:
    """Four optimizers on a plateau."""
    start, steps = (-4.0, 2.0), 120
    ways = {
        "SGD, lr 0.5": Descent(fusedopt.SGD, start, lr=0.5),
        "SGD, lr 0.5, momentum 0.9": Descent(fusedopt.SGD, start, lr=0.5, momentum=0.9),
        "RMSprop, lr 0.1": Descent(fusedopt.RMSprop, start, lr=0.1),
        "Adam, lr 0.2": Descent(fusedopt.Adam, start, lr=0.2),
    }
    ends = {label: way.go(steps).path[-1][0] for label, way in ways.items()}
    map_and_relief(example, "plateau", ways, (-5.0, 3.5), (-9.0, 3.0),
                   f"A plateau: {steps} steps from w0 = -4, where the slope is 0.003",
                   "upper right")  # fmt: skip
    plain = ends.pop("SGD, lr 0.5")
    example.claim("Plain SGD is still on the plateau: w0 below -3", plain < -3, f"{plain:.2f}")
    for label, w0 in ends.items():
        example.claim(f"{label} has crossed it: w0 within 0.5 of the valley",
                      abs(w0) < 0.5, f"{w0:.2f}")  # fmt: skip


def show_noise(example: Example) -> None:
    """Mini-batches of 4 of 256 samples, and three ways to reduce their noise."""
    start, updates, window = (-1.2, 2.5), *((400, 4) if example.short else (640, 8))

    def noisy(**settings: Any) -> Descent:
        return Descent(fusedopt.SGD, start, BATCH, lr=0.5, **settings)

    def restarts(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, updates // 4)

    ways = {
        f"lr 0.5, batches of {BATCH} samples": noisy().go(updates),
        f"{window} batches accumulated an update":
            noisy(accumulation_steps=window).go(updates * window),
        "step decay: lr 0.05 from the half on":
            noisy().go(updates, lambda o: lr_scheduler.StepLR(o, updates // 2, 0.1)),
        "warm restarts: four cosines to 0": noisy().go(updates, restarts),
    }  # fmt: skip
    names = ("constant", "accumulated", "step decay", "warm restarts")
    full = Descent(fusedopt.SGD, start, lr=0.5).go(updates)
    excesses, last = {}, {}
    figure, panels = pyplot.subplots(2, len(ways), figsize=(14, 7), height_ratios=(1.35, 1))
    for name, (title, way), (above, below) in zip(names, ways.items(), panels.T, strict=True):
        every = len(way.losses) // updates  # micro-batches of an update do not move the point
        contours(above, (-1.8, 1.8), (-6.0, 3.0), title)
        example.path(above, f"noise/{name}/path", way.path[::every], color=BLUE, linewidth=0.9)
        example.path(above, f"noise/{name}/all_samples", full.path, color=VERMILION,
                     linestyle="--")  # fmt: skip
        excesses[name] = excess = way.excess()[::every]
        last[name] = excess[-(updates // 8) :].mean().item()
        example.curve(below, f"noise/{name}/excess", range(len(excess)), excess, color=BLUE)
        below.set(xlabel="update", yscale="log", ylim=(1e-4, 3))
        right = below.twinx()
        right.grid(False)
        rates = way.rates[::every]
        example.curve(right, f"noise/{name}/lr", range(updates), rates, color=ORANGE,
                      linestyle="--")  # fmt: skip
        right.set_ylim(0, 0.6)
        right.spines["right"].set_visible(True)
    right.set_ylabel("learning rate (orange, dashed)")
    panels[1][0].set_ylabel("loss above the minimum (blue)")
    figure.suptitle("Mini-batch noise, and what reduces it "
                    "(red, dashed: the path with all samples in every step)")  # fmt: skip
    example.save(figure, "surfaces_noise")

    for name in names[1:]:
        example.claim(f"{name}: over the last eighth, less than half of constant's excess loss",
                      last[name] < last["constant"] / 2,
                      f"{last[name]:.4f} against {last['constant']:.4f}")  # fmt: skip
    restart = 3 * updates // 4
    before = excesses["warm restarts"][restart - 8 : restart].mean().item()
    after = excesses["warm restarts"][restart + 8 : restart + 24].mean().item()
    example.claim("A warm restart brings the noise back", after > before,
                  f"{before:.4f} before the last one, {after:.4f} after")  # fmt: skip


def show_range_test(example: Example) -> None:
    """The loss while the learning rate is raised suggests a learning rate."""
    steps, first, last, start = 160, 1e-3, 10.0, (-1.2, 2.5)
    factor = (last / first) ** (1 / (steps - 1))
    test = Descent(fusedopt.SGD, start, TEST_BATCH, lr=first)
    test.go(steps, lambda optimizer: lr_scheduler.ExponentialLR(optimizer, factor))
    smooth, mean = [], 0.0  # a running mean, or noise would decide where the curve is lowest
    for step, loss in enumerate(test.losses):
        mean = 0.85 * mean + 0.15 * loss
        smooth.append(mean / (1 - 0.85 ** (step + 1)))
    rate = test.rates[min(range(steps), key=smooth.__getitem__)]
    suggestion = rate / 10

    figure, axes = pyplot.subplots(figsize=(8.2, 4.6))
    batch = {"color": "#b9b9b9", "linewidth": 0.8, "label": "a batch's loss"}
    lines = (("a_batch", test.losses, batch),
             ("smoothed", smooth, {"color": BLUE, "label": "smoothed"}))  # fmt: skip
    for tag, losses, style in lines:
        example.path(axes, f"range_test/{tag}", zip(test.rates, losses, strict=True), **style)
    axes.axvline(rate, color=VERMILION, linestyle=":", label=f"lowest: {rate:.2g}")
    axes.axvline(suggestion, color=GREEN, linestyle="--",
                 label=f"suggested, a tenth: {suggestion:.2g}")  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate (raised at every step)", ylabel=HEIGHT_LABEL,
             title="Range test: where the loss stops falling, steps overshoot;\n"
             "a tenth of that rate still falls fast, and has room")  # fmt: skip
    axes.legend(loc="lower left")
    example.save(figure, "surfaces_range_test")

    def end(scale: float) -> float:
        way = Descent(fusedopt.SGD, start, TEST_BATCH, lr=scale * suggestion).go(400)
        return way.excess()[-10:].mean().item()

    ends = {scale: end(scale) for scale in (0.1, 1, 10)}
    example.claim(
        "In 400 steps the suggested rate gets lower than a tenth of it, and than ten times it",
        ends[1] < ends[0.1] and ends[1] < ends[10],
        ", ".join(f"lr {suggestion * scale:.2g}: {end:.3f}" for scale, end in ends.items()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the pictures; returns the exit status."""
    example = Example(__doc__, arguments)
    for show in example.track((show_rates, show_plateau, show_noise, show_range_test), "pictures"):
        show(example)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
