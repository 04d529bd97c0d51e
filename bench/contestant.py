"""A step ready to be timed, and how one is made from an optimizer of any library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from . import optimizers

Step = Callable[[], object]
# Makes an optimizer from its name, parameters or groups, and settings.
Maker = Callable[..., Any]


@dataclass(frozen=True)
class Contestant:
    """A step ready to be timed.

    Attributes:
        step: takes one step.
        detail: says afterwards how the step was taken, where there is something to say.
    """

    step: Step
    detail: Callable[[], str] = lambda: ""


class Builder(Protocol):
    """What can build a contestant."""

    def build(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Contestant:
        """A step of `optimizer` over new parameters that have these gradients."""


def race_optimizer(
    make: Maker, name: str, gradients: Sequence[torch.Tensor], grouped: bool
) -> tuple[Any, Contestant]:
    """An optimizer with the step job's settings over copies of the gradients, and its step."""
    parameters = [torch.nn.Parameter(gradient.clone()) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    groups = [{"params": [parameter]} for parameter in parameters] if grouped else parameters
    made = make(name, groups, lr=optimizers.STEP_LR, **optimizers.settings(name).step)
    return made, Contestant(made.step)


def try_step(builder: Builder, optimizer: str, dtype: torch.dtype, device: str) -> str:
    """Why a step on two elements fails, which only the library knows; empty if it does not."""
    try:
        builder.build(optimizer, [torch.ones(2, dtype=dtype, device=device)]).step()
    except Exception as error:  # another library's code: it may raise anything
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return ""
