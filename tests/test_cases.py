"""The tests' own ground: the list of samples, the oracle and the tolerances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from cases import ADAGRAD, ADAM, CASES, SGD, Case, Sample, case_samples


def test_names_of_samples_are_unique() -> None:
    names = [param.id for param in case_samples()]
    assert len(set(names)) == len(names)


def _as_float64(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_as_float64(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("case", "sample"), case_samples())
def test_oracle_is_torchs_float64_step(case: Case, sample: Sample) -> None:
    """The oracle restates torch.optim; torch's own fp64 step, from p = 0 too, says if it does."""
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(64, dtype=torch.float64, generator=generator)
    param[::8] = 0
    param.requires_grad_()
    # A hyperparameter in an fp32 tensor would make torch correct the bias in fp32.
    kwargs = {k: _as_float64(v) for k, v in case.kwargs(sample).items()}
    optimizer = case.torch_class([param], foreach=False, **kwargs)
    hyper = case.hyper(optimizer.param_groups[0])
    for step in range(1, 6):
        param.grad = torch.randn(64, dtype=torch.float64, generator=generator)
        state = optimizer.state[param]
        before = {n: s.clone() for n, s in state.items() if n in case.states and s is not None}
        if step == 1 and not case.lazy_state:
            first = sample.kwargs.get("initial_accumulator_value", 0.0)
            before = {name: torch.full_like(param, first) for name in case.states}
        old = param.detach().clone()
        optimizer.step()
        after = {n: s for n, s in state.items() if n in case.states and s is not None}
        tolerances.assert_step_close(
            case, torch.float64, (old, param.grad, before), (param, after), step, hyper
        )
        assert not torch.equal(param.detach(), old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    kind, patterns = (
        (torch.int32, torch.arange(0, 2**31 - 1, 98_317))
        if dtype == torch.float32
        else (torch.int16, torch.arange(0, 2**15 - 1))
    )
    here = patterns.to(kind).view(dtype)
    there = (patterns + 1).to(kind).view(dtype)
    finite = torch.isfinite(there)
    distance = there.double() - here.double()
    np.testing.assert_array_equal(tolerances.ulp(here, dtype)[finite], distance[finite])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_bound_is_sharp(dtype: str) -> None:
    """Storage's half ulp and k ulps of the arithmetic pass, one more ulp of storage does not."""
    old, new = np.array([1.0, 1.0, 0.0]), np.array([1.0, 1.5, 0.25])
    tolerances.assert_param_close(new, new, old, dtype, ADAM)
    step = float(tolerances.ulp(1.0, dtype))
    k = ADAM.param_ulps
    beyond = 1.0 if tolerances.compute_dtype(dtype) != dtype else 5.0 * k
    off = np.array([0, beyond * step, 0])
    for sign in (1, -1):
        with pytest.raises(AssertionError, match=r"worst at \(1,\).*error .* ulp, bound .* ulp"):
            tolerances.assert_param_close(new + sign * off, new, old, dtype, ADAM)


def test_not_a_number_is_never_close() -> None:
    nan, one = np.array([np.nan]), np.array([1.0])
    for actual, wanted, old in [(nan, one, one), (one, nan, one), (nan, nan, one), (one, one, nan)]:
        with pytest.raises(AssertionError, match="1 of 1 elements are off"):
            tolerances.assert_param_close(actual, wanted, old, "float32", SGD)


def test_a_store_may_overflow_only_beyond_the_largest_number() -> None:
    old, infinity = np.array([1e4]), np.array([np.inf])
    tolerances.assert_state_close(infinity, np.array([65520.0]), old, "float16", ADAGRAD, "sum")
    tolerances.assert_state_close(infinity, np.array([1e9]), old, "float16", ADAGRAD, "sum")
    tolerances.assert_state_close(infinity, infinity, infinity, "float16", ADAGRAD, "sum")
    for wanted in (65400.0, -1e9, -np.inf):
        with pytest.raises(AssertionError):
            tolerances.assert_state_close(
                infinity, np.array([wanted]), old, "float16", ADAGRAD, "sum"
            )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_formula_needs_its_states_but_for_those_that_the_first_step_makes(case: Case) -> None:
    zero, keywords = np.zeros(1), case.hyper(case.richest.kwargs)
    if case.lazy_state:
        assert case.formula(zero, zero, {}, 1, **keywords)[1].keys() == case.states.keys()
    else:
        with pytest.raises(KeyError):
            case.formula(zero, zero, {}, 1, **keywords)
