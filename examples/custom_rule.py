"""An optimizer of one's own: as a Python class on torch, then as a fused rule, shown to match.

The rule is the heavy ball: momentum with the learning rate inside the buffer,

    b = momentum * b + lr * grad
    p = p - b

First it is ten lines of Python. Then it is the files that CONTRIBUTING.md asks for, in
examples/custom_rule: a header, its Triton twin and a class. Here the header is compiled with the
library's CPU driver (no torch, some seconds), the twin runs in Triton's interpreter, and both must
give the Python class's bits. The second picture shows what the rule is for.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rule_build
import torch
from common import BLACK, BLUE, DASHES, GREY, ORANGE, VERMILION, Example, plain_numbers
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn

import fusedopt

STEPS, SHORT_STEPS = 120, 40
LR, MOMENTUM = 0.05, 0.9
DROP = 0.02  # what the learning rate is multiplied by in the middle of a run


class HeavyBall(torch.optim.Optimizer):
    """The rule in Python: what one writes first, to see whether it is any good."""

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter, each in four passes over memory."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                self.update(param, state["momentum_buffer"], group["lr"], group["momentum"])

    def update(self, param: Tensor, buffer: Tensor, lr: float, momentum: float) -> None:
        """Updates a parameter and its buffer."""
        # Multiplied, rounded, added, rounded, as the library's kernels do. add_(grad, alpha=lr)
        # would round once where the processor has an instruction for it.
        buffer.mul_(momentum).add_(param.grad * lr)
        param.sub_(buffer)


class Compiled(HeavyBall):
    """The same, updated by the compiled header in the CPU driver."""

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, lr, momentum)
        self.library = rule_build.library(rule_build.make_tree())

    def update(self, param: Tensor, buffer: Tensor, lr: float, momentum: float) -> None:
        """One pass over memory."""
        hyper = (ctypes.c_double * 2)(lr, momentum)
        states = (ctypes.c_void_p * 1)(buffer.data_ptr())
        rule = rule_build.RULE.encode()
        # This rule does not ask which step it is.
        self.library.step(
            rule, hyper, 1, param.data_ptr(), param.grad.data_ptr(), states, param.numel()
        )


# DeviceRow and DeviceChunk in csrc/cuda/table.h, which the twin's kernel reads.
ROW = np.dtype("u8, u8, 5u8, i8, i4, i4, i4, i4")
CHUNK = np.dtype("i8, i4, i4")


class Twin(HeavyBall):
    """The same, updated by the Triton twin in Triton's interpreter."""

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, lr, momentum)
        self.rule, self.kernels = rule_build.twin(rule_build.make_tree())

    def update(self, param: Tensor, buffer: Tensor, lr: float, momentum: float) -> None:
        """One row of a table, in one chunk."""
        import triton.language as tl

        types = (tl.float32, tl.float32, tl.float32)
        instance = self.kernels.Update(
            self.rule.update, self.rule.Scalars, tl.constexpr(0), 1, *types
        )
        scalars = self.rule.prepare(self.rule.Hyper(lr, momentum), 1, False)
        slot = np.array([1.0, *scalars], np.float32)  # the gradient's factor comes first
        arrays = (param.data_ptr(), param.grad.data_ptr(), (buffer.data_ptr(), 0, 0, 0, 0))
        row = np.array([(*arrays, 0, 0, -1, 1, 0)], ROW)
        chunk = np.array([(0, param.numel(), 0)], CHUNK)
        table = (row.ctypes.data, chunk.ctypes.data, 0, slot.ctypes.data, 1)
        self.kernels.fusedopt_update[(1,)](*table, 0, 0, 0, 0, instance)


Make = Callable[..., torch.optim.Optimizer]


def train(make: Make, steps: int, drop_at: int) -> tuple[list[float], list[Tensor]]:
    """Losses of a small network on a sine, and its parameters at the end."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 64).unsqueeze(1)
    y = torch.sin(2 * x)
    model = nn.Sequential(nn.Linear(1, 37), nn.Tanh(), nn.Linear(37, 1))  # 37: vectors and a tail
    optimizer = make(model.parameters(), lr=LR, momentum=MOMENTUM)
    losses = []
    for step in range(steps):
        if step == drop_at:
            optimizer.param_groups[0]["lr"] *= DROP
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, [parameter.detach() for parameter in model.parameters()]


def mark_drop(axes: Axes, step: int) -> None:
    """A line where the learning rate drops."""
    axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate(f"learning rate times {DROP:g}", (step, 0.93), (4, 0), fontsize=8,
                  xycoords=axes.get_xaxis_transform(), textcoords="offset points")  # fmt: skip


def show_match(example: Example, steps: int) -> None:
    """One curve three times."""
    makers: dict[str, Make] = {"Python class": HeavyBall, "fused rule": Compiled}
    try:
        import triton  # noqa: F401

        makers["Triton twin"] = Twin
    except ImportError as error:
        example.console.print(f"The Triton twin is left out: {error}; python -m pip install triton")
    styles = (
        {"color": "#9ccbe8", "linewidth": 7},
        {"color": BLACK, "linewidth": 1},
        {"color": VERMILION, "linestyle": (0, (1, 3)), "linewidth": 3.5},
    )
    figure, axes = pyplot.subplots(figsize=(8, 4.6))
    reference: list[Tensor] = []
    names = example.track([*makers], "implementations")
    for name, style in zip(names, styles, strict=False):
        losses, parameters = train(makers[name], steps, steps // 2)
        reference = reference or parameters
        tag = f"match/{name.replace(' ', '_')}"
        example.curve(axes, tag, range(steps), losses, label=name, **style)
        if name != "Python class":
            pairs = zip(parameters, reference, strict=True)
            same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
            learned = losses[-1] < losses[0] / 2
            example.claim(f"{name}: after {steps} steps, bit for bit the Python class's parameters",
                          same and learned, "equal" if same else "they differ")  # fmt: skip
    mark_drop(axes, steps // 2)
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log",
             title="The heavy ball three times: the curves and the bits are the same")  # fmt: skip
    plain_numbers(axes)
    axes.legend()
    figure.tight_layout()
    example.save(figure, "custom_rule")


def roll(make: Make, steps: int, drop_at: int) -> list[float]:
    """The way of a number down a slope of 1, until the learning rate is dropped to 0.02 of it."""
    number = nn.Parameter(torch.zeros(()))
    optimizer = make([number], lr=LR, momentum=MOMENTUM)
    way = [0.0]
    for step in range(steps):
        if step == drop_at:
            optimizer.param_groups[0]["lr"] *= DROP
        number.grad = torch.ones(())
        optimizer.step()
        way.append(-number.item())
    return way


def show_difference(example: Example) -> None:
    """Where it differs from SGD's momentum: when the learning rate changes."""
    steps, drop_at = 60, 30
    ball, sgd = (roll(make, steps, drop_at) for make in (Compiled, fusedopt.SGD))
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    example.curve(axes, "difference/heavy_ball", range(steps + 1), ball, color=BLUE,
                  label="heavy ball: lr in the buffer")  # fmt: skip
    example.curve(axes, "difference/SGD", range(steps + 1), sgd, color=ORANGE, linestyle=DASHES[1],
                  label="fusedopt.SGD, momentum: lr outside")  # fmt: skip
    mark_drop(axes, drop_at)
    axes.set(xlabel="step", ylabel="way down a slope of 1 (no unit)",
             title="When the learning rate drops, the ball rolls on, and SGD stops")  # fmt: skip
    axes.legend(loc="upper left")
    figure.tight_layout()
    example.save(figure, "custom_rule_rolls")
    apart = max(abs(a - b) for a, b in zip(ball[: drop_at + 1], sgd[: drop_at + 1], strict=True))
    example.claim("Until the learning rate changes, it is SGD with momentum",
                  apart <= 1e-5 * ball[drop_at], f"{apart:.1e} apart at most")  # fmt: skip
    on, off = ball[-1] - ball[drop_at], sgd[-1] - sgd[drop_at]
    example.claim("After the drop the ball rolls on ten times as far as SGD",
                  on > 10 * off, f"{on:.2f} against {off:.3f}")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds, trains and compares; the exit status."""
    example = Example(__doc__, arguments)
    torch.set_num_threads(1)  # the network is no work for two
    show_match(example, SHORT_STEPS if example.short else STEPS)
    show_difference(example)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
