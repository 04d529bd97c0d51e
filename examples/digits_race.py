"""All optimizers of fusedopt learn digits, and accumulated micro-batches give the same curve.

A network 64-100-100-10 learns scikit-learn's 1,797 digits from the same weights, on the same
batches in the same order, with SGD, momentum, Nesterov momentum and every other optimizer of
fusedopt. The training code is that of `python -m fusedopt.bench train`, which compares with
torch.optim. Then 128 images a step, as one batch and as four micro-batches of 32.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from common import BLACK, COLOURS, DASHES, WIDE, Example, plain_numbers
from matplotlib import pyplot
from torch import Tensor

import fusedopt
from fusedopt.bench import optimizers
from fusedopt.bench.train import BATCH, MODELS, Digits, Run, train_in_lockstep

EPOCHS, SHORT_EPOCHS = 30, 16
SEED = 0
MICRO_BATCHES = 4
RIGHT = 85.0  # least accuracy on the test images, in percent
# Largest relative difference between the curves: the mean of four means rounds differently from the
# mean of all, and training amplifies the difference.
SAME = 1e-4

SGD: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "SGD, momentum": {"lr": 0.1, "momentum": 0.9},
    "SGD, Nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
}


def contestants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Class name and settings, which are the benchmark's, for each title."""
    names = [name for name in optimizers.names() if name != "SGD"]
    others = {name: (name, optimizers.settings(name).train) for name in names}
    return {title: ("SGD", settings) for title, settings in SGD.items()} | others


def run_of(model: torch.nn.Module, name: str, **settings: Any) -> Run:
    """A copy of a model with one of fusedopt's optimizers."""
    own = copy.deepcopy(model)
    return Run(own, getattr(fusedopt, name)(own.parameters(), **settings))


def mean_of(losses: Sequence[float], number: int) -> list[float]:
    """The means of `number` losses each."""
    return torch.tensor(losses, dtype=torch.float64).view(-1, number).mean(1).tolist()


def race(example: Example, digits: Digits, epochs: int) -> None:
    """Trains with all optimizers on the same batches."""
    torch.manual_seed(SEED)
    model = MODELS["mlp"]()
    runs = {title: run_of(model, name, **kw) for title, (name, kw) in contestants().items()}
    for epoch in example.track(digits.batches(epochs, SEED), "race"):
        train_in_lockstep([*runs.values()], epoch)

    figure, axes = pyplot.subplots(figsize=(9, 5.4))
    rows, curves = [], {}
    for index, (title, run) in enumerate(runs.items()):
        curves[title] = losses = mean_of(run.losses, len(run.losses) // epochs)
        accuracy = run.accuracy(digits.test_images, digits.test_classes)
        turn, hue = divmod(index, len(COLOURS))
        example.curve(axes, f"race/{title}", range(1, epochs + 1), losses, color=COLOURS[hue],
                      linestyle=DASHES[(hue + turn) % len(DASHES)],
                      label=f"{title} ({accuracy:.1f}% of test images right)")  # fmt: skip
        warm = run.step_seconds[len(run.step_seconds) // epochs :]
        step = 1e6 * statistics.median(warm or run.step_seconds)
        settings = ", ".join(f"{key} {value}" for key, value in contestants()[title][1].items())
        rows.append((title, settings or "defaults", f"{losses[0]:.3f}", f"{losses[-1]:.4f}",
                     f"{accuracy:.2f}", f"{step:.1f}"))  # fmt: skip
        example.claim(f"{title} learns: the loss ends below a quarter of guessing's, log 10",
                      losses[-1] < math.log(10) / 4, f"{losses[-1]:.4f}")  # fmt: skip
        example.claim(f"{title}: at least {RIGHT:.0f}% of test images right",
                      accuracy >= RIGHT, f"{accuracy:.1f}%")  # fmt: skip
    axes.set(xlabel="epoch (1,200 images)", yscale="log",
             ylabel="training log-loss (nats, mean of the epoch)",
             title=f"Handwritten digits, 64-100-100-10, batches of {BATCH}: the race")  # fmt: skip
    plain_numbers(axes)
    axes.legend()
    example.save(figure, "digits_race")
    example.table(
        f"After {epochs} epochs (step: median time of optimizer.step() from the second epoch on)",
        ("optimizer", "settings", "first loss", "last loss", "test acc. %", "step us"),
        rows,
    )
    plain, fast = curves["SGD"], curves["SGD, momentum"]
    example.claim("Momentum is ahead of plain SGD at the same learning rate, in every epoch",
                  all(a < b for a, b in zip(fast, plain, strict=True)),
                  f"{fast[-1]:.4f} against {plain[-1]:.4f} at the end")  # fmt: skip


def large_batches(epoch: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """An epoch's batches joined in pairs, without a smaller last one."""
    whole = [batch for batch in epoch if len(batch[1]) == BATCH]
    pairs = zip(whole[::2], whole[1::2], strict=False)
    return [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]


def accumulate(example: Example, digits: Digits, epochs: int) -> None:
    """Trains with batches of 128, and with four accumulated micro-batches of 32."""
    torch.manual_seed(SEED)
    model = MODELS["mlp"]()
    titles = {"SGD, momentum": "SGD", "AdamW": "AdamW"}
    figure, panels = pyplot.subplots(1, len(titles), figsize=(11, 4.4), sharey=True)
    large, small = 2 * BATCH, 2 * BATCH // MICRO_BATCHES
    for axes, (title, name) in zip(panels, titles.items(), strict=True):
        settings = contestants()[title][1]
        whole = run_of(model, name, **settings)
        parts = run_of(model, name, **settings, accumulation_steps=MICRO_BATCHES)
        for epoch in example.track(digits.batches(epochs, SEED), f"micro-batches, {title}"):
            for images, classes in large_batches(epoch):
                whole.train_on(images, classes)
                for batch in zip(images.split(small), classes.split(small), strict=True):
                    parts.train_on(*batch)
        ours = mean_of(parts.losses, MICRO_BATCHES)
        steps = range(1, len(ours) + 1)
        example.curve(axes, f"micro-batches/{title}/one_batch", steps, whole.losses,
                      label=f"one batch of {large}", **WIDE)  # fmt: skip
        example.curve(axes, f"micro-batches/{title}/accumulated", steps, ours, color=BLACK,
                      linewidth=1, label=f"{MICRO_BATCHES} x {small} accumulated")  # fmt: skip
        axes.set(xlabel=f"update ({large} images)", yscale="log", title=title)
        plain_numbers(axes)
        axes.legend()
        pairs = zip(whole.losses, ours, strict=True)
        apart = torch.tensor([abs(a - b) / a for a, b in pairs]).amax().item()  # keeps a nan
        example.claim(f"{title}: accumulated micro-batches have the curve of the large batch, "
                      f"to {SAME:g} of the loss",
                      apart <= SAME, f"{apart:.1e} at most")  # fmt: skip
    panels[0].set_ylabel("training log-loss (nats)")
    figure.suptitle(f"accumulation_steps={MICRO_BATCHES}: micro-batches give the same curve")
    example.save(figure, "digits_micro_batches")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the race; returns the exit status."""
    example = Example(__doc__, arguments)
    digits = Digits.load()
    epochs = SHORT_EPOCHS if example.short else EPOCHS
    race(example, digits, epochs)
    accumulate(example, digits, epochs)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
