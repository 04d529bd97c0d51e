"""How far a result may be from the float64 oracle: the one table of bounds, and its checks.

One step is compared at a time: the oracle starts from the very values that the step started from.
The bound on a new parameter p' (a state: the same, in its own values) is::

    |p' - oracle|  <=  1/2 ulp of storage(oracle)
                       + k * (ulp(1) * (|p| + |oracle - p|) + conditioning)

*Storage* is the dtype the value is kept in: the driver rounds once, when it stores. *ulp(1)* is
that of the type computed in: 2^-23 for fp32, bf16 and fp16 storage, 2^-52 for fp64. |p| +
|oracle - p| bounds the size of the terms of a convex mix such as beta * s + (1 - beta) * g as well.

*k*, in a row of cases.py, is half the number of roundings on the longest path of the formula (a
rounding is at most half an ulp), a narrowed scalar counting as one. A path starts after the decayed
gradient, whose roundings are in *conditioning*. That covers what no count of roundings can: a
formula that subtracts nearly equal numbers (a gradient that cancels against its weight decay, a
centered variance, momentum against the gradient, 1 - beta^step) magnifies the roundings before. It
is measured on the oracle itself: how far the result moves when the gradient or a state moves by one
ulp. It stays at a few ulps of the update where nothing cancels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import Array, Case, States

# Bits of the significand (the hidden one included) and the exponent of the smallest normal number.
_FORMATS: dict[str, tuple[int, int, int]] = {
    "float64": (53, -1022, 1023),
    "float32": (24, -126, 127),
    "bfloat16": (8, -126, 127),
    "float16": (11, -14, 15),
}


def dtype_name(dtype: object) -> str:
    """The plain name of a torch dtype, a numpy dtype or a name ("float32")."""
    name = getattr(dtype, "name", None) or str(dtype)
    name = name.removeprefix("torch.")
    if name not in _FORMATS:
        raise ValueError(f"dtype is {dtype!r}, wanted one of {', '.join(_FORMATS)}")
    return name


def compute_dtype(dtype: object) -> str:
    """The dtype that a step computes in when it stores `dtype`."""
    return "float64" if dtype_name(dtype) == "float64" else "float32"


def to_float64(values: Any) -> Array:
    """A torch tensor (of any layout, bf16 too), an array or numbers, as an exact float64 array."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)


def ulp(values: Any, dtype: object) -> Array:
    """The distance between neighbouring numbers of `dtype` around `values`, subnormals included.

    Past the largest finite number it is that of the last binade.
    """
    bits, lowest, highest = _FORMATS[dtype_name(dtype)]
    magnitude = np.abs(to_float64(values))
    # frexp gives a mantissa in [0.5, 1), and for zero the exponent 0, which is no binade of its.
    exponent = np.where(magnitude == 0, lowest, np.frexp(magnitude)[1].astype(np.int64) - 1)
    return np.ldexp(1.0, np.clip(exponent, lowest, highest) - (bits - 1))


def _epsilon(dtype: object) -> float:
    return float(ulp(1.0, compute_dtype(dtype)))


@np.errstate(all="ignore")  # infinities and NaN are values like others here
def conditioning(
    case: Case,
    param: Any,
    grad: Any,
    states: States,
    step: int,
    hyper: dict[str, Any],
    dtype: object,
) -> dict[str, Array]:
    """How far the oracle moves when its inputs move by one ulp each, summed over the inputs.

    Args:
        case: The row of cases.py.
        param: Parameter before the step.
        grad: Gradient.
        states: States before the step, as the oracle takes them.
        step: Step count, from 1.
        hyper: The oracle's keyword arguments.
        dtype: Storage dtype; decides the ulp of the arithmetic.

    Returns:
        An absolute distance for "param" and for every state the step returns.
    """
    param, grad = to_float64(param), to_float64(grad)
    states = {name: to_float64(value) for name, value in states.items()}
    epsilon, tiny = _epsilon(dtype), float(ulp(0.0, compute_dtype(dtype)))
    hyper = {**case.defaults, **hyper}
    decay = 0.0 if hyper.get("decoupled_weight_decay") else float(hyper["weight_decay"])

    def run(grad: Array, states: States, hyper: dict[str, Any]) -> dict[str, Array]:
        new_param, new_states = case.formula(param, grad, states, step, **hyper)
        return {"param": new_param, **new_states}

    base = run(grad, states, hyper)

    def distance(moved: dict[str, Array]) -> dict[str, Array]:
        return {name: np.abs(moved[name] - base[name]) for name in base}

    # Both ways: where the decayed gradient all but cancels, its square moves by more on one side.
    shift = epsilon * (np.abs(grad) + decay * np.abs(param)) + tiny
    up, down = (distance(run(grad + s, states, hyper)) for s in (shift, -shift))
    distances = [{name: np.maximum(up[name], down[name]) for name in base}]
    for name, value in states.items():
        # A state of exactly zero stays: it carries no rounding.
        shifted = {**states, name: value + (epsilon * np.abs(value) + tiny) * (value != 0)}
        distances.append(distance(run(grad, shifted, hyper)))
    slack = {name: sum((d[name] for d in distances), np.zeros(())) for name in base}
    # beta^step is a power in double everywhere, by repeated squaring: up to `step` roundings, which
    # 1 - beta^step magnifies. The root halves what reaches the update through the second moment.
    relative = 0.0
    for beta, share in zip(hyper.get("betas", ()), (1.0, 0.5), strict=False):
        relative += share * step * 2.0**-53 * beta**step / (1.0 - beta**step)
    lr, decay = float(hyper["lr"]), float(hyper["weight_decay"])
    slack["param"] = slack["param"] + relative * (
        np.abs(base["param"] - param) + lr * decay * np.abs(param)
    )
    return slack


def _compute_bound(oracle: Array, old: Array, slack: Any, dtype: object, ulps: int) -> Array:
    """The bound without the rounding of the store: what the arithmetic itself may be off by."""
    if compute_dtype(dtype) == "float64":
        ulps *= 2  # the float64 oracle rounds as often as the step does
    terms = np.abs(old) + np.abs(oracle - old)
    tiny = float(ulp(0.0, compute_dtype(dtype)))  # a product that underflows rounds by that much
    return ulps * (_epsilon(dtype) * terms + to_float64(slack) + tiny)


def _ulps(case: Case, name: str) -> int:
    return case.param_ulps if name == "param" else case.states[name].ulps


@np.errstate(all="ignore")
def absolute_bounds(
    case: Case,
    param: Any,
    grad: Any,
    states: States,
    step: int,
    hyper: dict[str, Any],
    dtype: object,
) -> dict[str, Array]:
    """The bound of one step as absolute distances, by name; arguments as `conditioning`."""
    param, grad = to_float64(param), to_float64(grad)
    new_param, new_states = case.formula(param, grad, states, step, **hyper)
    slack = conditioning(case, param, grad, states, step, hyper, dtype)
    bounds = {}
    for name, new in {"param": new_param, **new_states}.items():
        old = param if name == "param" else to_float64(states.get(name, 0.0))
        arithmetic = _compute_bound(new, old, slack[name], dtype, _ulps(case, name))
        bounds[name] = arithmetic + 0.5 * ulp(np.abs(new) + arithmetic, dtype)
    return bounds


@np.errstate(all="ignore")
def _assert_close(
    what: str, actual: Any, oracle: Any, old: Any, dtype: object, ulps: int, slack: Any
) -> None:
    actual, oracle, old = to_float64(actual), to_float64(oracle), to_float64(old)
    if actual.shape != oracle.shape:
        raise AssertionError(f"{what}: shape is {actual.shape}, wanted {oracle.shape}")
    if actual.size == 0:
        return
    # Past the largest finite number a store gives infinity: compare as if that were the start of
    # the next binade, the number that rounding without a limit would give.
    limit = float(np.ldexp(1.0, _FORMATS[dtype_name(dtype)][2]))
    got, wanted = (np.clip(x / 2, -limit, limit) * 2 for x in (actual, oracle))
    arithmetic = np.broadcast_to(_compute_bound(wanted, old, slack, dtype, ulps), oracle.shape)
    bound = arithmetic + 0.5 * ulp(np.abs(wanted) + arithmetic, dtype)
    error = np.abs(got - wanted)
    # Written so that a NaN on any side is bad; infinite must be what the oracle itself finds so.
    bad = np.where(np.isfinite(oracle), ~(error <= bound), ~(actual == oracle))
    if not bad.any():
        return
    severity = np.where(bad, np.nan_to_num(error / bound, nan=np.inf), -1.0)
    worst = np.unravel_index(np.argmax(severity), severity.shape)
    unit = ulp(oracle, dtype)[worst] if np.isfinite(oracle[worst]) else np.nan
    raise AssertionError(
        f"{what} ({dtype_name(dtype)}): {int(bad.sum())} of {bad.size} elements are off; worst at "
        f"{tuple(int(i) for i in worst)}: got {actual[worst]!r}, oracle {oracle[worst]!r}, "
        f"before the step {np.broadcast_to(old, oracle.shape)[worst]!r}; error "
        f"{error[worst] / unit:.3g} ulp, bound {bound[worst] / unit:.3g} ulp "
        f"(1 ulp = {unit:.3g}, k = {ulps})"
    )


def assert_param_close(
    actual: Any, oracle_new: Any, old: Any, dtype: object, case: Case, slack: Any = 0.0
) -> None:
    """Fails unless a stepped parameter is within the bound of the module's docstring.

    Args:
        actual: Parameter after the step (tensor or array).
        oracle_new: The oracle's parameter after the same single step.
        old: Parameter before the step.
        dtype: Storage dtype (of torch or numpy, or its name).
        case: The row of cases.py.
        slack: `conditioning(...)["param"]`; 0 where no intermediate value can cancel.
    """
    _assert_close(f"{case.name} param", actual, oracle_new, old, dtype, case.param_ulps, slack)


def assert_state_close(
    actual: Any,
    oracle_new: Any,
    old: Any,
    dtype: object,
    case: Case,
    state: str,
    slack: Any = 0.0,
) -> None:
    """As `assert_param_close`, for the state named `state`."""
    ulps = case.states[state].ulps
    _assert_close(f"{case.name} {state}", actual, oracle_new, old, dtype, ulps, slack)


@np.errstate(all="ignore")
def assert_step_close(
    case: Case,
    dtype: object,
    before: tuple[Any, Any, dict[str, Any]],
    after: tuple[Any, dict[str, Any]],
    step: int,
    hyper: dict[str, Any],
) -> None:
    """Fails unless one step of one parameter is within the bounds: the check most tests want.

    Args:
        case: The row of cases.py.
        dtype: Storage dtype of the parameter and its states.
        before: Parameter, gradient and states by name before the step, as copies; a state torch
            has not created yet (SGD's buffer) is left out.
        after: Parameter and states after it; what is not a state of the rule ("step") is ignored.
        step: The parameter's step count after the step.
        hyper: The oracle's keyword arguments (`Case.hyper`).

    Raises:
        AssertionError: It names the tensor, the worst element, its error and its bound.
    """
    param, grad = to_float64(before[0]), to_float64(before[1])
    states = {n: to_float64(s) for n, s in before[2].items() if n in case.states}
    new_param, new_states = case.formula(param, grad, states, step, **hyper)
    slack = conditioning(case, param, grad, states, step, hyper, dtype)
    assert_param_close(after[0], new_param, param, dtype, case, slack["param"])
    for name, new in new_states.items():
        old = states.get(name, np.zeros_like(param))
        stored = getattr(after[1][name], "dtype", dtype)  # fp32 beside a 16-bit parameter
        assert_state_close(after[1][name], new, old, stored, case, name, slack[name])
