"""Descents on a surface with a valley and a plateau: tanh(w0)^2 + 0.01 |w1| + sigmoid(w1).

Across the valley (w0) the surface is steep near the middle and flat far away; along it (w1) there
is a gentle slope to a minimum at w1 = -4.6. Four pictures: learning rates that are too small, good
and too large; a plateau that SGD does not leave and momentum, RMSprop and Adam cross; the noise of
mini-batches and what quiets it (accumulation, step decay, warm restarts); and the range test, which
suggests a learning rate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


def surface(w0: Tensor, w1: Tensor) -> Tensor:
    """The loss."""
    return torch.tanh(w0) ** 2 + 0.01 * w1.abs() + torch.sigmoid(w1)


def lowest() -> float:
    """The loss at the minimum: on w0 = 0, where sigmoid(w1) falls by what 0.01 |w1| rises."""
    s = (1 - math.sqrt(1 - 0.04)) / 2  # s (1 - s) = 0.01
    return s - 0.01 * math.log(s / (1 - s))


def tilts() -> Tensor:
    """What a sample adds to the surface: a slope of its own. All together they cancel."""
    tilts = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    return (tilts - tilts.mean(0)) * torch.tensor([0.6, 0.1])


@dataclass
class Descent:
    """A point, and the way it takes.

    Attributes:
        optimizer: what moves it.
        point: where it is.
        batch: samples a step; 0 for all of them.
        path: where it was, from the start on.
        losses: what it saw at every step: of the batch.
        rates: learning rate of every step.
    """

    optimizer: torch.optim.Optimizer
    point: torch.nn.Parameter
    batch: int = 0
    path: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @staticmethod
    def of(
        make: Callable[..., torch.optim.Optimizer], start: Sequence[float], batch: int = 0,
        **settings: Any,
    ) -> Descent:  # fmt: skip
        """A descent that has not begun."""
        point = torch.nn.Parameter(torch.tensor(start))
        return Descent(make([point], **settings), point, batch, [point.tolist()])

    def go(
        self, steps: int, make_scheduler: Callable[[Any], lr_scheduler.LRScheduler] | None = None
    ) -> Descent:
        """Takes steps; itself."""
        scheduler = make_scheduler(self.optimizer) if make_scheduler else None
        samples = tilts()
        generator = torch.Generator().manual_seed(1)
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

    def heights(self) -> Tensor:
        """The loss, without noise, along the way."""
        return surface(*torch.tensor(self.path).T)

    def excess(self, part: slice) -> float:
        """Mean height over the minimum in a part of the way."""
        return (self.heights()[part] - lowest()).mean().item()


# ---- Drawing ----


def grid(
    w0: tuple[float, float], w1: tuple[float, float], size: int = 80
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates and heights of a part of the surface."""
    x, y = torch.meshgrid(torch.linspace(*w0, size), torch.linspace(*w1, size), indexing="xy")
    return x, y, surface(x, y)


def contours(axes: Axes, w0: tuple[float, float], w1: tuple[float, float], title: str) -> None:
    """A map of a part of the surface."""
    axes.contourf(*grid(w0, w1), levels=16, cmap="Greys", alpha=0.55)
    axes.grid(False)
    axes.set(xlabel=W0_LABEL, ylabel=W1_LABEL, title=title, xlim=w0, ylim=w1)


def relief(
    axes: Any, w0: tuple[float, float], w1: tuple[float, float], ways: Sequence[Descent]
) -> None:
    """The same part in three dimensions, with ways on it."""
    axes.plot_surface(*grid(w0, w1), cmap="Greys", alpha=0.5, linewidth=0)
    for index, way in enumerate(ways):
        x, y = zip(*way.path, strict=True)
        axes.plot(x, y, way.heights() + 0.01, color=COLOURS[index], linewidth=1.1, zorder=10)
    axes.set(xlabel=W0_LABEL, ylabel=W1_LABEL, zlabel=HEIGHT_LABEL)
    axes.view_init(elev=42, azim=-60)
    axes.set_box_aspect((1, 1, 0.75), zoom=0.95)
    axes.locator_params(nbins=5)


def map_and_relief(
    example: Example, name: str, ways: dict[str, Descent], w0: tuple[float, float],
    w1: tuple[float, float], title: str, legend: str,
) -> None:  # fmt: skip
    """Ways on the map and on the relief beside it."""
    figure = pyplot.figure(figsize=(11.5, 4.9))
    flat, steep = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
    contours(flat, w0, w1, "from above: darker is higher, a dot is a step")
    for index, (label, way) in enumerate(ways.items()):
        example.path(flat, f"{name}/{label.replace(',', '').replace(' ', '_')}", way.path,
                     color=COLOURS[index], linestyle=DASHES[index], linewidth=1, marker=".",
                     markersize=4, label=label)  # fmt: skip
    flat.legend(loc=legend)
    relief(steep, w0, w1, [*ways.values()])
    steep.set_title("the same ways on the surface")
    figure.suptitle(title)
    figure.tight_layout()
    example.save(figure, f"surfaces_{name}")


# ---- The pictures ----


def show_rates(example: Example) -> None:
    """SGD with three learning rates."""
    rates = (1.4, 0.5, 0.03)  # the widest way below the others
    ways = {f"SGD, lr {lr:g}": Descent.of(fusedopt.SGD, (1.2, 3.0), lr=lr).go(100) for lr in rates}
    map_and_relief(example, "rates", ways, (-2.0, 2.0), (-5.0, 4.0),
                   "Learning rates: too small, good, too large (100 steps of SGD)",
                   "lower right")  # fmt: skip
    large, good, small = ways.values()
    ends = [way.heights()[-1].item() - lowest() for way in (small, good, large)]
    example.claim("lr 0.5 gets within 0.1 of the minimum, lr 0.03 stays above 0.5",
                  ends[1] < 0.1 and ends[0] > 0.5, f"{ends[1]:.3f}, {ends[0]:.3f}")  # fmt: skip
    sides = torch.tensor(large.path)[-20:, 0]
    bounces = bool((sides[1:] * sides[:-1] < 0).all() and (sides.abs() > 0.3).all())
    example.claim("lr 1.4 still bounces from side to side of the valley at the end",
                  bounces, f"w0 between {sides.min():.2f} and {sides.max():.2f}")  # fmt: skip


def show_plateau(example: Example) -> None:
    """Four optimizers on a plateau."""
    start, steps = (-4.0, 2.0), 120
    ways = {
        "SGD, lr 0.5": Descent.of(fusedopt.SGD, start, lr=0.5),
        "SGD, lr 0.5, momentum 0.9": Descent.of(fusedopt.SGD, start, lr=0.5, momentum=0.9),
        "RMSprop, lr 0.1": Descent.of(fusedopt.RMSprop, start, lr=0.1),
        "Adam, lr 0.2": Descent.of(fusedopt.Adam, start, lr=0.2),
    }
    for way in ways.values():
        way.go(steps)
    map_and_relief(example, "plateau", ways, (-5.0, 3.5), (-9.0, 3.0),
                   f"A plateau: {steps} steps from w0 = -4, where the slope is 0.003",
                   "upper right")  # fmt: skip
    plain, *others = (way.path[-1][0] for way in ways.values())
    example.claim("Plain SGD is still on the plateau: w0 below -3", plain < -3, f"{plain:.2f}")
    for label, w0 in zip([*ways][1:], others, strict=True):
        example.claim(f"{label} has crossed it: w0 within 0.5 of the valley",
                      abs(w0) < 0.5, f"{w0:.2f}")  # fmt: skip


def show_noise(example: Example) -> None:
    """Mini-batches of 4 of 256 samples, and four ways to quiet them."""
    start, updates = (-1.2, 2.5), 400 if example.short else 640

    def noisy(**settings: Any) -> Descent:
        return Descent.of(fusedopt.SGD, start, BATCH, lr=0.5, **settings)

    window = 4 if example.short else 8
    ways = {
        "constant": noisy().go(updates),
        "accumulated": noisy(accumulation_steps=window).go(updates * window),
        "step decay": noisy().go(updates, lambda o: lr_scheduler.StepLR(o, updates // 2, 0.1)),
        "warm restarts": noisy().go(
            updates, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, updates // 4)
        ),
    }
    titles = {
        "constant": f"lr 0.5, batches of {BATCH} samples",
        "accumulated": f"{window} batches accumulated an update",
        "step decay": "step decay: lr 0.05 from the half on",
        "warm restarts": "warm restarts: four cosines to 0",
    }
    full = Descent.of(fusedopt.SGD, start, lr=0.5).go(updates)
    figure, panels = pyplot.subplots(2, len(ways), figsize=(14, 7), height_ratios=(1.35, 1))
    for index, (name, way) in enumerate(ways.items()):
        above, below = panels[:, index]
        every = window if name == "accumulated" else 1
        tag = f"noise/{name.replace(' ', '_')}"
        contours(above, (-1.8, 1.8), (-6.0, 3.0), titles[name])
        path = way.path[::every]  # an update's micro-batches do not move it
        example.path(above, f"{tag}/path", path, color=BLUE, linewidth=0.9)
        example.path(above, f"{tag}/all_samples", full.path, color=VERMILION, linestyle="--")
        heights = (way.heights()[::every] - lowest()).tolist()
        example.curve(below, f"{tag}/excess", range(len(heights)), heights, color=BLUE)
        below.set(xlabel="update", yscale="log", ylim=(1e-4, 3))
        right = below.twinx()
        right.grid(False)
        rates = way.rates[::every]
        example.curve(right, f"{tag}/lr", range(len(rates)), rates, color=ORANGE, linestyle="--")
        right.set_ylim(0, 0.6)
        right.spines["right"].set_visible(True)
        if index == len(ways) - 1:
            right.set_ylabel("learning rate (orange, dashed)")
    panels[1][0].set_ylabel("loss above the minimum (blue)")
    figure.suptitle("Mini-batch noise, and what quiets it "
                    "(red, dashed: the way with all samples in every step)")  # fmt: skip
    figure.tight_layout()
    example.save(figure, "surfaces_noise")

    last = {name: way.excess(slice(-(len(way.losses) // 8), None)) for name, way in ways.items()}
    for name in ("accumulated", "step decay", "warm restarts"):
        example.claim(f"{name}: over the last eighth, less than half of constant's excess loss",
                      last[name] < last["constant"] / 2,
                      f"{last[name]:.4f} against {last['constant']:.4f}")  # fmt: skip
    quarter = updates // 4
    restart = ways["warm restarts"].heights()
    before = (restart[3 * quarter - 8 : 3 * quarter] - lowest()).mean().item()
    after = (restart[3 * quarter + 8 : 3 * quarter + 24] - lowest()).mean().item()
    example.claim("A warm restart brings the noise back", after > before,
                  f"{before:.4f} before the last one, {after:.4f} after")  # fmt: skip


def show_range_test(example: Example) -> None:
    """The learning rate is raised from step to step; the loss says which one to take."""
    steps, first, last, start = 160, 1e-3, 10.0, (-1.2, 2.5)
    factor = (last / first) ** (1 / (steps - 1))
    test = Descent.of(fusedopt.SGD, start, TEST_BATCH, lr=first)
    test.go(steps, lambda optimizer: lr_scheduler.ExponentialLR(optimizer, factor))

    # The noise of batches would decide where the curve is lowest: an average that forgets.
    smooth, mean = [], 0.0
    for step, loss in enumerate(test.losses):
        mean = 0.85 * mean + 0.15 * loss
        smooth.append(mean / (1 - 0.85 ** (step + 1)))
    lowest_rate = test.rates[min(range(steps), key=smooth.__getitem__)]
    suggestion = lowest_rate / 10

    figure, axes = pyplot.subplots(figsize=(8.2, 4.6))
    lines = (
        ("a_batch", test.losses, {"color": "#b9b9b9", "linewidth": 0.8, "label": "a batch's loss"}),
        ("smoothed", smooth, {"color": BLUE, "label": "smoothed"}),
    )
    for tag, losses, style in lines:
        points = [*zip(test.rates, losses, strict=True)]
        example.path(axes, f"range_test/{tag}", points, **style)
    axes.axvline(lowest_rate, color=VERMILION, linestyle=":", label=f"lowest: {lowest_rate:.2g}")
    axes.axvline(suggestion, color=GREEN, linestyle="--",
                 label=f"suggested, a tenth: {suggestion:.2g}")  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate (raised at every step)", ylabel=HEIGHT_LABEL)
    axes.legend(loc="lower left")
    axes.set_title("Range test: where the loss stops falling, steps overshoot;\n"
                   "a tenth of that rate still falls fast, and has room")  # fmt: skip
    figure.tight_layout()
    example.save(figure, "surfaces_range_test")
    example.console.print(
        f"Range test: take lr {suggestion:.2g}. The smoothed loss is lowest at {lowest_rate:.2g} "
        "and rises above, where steps overshoot the valley; a tenth of that leaves room.",
        soft_wrap=True,
    )

    ends = {
        scale: Descent.of(fusedopt.SGD, start, TEST_BATCH, lr=scale * suggestion).go(400)
        .excess(slice(-10, None))
        for scale in (0.1, 1, 10)
    }  # fmt: skip
    example.claim(
        "In 400 steps the suggested rate gets lower than a tenth of it, and than ten times it",
        ends[1] < ends[0.1] and ends[1] < ends[10],
        ", ".join(f"lr {suggestion * scale:.2g}: {end:.3f}" for scale, end in ends.items()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the pictures; the exit status."""
    example = Example(__doc__, arguments)
    torch.set_num_threads(1)  # two numbers are no work for two
    for show in example.track((show_rates, show_plateau, show_noise, show_range_test), "pictures"):
        show(example)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
