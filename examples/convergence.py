"""Which optimizer and learning rate gets a straight line through 30 points in 20,000 steps?

US homicide deaths by the age of the victim, 21 to 50, and the line through them that makes the sum
of the squares of its errors smallest. Ages are around 35 and the intercept around 1,000, so that
the loss is a valley 24,000 times steeper across than along: no learning rate of plain SGD is small
enough for the one and large enough for the other. Adagrad and Adam scale each coordinate and get
there; and so does plain SGD once both axes are scaled to 0..1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
WITHIN = 0.01  # of the optimum's loss, slope and intercept: converged
CONVERGED, CRAWLING, DIVERGED = "converged", "crawling", "diverged"

# By optimizer: its learning rates and how each ends.
RAW = {
    "SGD": {1e-6: CRAWLING, 5e-6: CRAWLING, 1e-5: CRAWLING, 5e-5: DIVERGED},
    "Adagrad": {1e-6: CRAWLING, 0.5: CRAWLING, 1.0: CRAWLING, 5.0: CRAWLING, 10.0: CONVERGED,
                50.0: CONVERGED},
    "Adam": {0.2: CONVERGED},
}  # fmt: skip
SCALED = {"SGD": {1e-5: CRAWLING, 1e-4: CONVERGED, 1e-2: CONVERGED}}


@dataclass(frozen=True)
class Line:
    """The least-squares line in closed form, in double.

    Attributes:
        loss: sum of the squared errors.
        slope: deaths a year of age.
        intercept: deaths at age 0.
    """

    loss: float
    slope: float
    intercept: float

    @staticmethod
    def through(x: Tensor, y: Tensor) -> Line:
        """The best line through these points."""
        x, y = x.double(), y.double()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        intercept = y.mean() - slope * x.mean()
        loss = (slope * x + intercept - y).square().sum()
        return Line(loss.item(), slope.item(), intercept.item())

    def verdict(self, reached: Sequence[float]) -> str:
        """How a run ended that reached this loss, slope and intercept."""
        if not all(map(math.isfinite, reached)):
            return DIVERGED
        best = (self.loss, self.slope, self.intercept)
        near = all(abs(a - b) <= WITHIN * abs(b) for a, b in zip(reached, best, strict=True))
        return CONVERGED if near else CRAWLING


class Runs:
    """Runs of one optimizer over the same points, each a param group with its own learning rate.

    The gradient of this loss is two sums, so it is computed as such, for all runs at once; it goes
    where a backward would put it. 20,000 steps then take a second instead of a minute.

    Args:
        make: the optimizer's class.
        rates: a learning rate for each run.
        x: of the points.
        y: of the points.
    """

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], rates: Sequence[float], x: Tensor,
        y: Tensor,
    ) -> None:  # fmt: skip
        self.x, self.y = x, y
        self.lines = torch.zeros(len(rates), 2)  # a run's slope and intercept: its parameter
        self.grads = torch.zeros_like(self.lines)
        groups = []
        for line, grad, lr in zip(self.lines, self.grads, rates, strict=True):
            parameter = torch.nn.Parameter(line)  # a view, as the gradient is
            parameter.grad = grad
            groups.append({"params": [parameter], "lr": lr})
        self.optimizer = make(groups, lr=1.0)

    def errors(self) -> Tensor:
        """Of every run's line at every point."""
        return self.lines[:, :1] * self.x + self.lines[:, 1:] - self.y

    def backward(self) -> None:
        """Fills the gradients."""
        errors = self.errors()
        torch.mul(errors @ self.x, 2, out=self.grads[:, 0])
        torch.mul(errors.sum(1), 2, out=self.grads[:, 1])

    def state(self) -> Tensor:
        """Loss, slope and intercept of every run."""
        return torch.column_stack([self.errors().square().sum(1), self.lines])


def train(runs: Runs, marks: Sequence[int], example: Example, label: str) -> Tensor:
    """Trains to the last mark; by mark and run: loss, slope and intercept."""
    states, done = [], 0
    for mark in example.track(marks, label):
        for _ in range(mark - done):
            runs.backward()
            runs.optimizer.step()
        done = mark
        states.append(runs.state())
    return torch.stack(states)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; the exit status."""
    example = Example(__doc__, arguments)
    torch.set_num_threads(1)  # 30 points are no work for two
    x, y = torch.tensor(AGES, dtype=torch.float32), torch.tensor(DEATHS, dtype=torch.float32)
    # Marks are dense at first: that is where runs diverge or settle.
    count = 60 if example.short else 240
    marks = torch.logspace(0, math.log10(ITERATIONS), count, dtype=torch.float64)
    steps = [0, *sorted({round(mark) for mark in marks.tolist()})]

    def unit(values: Tensor) -> Tensor:
        return (values - values.min()) / (values.max() - values.min())

    rows = []
    problems = (("raw", RAW, x, y), ("scaled", SCALED, unit(x), unit(y)))
    for problem, optimizers, xs, ys in problems:
        best = Line.through(xs, ys)
        histories = {}
        for name, expected in optimizers.items():
            runs = Runs(getattr(fusedopt, name), [*expected], xs, ys)
            history = train(runs, steps, example, f"{name}, {problem} axes")
            histories[name] = history
            for run, (lr, wanted) in enumerate(expected.items()):
                reached = history[-1, run].tolist()
                verdict = best.verdict(reached)
                rows.append((f"{name} {lr:g}", problem, *(f"{v:.4g}" for v in reached), verdict))
                example.claim(
                    f"{name}, lr {lr:g}, {problem} axes: {wanted}", verdict == wanted,
                    f"{verdict}: loss {reached[0]:.4g}, optimum {best.loss:.4g}",
                )  # fmt: skip
        rows.append(("least squares", problem, f"{best.loss:.4g}", f"{best.slope:.4g}",
                     f"{best.intercept:.4g}", "closed form"))  # fmt: skip
        if problem == "raw":
            moved = histories["Adagrad"][:, 0, 1:].abs().max().item()
            example.claim("Adagrad at 1e-6 stands still: slope and intercept stay below 0.001",
                          moved < 1e-3, f"{moved:.1e} at most")  # fmt: skip
            draw(example, problem, histories, optimizers, steps, best)
        else:
            draw_scaled(example, histories["SGD"], [*SCALED["SGD"]], steps, x, y)
    example.table(
        f"After {ITERATIONS:,} iterations (converged: loss, slope, intercept within {WITHIN:.0%})",
        ("run", "axes", "loss", "slope", "intercept", "outcome"),
        rows,
    )
    return example.finish()


ROWS = (
    ("loss", "loss (sum of squared deaths)"),
    ("slope", "slope (deaths a year of age)"),
    ("intercept", "intercept (deaths)"),
)


def draw(
    example: Example, problem: str, histories: dict[str, Tensor],
    optimizers: dict[str, dict[float, str]], steps: Sequence[int], best: Line,
) -> None:  # fmt: skip
    """Loss, slope and intercept below one another, a column an optimizer."""
    figure, panels = pyplot.subplots(3, len(histories), figsize=(11.5, 8.5), sharex=True,
                                     sharey="row")  # fmt: skip
    for column, (name, history) in enumerate(histories.items()):
        for row, (what, label) in enumerate(ROWS):
            axes = panels[row][column]
            axes.axhline(getattr(best, what), color=BLACK, linewidth=0.8, linestyle=":")
            for run, (lr, outcome) in enumerate(optimizers[name].items()):
                # What diverges jumps from side to side at every iteration.
                thin = {"linestyle": "-", "linewidth": 0.5, "zorder": 1.5}
                style = thin if outcome == DIVERGED else {"linestyle": DASHES[run]}
                example.curve(
                    axes, f"{problem}/{what}/{name}_{lr:g}", steps, history[:, run, row].tolist(),
                    color=COLOURS[run], label=f"lr {lr:g}", **style,
                )  # fmt: skip
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(0, steps[-1])
            if column == 0:
                axes.set_ylabel(label)
        panels[0][column].set_title(name)
        panels[0][column].legend(loc="lower left", ncols=3)
        panels[2][column].set_xlabel("iteration")
    panels[0][0].set_yscale("log")
    panels[0][0].set_ylim(best.loss / 20, 1e8)
    # What diverges leaves the picture; the others are what it is about.
    panels[1][0].set_ylim(-25, 25)
    panels[2][0].set_ylim(-250, 1300)
    figure.suptitle("A straight line through 30 counts: where 20,000 iterations lead\n"
                    "(dotted: the least-squares optimum)")  # fmt: skip
    figure.tight_layout()
    example.save(figure, "convergence")


def draw_scaled(
    example: Example, history: Tensor, rates: Sequence[float], steps: Sequence[int], x: Tensor,
    y: Tensor,
) -> None:  # fmt: skip
    """Plain SGD's loss on scaled axes, and its lines through the points."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2))
    right.scatter(x, y, s=18, color=BLACK, label="counts")
    scale = (y.max() - y.min()) / (x.max() - x.min())
    for run, lr in enumerate(rates):
        style = {"color": COLOURS[run], "linestyle": DASHES[run], "label": f"SGD, lr {lr:g}"}
        example.curve(left, f"scaled/loss/SGD_{lr:g}", steps, history[:, run, 0].tolist(), **style)
        _, slope, intercept = history[-1, run].tolist()
        line = (slope * (x - x.min()) * scale) + intercept * (y.max() - y.min()) + y.min()
        example.curve(right, f"scaled/line/SGD_{lr:g}", x.int().tolist(), line.tolist(), **style)
    left.set(xscale="symlog", yscale="log", xlim=(0, steps[-1]), xlabel="iteration",
             ylabel="loss (sum of squares, scaled)", title="Both axes scaled to 0..1")  # fmt: skip
    right.set(xlabel="age (years)", ylabel="homicide deaths a year",
              title=f"The lines after {steps[-1]:,} iterations")  # fmt: skip
    left.legend()
    right.legend()
    figure.suptitle("The same counts, scaled: plain SGD converges")
    figure.tight_layout()
    example.save(figure, "convergence_scaled")


if __name__ == "__main__":
    sys.exit(main())
