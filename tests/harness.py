"""What several suites share: parameters with gradients, one checked step, a run beside torch."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from cases import Case, Sample
from tolerances import assert_step_close
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# A scalar, nothing, one element, a matrix, a vector with a tail in every instruction tier, and more
# than one vector of the widest one.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3, 5), (37,), (2, 3, 40))


def make_params(
    shapes: Iterable[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> list[Tensor]:
    """Parameters of standard normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(tuple(shape), generator=generator).to(device, dtype))
        for shape in shapes
    ]


def set_grads(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """New gradients of normal values, the same for the same seed and shapes on every device."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).mul_(scale)
        param.grad = grad.to(param.device, param.grad_dtype or param.dtype)


def clone_params(params: Iterable[Tensor]) -> list[Tensor]:
    """Parameters of the same values and memory layout, without gradients."""
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def public(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a parameter's state that `state_dict` has."""
    return {name: value for name, value in state.items() if not name.startswith("_")}


def states_of(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """Copies of the public state tensors of a parameter, None and numbers left out."""
    state = public(optimizer.state.get(param, {}))
    return {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)}


def checked_step(case: Case, optimizer: torch.optim.Optimizer) -> None:
    """Steps, and compares every parameter and state with the float64 oracle."""
    before = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                before[param] = (
                    param.detach().clone(),
                    param.grad.detach().clone(),
                    states_of(optimizer, param),
                )
    optimizer.step()
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in before:
                continue
            old_param, grad, old_states = before[param]
            count = float(old_states.pop("step", torch.tensor(0.0))) + 1
            new_states = states_of(optimizer, param)
            if not (old_states or case.lazy_state):  # created by this step
                old_states = {k: torch.zeros_like(v) for k, v in new_states.items() if k != "step"}
            assert_step_close(
                case,
                param.dtype,
                (old_param, grad, old_states),
                (param, new_states),
                int(count),
                case.hyper(group),
            )


def run(
    optimizer_class: type[torch.optim.Optimizer],
    params: list[Tensor],
    kwargs: dict[str, Any],
    steps: int = 4,
) -> torch.optim.Optimizer:
    """Constructs an optimizer and steps it over reproducible gradients."""
    optimizer = optimizer_class(params, **kwargs)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return optimizer


def assert_same(
    a: tuple[list[Tensor], torch.optim.Optimizer], b: tuple[list[Tensor], torch.optim.Optimizer]
) -> None:
    """Fails unless two runs have bitwise equal parameters and states."""
    for (pa, pb), (sa, sb) in zip(
        zip(a[0], b[0], strict=True),
        zip(
            (public(a[1].state.get(p, {})) for p in a[0]),
            (public(b[1].state.get(p, {})) for p in b[0]),
            strict=True,
        ),
        strict=True,
    ):
        assert torch.equal(pa, pb), f"parameters of shape {tuple(pa.shape)} differ"
        assert list(sa) == list(sb)
        for key in sa:
            assert torch.equal(sa[key], sb[key]), f"{key} of shape {tuple(pa.shape)} differs"


def sample_named(case: Case, desc: str) -> Sample:
    """The sample of a case with this description."""
    return next(sample for sample in case.samples if sample.desc == desc)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What `torch.load` with ``weights_only`` makes of what `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def go_on(*runs: tuple[list[Tensor], torch.optim.Optimizer], steps: int = 2) -> None:
    """Steps several runs over the same gradients."""
    for step in range(steps):
        for params, optimizer in runs:
            set_grads(params, 10 + step)
            optimizer.step()


def assert_states_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit; dtype, device and strides as well."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        for attribute in ("dtype", "device", "shape"):
            assert getattr(ours[name], attribute) == getattr(value, attribute), name
        assert ours[name].stride() == value.stride(), name
