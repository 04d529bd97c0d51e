"""Who updates a parameter, kernels or torch.optim, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt.backends import Backend
from fusedopt.step_extras import ACCUMULATOR

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


def why_state_torch(
    param: Tensor,
    states: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    new: torch.dtype,
) -> str:
    """Why torch.optim must step ``param``, judged by its state tensors: the rule's and others.

    None is one that will be created, of the rule's with dtype ``new``.
    """
    for state in (*states, *others):
        if state is not None and (reason := _C.why_state_unfit(param, state)):
            return reason
    if len({new if state is None else state.dtype for state in states}) > 1:
        return "its states have several dtypes"
    grad = param if param.grad is None else param.grad
    state = states[0] if states else param
    if state is None:
        state = torch.empty(0, dtype=new)
    if not _C.has_kernel(param, grad, state):
        return f"no kernel is built for dtypes {param.dtype}, {grad.dtype} and {state.dtype}"
    return ""


@dataclass(slots=True)
class Member:
    """A parameter of a param group.

    Attributes:
        group: Index of its param group.
        index: Its index in the group.
        param: The parameter.
        backend: That which serves its device, None without one.
        reason: Why torch.optim steps it, "" unless it does.
    """

    group: int
    index: int
    param: Tensor
    backend: Backend | None
    reason: str = ""


def _place(member: Member) -> tuple[int, int]:
    return member.group, member.index


class Sorted(NamedTuple):
    """The parameters by who updates them.

    Attributes:
        fused: Those that kernels update.
        torch: Those that torch.optim steps.
        waiting: Those that nobody updates until they have a gradient, by which they are judged.
    """

    fused: list[Member]
    torch: list[Member]
    waiting: list[Member]

    @property
    def launchers(self) -> dict[str, object]:
        """By type of device, what launches kernels there, but for the CPU's."""
        return {
            member.param.device.type: launcher
            for member in self.fused
            if member.backend is not None and (launcher := member.backend.launcher()) is not None
        }


@dataclass(frozen=True)
class Wanted:
    """What kernels need to find, or will create, in a parameter's state.

    Attributes:
        states: By group, names of the rule's states, which have the parameter's shape.
        dtype: By parameter, the dtype of those that are not there yet.
        others: Names of further entries of the parameter's shape.
        numbers: Names of entries of other shapes.
    """

    states: Callable[[Group], list[str]]
    dtype: Callable[[Tensor], torch.dtype]
    others: Sequence[str] = ()
    numbers: Sequence[str] = ()


def sort(
    groups: Sequence[Group],
    states: Mapping[Tensor, dict[str, Any]],
    backend_of: Callable[[Tensor], Backend | None],
    wanted: Wanted,
) -> Sorted:
    """Sorts parameters by who updates them now, judged by their gradients and states.

    A parameter without a gradient is updated, by whatever its state has left to do, or waits if
    part of its state is missing, or kernels could not update it. Parameters that are listed more
    than once, or share memory, are torch.optim's, which steps them one after the other.
    """
    sorted_ = Sorted([], [], [])
    written = []  # by member of `fused`
    times = Counter(map(id, chain.from_iterable(group["params"] for group in groups)))
    for number, group in enumerate(groups):
        names = [*wanted.states(group), *wanted.others, *wanted.numbers]
        shaped = len(names) - len(wanted.numbers)
        own = shaped - len(wanted.others)
        for index, param in enumerate(group["params"]):
            member = Member(number, index, param, backend_of(param))
            reason = why_torch(group, param, member.backend)
            if times[id(param)] > 1:
                reason = reason or SHARED_MEMORY
            state = states.get(param) or {}
            found = [state.get(name) for name in names]
            complete = all(entry is not None for entry in found)
            if not reason:
                new = param.dtype if complete else wanted.dtype(param)
                reason = why_state_torch(param, found[:own], found[own:shaped], new)
            creates = not complete and param.grad is not None
            if not reason and creates and torch.is_inference_mode_enabled():
                reason = "a state would be created in inference mode"
            member.reason = reason
            if reason and (param.grad is not None or state.get(ACCUMULATOR) is not None):
                sorted_.torch.append(member)
            elif reason:
                sorted_.waiting.append(member)
            elif complete or creates:
                sorted_.fused.append(member)
                written.append([param, *(t for t in found[:shaped] if t is not None)])
            else:
                sorted_.waiting.append(member)
    for place in reversed(_C.overlapping(written)):
        member = sorted_.fused.pop(place)
        member.reason = SHARED_MEMORY
        sorted_.torch.append(member)
    sorted_.torch.sort(key=_place)
    return sorted_


def routes(groups: Sequence[Group], sorted_: Sorted) -> list[Route]:
    """Where each parameter is updated, in the order of the groups."""
    found = []
    for member in sorted(chain(*sorted_), key=_place):
        names = groups[member.group].get("param_names")
        backend = member.backend
        found.append(
            Route(
                group=member.group,
                index=member.index,
                name=names[member.index] if names else None,
                shape=tuple(member.param.shape),
                dtype=member.param.dtype,
                device=member.param.device,
                backend="torch" if member.reason or backend is None else backend.name,
                reason=member.reason,
            )
        )
    return found
