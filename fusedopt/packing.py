"""From param groups to a plan: who is updated by kernels, who by torch, and the state both need.

This is the slow path, taken when the plan is built. What happens every step is `StepPlan.refresh`
and `StepPlan.launch`, in C++.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_scalar_dtype

from fusedopt._extension import _C
from fusedopt.backends import Backend

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

logger = logging.getLogger("fusedopt")

Group = dict[str, Any]

# The __torch_function__ of types that behave as plain tensors: a subclass that brings its own may
# give operations another meaning, which kernels on its memory would miss.
_PLAIN_TORCH_FUNCTIONS = (
    torch.Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    torch._C._disabled_torch_function_impl,
)

# Group index, parameter, whether its state was created for the step to come, and the flag on the
# device that says so where only the device knows.
Row = tuple[int, Tensor, bool, "Tensor | None"]

_SHARED_MEMORY = "its memory or its state's overlaps another parameter's"


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


def why_state_torch(param: Tensor, states: list[Tensor]) -> str:
    """Why torch.optim must step ``param``, judged by its state tensors."""
    for state in states:
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


def check_loaded_steps(optimizer: FusedOptimizer, loaded: dict[str, Any]) -> None:
    """Raises ValueError, naming the parameter, for a loaded state without the step that it needs.

    For before torch's ``__setstate__``, which reads the step counts.
    """
    if optimizer._has_step:
        for where, _, _, state in _states_by_param(loaded["param_groups"], loaded["state"]):
            if state.get("step") is None:
                raise _missing(optimizer, where, "step", state)


def check_loaded_state(optimizer: FusedOptimizer) -> None:
    """Raises ValueError, naming the parameter, for a state of a wrong shape or a missing one."""
    for where, group, param, state in _states_by_param(optimizer.param_groups, optimizer.state):
        for name in optimizer._state_names(group):
            value = state.get(name)
            if value is None:
                if optimizer._has_step:
                    raise _missing(optimizer, where, name, state)
            elif not isinstance(value, Tensor):
                raise ValueError(
                    f"{where}: {name!r} is {value!r}, wanted a tensor of the parameter's shape; "
                    "load a checkpoint of this model. Nothing was loaded."
                )
            elif value.shape != param.shape:
                raise ValueError(
                    f"{where}: {name!r} has shape {tuple(value.shape)}, wanted the "
                    "parameter's; load a checkpoint of this model. Nothing was loaded."
                )


def _states_by_param(
    param_groups: list[Group], states: dict[Tensor, dict[str, Any]]
) -> Iterator[tuple[str, Group, Tensor, dict[str, Any]]]:
    """What error messages call it, group, parameter and state, where a parameter has a state."""
    number = -1
    for group in param_groups:
        for index, param in enumerate(group["params"]):
            number += 1
            if state := states.get(param):
                yield f"state of {describe(group, index)} (number {number})", group, param, state


def _missing(optimizer: FusedOptimizer, where: str, name: str, state: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{where}: {name!r} is missing (found {sorted(state)}); load a checkpoint of "
        f"{type(optimizer).__name__} with the same flags. Nothing was loaded."
    )


class Packed:
    """A plan with its torch-stepped remainder, for one optimizer.

    Building creates the state of parameters that have a gradient for the first time, as torch's
    lazy initialisation does; `undo` removes it again if the step fails before it has changed
    anything.

    Raises:
        ValueError: the optimizer's backend is named and cannot update some parameter.
        KeyError: a parameter's state lacks an entry its flags ask for.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.created: list[tuple[Tensor, list[str]]] = []
        self.launchers: dict[str, object] = {}
        self.torch_params: list[tuple[int, int, Tensor, str]] = []
        try:
            rows, idle = self._sort()
            rows = self._drop_overlapping(rows)
            self._report()
            self.rows = len(rows)
            self.plan = _C.StepPlan(
                optimizer._rule,
                optimizer.param_groups,
                optimizer.state,
                rows,
                idle,
                self.launchers,
                optimizer._captured,
            )
        except BaseException:
            self.undo()
            raise

    @property
    def optimizer(self) -> FusedOptimizer:
        """The optimizer. It owns this: a cycle would keep a dropped model till a collection."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def _sort(self) -> tuple[list[Row], list[Tensor]]:
        optimizer = self.optimizer
        rows: list[Row] = []
        idle: list[Tensor] = []
        repeated = repeated_params(optimizer)
        for number, group in enumerate(optimizer.param_groups):
            names = optimizer._state_names(group)
            for index, param in enumerate(group["params"]):
                backend = optimizer._backend_of(param)
                reason = why_torch(group, param, backend)
                if id(param) in repeated:
                    reason = reason or _SHARED_MEMORY
                if not reason and param.grad is None and not self._has_state(param, names):
                    idle.append(param)
                    continue
                fresh = False
                launcher = backend.launcher() if backend is not None else None
                if not reason:
                    fresh = self._create_state(group, param, names, launcher is not None)
                    reason = why_state_torch(param, self._states(param, names))
                if reason:
                    self._to_torch(number, index, param, reason)
                    continue
                if launcher is not None:
                    self.launchers[param.device.type] = launcher
                rows.append((number, param, fresh, optimizer._first_flags.get(param)))
        return rows, idle

    def _states(self, param: Tensor, names: list[str]) -> list[Tensor]:
        return [self.optimizer.state[param][name] for name in names]

    def _has_state(self, param: Tensor, names: list[str]) -> bool:
        state = self.optimizer.state.get(param) or {}
        wanted = [*names, "step"] if self.optimizer._has_step else names
        if not wanted:
            return True
        return all(state.get(name) is not None for name in wanted)

    def _create_state(self, group: Group, param: Tensor, names: list[str], on_device: bool) -> bool:
        """Creates what is missing, as torch does; returns whether anything was."""
        optimizer = self.optimizer
        if self._has_state(param, names):
            return False
        state = optimizer.state[param]
        if optimizer._has_step:
            if state:
                missing = next(name for name in [*names, "step"] if state.get(name) is None)
                raise KeyError(missing)
            if group.get("fused"):
                _device_dtype_check_for_fused(param)
            counts_there = group.get("fused") or group.get("capturable")
            self.created.append((param, ["step", *names]))
            state["step"] = torch.zeros(
                (),
                dtype=_get_scalar_dtype(is_fused=group.get("fused")),
                device=param.device if counts_there else "cpu",
            )
        else:
            self.created.append((param, names))
            if group.get("fused") and on_device:  # only there is known if the step took place
                optimizer._first_flags[param] = torch.ones(
                    (), dtype=torch.int32, device=param.device
                )
        for name in names:
            state[name] = optimizer._initial_state(param, name)
        return True

    def _drop_overlapping(self, rows: list[Row]) -> list[Row]:
        """Moves rows that share memory to torch, which steps them one after the other."""
        groups = self.optimizer.param_groups
        written = [
            [param, *self._states(param, self.optimizer._state_names(groups[number]))]
            if self.optimizer._state_names(groups[number])
            else [param]
            for number, param, *_ in rows
        ]
        shared = set(_C.overlapping(written))
        for row in sorted(shared):
            number, param, *_ = rows[row]
            index = next(i for i, p in enumerate(groups[number]["params"]) if p is param)
            self._to_torch(number, index, param, _SHARED_MEMORY)
        return [row for i, row in enumerate(rows) if i not in shared]

    def _to_torch(self, number: int, index: int, param: Tensor, reason: str) -> None:
        backend = self.optimizer.backend
        if backend != "auto":
            group = self.optimizer.param_groups[number]
            raise ValueError(
                f"backend={backend!r} cannot update {describe(group, index)} of param group "
                f"{number}: {reason}; use backend='auto', which leaves it to torch.optim"
            )
        if optimizer_dtype := self.optimizer.state_dtype:
            group = self.optimizer.param_groups[number]
            if self.optimizer._dtype_of_states(param) != param.dtype:
                raise ValueError(
                    f"state_dtype={optimizer_dtype} cannot be had for {describe(group, index)} of "
                    f"param group {number}, which torch.optim must step: {reason}; leave "
                    "state_dtype out, or give that parameter an optimizer of its own"
                )
        self.torch_params.append((number, index, param, reason))

    def _report(self) -> None:
        if not self.torch_params or self.optimizer._reported_torch:
            return
        self.optimizer._reported_torch = True
        counts = Counter(reason for *_, reason in self.torch_params)
        total = sum(len(group["params"]) for group in self.optimizer.param_groups)
        logger.warning(
            "fusedopt.%s: torch.optim steps %d of %d parameters: %s. "
            "optimizer.routes() lists them.",
            type(self.optimizer).__name__,
            len(self.torch_params),
            total,
            "; ".join(f"{reason} ({count})" for reason, count in counts.items()),
        )

    def refresh(self) -> str | None:
        """Brings the plan up to date; returns why it no longer fits, having changed nothing."""
        optimizer = self.optimizer
        for number, _, param, reason in self.torch_params:
            if reason == _SHARED_MEMORY:
                continue
            if number >= len(optimizer.param_groups):
                return "the parameter groups have other members"
            group = optimizer.param_groups[number]
            now = why_torch(group, param, optimizer._backend_of(param))
            if now != reason and (now or not reason.startswith(("a state", "its states", "no "))):
                return "a parameter's route changed"
        return self.plan.refresh(optimizer.param_groups, optimizer.state)

    @property
    def on_device(self) -> bool:
        """Whether kernels on devices read AMP's tensors, and nothing on the host needs them."""
        return not self.torch_params and self.plan.on_device

    def launch(self) -> None:
        """Performs the step that `refresh` prepared: torch's remainder, then the kernels."""
        optimizer = self.optimizer
        if self.torch_params:
            torch_step(optimizer, self.torch_params, amp=self.rows == 0)
        if self.on_device:
            self.plan.launch(
                getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
            )
        else:
            self.plan.launch()
        self.created.clear()

    def undo(self) -> None:
        """Removes the state that was created for a step that did not take place, if one did not."""
        for param, names in self.created:
            state = self.optimizer.state[param]
            self.optimizer._first_flags.pop(param, None)
            for name in names:
                state.pop(name, None)
            if not state:
                del self.optimizer.state[param]
        self.created.clear()


def torch_step(
    optimizer: FusedOptimizer, torch_params: list[tuple[int, int, Tensor, str]], *, amp: bool
) -> None:
    """torch.optim's own step over some of the parameters, sharing the optimizer's state.

    What runs is the function inside torch's ``step``, without the wrapper that fires hooks (they
    fire once, around ours), on a stand-in that has the optimizer's attributes and narrowed groups;
    without ``amp``, it does not see GradScaler's tensors, which have been dealt with.
    """
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update(optimizer.__dict__)
    if not amp:
        stand_in.__dict__.pop("grad_scale", None)
        stand_in.__dict__.pop("found_inf", None)
    members: dict[int, list[Tensor]] = {}
    for number, _, param, _ in torch_params:
        members.setdefault(number, []).append(param)
    stand_in.param_groups = [
        {**optimizer.param_groups[number], "params": params}
        for number, params in sorted(members.items())
    ]
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        inspect.unwrap(optimizer._torch_class.step)(stand_in)


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
                _SHARED_MEMORY if id(param) in repeated else why_state_torch(param, states)
            )
            name = "torch" if reason or backend is None else backend.name
            entries.append((number, index, param, states, reason, name))
    fused = [entry for entry in entries if not entry[4]]
    shared = {id(fused[i][2]) for i in _C.overlapping([[e[2], *e[3]] for e in fused])}
    for number, index, param, _, reason, name in entries:
        reason = reason or (_SHARED_MEMORY if id(param) in shared else "")
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
