"""From sorted parameters to a plan, and the state that its steps need.

This is the slow path, taken when the plan is built. What happens every step is `StepPlan.step`, in
C++.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_scalar_dtype

from fusedopt._extension import _C
from fusedopt.backends import Backend
from fusedopt.routing import SHARED_MEMORY, Group, Member, Sorted, why_torch

logger = logging.getLogger("fusedopt")

# Group index, parameter, whether its state was created for the step to come, and the flag on the
# device that says so where only the device knows.
Row = tuple[int, Tensor, bool, "Tensor | None"]
State = dict[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class NewState:
    """How the state of a parameter is made, as torch's lazy initialisation does.

    Attributes:
        names: By group, the names of the rule's states.
        entries: Those of further entries, which options ask for.
        initial: What a parameter's entry starts as.
        has_step: Whether the rule keeps a step count.
        may_skip: Whether a device may decide that a step does not take place, whatever the group.
    """

    names: Callable[[Group], list[str]]
    entries: list[str]
    initial: Callable[[Tensor, str], Tensor]
    has_step: bool
    may_skip: bool


class Packed:
    """A plan with its torch-stepped remainder, for one optimizer.

    Building creates the state of parameters that have a gradient for the first time; `undo` removes
    it again if the step fails before it has changed anything.

    Args:
        rule: The rule's name.
        groups, state: The optimizer's.
        members: Its parameters.
        new: How states are made.
        first_flags: By parameter of a rule without step counts, an int32 on the device that is 1
            until a step took place, where a device may have skipped those there were.
        captured: Where tables go that graphs hold.
        memory: What steps are asked for and remember; None if they are updates and nothing else.
        named: The parameters that the coming step is for; others wait until they have a state.

    Raises:
        KeyError: a parameter's state lacks an entry its flags ask for.
    """

    def __init__(
        self,
        rule: str,
        groups: list[Group],
        state: State,
        members: Sorted,
        new: NewState,
        first_flags: dict[Tensor, Tensor],
        captured: Any,
        memory: Any,
        named: Sequence[Tensor] | None = None,
    ) -> None:
        self.memory = memory
        self._state = state
        self._first_flags = first_flags
        self._created: list[tuple[Tensor, list[str]]] = []
        self.torch_params = members.torch
        launchers = members.launchers
        wanted = None if named is None else {id(param) for param in named}
        idle = [member.param for member in members.waiting]
        rows: list[Row] = []
        try:
            for member in members.fused:
                group, param = groups[member.group], member.param
                stateful = new.has_step or new.entries or new.names(group)
                waits = wanted is not None and id(param) not in wanted and not state.get(param)
                if waits and stateful:
                    idle.append(param)
                    continue
                on_device = param.device.type in launchers
                fresh = self._create_state(group, param, new, on_device=on_device)
                self._create_entries(param, new, on_device=on_device)
                rows.append((member.group, param, fresh, first_flags.get(param)))
            self.rows = len(rows)
            self._row_of = {id(param): row for row, (_, param, *_) in enumerate(rows)}
            self.plan = _C.StepPlan(rule, groups, state, rows, idle, launchers, captured, memory)
        except BaseException:
            self.undo()
            raise
        # Whether kernels read AMP's tensors, and nothing on the host needs them.
        self.on_device = not self.torch_params and self.plan.on_device

    def _create_state(self, group: Group, param: Tensor, new: NewState, *, on_device: bool) -> bool:
        """Creates what the rule needs and is missing; returns whether anything was."""
        names = new.names(group)
        needed = ["step", *names] if new.has_step else names
        state = self._state.get(param) or {}
        if all(state.get(name) is not None for name in needed):
            return False
        state = self._state[param]
        if new.has_step and state.keys() - set(new.entries):
            raise KeyError(next(name for name in [*names, "step"] if state.get(name) is None))
        if new.has_step and group.get("fused"):
            _device_dtype_check_for_fused(param)
        self._created.append((param, needed))
        if new.has_step:
            counts_there = group.get("fused") or group.get("capturable")
            counts_there = counts_there or (new.may_skip and on_device)
            state["step"] = torch.zeros(
                (),
                dtype=_get_scalar_dtype(is_fused=group.get("fused")),
                device=param.device if counts_there else "cpu",
            )
        elif on_device and (group.get("fused") or new.may_skip):
            # Only there is known if the step took place.
            flag = torch.ones((), dtype=torch.int32, device=param.device)
            self._first_flags[param] = flag
        for name in names:
            state[name] = new.initial(param, name)
        return True

    def _create_entries(self, param: Tensor, new: NewState, *, on_device: bool) -> None:
        """Creates what options ask for, and has steps counted where they may be skipped."""
        missing = [name for name in new.entries if name not in self._state.get(param, {})]
        if missing:
            self._created.append((param, missing))
        for name in missing:
            self._state[param][name] = new.initial(param, name)
        if new.may_skip and on_device and new.has_step:
            step = self._state[param]["step"]
            if step.device != param.device:
                self._state[param]["step"] = step.to(param.device)

    def report(self, class_name: str, total: int) -> bool:
        """Logs which parameters torch steps; returns whether there are any."""
        counts = Counter(member.reason for member in self.torch_params)
        if counts:
            logger.warning(
                "fusedopt.%s: torch.optim steps %d of %d parameters: %s. "
                "optimizer.routes() lists them.",
                class_name,
                len(self.torch_params),
                total,
                "; ".join(f"{reason} ({count})" for reason, count in counts.items()),
            )
        return bool(counts)

    def step(
        self,
        groups: list[Group],
        state: State,
        request: Any = None,
        named: Sequence[Tensor] | None = None,
    ) -> bool | str:
        """Takes a step.

        Args:
            groups: The optimizer's.
            state: The optimizer's.
            request: What is asked for beside the update.
            named: The parameters that take part; None for all.

        Returns:
            Whether it took place, as far as the host knows, or why the plan no longer fits it.
        """
        if named is not None:
            torchs = {id(member.param) for member in self.torch_params}
            if any(id(param) not in self._row_of.keys() | torchs for param in named):
                return "a parameter received its first gradient"
            request.rows = [self._row_of[id(p)] for p in named if id(p) not in torchs]
        outcome = self.plan.step(groups, state, request)
        if outcome is True and self._created:
            self._created.clear()
        return outcome

    def why_not(self, groups: list[Group], state: State, request: Any = None) -> str | None:
        """Why the plan no longer fits such a step, having changed nothing; None if it does."""
        return self.plan.why_not(groups, state, request)

    def why_rerouted(
        self, groups: list[Group], backend_of: Callable[[Tensor], Backend | None]
    ) -> str | None:
        """Why parameters that torch steps are to be sorted anew; None if they are not."""
        for member in self.torch_params:
            if member.reason == SHARED_MEMORY:
                continue
            if member.group >= len(groups):
                return "the parameter groups have other members"
            reason = member.reason
            now = why_torch(groups[member.group], member.param, backend_of(member.param))
            if now != reason and (now or not reason.startswith(("a state", "its states", "no "))):
                return "a parameter's route changed"
        return None

    def keep(self) -> None:
        """Keeps the state that was created, whatever becomes of the step."""
        self._created.clear()

    def undo(self) -> None:
        """Removes the state that was created for a step that did not take place, if one did not."""
        for param, names in self._created:
            state = self._state[param]
            self._first_flags.pop(param, None)
            for name in names:
                state.pop(name, None)
            if not state:
                del self._state[param]
        self._created.clear()


def torch_step(
    optimizer: torch.optim.Optimizer,
    torch_class: type[torch.optim.Optimizer],
    members: Sequence[Member],
    *,
    amp: bool,
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
    params: dict[int, list[Tensor]] = {}
    for member in members:
        params.setdefault(member.group, []).append(member.param)
    stand_in.param_groups = [
        {**optimizer.param_groups[number], "params": some}
        for number, some in sorted(params.items())
    ]
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        inspect.unwrap(torch_class.step)(stand_in)
