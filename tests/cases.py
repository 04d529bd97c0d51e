"""The optimizers under test: one row each. Adding an optimizer to every suite is adding a row here.

A row's samples are every keyword combination that torch's own test database
(``torch.testing._internal.common_optimizers``) lists for the optimizer on the CPU, written out, and
after them combinations that it lacks: weight decay under every flag that changes the formula, and
learning rates and betas given as tensors. ``tests/test_cases.py`` fails when torch's list has a
combination that is missing here.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import oracle
import torch


@dataclass(frozen=True)
class Sample:
    """One combination of keyword arguments.

    Attributes:
        kwargs: What the constructor gets besides the parameters.
        desc: What is special about it, as torch's database words it.
    """

    kwargs: dict[str, Any]
    desc: str


@dataclass(frozen=True)
class Case:
    """One optimizer.

    Attributes:
        name: Name of its rule header, docs page and Python module.
        fused_class: Name of the class in `fusedopt`.
        torch_class: The class of torch.optim it replaces.
        rule: Name in `oracle.RULES`.
        states: State tensors that some sample creates, in torch's order, without "step".
        has_step: Whether torch keeps a step count in the state.
        float16_kwargs: What fp16 parameters need besides a sample's own keywords.
        samples: Keyword combinations.
    """

    name: str
    fused_class: str
    torch_class: type[torch.optim.Optimizer]
    rule: str
    states: tuple[str, ...]
    has_step: bool
    samples: tuple[Sample, ...]
    float16_kwargs: tuple[tuple[str, Any], ...] = ()

    def fused(self) -> Any:
        """The class of fusedopt, imported when it is needed."""
        import fusedopt

        return getattr(fusedopt, self.fused_class)

    def kwargs(self, sample: Sample, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """A fresh copy of a sample's keywords (its tensors too) for parameters of `dtype`."""
        extra = dict(self.float16_kwargs) if dtype == torch.float16 else {}
        return {**deepcopy(sample.kwargs), **extra}


def oracle_hyper(rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A param group's hyperparameters as keyword arguments of the oracle, tensors as floats."""
    # AdamW hands its keywords to Adam.
    function = oracle.adam if rule == "adamw" else oracle.RULES[rule]
    names = inspect.signature(function).parameters
    hyper: dict[str, Any] = {}
    for key, value in group.items():
        if key not in names:
            continue
        if isinstance(value, tuple):
            hyper[key] = tuple(float(v) for v in value)
        else:
            hyper[key] = value if isinstance(value, bool) else float(value)
    return hyper


_SGD = (
    Sample({}, "default"),
    Sample({"lr": 1e-2}, "non-default lr"),
    Sample({"lr": torch.tensor(0.001)}, "tensor lr"),
    Sample({"weight_decay": 0.5}, "non-zero weight_decay"),
    Sample({"momentum": 0.9}, "momentum"),
    Sample({"weight_decay": 0.1, "maximize": True}, "maximize"),
    Sample({"momentum": 0.9, "dampening": 0.5}, "dampening"),
    Sample({"momentum": 0.9, "weight_decay": 0.1}, "weight_decay w/ momentum"),
    Sample({"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, "nesterov"),
    # Beyond torch's database.
    Sample({"momentum": 0.9, "nesterov": True}, "nesterov without weight_decay"),
    Sample({"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}, "dampening, weight_decay"),
    Sample(
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        "maximize, nesterov, weight_decay",
    ),
    Sample(
        {"lr": torch.tensor(0.01), "momentum": 0.9, "weight_decay": 0.1},
        "tensor lr, momentum, weight_decay",
    ),
)

_ADAGRAD = (
    Sample({}, "default"),
    Sample({"weight_decay": 0.1}, "nonzero weight_decay"),
    Sample({"weight_decay": 0.1, "maximize": True}, "maximize"),
    Sample({"lr": 0.1}, "non-default lr"),
    Sample({"initial_accumulator_value": 0.1, "weight_decay": 0.1}, "initial_accumulator_value"),
    Sample({"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1}, "lr_decay"),
    Sample({"lr": torch.tensor(0.001)}, "Tensor lr"),
    # Beyond torch's database.
    Sample(
        {"lr": torch.tensor(0.1), "lr_decay": 0.5, "weight_decay": 0.1, "maximize": True},
        "Tensor lr, lr_decay, weight_decay, maximize",
    ),
)

_RMSPROP = (
    Sample({}, "default"),
    Sample({"lr": 1e-3}, "non-default lr"),
    Sample({"weight_decay": 0.1}, "nonzero weight_decay"),
    Sample({"maximize": True}, "maximize"),
    Sample({"weight_decay": 0.1, "centered": True}, "centered"),
    Sample({"maximize": True, "weight_decay": 0.1}, "maximize, weight_decay"),
    Sample({"weight_decay": 0.1, "centered": True, "momentum": 0.1}, "momentum"),
    Sample(
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
        "maximize, centered, weight_decay, w/ momentum",
    ),
    # Beyond torch's database.
    Sample({"momentum": 0.9}, "momentum, not centered"),
    Sample({"momentum": 0.9, "weight_decay": 0.1}, "momentum, weight_decay, not centered"),
    Sample({"centered": True}, "centered without weight_decay"),
    Sample({"alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1}, "non-default alpha and eps"),
    Sample({"lr": torch.tensor(0.001), "weight_decay": 0.1}, "Tensor lr, weight_decay"),
)

# torch's database lists the same samples for Adam and AdamW.
_ADAM = (
    Sample({}, "default"),
    Sample({"lr": 0.01}, "non-default lr"),
    Sample({"weight_decay": 0.1}, "nonzero weight_decay"),
    Sample({"weight_decay": 0.1, "maximize": True}, "maximize"),
    Sample({"weight_decay": 0.1, "amsgrad": True}, "amsgrad"),
    # Beyond torch's database.
    Sample({"weight_decay": 0.0}, "zero weight_decay"),
    Sample({"weight_decay": 0.0, "amsgrad": True}, "amsgrad without weight_decay"),
    Sample({"weight_decay": 0.1, "amsgrad": True, "maximize": True}, "maximize, amsgrad"),
    Sample({"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}, "non-default betas and eps"),
    Sample({"lr": torch.tensor(0.01), "weight_decay": 0.1}, "Tensor lr, weight_decay"),
    Sample(
        {
            "lr": torch.tensor(0.001),
            "betas": (torch.tensor(0.9), torch.tensor(0.99)),
            "weight_decay": 0.1,
            "amsgrad": True,
        },
        "Tensor lr, Tensor betas, amsgrad, weight_decay",
    ),
    Sample(
        {"betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]])), "weight_decay": 0.1},
        "Tensor betas of any shape, weight_decay",
    ),
)

# torch gives Adam eps = 0.1 with fp16 parameters, and so must every comparison. Squares of small
# gradients round to zero in an fp16 exp_avg_sq (its smallest number is 6e-8) while exp_avg keeps
# the gradient, so the quotient is exp_avg / eps: thousands of times the learning rate at 1e-8. In
# torch's step, which rounds eps to fp16 as well, 1e-8 is zero and the quotient infinite or NaN.
_ADAM_FLOAT16 = (("eps", 0.1),)

_ADAM_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

CASES = (
    Case("sgd", "SGD", torch.optim.SGD, "sgd", ("momentum_buffer",), False, _SGD),
    Case("adagrad", "Adagrad", torch.optim.Adagrad, "adagrad", ("sum",), True, _ADAGRAD),
    Case(
        "rmsprop",
        "RMSprop",
        torch.optim.RMSprop,
        "rmsprop",
        ("square_avg", "momentum_buffer", "grad_avg"),
        True,
        _RMSPROP,
    ),
    Case(
        "adam",
        "Adam",
        torch.optim.Adam,
        "adam",
        _ADAM_STATES,
        True,
        (
            *_ADAM,
            Sample({"weight_decay": 0.1, "decoupled_weight_decay": True}, "decoupled_weight_decay"),
            Sample(
                {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True},
                "decoupled_weight_decay, amsgrad",
            ),
        ),
        _ADAM_FLOAT16,
    ),
    Case("adamw", "AdamW", torch.optim.AdamW, "adamw", _ADAM_STATES, True, _ADAM, _ADAM_FLOAT16),
)


def case_samples() -> list[Any]:
    """Every (case, sample) pair as pytest parameters with readable names."""
    import pytest

    return [
        pytest.param(case, sample, id=f"{case.name}-{sample.desc.replace(' ', '_')}")
        for case in CASES
        for sample in case.samples
    ]
