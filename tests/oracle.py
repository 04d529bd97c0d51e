"""The float64 oracle: every rule written from its formula, once, in numpy, and nowhere else.

A rule is a function ``(param, grad, states, step, **hyper) -> (new_param, new_states)`` over
float64 arrays. It follows the formula that ``torch.optim`` documents, reads hyperparameters by
torch's names, and never writes its arguments. ``states`` maps torch's ``state_dict`` names to
arrays; a missing SGD ``momentum_buffer`` is the first step, as torch's ``None`` is. ``step`` counts
from 1.

``python tests/oracle.py --write FILE`` writes golden cases for ``tests/cpp/rule_test.cpp``. The
file is lines of words separated by one space; real numbers are C99 hexadecimal floats, so nothing
is lost. Lines that start with ``#`` are comments. A case is these lines, in this order::

    case <name>
    rule <name in csrc/rules/all.h>
    hyper <count> <value of every field of the rule's Hyper, in order>
    step <step, from 1> first <1 if the states were created for this step, else 0>
    states <count> <names, in the order of the rule's states(variant)>
    elements <count>
    <param grad state...  param state...  bound state...  bound state...>

with one line an element: the inputs (exact in float32), the expected new parameter and states, and
how far each may be off when the rule runs on ``float``, then the same on ``double``
(tests/tolerances.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
States = dict[str, Array]


def sgd(
    param: Array,
    grad: Array,
    states: States,
    step: int,
    *,
    lr: float,
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


def adagrad(
    param: Array,
    grad: Array,
    states: States,
    step: int,
    *,
    lr: float,
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


def rmsprop(
    param: Array,
    grad: Array,
    states: States,
    step: int,
    *,
    lr: float,
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
    new = {"square_avg": v}
    variance = v
    if centered:
        a = alpha * states["grad_avg"] + (1 - alpha) * g
        new["grad_avg"] = a
        variance = v - a**2
    d = g / (np.sqrt(variance) + eps)
    if momentum > 0:
        d = momentum * states["momentum_buffer"] + d
        new["momentum_buffer"] = d
    return param - lr * d, new


def adam(
    param: Array,
    grad: Array,
    states: States,
    step: int,
    *,
    lr: float,
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


def adamw(
    param: Array, grad: Array, states: States, step: int, **hyper: Any
) -> tuple[Array, States]:
    """Adam with decoupled decay (Loshchilov, Hutter, 2019), as torch.optim.AdamW."""
    return adam(param, grad, states, step, **{"decoupled_weight_decay": True, **hyper})


Rule = Callable[..., tuple[Array, States]]
RULES: dict[str, Rule] = {
    "sgd": sgd,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adamw,
}

# What follows writes the golden cases of the C++ test. Keys of _HYPER are in the order of each
# rule's C++ Hyper.
_ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": 0.0}
_HYPER: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": 0.0},
    "adagrad": {"lr": 0.01, "lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-10},
    "rmsprop": {
        "lr": 0.01,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": 0.0,
    },
    "adam": {**_ADAM, "decoupled_weight_decay": 0.0},
    "adamw": {**_ADAM, "decoupled_weight_decay": 1.0},
}
# Every variant of every rule; each is written with and without weight decay, at every step below.
_VARIANTS: dict[str, dict[str, dict[str, float]]] = {
    "sgd": {
        "plain": {},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.9, "dampening": 0.5},
        "nesterov": {"momentum": 0.9, "nesterov": 1.0},
    },
    "adagrad": {"plain": {}, "lr_decay": {"lr_decay": 0.5}, "eps": {"eps": 0.1}},
    "rmsprop": {
        "plain": {},
        "momentum": {"momentum": 0.9},
        "centered": {"centered": 1.0},
        "centered_momentum": {"centered": 1.0, "momentum": 0.9},
        "eps": {"eps": 0.1},
    },
    "adam": {"plain": {}, "amsgrad": {"amsgrad": 1.0}, "eps": {"eps": 0.1}},
}
_VARIANTS["adamw"] = _VARIANTS["adam"]
_STEPS = (1, 2, 10, 1000)

_PARAMS = (0.0, 1.0, -1.5, 0.3, -2e-3, 1e4, -1e-6, 7.0)
_GRADS = (1.0, -0.5, 3e4, -1e-6, 0.02, -3.0, 1e-12, 0.0)


def state_names(rule: str, hyper: dict[str, float]) -> list[str]:
    """The states that a rule keeps under `hyper`, in the order of its C++ states(variant)."""
    if rule == "sgd":
        return ["momentum_buffer"] if hyper["momentum"] else []
    if rule == "adagrad":
        return ["sum"]
    if rule == "rmsprop":
        buffer = ["momentum_buffer"] if hyper["momentum"] else []
        return ["square_avg", *buffer, *(["grad_avg"] if hyper["centered"] else [])]
    return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if hyper["amsgrad"] else [])]


def oracle_hyper(rule: str, hyper: dict[str, float]) -> dict[str, Any]:
    """C++ hyperparameters, a double a field, as the keywords of the oracle."""
    keywords: dict[str, Any] = dict(hyper)
    if "beta1" in keywords:
        keywords["betas"] = (keywords.pop("beta1"), keywords.pop("beta2"))
    return keywords


def _states_before(names: list[str], grad: Array, first: bool) -> States:
    """States as some earlier steps could have left them, exact in float32; zeros on the first."""
    if first:
        return {name: np.zeros_like(grad) for name in names}
    rng = np.random.default_rng(len(grad))
    history = grad + rng.standard_normal(len(grad))  # a mean gradient seen so far
    spread = rng.uniform(0.5, 2.0, len(grad))
    values = {
        "momentum_buffer": 3.0 * history,
        "sum": 5.0 * history**2,
        "square_avg": history**2 * (1.0 + spread),
        "grad_avg": history,  # its square is below square_avg: a variance is not negative
        "exp_avg": history * spread,
        "exp_avg_sq": history**2 * spread,
        # Half the elements have seen a larger second moment before, half have not.
        "max_exp_avg_sq": history**2 * spread * np.where(rng.random(len(grad)) < 0.5, 4.0, 0.25),
    }
    return {name: values[name].astype(np.float32).astype(np.float64) for name in names}


def _golden_lines() -> Iterator[str]:
    """The lines of the golden file (format: the module's docstring)."""
    from tolerances import absolute_bounds

    pairs = [(p, g) for p in _PARAMS for g in _GRADS]
    param, grad = np.array(pairs, np.float32).T.astype(np.float64)
    for rule, variants in _VARIANTS.items():
        for name, changes in variants.items():
            for step in _STEPS:
                for weight_decay in (0.0, 0.1):
                    hyper = {**_HYPER[rule], **changes, "weight_decay": weight_decay}
                    keywords = oracle_hyper(rule, hyper)
                    names = state_names(rule, hyper)
                    first = step == 1
                    before = _states_before(names, grad, first)
                    # torch has no momentum buffer yet on SGD's first step.
                    given = {} if first and rule == "sgd" else before
                    after, states = RULES[rule](param, grad, given, step, **keywords)
                    columns = [param, grad, *(before[n] for n in names)]
                    columns += [after, *(states[n] for n in names)]
                    for dtype in ("float32", "float64"):
                        bounds = absolute_bounds(rule, param, grad, given, step, keywords, dtype)
                        columns += [bounds[n] for n in ("param", *names)]
                    yield f"case {rule}/{name}/step={step}/weight_decay={weight_decay}"
                    yield f"rule {rule}"
                    yield " ".join(["hyper", str(len(hyper)), *map(float.hex, hyper.values())])
                    yield f"step {step} first {int(first)}"
                    yield " ".join(["states", str(len(names)), *names])
                    yield f"elements {len(param)}"
                    for row in zip(*columns, strict=True):
                        yield " ".join(float(x).hex() for x in row)


def main() -> None:
    """Writes the golden file."""
    parser = argparse.ArgumentParser(description="Write golden cases for the C++ rule test.")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    path = parser.parse_args().write
    path.write_text("\n".join(["# Written by tests/oracle.py", *_golden_lines()]) + "\n")


if __name__ == "__main__":
    main()
