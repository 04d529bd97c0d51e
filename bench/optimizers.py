"""Which optimizers there are, and the settings the benchmark runs them with.

The list is read from fusedopt itself, so a new optimizer joins the benchmark without a change here;
``SETTINGS`` only holds what differs from the optimizer's own defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

import fusedopt


@dataclass(frozen=True)
class Settings:
    """Keyword arguments of an optimizer, for each job.

    Attributes:
        train: for the digits job. The learning rates train both networks to about 97% and keep
            the trajectories smooth, so that two correct optimizers stay together.
        step: for the bare step. Only what decides how many states are moved; the learning rate is
            ``STEP_LR`` for all.
    """

    train: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)


SETTINGS: dict[str, Settings] = {
    "SGD": Settings(train={"lr": 0.05, "momentum": 0.9}, step={"momentum": 0.9}),
    "Adagrad": Settings(train={"lr": 0.02}),
    "RMSprop": Settings(train={"lr": 1e-3}),
    "Adam": Settings(train={"lr": 2e-3}),
    "AdamW": Settings(train={"lr": 1e-3, "weight_decay": 0.1}),
}

# Gradients never change in the step job: a small rate keeps thousands of equal steps finite.
STEP_LR = 1e-6


def names() -> list[str]:
    """Names of the optimizers fusedopt exports, those of ``SETTINGS`` first and in its order."""
    exported = [
        name
        for name, value in vars(fusedopt).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and not name.startswith("_")
    ]
    known = [name for name in SETTINGS if name in exported]
    return known + sorted(set(exported) - set(known))


def settings(name: str) -> Settings:
    """Settings of optimizer `name`; empty for one that runs with its own defaults."""
    return SETTINGS.get(name, Settings())


@cache
def count_states(name: str) -> int:
    """Number of states of a parameter's size that `name` keeps, found by taking one step."""
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = getattr(fusedopt, name)([parameter], lr=STEP_LR, **settings(name).step)
    optimizer.step()
    values = optimizer.state[parameter].values()
    return sum(isinstance(v, torch.Tensor) and v.shape == parameter.shape for v in values)
