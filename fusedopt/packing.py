"""From param groups to a plan: who is updated by kernels, who by torch, and the state both need.

This is the slow path, taken when the plan is built. What happens every step is `StepPlan.refresh`
and `StepPlan.launch`, in C++.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_scalar_dtype

from fusedopt import distributed
from fusedopt._extension import _C
from fusedopt.routing import SHARED_MEMORY, Group, Member, describe, why_torch

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

logger = logging.getLogger("fusedopt")

# Group index, parameter, whether its state was created for the step to come, and the flag on the
# device that says so where only the device knows.
Row = tuple[int, Tensor, bool, "Tensor | None"]


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
        self.torch_params: list[Member] = []
        try:
            rows, idle = self._sort()
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
                optimizer._onepass.core if optimizer._onepass is not None else None,
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
        """Who is updated by kernels, and who waits; creates the state that kernels need."""
        optimizer = self.optimizer
        members = optimizer._sort()
        for member in members.torch:
            self._to_torch(member)
        self.launchers = members.launchers
        rows: list[Row] = []
        for member in members.fused:
            number, param = member.group, member.param
            group = optimizer.param_groups[number]
            on_device = param.device.type in self.launchers
            fresh = self._create_state(group, param, optimizer._state_names(group), on_device)
            self._create_entries(param, self.entries, on_device)
            rows.append((number, param, fresh, optimizer._first_flags.get(param)))
        return rows, [member.param for member in members.waiting]

    @property
    def entries(self) -> list[str]:
        """What a parameter's state has beside what its rule keeps."""
        onepass = self.optimizer._onepass
        return onepass.entries() if onepass is not None else []

    def _has_state(self, param: Tensor, names: list[str]) -> bool:
        state = self.optimizer.state.get(param) or {}
        wanted = [*names, "step"] if self.optimizer._has_step else names
        return all(state.get(name) is not None for name in wanted)

    @property
    def _may_skip(self) -> bool:
        """Whether a device may decide that a step does not take place, whatever the group."""
        onepass = self.optimizer._onepass
        return onepass is not None and onepass.core.may_skip

    def _create_state(self, group: Group, param: Tensor, names: list[str], on_device: bool) -> bool:
        """Creates what is missing, as torch does; returns whether anything was."""
        optimizer = self.optimizer
        if self._has_state(param, names):
            return False
        state = optimizer.state[param]
        if optimizer._has_step:
            if state.keys() - set(self.entries):
                missing = next(name for name in [*names, "step"] if state.get(name) is None)
                raise KeyError(missing)
            if group.get("fused"):
                _device_dtype_check_for_fused(param)
            counts_there = group.get("fused") or group.get("capturable")
            counts_there = counts_there or (self._may_skip and on_device)
            self.created.append((param, ["step", *names]))
            state["step"] = torch.zeros(
                (),
                dtype=_get_scalar_dtype(is_fused=group.get("fused")),
                device=param.device if counts_there else "cpu",
            )
        else:
            self.created.append((param, names))
            if on_device and (group.get("fused") or self._may_skip):
                # Only there is known if the step took place.
                optimizer._first_flags[param] = torch.ones(
                    (), dtype=torch.int32, device=param.device
                )
        for name in names:
            state[name] = optimizer._initial_state(param, name)
        return True

    def _create_entries(self, param: Tensor, entries: list[str], on_device: bool) -> None:
        """Creates what options ask for, and has steps counted where they may be skipped."""
        optimizer = self.optimizer
        if optimizer._onepass is None:
            return
        missing = [name for name in entries if name not in optimizer.state.get(param, {})]
        if missing:
            self.created.append((param, missing))
        for name in missing:
            optimizer.state[param][name] = optimizer._onepass.initial(param, name)
        if self._may_skip and on_device and optimizer._has_step:
            step = optimizer.state[param]["step"]
            if step.device != param.device:
                optimizer.state[param]["step"] = step.to(param.device)

    def _to_torch(self, member: Member) -> None:
        """Leaves a parameter to torch.optim, unless more was asked for than that can do."""
        optimizer = self.optimizer
        group = optimizer.param_groups[member.group]
        who = f"{describe(group, member.index)} of param group {member.group}"
        if (onepass := optimizer._onepass) is not None:
            raise ValueError(
                f"{', '.join(onepass.options.asked) or 'accumulate()'} cannot be had for {who}, "
                f"which torch.optim must step: {member.reason}; leave it out, or give that "
                "parameter an optimizer of its own"
            )
        if optimizer.backend != "auto":
            raise ValueError(
                f"backend={optimizer.backend!r} cannot update {who}: {member.reason}; use "
                "backend='auto', which leaves it to torch.optim"
            )
        if optimizer._dtype_of_states(member.param) != member.param.dtype:
            raise ValueError(
                f"state_dtype={optimizer.state_dtype} cannot be had for {who}, which torch.optim "
                f"must step: {member.reason}; leave state_dtype out, or give that parameter an "
                "optimizer of its own"
            )
        self.torch_params.append(member)

    def _report(self) -> None:
        if not self.torch_params or self.optimizer._reported_torch:
            return
        self.optimizer._reported_torch = True
        counts = Counter(member.reason for member in self.torch_params)
        total = sum(len(group["params"]) for group in self.optimizer.param_groups)
        logger.warning(
            "fusedopt.%s: torch.optim steps %d of %d parameters: %s. "
            "optimizer.routes() lists them.",
            type(self.optimizer).__name__,
            len(self.torch_params),
            total,
            "; ".join(f"{reason} ({count})" for reason, count in counts.items()),
        )

    def refresh(self, purpose: Any = _C.Purpose.UPDATE) -> str | None:
        """Brings the plan up to date; returns why it no longer fits, having changed nothing."""
        optimizer = self.optimizer
        for member in self.torch_params:
            if member.reason == SHARED_MEMORY:
                continue
            if member.group >= len(optimizer.param_groups):
                return "the parameter groups have other members"
            group, reason = optimizer.param_groups[member.group], member.reason
            now = why_torch(group, member.param, optimizer._backend_of(member.param))
            if now != reason and (now or not reason.startswith(("a state", "its states", "no "))):
                return "a parameter's route changed"
        return self.plan.refresh(optimizer.param_groups, optimizer.state, purpose)

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

    def launch_onepass(self, weight: float | Tensor) -> bool:
        """The same with what the options ask for; returns whether the host knows of no skip.

        Gradients count with ``weight``, if they are accumulated.
        """
        optimizer = self.optimizer
        live = weight if isinstance(weight, Tensor) else None
        try:
            took_place: bool = self.plan.launch_onepass(
                getattr(optimizer, "grad_scale", None),
                getattr(optimizer, "found_inf", None),
                1.0 if isinstance(weight, Tensor) else float(weight),
                live,
                distributed.add_up_shards,
            )
        except BaseException:
            self.undo()
            raise
        if took_place:
            self.created.clear()
        return took_place

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


def torch_step(optimizer: FusedOptimizer, torch_params: list[Member], *, amp: bool) -> None:
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
    for member in torch_params:
        members.setdefault(member.group, []).append(member.param)
    stand_in.param_groups = [
        {**optimizer.param_groups[number], "params": params}
        for number, params in sorted(members.items())
    ]
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        inspect.unwrap(optimizer._torch_class.step)(stand_in)
