"""Hyperparameters that change: by torch's schedulers, by param group, by hand, from a checkpoint.

A small network learns a noisy sine. torch's schedulers work with fusedopt's optimizers as with
torch's: they write to `param_groups`, which every step reads. The first picture shows schedules,
each with learning rate and loss. The second shows param groups that learn the same thing with other
settings, hyperparameters assigned during a run, and a run that is saved and resumed.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from common import BLACK, BLUE, COLOURS, DASHES, GREY, VERMILION, WIDE, Example, plain_numbers
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fusedopt

STEPS, SHORT_STEPS = 400, 200
PEAK = 0.1  # highest learning rate of every schedule
LOSS_LABEL = "loss (mean squared error)"

MakeScheduler = Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]


def network() -> nn.Module:
    """A network 1-24-1 with tanh, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))


def sine() -> tuple[Tensor, Tensor]:
    """128 points of a noisy sine."""
    x = torch.linspace(-3, 3, 128).unsqueeze(1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return x, torch.sin(2 * x) + 0.1 * noise


class Run:
    """A network in training, with the loss and the learning rate of every step so far."""

    def __init__(
        self, name: str, scheduler: MakeScheduler | None = None, steps: int = 0, **settings: Any
    ) -> None:
        self.model = network()
        make = getattr(fusedopt, name)
        self.optimizer: torch.optim.Optimizer = make(self.model.parameters(), **settings)
        self.scheduler = scheduler and scheduler(self.optimizer, steps)
        self.losses: list[float] = []
        self.rates: list[float] = []

    def train(self, steps: int) -> Run:
        """Makes steps on all points; returns itself."""
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
        return self


# ---- Schedules ----


class Schedule(NamedTuple):
    """A scheduler of torch, and the learning rate at a step out of so many by its definition."""

    title: str
    make: MakeScheduler
    rate: Callable[[int, int], float]


def _warm_up(optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    tenth = steps // 10
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=tenth)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - tenth)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[tenth])


def _cosine(step: float, steps: float) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


SCHEDULES = (
    Schedule("constant",
             lambda optimizer, steps: lr_scheduler.ConstantLR(optimizer, factor=1.0),
             lambda step, steps: PEAK),
    Schedule("step: a third every quarter",
             lambda optimizer, steps: lr_scheduler.StepLR(optimizer, steps // 4, gamma=1 / 3),
             lambda step, steps: PEAK / 3 ** (step // (steps // 4))),
    Schedule("exponential: to a hundredth",
             lambda optimizer, steps: lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps)),
             lambda step, steps: PEAK * 0.01 ** (step / steps)),
    Schedule("cosine: to zero",
             lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
             lambda step, steps: PEAK * _cosine(step, steps)),
    Schedule("triangular: four cycles",
             lambda optimizer, steps: lr_scheduler.CyclicLR(
                 optimizer, PEAK / 20, PEAK, step_size_up=steps // 8, cycle_momentum=False),
             lambda step, steps: PEAK - PEAK * 0.95 * abs(step % (steps // 4) * 8 / steps - 1)),
    Schedule("warm-up, then cosine",
             _warm_up,
             lambda step, steps: PEAK * (
                 0.01 + 0.99 * step / (steps // 10) if step < steps // 10
                 else _cosine(step - steps // 10, steps - steps // 10))),
)  # fmt: skip


def show_schedules(example: Example, steps: int) -> None:
    """Trains SGD with each schedule; a panel shows learning rate and loss."""
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey=True)
    for axes, schedule in zip(panels.flat, example.track(SCHEDULES, "schedules"), strict=True):
        title, make, rate = schedule
        run = Run("SGD", make, steps, lr=PEAK, momentum=0.9).train(steps)
        draw_rate_and_loss(example, axes, title.partition(":")[0], run)
        axes.set_title(title)
        error = max(abs(lr - rate(step, steps)) for step, lr in enumerate(run.rates))
        example.claim(f"{title}: every step's learning rate is the schedule's",
                      error <= 1e-9 * PEAK * steps, f"{error:.1e} off at most")  # fmt: skip
        end = sum(run.losses[-10:]) / 10
        example.claim(f"{title}: the loss falls to a fifth",
                      end < run.losses[0] / 5, f"{run.losses[0]:.3f} to {end:.4f}")  # fmt: skip
    figure.suptitle("Learning rate (orange, right) and loss (blue, left) under torch's schedulers, "
                    "on fusedopt.SGD with momentum 0.9")  # fmt: skip
    example.save(figure, "schedules")


def draw_rate_and_loss(example: Example, axes: Axes, tag: str, run: Run) -> Axes:
    """Draws both over the steps, each with its own axis; returns the learning rate's."""
    steps = range(len(run.losses))
    example.curve(axes, f"{tag}/loss", steps, run.losses, color=BLUE)
    axes.set(xlabel="step", yscale="log")
    plain_numbers(axes)
    axes.set_ylabel(LOSS_LABEL, color=BLUE)
    right = axes.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    example.curve(right, f"{tag}/lr", steps, run.rates, color=VERMILION, linestyle="--")
    right.set_ylim(bottom=0)
    right.set_ylabel("learning rate (dashed)", color=VERMILION)
    return right


# ---- Param groups, assignment, a checkpoint ----

GROUPS: dict[str, dict[str, Any]] = {
    "lr 0.02": {"lr": 0.02},
    "lr 0.1": {"lr": 0.1},
    "lr 0.02, momentum 0.9": {"lr": 0.02, "momentum": 0.9},
    "lr 0.02, momentum 0.9, decay 0.02": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.02},
}


def train_groups(steps: int) -> list[list[float]]:
    """Losses of networks that are the groups of one optimizer."""
    x, y = sine()
    models = [network() for _ in GROUPS]
    groups = [
        {"params": model.parameters(), **settings}
        for model, settings in zip(models, GROUPS.values(), strict=True)
    ]
    optimizer = fusedopt.SGD(groups, lr=1.0)
    losses: list[list[float]] = [[] for _ in models]
    for _ in range(steps):
        optimizer.zero_grad()
        for model, seen in zip(models, losses, strict=True):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            seen.append(loss.item())
        optimizer.step()
    return losses


def show_groups(example: Example, axes: Axes, steps: int) -> None:
    """Trains four networks with one optimizer, and each with its own."""
    together = train_groups(steps)
    alone = [Run("SGD", **settings).train(steps).losses for settings in GROUPS.values()]
    for name, losses, colour, dash in zip(GROUPS, together, COLOURS, DASHES, strict=False):
        example.curve(axes, f"groups/{name}", range(steps), losses, color=colour, linestyle=dash,
                      label=name)  # fmt: skip
    axes.set(xlabel="step", ylabel=LOSS_LABEL, yscale="log", ylim=(0.03, 1.6),
             title="Four groups of one optimizer")  # fmt: skip
    plain_numbers(axes)
    axes.legend()
    example.claim("Four groups of one optimizer learn bit for bit as four optimizers",
                  together == alone, "equal" if together == alone else "they differ")  # fmt: skip
    ends = [losses[-1] for losses in together]
    example.claim("Every setting makes its own curve: no two end at the same loss",
                  len(set(ends)) == len(ends), ", ".join(f"{e:.3f}" for e in ends))  # fmt: skip


def show_by_hand(example: Example, axes: Axes, steps: int) -> None:
    """Assigns hyperparameters during a run."""
    run, quarter = Run("SGD", lr=0.02, momentum=0.5), steps // 4
    changes: tuple[dict[str, float], ...] = (
        {}, {"lr": 0.0}, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.01, "weight_decay": 0.1},
    )  # fmt: skip
    for change in changes:
        run.optimizer.param_groups[0].update(change)
        run.train(quarter)
    right = draw_rate_and_loss(example, axes, "by hand", run)
    for index, change in enumerate(changes[1:], start=1):
        height = 0.158 if index < 3 else 0.136  # neighbours are too near for one line
        said = ",\n".join(f"{key.replace('_', ' ')} {value:g}" for key, value in change.items())
        right.axvline(index * quarter, color=GREY, linewidth=0.8, linestyle=":")
        right.annotate(said, (index * quarter, height), (4, 0), textcoords="offset points",
                       va="top", fontsize=8)  # fmt: skip
    right.set_ylim(0, 0.16)
    axes.set_title("Assigned during a run")
    _, still, third, last = (run.losses[i * quarter : (i + 1) * quarter] for i in range(4))
    example.claim("With lr 0 the loss is constant, to the bit",
                  len({*still}) == 1, f"{len({*still})} value(s)")  # fmt: skip
    example.claim("With lr 0.1 and momentum 0.9 it falls again, to a third",
                  third[-1] < third[0] / 3, f"{third[0]:.3f} to {third[-1]:.3f}")  # fmt: skip
    example.claim("With weight decay 0.1 it rises again: the decay pulls the weights back",
                  last[-1] > third[-1], f"{third[-1]:.3f} to {last[-1]:.3f}")  # fmt: skip


def show_resumed(example: Example, axes: Axes, steps: int) -> None:
    """Saves a run of AdamW with warm-up and cosine at half-time, and resumes another from it."""
    whole, other = (Run("AdamW", _warm_up, steps, lr=0.02) for _ in range(2))
    half, parts, file = steps // 2, ("model", "optimizer", "scheduler"), io.BytesIO()
    whole.train(half)
    torch.save({part: getattr(whole, part).state_dict() for part in parts}, file)
    whole.train(half)
    file.seek(0)
    for part, state in torch.load(file, weights_only=True).items():
        getattr(other, part).load_state_dict(state)
    other.train(half)

    example.curve(axes, "resumed/whole", range(steps), whole.losses, label="never interrupted",
                  **WIDE)  # fmt: skip
    example.curve(axes, "resumed/from_the_file", range(half, steps), other.losses, color=BLACK,
                  label="resumed from the file")  # fmt: skip
    axes.axvline(half, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate("saved", (half, whole.losses[0]), (4, 0), textcoords="offset points",
                  va="top", fontsize=8)  # fmt: skip
    axes.set(xlabel="step", ylabel=LOSS_LABEL, yscale="log",
             title="AdamW, warm-up and cosine: a checkpoint")  # fmt: skip
    plain_numbers(axes)
    axes.legend(loc="lower left")
    same = whole.losses[half:] == other.losses and whole.rates[half:] == other.rates
    example.claim("The resumed run has the same losses and learning rates, to the bit",
                  same, "equal" if same else "they differ")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the pictures; returns the exit status."""
    example = Example(__doc__, arguments)
    steps = SHORT_STEPS if example.short else STEPS
    show_schedules(example, steps)
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.4))
    parts = (show_groups, show_by_hand, show_resumed)
    for axes, show in zip(panels, example.track(parts, "groups, by hand, resumed"), strict=True):
        show(example, axes, steps)
    figure.suptitle("Hyperparameters belong to groups, may change between steps, and are saved")
    example.save(figure, "hyperparameters")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
