"""Which optimizers and learning rates fit a line to 30 points in 20,000 steps?

The points are US homicide deaths by the age of the victim, 21 to 50; the line minimizes the sum of
squared errors. Ages are around 35 and the intercept is around 1,000, which makes the loss a valley
24,000 times steeper across than along: no learning rate of plain SGD suits both directions. Adagrad
and Adam scale each coordinate and reach the optimum, and so does SGD once both axes are scaled to
0..1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from common import BLACK, COLOURS, DASHES, Example
from matplotlib import pyplot
from torch import Tensor

import fusedopt

# Deaths by homicide in the United States in one year, by age: public counts of the Centers for
# Disease Control and Prevention (National Center for Health Statistics, "Underlying Cause of
# Death", CDC WONDER online database).
AGES = range(21, 51)
DEATHS = (
    657, 639, 656, 649, 615, 569, 492, 534, 485, 444, 424, 452, 435, 413, 378,
    369, 329, 297, 267, 281, 232, 244, 259, 239, 255, 226, 201, 217, 199, 206,
)  # fmt: skip

ITERATIONS = 20_000
WITHIN = 0.01  # relative distance of a converged run to the optimal loss, slope and intercept
CONVERGED, CRAWLING, DIVERGED = "converged", "crawling", "diverged"

# For each optimizer, its learning rates and how each run ends.
RAW = {
    "SGD": {1e-6: CRAWLING, 5e-6: CRAWLING, 1e-5: CRAWLING, 5e-5: DIVERGED},
    "Adagrad": {1e-6: CRAWLING, 0.5: CRAWLING, 1.0: CRAWLING, 5.0: CRAWLING, 10.0: CONVERGED,
                50.0: CONVERGED},
    "Adam": {0.2: CONVERGED},
}  # fmt: skip
SCALED = {"SGD": {1e-5: CRAWLING, 1e-4: CONVERGED, 1e-2: CONVERGED}}


class Line(NamedTuple):
    """A line, with the sum of its squared errors as loss."""

    loss: float
    slope: float
    intercept: float

    @staticmethod
    def through(x: Tensor, y: Tensor) -> Line:
        """The least-squares line, in closed form in double."""
        x, y = x.double(), y.double()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        intercept = y.mean() - slope * x.mean()
        loss = (slope * x + intercept - y).square().sum()
        return Line(loss.item(), slope.item(), intercept.item())

    def verdict(self, reached: Sequence[float]) -> str:
        """How a run ended that reached this loss, slope and intercept; self is the optimum."""
        if not all(map(math.isfinite, reached)):
            return DIVERGED
        near = all(abs(a - b) <= WITHIN * abs(b) for a, b in zip(reached, self, strict=True))
        return CONVERGED if near else CRAWLING


class Runs:
    """Runs of one optimizer over the same points, each a param group with its own learning rate.

    The gradient is two sums, computed here for all runs at once and stored where a backward would
    put it. 20,000 steps then take a second instead of a minute.
    """

    def __init__(self, name: str, rates: Sequence[float], x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.lines = torch.zeros(len(rates), 2)  # each row, slope and intercept, is a parameter
        self.grads = torch.zeros_like(self.lines)
        groups = []
        for line, grad, lr in zip(self.lines, self.grads, rates, strict=True):
            parameter = torch.nn.Parameter(line)  # a view, as the gradient is
            parameter.grad = grad
            groups.append({"params": [parameter], "lr": lr})
        self.optimizer: torch.optim.Optimizer = getattr(fusedopt, name)(groups, lr=1.0)

    def errors(self) -> Tensor:
        """Error of every run's line at every point."""
        return self.lines[:, :1] * self.x + self.lines[:, 1:] - self.y

    def backward(self) -> None:
        """Computes the gradients."""
        errors = self.errors()
        torch.mul(errors @ self.x, 2, out=self.grads[:, 0])
        torch.mul(errors.sum(1), 2, out=self.grads[:, 1])

    def state(self) -> Tensor:
        """Loss, slope and intercept of every run."""
        return torch.column_stack([self.errors().square().sum(1), self.lines])

    def train(self, marks: Sequence[int], example: Example, label: str) -> Tensor:
        """Trains to the last mark; returns the states at the marks."""
        states, done = [], 0
        for mark in example.track(marks, label):
            for _ in range(mark - done):
                self.backward()
                self.optimizer.step()
            done = mark
            states.append(self.state())
        return torch.stack(states)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status."""
    example = Example(__doc__, arguments)
    x, y = torch.tensor(AGES, dtype=torch.float32), torch.tensor(DEATHS, dtype=torch.float32)
    # Marks are dense at first, where runs diverge or settle.
    count = 60 if example.short else 240
    marks = torch.logspace(0, math.log10(ITERATIONS), count, dtype=torch.float64)
    steps = [0, *sorted({round(mark) for mark in marks.tolist()})]
    unit_x, unit_y = ((v - v.min()) / (v.max() - v.min()) for v in (x, y))

    rows = []
    histories: dict[tuple[str, str], Tensor] = {}
    problems = (("raw", RAW, x, y), ("scaled", SCALED, unit_x, unit_y))
    for problem, optimizers, xs, ys in problems:
        best = Line.through(xs, ys)
        for name, expected in optimizers.items():
            runs = Runs(name, [*expected], xs, ys)
            history = runs.train(steps, example, f"{name}, {problem} axes")
            histories[problem, name] = history
            for reached, (lr, wanted) in zip(history[-1].tolist(), expected.items(), strict=True):
                verdict = best.verdict(reached)
                rows.append((f"{name} {lr:g}", problem, *(f"{v:.4g}" for v in reached), verdict))
                found = f"{verdict}: loss {reached[0]:.4g}, optimum {best.loss:.4g}"
                title = f"{name}, lr {lr:g}, {problem} axes"
                example.claim(f"{title}: {wanted}", verdict == wanted, found)
        rows.append(("least squares", problem, *(f"{v:.4g}" for v in best), "closed form"))
    moved = histories["raw", "Adagrad"][:, 0, 1:].abs().max().item()
    example.claim("Adagrad at 1e-6 stands still: slope and intercept stay below 0.001",
                  moved < 1e-3, f"{moved:.1e} at most")  # fmt: skip
    draw_raw(example, histories, steps, Line.through(x, y))
    draw_scaled(example, histories["scaled", "SGD"], steps, x, y)
    example.table(
        f"After {ITERATIONS:,} iterations (converged: loss, slope, intercept within {WITHIN:.0%})",
        ("run", "axes", *Line._fields, "outcome"),
        rows,
    )
    return example.finish()


def draw_raw(
    example: Example, histories: dict[tuple[str, str], Tensor], steps: Sequence[int], best: Line
) -> None:
    """A row each for loss, slope and intercept, a column for each optimizer."""
    figure, panels = pyplot.subplots(3, len(RAW), figsize=(11.5, 8.5), sharex=True, sharey="row")
    labels = "loss (sum of squared deaths)", "slope (deaths a year of age)", "intercept (deaths)"
    for column, (name, expected) in enumerate(RAW.items()):
        for row, (what, label) in enumerate(zip(Line._fields, labels, strict=True)):
            axes = panels[row][column]
            axes.axhline(best[row], color=BLACK, linewidth=0.8, linestyle=":")
            for run, (lr, outcome) in enumerate(expected.items()):
                # A diverging run jumps from side to side at every iteration.
                thin = {"linestyle": "-", "linewidth": 0.5, "zorder": 1.5}
                style = thin if outcome == DIVERGED else {"linestyle": DASHES[run]}
                values = histories["raw", name][:, run, row].tolist()
                example.curve(axes, f"raw/{what}/{name}_{lr:g}", steps, values,
                              color=COLOURS[run], label=f"lr {lr:g}", **style)  # fmt: skip
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(0, steps[-1])
            if column == 0:
                axes.set_ylabel(label)
        panels[0][column].set_title(name)
        panels[0][column].legend(loc="lower left", ncols=3)
        panels[2][column].set_xlabel("iteration")
    panels[0][0].set(yscale="log", ylim=(best.loss / 20, 1e8))  # diverging runs leave the picture
    panels[1][0].set_ylim(-25, 25)
    panels[2][0].set_ylim(-250, 1300)
    figure.suptitle("A straight line through 30 counts: where 20,000 iterations lead\n"
                    "(dotted: the least-squares optimum)")  # fmt: skip
    example.save(figure, "convergence")


def draw_scaled(
    example: Example, history: Tensor, steps: Sequence[int], x: Tensor, y: Tensor
) -> None:
    """SGD's loss on scaled axes, and its lines through the points."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2))
    right.scatter(x, y, s=18, color=BLACK, label="counts")
    height = y.max() - y.min()
    for run, lr in enumerate(SCALED["SGD"]):
        style = {"color": COLOURS[run], "linestyle": DASHES[run], "label": f"SGD, lr {lr:g}"}
        example.curve(left, f"scaled/loss/SGD_{lr:g}", steps, history[:, run, 0].tolist(), **style)
        _, slope, intercept = history[-1, run].tolist()
        line = (slope * (x - x.min()) / (x.max() - x.min()) + intercept) * height + y.min()
        example.curve(right, f"scaled/line/SGD_{lr:g}", AGES, line.tolist(), **style)
    left.set(xscale="symlog", yscale="log", xlim=(0, steps[-1]), xlabel="iteration",
             ylabel="loss (sum of squares, scaled)", title="Both axes scaled to 0..1")  # fmt: skip
    right.set(xlabel="age (years)", ylabel="homicide deaths a year",
              title=f"The lines after {steps[-1]:,} iterations")  # fmt: skip
    left.legend()
    right.legend()
    figure.suptitle("The same counts, scaled: plain SGD converges")
    example.save(figure, "convergence_scaled")


if __name__ == "__main__":
    sys.exit(main())
