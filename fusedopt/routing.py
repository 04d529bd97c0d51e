"""Who updates a parameter, kernels or torch.optim, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt.backends import Backend

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

Group = dict[str, Any]

# The __torch_function__ of types that behave as plain tensors: a subclass that brings its own may
# give operations another meaning, which kernels on its memory would miss.
_PLAIN_TORCH_FUNCTIONS = (
    torch.Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    torch._C._disabled_torch_function_impl,
)

SHARED_MEMORY = "its memory or its state's overlaps another parameter's"


@dataclass(frozen=True)
class Route:
    """Where a parameter is updated.

    Attributes:
        group: Index of its param group.
        index: Its index in the group.
        name: Its name, where the group has named parameters.
        shape, dtype, device: The parameter's.
        backend: "cpu", "cuda", or "torch" for torch.optim's own step.
        reason: Why torch steps it, "" when kernels do.
    """

    group: int
    index: int
    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    backend: str
    reason: str


def describe(group: Group, index: int) -> str:
    """A parameter, as error messages name it."""
    names = group.get("param_names")
    name = f" ({names[index]!r})" if names else ""
    return f"parameter {index}{name} of shape {tuple(group['params'][index].shape)}"


def why_torch(group: Group, param: Tensor, backend: Backend | None) -> str:
    """Why torch.optim must step ``param``, judged by the group, the parameter and its gradient.

    ``backend`` is the one that serves the parameter's device, None without one.
    """
    if group.get("differentiable"):
        return "its group has differentiable=True"
    if backend is None:
        return f"the parameter is on device {param.device}, for which this build has no kernels"
    if group.get("capturable") and backend.launcher() is None:
        return "its group has capturable=True, and a step on the CPU cannot be captured"
    hook = type(param).__torch_function__
    if getattr(hook, "__func__", hook) not in _PLAIN_TORCH_FUNCTIONS:
        return "the parameter is a tensor subclass"
    return _C.why_not_fused(param, param.grad)


def why_state_torch(param: Tensor, states: list[Tensor], others: Sequence[Tensor] = ()) -> str:
    """Why torch.optim must step ``param``, judged by its state tensors: the rule's and others."""
    for state in (*states, *others):
        reason = _C.why_state_unfit(param, state)
        if reason:
            return reason
    if len({state.dtype for state in states}) > 1:
        return "its states have several dtypes"
    grad = param if param.grad is None else param.grad
    state = states[0] if states else param
    if not _C.has_kernel(param, grad, state):
        return f"no kernel is built for dtypes {param.dtype}, {grad.dtype} and {state.dtype}"
    return ""


def repeated_params(optimizer: FusedOptimizer) -> set[int]:
    """The ids of parameters that are listed more than once, which torch steps as often."""
    counts = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    return {key for key, count in counts.items() if count > 1}


def routes(optimizer: FusedOptimizer) -> Iterator[Route]:
    """Where each parameter would be updated now. Creates no state."""
    repeated = repeated_params(optimizer)
    entries = []
    for number, group in enumerate(optimizer.param_groups):
        names = optimizer._state_names(group)
        for index, param in enumerate(group["params"]):
            state = optimizer.state.get(param) or {}
            states = [state[name] for name in names if state.get(name) is not None]
            backend = optimizer._backend_of(param)
            reason = why_torch(group, param, backend) or (
                SHARED_MEMORY if id(param) in repeated else why_state_torch(param, states)
            )
            name = "torch" if reason or backend is None else backend.name
            entries.append((number, index, param, states, reason, name))
    fused = [entry for entry in entries if not entry[4]]
    shared = {id(fused[i][2]) for i in _C.overlapping([[e[2], *e[3]] for e in fused])}
    for number, index, param, _, reason, name in entries:
        reason = reason or (SHARED_MEMORY if id(param) in shared else "")
        param_names = optimizer.param_groups[number].get("param_names")
        yield Route(
            group=number,
            index=index,
            name=param_names[index] if param_names else None,
            shape=tuple(param.shape),
            dtype=param.dtype,
            device=param.device,
            backend="torch" if reason else name,
            reason=reason,
        )
