"""Your own optimizer: a Python class on torch, then a fused rule, and a check that they match.

The rule is the heavy ball, momentum with the learning rate inside the buffer:

    b = momentum * b + lr * grad
    p = p - b

The Python class takes ten lines. The fused rule is the files that CONTRIBUTING.md asks for, in
examples/custom_rule: a header, its Triton twin and a class. This script compiles the header with
the library's CPU driver (without torch, in seconds), runs the twin in Triton's interpreter, and
checks that both give the Python class's bits. The second picture shows what the rule is good for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import BLACK, BLUE, DASHES, GREY, ORANGE, VERMILION, WIDE, Example, plain_numbers
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn

import fusedopt

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "examples/custom_rule"
# A registry of this rule alone, so that the driver compiles in seconds.
REGISTRY = """#include "rules/heavy_ball.h"
#define FUSEDOPT_FOR_EACH_RULE(RULE) RULE("heavy_ball", HeavyBall)
"""
# The flags of setup.py that decide the bits of the arithmetic, with less optimization.
FLAGS = "-std=c++20 -O1 -fopenmp -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=off -shared"

LR, MOMENTUM = 0.05, 0.9
DROP = 0.02  # factor of the learning rate in the middle of a run


class HeavyBall(torch.optim.Optimizer):
    """The rule in Python: what you write first, to see whether it is any good."""

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                self.update(param, state["momentum_buffer"], group["lr"], group["momentum"])

    def update(self, param: Tensor, buffer: Tensor, lr: float, momentum: float) -> None:
        """Updates a parameter and its buffer in four passes over memory."""
        # Rounds after every operation, as the library's kernels do. add_(grad, alpha=lr) rounds
        # only once if the processor has an instruction for it.
        buffer.mul_(momentum).add_(param.grad * lr)
        param.sub_(buffer)


@functools.cache
def compiled() -> ctypes.CDLL:
    """The library's CPU driver with this rule, compiled."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        sys.exit(f"custom_rule needs a C++20 compiler; {compiler!r} is missing: set CXX")
    sources = [HERE / "step.cpp", *ROOT.glob("csrc/core/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    with tempfile.TemporaryDirectory() as folder:
        registry, library = Path(folder, "rules/all.h"), Path(folder, "driver.so")
        registry.parent.mkdir()
        registry.write_text(REGISTRY)
        includes = [f"-I{place}" for place in (folder, HERE / "csrc", ROOT / "csrc")]
        command = [compiler, *FLAGS.split(), *includes, *map(str, sources), "-o", str(library)]
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(f"failed: {' '.join(command)}")
        return ctypes.CDLL(str(library))


class Compiled(HeavyBall):
    """The same, updated by the compiled header in the CPU driver."""

    def update(self, param: Tensor, buffer: Tensor, lr: float, momentum: float) -> None:
        """Updates in one pass over memory."""
        hyper = (ctypes.c_double * 2)(lr, momentum)
        states = (ctypes.c_void_p * 1)(buffer.data_ptr())
        arrays = (ctypes.c_void_p(t.data_ptr()) for t in (param, param.grad))
        first = ctypes.c_int64(1)  # the rule does not depend on the number of the step
        size = ctypes.c_int64(param.numel())
        compiled().step(b"heavy_ball", hyper, first, *arrays, states, size)


@functools.cache
def interpreted() -> tuple[ModuleType, Any]:
    """The twin, and the kernel of step.py, both for Triton's interpreter."""
    import triton

    # Triton chooses between compiler and interpreter when a function is decorated. So import the
    # library's kernels once more, under another name, together with the files of this rule.
    package = ModuleType("interpreted_kernels")
    package.__path__ = [str(ROOT / "triton_kernels"), str(HERE / "triton_kernels"), str(HERE)]
    sys.modules[package.__name__] = package
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        step = import_module("interpreted_kernels.step")
        return import_module("interpreted_kernels.heavy_ball"), step.kernel


class Twin(HeavyBall):
    """The same, updated by the Triton twin in Triton's interpreter."""

    def update(self, param: Tensor, buffer: Tensor, lr: float, momentum: float) -> None:
        """Updates in one block."""
        rule, kernel = interpreted()
        scalars, _ = rule.prepare(rule.Hyper(lr, momentum), ())
        block = 1 << (param.numel() - 1).bit_length()
        kernel[(1,)](param, param.grad, buffer, *scalars, param.numel(), block)


Make = Callable[..., torch.optim.Optimizer]


def train(make: Make, steps: int) -> tuple[list[float], list[Tensor]]:
    """Trains a small network on a sine; returns its losses and final parameters."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 64).unsqueeze(1)
    y = torch.sin(2 * x)
    model = nn.Sequential(nn.Linear(1, 37), nn.Tanh(), nn.Linear(37, 1))  # 37: vectors and a tail
    optimizer = make(model.parameters(), lr=LR, momentum=MOMENTUM)
    losses = []
    for step in range(steps):
        if step == steps // 2:
            optimizer.param_groups[0]["lr"] *= DROP
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, [parameter.detach() for parameter in model.parameters()]


def roll(make: Make, steps: int) -> list[float]:
    """Rolls a number down a slope of 1; returns how far it is after each step."""
    number = nn.Parameter(torch.zeros(()))
    optimizer = make([number], lr=LR, momentum=MOMENTUM)
    way = [0.0]
    for step in range(steps):
        if step == steps // 2:
            optimizer.param_groups[0]["lr"] *= DROP
        number.grad = torch.ones(())
        optimizer.step()
        way.append(-number.item())
    return way


def mark_drop(axes: Axes, step: int) -> None:
    """Draws a line where the learning rate drops."""
    axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate(f"learning rate times {DROP:g}", (step, 0.93), (4, 0), fontsize=8,
                  xycoords=axes.get_xaxis_transform(), textcoords="offset points")  # fmt: skip


def show_match(example: Example, steps: int) -> None:
    """Trains with the three implementations and compares their parameters."""
    makers: dict[str, Make] = {"Python class": HeavyBall, "fused rule": Compiled}
    try:
        import triton  # noqa: F401

        makers["Triton twin"] = Twin
    except ImportError as error:
        example.console.print(f"The Triton twin is left out: {error}; python -m pip install triton")
    thin = {"color": BLACK, "linewidth": 1}
    dots = {"color": VERMILION, "linestyle": (0, (1, 3)), "linewidth": 3.5}
    figure, axes = pyplot.subplots(figsize=(8, 4.6))
    runs = [train(make, steps) for make in example.track(makers.values(), "implementations")]
    for name, (losses, parameters), style in zip(makers, runs, (WIDE, thin, dots), strict=False):
        example.curve(axes, f"match/{name}", range(steps), losses, label=name, **style)
        if name != "Python class":
            same = all(torch.equal(*pair) for pair in zip(parameters, runs[0][1], strict=True))
            example.claim(f"{name}: after {steps} steps, bit for bit the Python class's parameters",
                          same and losses[-1] < losses[0] / 2,
                          "equal" if same else "they differ")  # fmt: skip
    mark_drop(axes, steps // 2)
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log",
             title="The heavy ball three times: the curves and the bits are the same")  # fmt: skip
    plain_numbers(axes)
    axes.legend()
    example.save(figure, "custom_rule")


def show_difference(example: Example) -> None:
    """Shows the difference to SGD's momentum when the learning rate changes."""
    steps, drop = 60, 30
    ball, sgd = (roll(make, steps) for make in (Compiled, fusedopt.SGD))
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    example.curve(axes, "difference/heavy_ball", range(steps + 1), ball, color=BLUE,
                  label="heavy ball: lr in the buffer")  # fmt: skip
    example.curve(axes, "difference/SGD", range(steps + 1), sgd, color=ORANGE, linestyle=DASHES[1],
                  label="fusedopt.SGD, momentum: lr outside")  # fmt: skip
    mark_drop(axes, drop)
    axes.set(xlabel="step", ylabel="way down a slope of 1 (no unit)",
             title="When the learning rate drops, the ball rolls on, and SGD stops")  # fmt: skip
    axes.legend(loc="upper left")
    example.save(figure, "custom_rule_rolls")
    apart = max(abs(a - b) for a, b in zip(ball[: drop + 1], sgd[: drop + 1], strict=True))
    example.claim("Until the learning rate changes, it is SGD with momentum",
                  apart <= 1e-5 * ball[drop], f"{apart:.1e} apart at most")  # fmt: skip
    on, off = ball[-1] - ball[drop], sgd[-1] - sgd[drop]
    example.claim("After the drop the ball rolls on ten times as far as SGD",
                  on > 10 * off, f"{on:.2f} against {off:.3f}")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds, trains and compares; returns the exit status."""
    example = Example(__doc__, arguments)
    show_match(example, 40 if example.short else 120)
    show_difference(example)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
