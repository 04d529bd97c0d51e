"""Learning rates and other hyperparameters that change: by group, by hand, by torch's schedulers.

A small network learns a noisy sine. torch's schedulers work on fusedopt's optimizers as on torch's:
they write to `param_groups`, which every step reads. Four pictures: schedules, with the learning
rate and the loss drawn together; parameter groups that learn the same thing with other settings;
hyperparameters changed by hand in the middle of a run; and a run that is saved in its middle, and
goes on from the file as if nothing had happened.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import BLACK, BLUE, COLOURS, DASHES, GREY, VERMILION, Example, plain_numbers
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fusedopt

STEPS, SHORT_STEPS = 400, 200


def network() -> nn.Module:
    """1-24-1 with tanh, from seed 0: the same one whenever it is asked for."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))


def sine() -> tuple[Tensor, Tensor]:
    """128 points of a sine, and noise of seed 1."""
    x = torch.linspace(-3, 3, 128).unsqueeze(1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return x, torch.sin(2 * x) + 0.1 * noise


@dataclass
class Run:
    """A network, what trains it, and what happened so far.

    Attributes:
        optimizer: one of fusedopt's.
        model: the network.
        scheduler: what sets the learning rate after each step, if anything does.
        losses: before every step.
        rates: learning rate of every step.
    """

    optimizer: torch.optim.Optimizer
    model: nn.Module
    scheduler: lr_scheduler.LRScheduler | None = None
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def train(self, steps: int) -> None:
        """Takes steps on all points."""
        x, y = sine()
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(x), y)
            loss.backward()
            self.losses.append(loss.item())
            self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()


# ---- Schedules ----

PEAK = 0.1  # learning rate of every schedule at its highest


@dataclass(frozen=True)
class Schedule:
    """A schedule, and what it must give.

    Attributes:
        title: over its panel.
        make: torch's scheduler for an optimizer and a number of steps.
        rate: the learning rate at a step of so many, from the schedule's definition.
    """

    title: str
    make: Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]
    rate: Callable[[int, int], float]


def _warm_up(optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    tenth = steps // 10
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=tenth),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - tenth),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[tenth])


def _cosine(step: float, steps: float) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


def _triangle(step: int, half: int) -> float:
    """From 0 up to 1 in `half` steps, and down again."""
    return 1 - abs(step % (2 * half) - half) / half


SCHEDULES = (
    Schedule(
        "constant",
        lambda optimizer, steps: lr_scheduler.ConstantLR(optimizer, factor=1.0),
        lambda step, steps: PEAK,
    ),
    Schedule(
        "step: a third every quarter",
        lambda optimizer, steps: lr_scheduler.StepLR(optimizer, steps // 4, gamma=1 / 3),
        lambda step, steps: PEAK / 3 ** (step // (steps // 4)),
    ),
    Schedule(
        "exponential: to a hundredth",
        lambda optimizer, steps: lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / steps)),
        lambda step, steps: PEAK * 0.01 ** (step / steps),
    ),
    Schedule(
        "cosine: to zero",
        lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        lambda step, steps: PEAK * _cosine(step, steps),
    ),
    Schedule(
        "triangular: four cycles",
        lambda optimizer, steps: lr_scheduler.CyclicLR(
            optimizer, base_lr=PEAK / 20, max_lr=PEAK, step_size_up=steps // 8, cycle_momentum=False
        ),
        lambda step, steps: PEAK / 20 + (PEAK - PEAK / 20) * _triangle(step, steps // 8),
    ),
    Schedule(
        "warm-up, then cosine",
        _warm_up,
        lambda step, steps: PEAK * (
            0.01 + 0.99 * step / (steps // 10)
            if step < steps // 10
            else _cosine(step - steps // 10, steps - steps // 10)
        ),
    ),
)  # fmt: skip


def scheduled(schedule: Schedule, steps: int) -> Run:
    """A run of SGD with momentum under a schedule."""
    model = network()
    optimizer = fusedopt.SGD(model.parameters(), lr=PEAK, momentum=0.9)
    run = Run(optimizer, model, schedule.make(optimizer, steps))
    run.train(steps)
    return run


def show_schedules(example: Example, steps: int) -> None:
    """A panel a schedule: learning rate and loss over the steps."""
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey=True)
    for axes, schedule in zip(panels.flat, example.track(SCHEDULES, "schedules"), strict=True):
        run = scheduled(schedule, steps)
        draw_rate_and_loss(example, axes, schedule.title.partition(":")[0], run)
        axes.set_title(schedule.title)
        wanted = [schedule.rate(step, steps) for step in range(steps)]
        error = max(abs(a - b) for a, b in zip(run.rates, wanted, strict=True))
        example.claim(f"{schedule.title}: every step's learning rate is the schedule's",
                      error <= 1e-9 * PEAK * steps, f"{error:.1e} off at most")  # fmt: skip
        end = sum(run.losses[-10:]) / 10
        example.claim(f"{schedule.title}: the loss falls to a fifth",
                      end < run.losses[0] / 5, f"{run.losses[0]:.3f} to {end:.4f}")  # fmt: skip
    figure.suptitle("Learning rate (orange, right) and loss (blue, left) under torch's schedulers, "
                    "on fusedopt.SGD with momentum 0.9")  # fmt: skip
    figure.tight_layout()
    example.save(figure, "schedules")


def draw_rate_and_loss(example: Example, axes: Axes, name: str, run: Run) -> Axes:
    """Both over the steps, each with an axis of its own; the learning rate's."""
    tag = name.replace(" ", "_").replace(",", "")
    steps = range(len(run.losses))
    example.curve(axes, f"{tag}/loss", steps, run.losses, color=BLUE)
    axes.set(xlabel="step", yscale="log")
    plain_numbers(axes)
    axes.set_ylabel("loss (mean squared error)", color=BLUE)
    right = axes.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    example.curve(right, f"{tag}/lr", steps, run.rates, color=VERMILION, linestyle="--")
    right.set_ylim(bottom=0)
    right.set_ylabel("learning rate (dashed)", color=VERMILION)
    return right


# ---- Parameter groups ----

GROUPS: dict[str, dict[str, Any]] = {
    "lr 0.02": {"lr": 0.02},
    "lr 0.1": {"lr": 0.1},
    "lr 0.02, momentum 0.9": {"lr": 0.02, "momentum": 0.9},
    "lr 0.02, momentum 0.9, decay 0.02": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.02},
}


def train_groups(groups: Sequence[dict[str, Any]], steps: int) -> list[list[float]]:
    """Losses of networks that are the groups of one optimizer."""
    x, y = sine()
    models = [network() for _ in groups]
    pairs = zip(models, groups, strict=True)
    optimizer = fusedopt.SGD(
        [{"params": model.parameters(), **group} for model, group in pairs], lr=1.0
    )
    losses: list[list[float]] = [[] for _ in groups]
    for _ in range(steps):
        optimizer.zero_grad()
        for model, seen in zip(models, losses, strict=True):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            seen.append(loss.item())
        optimizer.step()
    return losses


def show_groups(example: Example, axes: Axes, steps: int) -> None:
    """The same network four times, in four groups of one optimizer."""
    together = train_groups([*GROUPS.values()], steps)
    alone = [train_groups([group], steps)[0] for group in GROUPS.values()]
    for index, (name, losses) in enumerate(zip(GROUPS, together, strict=True)):
        tag = f"groups/{name.replace(', ', '-').replace(' ', '_')}"
        example.curve(axes, tag, range(steps), losses, color=COLOURS[index],
                      linestyle=DASHES[index], label=name)  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log",
             title="Four groups of one optimizer", ylim=(0.03, 1.6))  # fmt: skip
    plain_numbers(axes)
    axes.legend()
    example.claim("Four groups of one optimizer learn bit for bit as four optimizers",
                  together == alone, "equal" if together == alone else "they differ")  # fmt: skip
    ends = [losses[-1] for losses in together]
    example.claim("Every setting makes a curve of its own: no two end at the same loss",
                  len(set(ends)) == len(ends), ", ".join(f"{e:.3f}" for e in ends))  # fmt: skip


# ---- By hand ----


def show_by_hand(example: Example, axes: Axes, steps: int) -> None:
    """A run whose hyperparameters are assigned in its middle."""
    model = network()
    optimizer = fusedopt.SGD(model.parameters(), lr=0.02, momentum=0.5)
    run = Run(optimizer, model)
    quarter = steps // 4
    changes: tuple[dict[str, float], ...] = (
        {}, {"lr": 0.0}, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.01, "weight_decay": 0.1},
    )  # fmt: skip
    for change in changes:
        optimizer.param_groups[0].update(change)
        run.train(quarter)
    right = draw_rate_and_loss(example, axes, "by hand", run)
    for index, change in enumerate(changes[1:], start=1):
        height = 0.158 if index < 3 else 0.136  # neighbours are too near for one line
        said = ",\n".join(f"{key.replace('_', ' ')} {value:g}" for key, value in change.items())
        right.axvline(index * quarter, color=GREY, linewidth=0.8, linestyle=":")
        right.annotate(said, (index * quarter, height), (4, 0), textcoords="offset points",
                       va="top", fontsize=8)  # fmt: skip
    right.set_ylim(0, 0.16)
    axes.set_title("Assigned in the middle of a run")
    still = set(run.losses[quarter : 2 * quarter])
    example.claim("With lr 0 the loss stands still, to the bit",
                  len(still) == 1, f"{len(still)} value(s)")  # fmt: skip
    third = run.losses[2 * quarter : 3 * quarter]
    example.claim("With lr 0.1 and momentum 0.9 it falls again, to a third",
                  third[-1] < third[0] / 3, f"{third[0]:.3f} to {third[-1]:.3f}")  # fmt: skip
    example.claim("With weight decay 0.1 it rises again: the decay pulls the weights back",
                  run.losses[-1] > third[-1],
                  f"{third[-1]:.3f} to {run.losses[-1]:.3f}")  # fmt: skip


# ---- A checkpoint ----


def fresh(steps: int) -> Run:
    """A run of AdamW under warm-up and cosine that has not begun."""
    model = network()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.02)
    return Run(optimizer, model, _warm_up(optimizer, steps))


def show_resumed(example: Example, axes: Axes, steps: int) -> None:
    """A run that is saved in its middle, and one that begins with the file."""
    whole, other = fresh(steps), fresh(steps)
    whole.train(steps // 2)
    parts = ("model", "optimizer", "scheduler")
    file = io.BytesIO()
    torch.save({part: getattr(whole, part).state_dict() for part in parts}, file)
    whole.train(steps // 2)

    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for part in parts:
        getattr(other, part).load_state_dict(loaded[part])
    other.train(steps // 2)

    half = range(steps // 2, steps)
    example.curve(axes, "resumed/whole", range(steps), whole.losses, color="#9ccbe8", linewidth=6,
                  label="never interrupted")  # fmt: skip
    example.curve(axes, "resumed/from_the_file", half, other.losses, color=BLACK,
                  label="resumed from the file")  # fmt: skip
    axes.axvline(steps // 2, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate("saved", (steps // 2, whole.losses[0]), (4, 0), textcoords="offset points",
                  va="top", fontsize=8)  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log",
             title="AdamW, warm-up and cosine: a checkpoint")  # fmt: skip
    plain_numbers(axes)
    axes.legend(loc="lower left")
    same = whole.losses[steps // 2 :] == other.losses and whole.rates[steps // 2 :] == other.rates
    example.claim("The resumed run has the same losses and learning rates, to the bit",
                  same, "equal" if same else "they differ")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the pictures; the exit status."""
    example = Example(__doc__, arguments)
    torch.set_num_threads(1)  # the network is no work for two
    steps = SHORT_STEPS if example.short else STEPS
    show_schedules(example, steps)
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.4))
    parts = (show_groups, show_by_hand, show_resumed)
    for axes, show in zip(panels, example.track(parts, "groups, by hand, resumed"), strict=True):
        show(example, axes, steps)
    figure.suptitle("Hyperparameters belong to groups, may change between steps, and are saved")
    figure.tight_layout()
    example.save(figure, "hyperparameters")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
