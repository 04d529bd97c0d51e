"""Steps under a TorchDispatchMode or a transform: seen by it, torch's own, or an error.

A mode sees a step as a call of the rule's operator, with the step's bits.
"""

import copy

import pytest
import torch
from cases import ADAMW, CASES, SGD
from harness import assert_same, make_params, set_grads
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusedopt

SAMPLES = [(case, {}) for case in CASES]
SAMPLES += [(case, {"momentum": 0.9, "dampening": 0.1}) for case in CASES if case is SGD]
SAMPLES += [(case, {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.1)}) for case in CASES]
EACH_SAMPLE = pytest.mark.parametrize(
    ("case", "kwargs"), SAMPLES, ids=lambda value: getattr(value, "name", None)
)


class Seen(TorchDispatchMode):
    """The names of the operators that a mode is told of."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def make(case, kwargs):
    params = make_params([(5, 3), (4,)])
    return params, case.fused()(params, **{"lr": 0.1, **kwargs})


def stepped(case, kwargs, times=2):
    params, optimizer = make(case, kwargs)
    for step in range(times):
        set_grads(params, step)
        optimizer.step()
    return params, optimizer


@EACH_SAMPLE
@pytest.mark.parametrize("mode", [Seen, lambda: FlopCounterMode(display=False)])
def test_a_mode_sees_the_step_and_changes_no_bit(case, kwargs, mode):
    params, optimizer = make(case, kwargs)
    with mode() as active:
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
    if isinstance(active, Seen):
        seen = [name for name in active.names if name.startswith("fusedopt::")]
        assert {name.split(".")[0] for name in seen} == {f"fusedopt::{case.name}_"}
    assert_same((params, optimizer), stepped(case, kwargs))


@EACH_SAMPLE
def test_make_fx_records_the_step(case, kwargs):
    params, optimizer = make(case, kwargs)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)

    def step(x):
        optimizer.step()
        return x + 1

    graph = make_fx(step)(torch.ones(1))
    with torch.no_grad():
        for _ in range(2):
            graph(torch.ones(1))
    twins, other = make(case, kwargs)
    for number in (0, 1, 1, 1):
        set_grads(twins, number)
        other.step()
    assert_same((params, optimizer), (twins, other))


def test_torchs_stateless_use_is_recorded():
    _stateless = pytest.importorskip("torch.optim._stateless")
    params, optimizer = stepped(ADAMW, {})

    def step(values, state, grads):
        for value, grad in zip(values.values(), grads, strict=True):
            value.grad = grad
        with _stateless.swap_in_optimizer_params_and_state(optimizer, values, state):
            optimizer.step()
        return values

    values = {str(i): p.detach().clone() for i, p in enumerate(params)}
    grads = [torch.ones_like(value) for value in values.values()]
    state = copy.deepcopy(optimizer.state_dict())
    graph = make_fx(step)(values, state, grads)
    graph(values, state, grads)
    for _ in range(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    for value, param in zip(values.values(), params, strict=True):
        assert torch.equal(value, param)


def test_fake_tensors_are_stepped_and_real_ones_refused_under_their_mode():
    with FakeTensorMode():
        params = make_params([(5, 3)])
        set_grads(params, 0)
        fusedopt.SGD(params, lr=0.1, momentum=0.9).step()
    params, optimizer = make(CASES[0], {"momentum": 0.9})
    set_grads(params, 0)
    before = [param.detach().clone() for param in params]
    with FakeTensorMode(), pytest.raises(AssertionError, match="convert all Tensors to FakeTensor"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize])
@pytest.mark.parametrize("grad_from_inside", [False, True])
def test_transforms_step_as_torch_does(transform, grad_from_inside):
    """What the transform has wrapped is torch's to step, or to refuse."""
    outcomes = []
    for library in (fusedopt, torch.optim):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = library.SGD([param], lr=0.1)
        param.grad = torch.ones(3)

        def step(grads, param=param, optimizer=optimizer):
            if grad_from_inside:
                param.grad = grads
            optimizer.step()
            return grads * 2

        try:
            transform(step)(torch.ones(3, 3))
        except RuntimeError as error:
            outcomes.append((str(error), param))
        else:
            outcomes.append(("", param))
    assert outcomes[0][0] == outcomes[1][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_what_an_operator_cannot_do_raises_under_a_mode():
    params = make_params([(3,)])
    set_grads(params, 0)
    before = params[0].detach().clone()
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
    with Seen(), pytest.raises(RuntimeError, match=r"max_grad_norm=1.0 under a TorchDispatchMode"):
        optimizer.step()
    assert torch.equal(params[0], before)
