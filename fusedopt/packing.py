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

State = dict[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class NewState:
    """How the state of a parameter is made, as torch's lazy initialisation does.

    Attributes:
        names: By group, the names of the rule's states.
        scalars: By group, its scalar states: name, initial value, and value where states are
            loaded without it.
        entries: Those of further entries, which options ask for.
        initial: What a parameter's entry starts as.
        may_skip: Whether a device may decide that a step does not take place, whatever the group.
    """

    names: Callable[[Group], list[str]]
    scalars: Callable[[Group], list[tuple[str, float, float]]]
    entries: list[str]
    initial: Callable[[Tensor, str], Tensor]
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
        captured: Any,
        memory: Any,
        named: Sequence[Tensor] | None = None,
    ) -> None:
        self.memory = memory
        self._state = state
        self._created: list[tuple[Tensor, str]] = []
        self.torch_params = members.torch
        launchers = members.launchers
        wanted = None if named is None else {id(param) for param in named}
        idle = [member.param for member in members.waiting]
        rows: list[tuple[int, Tensor]] = []
        try:
            for member in members.fused:
                group, param = groups[member.group], member.param
                stateful = new.entries or new.names(group) or new.scalars(group)
                waits = wanted is not None and id(param) not in wanted and not state.get(param)
                if waits and stateful:
                    idle.append(param)
                    continue
                on_device = param.device.type in launchers
                self._create_state(group, param, new, on_device=on_device)
                self._create_entries(param, new, on_device=on_device)
                rows.append((member.group, param))
            self.rows = len(rows)
            self._placed = rows
            self._row_of = {id(param): row for row, (_, param) in enumerate(rows)}
            created = bool(self._created)
            self.plan = _C.StepPlan(
                rule, groups, state, rows, idle, launchers, captured, memory, created
            )
        except BaseException:
            self.undo()
            raise

    def params(self, group: int, ids: set[int] | None) -> list[Tensor]:
        """A group's that kernels have a gradient of, and that have one of the ids, if given."""
        return [
            param
            for number, param in self._placed
            if number == group and param.grad is not None and (ids is None or id(param) in ids)
        ]

    def _create_state(self, group: Group, param: Tensor, new: NewState, *, on_device: bool) -> None:
        """Creates what the rule needs and is missing."""
        names, scalars = new.names(group), new.scalars(group)
        public = [scalar for scalar in scalars if not scalar[0].startswith("_")]
        private = scalars[len(public) :]
        state = self._state.get(param) or {}
        missing = [n for n in (*names, *(name for name, *_ in public)) if state.get(n) is None]
        if missing and public:
            if state.keys() - set(new.entries):
                raise KeyError(missing[0])
            if group.get("fused"):
                _device_dtype_check_for_fused(param)
        counts_there = group.get("fused") or group.get("capturable") or (new.may_skip and on_device)

        def create_scalar(name: str, value: float, *, there: bool) -> None:
            dtype = _get_scalar_dtype(is_fused=group.get("fused"))
            device = param.device if there else "cpu"
            self._create(param, name, torch.full((), value, dtype=dtype, device=device))

        if missing:
            for name, initial, _ in public:
                create_scalar(name, initial, there=bool(counts_there))
            for name in names:
                self._create(param, name, new.initial(param, name))
        for name, initial, loaded in private:
            value = self._state[param].get(name)
            # Who casts or moves all that is in a state does not know what this is.
            fits = value is not None and value.dtype in (torch.float32, torch.float64)
            if missing or not fits:
                create_scalar(name, initial if missing else loaded, there=on_device)

    def _create_entries(self, param: Tensor, new: NewState, *, on_device: bool) -> None:
        """Creates what options ask for, and has steps counted where they may be skipped."""
        for name in new.entries:
            if name not in self._state.get(param, {}):
                self._create(param, name, new.initial(param, name))
        if new.may_skip and on_device and "step" in self._state.get(param, {}):
            step = self._state[param]["step"]
            if step.device != param.device:
                self._state[param]["step"] = step.to(param.device)

    def _create(self, param: Tensor, name: str, value: Tensor) -> None:
        self._state[param][name] = value
        self._created.append((param, name))

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
        for param, name in self._created:
            self._state[param].pop(name, None)
            if not self._state[param]:
                del self._state[param]
        self._created.clear()


def torch_step(
    optimizer: torch.optim.Optimizer,
    torch_class: type[torch.optim.Optimizer],
    members: Sequence[Member],
) -> None:
    """torch.optim's own step over some of the parameters, sharing the optimizer's state.

    What runs is the function inside torch's ``step``, without the wrapper that fires hooks (they
    fire once, around ours), on a stand-in that has the optimizer's attributes, GradScaler's among
    them, and narrowed groups.
    """
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update(optimizer.__dict__)
    params: dict[int, list[Tensor]] = {}
    for member in members:
        params.setdefault(member.group, []).append(member.param)
    stand_in.param_groups = [
        {**optimizer.param_groups[number], "params": some}
        for number, some in sorted(params.items())
    ]
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        inspect.unwrap(torch_class.step)(stand_in)
