"""`state_dtype`: the states of 16-bit parameters in fp32, through every way of keeping them."""

import copy
import pickle

import pytest
import torch
from cases import CASES
from harness import (
    assert_same,
    clone_params,
    make_params,
    run,
    set_grads,
    through_a_file,
)

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def save_and_load(case, params, optimizer):
    twins = clone_params(params)
    twin = case.fused()(twins, state_dtype=optimizer.state_dtype)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    return twins, twin


COPIERS = {
    "save and load": save_and_load,
    "pickle": lambda _, *both: pickle.loads(pickle.dumps(both)),
    "deepcopy": lambda _, *both: copy.deepcopy(both),
}


@EACH_CASE
@pytest.mark.parametrize("copier", COPIERS)
def test_state_dtype_goes_on_bitwise(case, copier):
    kwargs = {**case.stateful, "state_dtype": torch.float32}
    params = make_params(dtype=torch.bfloat16)
    optimizer = run(case.fused(), params, kwargs)
    twins, twin = COPIERS[copier](case, params, optimizer)
    for optimizer_ in (optimizer, twin):
        states = [v for state in optimizer_.state.values() for v in state.values()]
        assert states
        assert all(value.dtype == torch.float32 for value in states)
    for step in range(2):
        for some, its in ((params, optimizer), (twins, twin)):
            set_grads(some, 20 + step)
            its.step()
    assert_same((params, optimizer), (twins, twin))


@EACH_CASE
@pytest.mark.parametrize("declared", [None, torch.float32])
def test_a_loaded_state_takes_the_declared_dtype(case, declared):
    kwargs = case.stateful
    params = make_params(dtype=torch.bfloat16)
    saved = run(case.torch_class, params, kwargs).state_dict()
    if declared is None:  # what was saved is wider than what is declared
        saved = run(case.fused(), params, {**kwargs, "state_dtype": torch.float32}).state_dict()
    twin = case.fused()(clone_params(params), state_dtype=declared, **kwargs)
    twin.load_state_dict(saved)
    for number, state in enumerate(twin.state.values()):
        for key, value in state.items():
            assert value.dtype == (torch.float32 if key == "step" or declared else torch.bfloat16)
            assert torch.equal(value, saved["state"][number][key].to(value.dtype))


def test_a_state_dtype_that_is_none():
    with pytest.raises(
        ValueError, match=r"state_dtype=torch\.float16 must be None, .* torch\.float32"
    ):
        fusedopt.AdamW(make_params(), state_dtype=torch.float16)


def test_a_state_dtype_that_torchs_step_cannot_have_changes_nothing():
    params = make_params([(3,), (4, 5)], dtype=torch.bfloat16)
    optimizer = fusedopt.AdamW(params, differentiable=True, state_dtype=torch.float32)
    set_grads(params, 0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"state_dtype=.* cannot be had for .*differentiable=True"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not optimizer.state
