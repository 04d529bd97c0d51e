"""The optimizers under test: a row each, which puts it into every suite, and its formula beside it.

A formula is a function ``(param, grad, states, step, **hyper) -> (new_param, new_states)`` over
float64 arrays, written from the paper and as torch.optim documents it, in numpy, once and nowhere
else. Its keywords are the fields of the rule's C++ ``Hyper`` in their order, by torch's names, and
``maximize``. It never writes its arguments. ``states`` maps torch's ``state_dict`` names to arrays;
new states are returned in the order of the rule's ``states(variant)``. ``step`` counts from 1.

A row's samples are every keyword combination that torch's own test database
(``torch.testing._internal.common_optimizers``) lists for the optimizer on the CPU, written out, and
after them combinations that it lacks: weight decay under every flag that changes the formula, and
learning rates and betas given as tensors. ``tests/test_torch_database.py`` fails when torch's list
has a combination that is missing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
States = dict[str, Array]


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
class State:
    """A state tensor of a rule.

    Attributes:
        ulps: As `Case.param_ulps`, of the state.
        earlier: What earlier steps could have left in it, from a mean gradient seen so far and
            numbers between 0.5 and 2.
    """

    ulps: int
    earlier: Callable[[Array, Array], Array]


@dataclass(frozen=True, eq=False)
class Case:
    """One optimizer.

    Attributes:
        name: Name of its rule header, docs page and Python module.
        fused_class: Name of the class in `fusedopt`.
        torch_class: The class of torch.optim it replaces.
        formula: The float64 formula.
        param_ulps: Half the number of roundings on the longest path to the parameter; how it is
            used, `tolerances` says.
        states: State tensors that some sample creates, in torch's order, without "step".
        samples: Keyword combinations.
        richest: The sample that asks for most of what the rule can do.
        has_step: Whether torch keeps a step count in the state.
        lazy_state: Whether the first step makes the state out of the gradient; others are zeros.
        sparse: Whether torch accepts sparse gradients.
        later: Keys of groups that checkpoints of torch's first release of the class lack.
        float16_kwargs: What fp16 parameters need besides a sample's own keywords.
    """

    name: str
    fused_class: str
    torch_class: type[torch.optim.Optimizer]
    formula: Callable[..., tuple[Array, States]]
    param_ulps: int
    states: dict[str, State]
    samples: tuple[Sample, ...]
    richest: Sample
    has_step: bool = True
    lazy_state: bool = False
    sparse: bool = False
    later: Iterable[str] = ()
    float16_kwargs: tuple[tuple[str, Any], ...] = ()

    def fused(self) -> Any:
        """The class of fusedopt, imported when it is needed."""
        import fusedopt

        return getattr(fusedopt, self.fused_class)

    def kwargs(self, sample: Sample, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """A fresh copy of a sample's keywords (its tensors too) for parameters of `dtype`."""
        extra = dict(self.float16_kwargs) if dtype == torch.float16 else {}
        return {**deepcopy(sample.kwargs), **extra}

    # ---- The formula ----------------------------------------------------------------------------

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The formula's keywords and their defaults."""
        parameters = inspect.signature(self.formula).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """A param group's hyperparameters as keywords of the formula, tensors as floats."""
        hyper: dict[str, Any] = {}
        for key in self.defaults.keys() & group.keys():
            value = group[key]
            if isinstance(value, tuple):
                hyper[key] = tuple(float(v) for v in value)
            else:
                hyper[key] = value if isinstance(value, bool) else float(value)
        return hyper

    def state_names(self, hyper: dict[str, Any]) -> list[str]:
        """The states that are kept under these keywords of the formula, in its order."""
        zero = np.zeros(1)
        return list(self.formula(zero, zero, dict.fromkeys(self.states, zero), 1, **hyper)[1])

    @property
    def stateful(self) -> dict[str, Any]:
        """Keywords under which it keeps a state."""
        kept = (s for s in self.samples if self.state_names(self.hyper(s.kwargs)))
        return {"lr": 0.1, **next(kept).kwargs}

    # ---- What torch's class can do --------------------------------------------------------------

    @property
    def takes(self) -> Iterable[str]:
        """Names of the keywords of torch's class."""
        return inspect.signature(self.torch_class).parameters

    @property
    def capturable(self) -> bool:
        """Whether it can count steps on a device when it is asked to."""
        return "capturable" in self.takes

    @property
    def replayable(self) -> bool:
        """Whether no step count ties a step to the host."""
        return self.capturable or not self.has_step

    @property
    def fused_on_a_gpu(self) -> bool:
        """Whether it takes `fused` with parameters on a GPU."""
        return "fused" in self.takes and self.replayable

    @property
    def momentum_key(self) -> str | None:
        """The keyword that schedulers cycle as momentum."""
        return next((key for key in ("betas", "momentum") if key in self.takes), None)


def sgd(
    param: Array,
    grad: Array,
    states: States,
    step: int,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Array, States]:
    """Stochastic gradient descent with momentum (Sutskever et al., 2013), as torch.optim.SGD."""
    g = -grad if maximize else grad
    g = g + weight_decay * param
    if momentum == 0:
        return param - lr * g, {}
    if "momentum_buffer" in states:
        b = momentum * states["momentum_buffer"] + (1 - dampening) * g
    else:  # the first step takes the gradient whole: dampening starts with the second
        b = g
    d = g + momentum * b if nesterov else b
    return param - lr * d, {"momentum_buffer": b}


_RICHEST_SGD = Sample(
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}, "dampening, weight_decay"
)
SGD = Case(
    "sgd",
    "SGD",
    torch.optim.SGD,
    sgd,
    # Buffer: (1 - dampening), product, sum 3; Nesterov: momentum, product, sum 3; lr, product 2;
    # difference 1: 9 / 2.
    param_ulps=5,
    states={"momentum_buffer": State(2, lambda history, _: 3.0 * history)},
    samples=(
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
        _RICHEST_SGD,
        Sample(
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
            "maximize, nesterov, weight_decay",
        ),
        Sample(
            {"lr": torch.tensor(0.01), "momentum": 0.9, "weight_decay": 0.1},
            "tensor lr, momentum, weight_decay",
        ),
    ),
    richest=_RICHEST_SGD,
    has_step=False,
    lazy_state=True,
    sparse=True,
    later=("nesterov",),
)


def adagrad(
    param: Array,
    grad: Array,
    states: States,
    step: int,
    *,
    lr: float = 0.01,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> tuple[Array, States]:
    """Adagrad (Duchi, Hazan, Singer, 2011), as torch.optim.Adagrad."""
    g = -grad if maximize else grad
    g = g + weight_decay * param
    total = states["sum"] + g**2
    decayed_lr = lr / (1 + (step - 1) * lr_decay)
    return param - decayed_lr * g / (np.sqrt(total) + eps), {"sum": total}


_RICHEST_ADAGRAD = Sample(
    {"lr": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
    "lr_decay, initial_accumulator_value",
)
ADAGRAD = Case(
    "adagrad",
    "Adagrad",
    torch.optim.Adagrad,
    adagrad,
    # Sum: square, sum 2, halved by the root: 1; root 1; eps, sum 2; lr, product 2; quotient 1;
    # difference 1: 8 / 2.
    param_ulps=4,
    states={"sum": State(1, lambda history, _: 5.0 * history**2)},
    samples=(
        Sample({}, "default"),
        Sample({"weight_decay": 0.1}, "nonzero weight_decay"),
        Sample({"weight_decay": 0.1, "maximize": True}, "maximize"),
        Sample({"lr": 0.1}, "non-default lr"),
        Sample(
            {"initial_accumulator_value": 0.1, "weight_decay": 0.1}, "initial_accumulator_value"
        ),
        Sample({"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1}, "lr_decay"),
        Sample({"lr": torch.tensor(0.001)}, "Tensor lr"),
        # Beyond torch's database.
        _RICHEST_ADAGRAD,
        Sample({"eps": 0.1}, "non-default eps"),
        Sample(
            {"lr": torch.tensor(0.1), "lr_decay": 0.5, "weight_decay": 0.1, "maximize": True},
            "Tensor lr, lr_decay, weight_decay, maximize",
        ),
    ),
    richest=_RICHEST_ADAGRAD,
    sparse=True,
)


def rmsprop(
    param: Array,
    grad: Array,
    states: States,
    step: int,
    *,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> tuple[Array, States]:
    """RMSprop (Tieleman, Hinton, 2012; centered: Graves, 2013), as torch.optim.RMSprop."""
    g = -grad if maximize else grad
    g = g + weight_decay * param
    v = alpha * states["square_avg"] + (1 - alpha) * g**2
    a = alpha * states["grad_avg"] + (1 - alpha) * g if centered else 0.0
    d = g / (np.sqrt(v - a**2) + eps)
    new = {"square_avg": v}
    if momentum > 0:
        d = momentum * states["momentum_buffer"] + d
        new["momentum_buffer"] = d
    if centered:
        new["grad_avg"] = a
    return param - lr * d, new


_RICHEST_RMSPROP = Sample({"weight_decay": 0.1, "centered": True, "momentum": 0.1}, "momentum")
RMSPROP = Case(
    "rmsprop",
    "RMSprop",
    torch.optim.RMSprop,
    rmsprop,
    # square_avg: (1 - alpha), 2 products, sum 4; its centered difference 1, halved by the root:
    # 2.5; root 1; eps, sum 2; quotient 1; buffer's sum 1; lr, product 2; difference 1: 10.5 / 2.
    # The state momentum_buffer: 5.5 for the root + eps, quotient 1, sum 1.
    param_ulps=6,
    states={
        "square_avg": State(2, lambda history, spread: history**2 * (1.0 + spread)),
        "momentum_buffer": State(4, lambda history, _: 3.0 * history),
        # Its square is below square_avg: a variance is not negative.
        "grad_avg": State(2, lambda history, _: history),
    },
    samples=(
        Sample({}, "default"),
        Sample({"lr": 1e-3}, "non-default lr"),
        Sample({"weight_decay": 0.1}, "nonzero weight_decay"),
        Sample({"maximize": True}, "maximize"),
        Sample({"weight_decay": 0.1, "centered": True}, "centered"),
        Sample({"maximize": True, "weight_decay": 0.1}, "maximize, weight_decay"),
        _RICHEST_RMSPROP,
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
    ),
    richest=_RICHEST_RMSPROP,
    later=("centered", "momentum"),
)


def adam(
    param: Array,
    grad: Array,
    states: States,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> tuple[Array, States]:
    """Adam (Kingma, Ba, 2015), AMSGrad (Reddi et al., 2018) and AdamW, as torch.optim.Adam."""
    beta1, beta2 = betas
    g = -grad if maximize else grad
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * param
    m = beta1 * states["exp_avg"] + (1 - beta1) * g
    v = beta2 * states["exp_avg_sq"] + (1 - beta2) * g**2
    new = {"exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = np.maximum(states["max_exp_avg_sq"], v)
        new["max_exp_avg_sq"] = v
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    denominator = np.sqrt(v) / np.sqrt(bias_correction2) + eps
    return param - lr / bias_correction1 * m / denominator, new


# torch gives Adam eps = 0.1 with fp16 parameters, and so must every comparison. Squares of small
# gradients round to zero in an fp16 exp_avg_sq (its smallest number is 6e-8) while exp_avg keeps
# the gradient, so the quotient is exp_avg / eps: thousands of times the learning rate at 1e-8. In
# torch's step, which rounds eps to fp16 as well, 1e-8 is zero and the quotient infinite or NaN.
_ADAM_FLOAT16 = (("eps", 0.1),)
# Half the elements of max_exp_avg_sq have seen a larger second moment before, half have not.
_ADAM_STATES = {
    "exp_avg": State(2, lambda history, spread: history * spread),
    "exp_avg_sq": State(2, lambda history, spread: history**2 * spread),
    "max_exp_avg_sq": State(
        2, lambda history, spread: history**2 * spread * np.where(spread < 1.25, 4.0, 0.25)
    ),
}
# exp_avg: (1 - beta1), product, sum 3; step size, product 2; exp_avg_sq: 4, halved by the root: 2;
# root 1; 1 / sqrt(bias correction), product 2; eps, sum 2; quotient 1; difference 1: 14 / 2.
_ADAM_ULPS = 7
_RICHEST_ADAM = Sample({"weight_decay": 0.1, "amsgrad": True}, "amsgrad")
# torch's database lists the same samples for Adam and AdamW.
_ADAM = (
    Sample({}, "default"),
    Sample({"lr": 0.01}, "non-default lr"),
    Sample({"weight_decay": 0.1}, "nonzero weight_decay"),
    Sample({"weight_decay": 0.1, "maximize": True}, "maximize"),
    _RICHEST_ADAM,
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
ADAM = Case(
    "adam",
    "Adam",
    torch.optim.Adam,
    adam,
    param_ulps=_ADAM_ULPS,
    states=_ADAM_STATES,
    samples=(
        *_ADAM,
        Sample({"weight_decay": 0.1, "decoupled_weight_decay": True}, "decoupled_weight_decay"),
        Sample(
            {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True},
            "decoupled_weight_decay, amsgrad",
        ),
    ),
    richest=_RICHEST_ADAM,
    later=("amsgrad", "decoupled_weight_decay"),
    float16_kwargs=_ADAM_FLOAT16,
)

ADAMW = Case(
    "adamw",
    "AdamW",
    torch.optim.AdamW,
    # Adam with decoupled decay (Loshchilov, Hutter, 2019).
    partial(adam, decoupled_weight_decay=True),
    param_ulps=_ADAM_ULPS,
    states=_ADAM_STATES,
    samples=_ADAM,
    richest=_RICHEST_ADAM,
    later=("amsgrad",),
    float16_kwargs=_ADAM_FLOAT16,
)

CASES = (SGD, ADAGRAD, RMSPROP, ADAM, ADAMW)


def case_samples() -> list[Any]:
    """Every (case, sample) pair as pytest parameters with readable names."""
    import pytest

    return [
        pytest.param(case, sample, id=f"{case.name}-{sample.desc.replace(' ', '_')}")
        for case in CASES
        for sample in case.samples
    ]
