"""Which optimizers there are, and the settings the benchmark runs them with.

The list is read from fusedopt itself, so a new optimizer joins the benchmark without a change here;
``SETTINGS`` only holds what differs from the optimizer's own defaults.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

import fusedopt
from fusedopt._extension import _C


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
    found = {name: getattr(fusedopt, name) for name in fusedopt.__all__}
    kind = torch.optim.Optimizer
    exported = {n for n, cls in found.items() if isinstance(cls, type) and issubclass(cls, kind)}
    return [*filter(exported.__contains__, SETTINGS), *sorted(exported - SETTINGS.keys())]


def settings(name: str) -> Settings:
    """Settings of optimizer `name`; empty for one that runs with its own defaults."""
    return SETTINGS.get(name, Settings())


def most_used(names: list[str]) -> str:
    """The optimizer people use most, or the first of those there are."""
    return "AdamW" if "AdamW" in names else names[0]


@cache
def count_states(name: str) -> int:
    """Number of states of a parameter's size that `name` keeps with the step job's settings."""
    cls = getattr(fusedopt, name)
    made = cls([torch.nn.Parameter(torch.ones(1))], lr=STEP_LR, **settings(name).step)
    return len(_C.state_names(cls._rule, made.param_groups[0]))


def variants(name: str) -> Iterator[dict[str, Any]]:
    """Keywords for every formula of an optimizer: its flags, and momentum without and with."""
    cls = getattr(fusedopt, name)
    known = inspect.signature(cls).parameters
    hyper = [key for key in _C.rules()[cls._rule]["hyper"] if key in known]
    choices = {key: (False, True) for key in hyper if known[key].default is False}
    if "momentum" in hyper:
        choices["momentum"] = (0.0, 0.9)
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        try:
            cls([torch.nn.Parameter(torch.ones(1))], lr=0.01, **chosen)
        except ValueError:
            continue  # such as Nesterov's momentum without momentum
        yield {"lr": 0.01, "weight_decay": 0.1, **chosen}
