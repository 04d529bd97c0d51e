"""Steps of an optimizer through a plan, which is made anew where it no longer fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt import distributed
from fusedopt._extension import _C
from fusedopt.backends import BACKENDS, Backend, backend_for
from fusedopt.framework_checks import check_no_shards
from fusedopt.packing import NewState, Packed, torch_step
from fusedopt.routing import Member, Route, Sorted, Wanted, describe, routes, sort
from fusedopt.step_extras import ENTRIES, WINDOW, Options, StepExtras
from fusedopt.wrappers import Wrappable, on_the_optimizer

_UPDATE = _C.Purpose.UPDATE
# Of gradients that count fully in their window, for each purpose.
_REQUESTS = {p: _C.StepRequest(p) for p in _C.Purpose.__members__.values()}


class PlannedSteps(Wrappable):
    """The part of `FusedOptimizer` that makes plans and takes steps with them."""

    _rule: ClassVar[str]
    # A step of some parameters of a group by the rule's operator; `fusedopt.functional` gives it.
    _step_operator: ClassVar[Callable[..., None]]
    _has_step: ClassVar[bool]
    _private_names: ClassVar[set[str]]  # of entries of the state that `state_dict` leaves out
    _all_state_names: ClassVar[set[str]]
    _torch_class: ClassVar[type[torch.optim.Optimizer]]

    _options: Options
    _extras: StepExtras | None  # None as long as a step is an update and nothing else
    _memory: Any  # what kernels and plans know of it, and of GradScaler; None likewise
    _packed: Packed | None
    _captured: Any
    _reported_torch: bool

    def _take(
        self,
        purpose: Any = _UPDATE,
        weight: float | Tensor = 1.0,
        *,
        named: Sequence[Tensor] | None = None,
        follows: bool = False,
    ) -> None:
        """Takes a step, with a new plan where the present one no longer fits.

        Args:
            purpose: What the gradients are for.
            weight: That of the gradients in their window.
            named: The parameters that take part; None for all.
            follows: The step is a further part of the last one, whose decision it obeys.
        """
        own = self.__dict__
        scaled = "grad_scale" in own or "found_inf" in own
        if scaled and self._memory is None:
            self._memory = _C.StepMemory(partial(distributed.add_up_shards, ()))
            self._memory.options = _C.StepOptions(scaled=True)
        packed = self._packed
        if (
            packed is not None
            and type(weight) is float
            and weight == 1.0
            and packed.memory is self._memory
            and not (scaled or packed.torch_params or follows or named is not None)
        ):  # nothing is asked for but what the plan knows
            request = None if purpose is _UPDATE else _REQUESTS[purpose]
            outcome = packed.step(self.param_groups, self.state, request)
            if outcome is True:
                return
            if outcome is False:
                if purpose is _UPDATE:
                    packed.undo()
                return

        if torch._C._len_torch_dispatch_stack():
            return self._take_dispatched(purpose, named, scaled=scaled)

        def step(packed: Packed) -> bool | str:
            request = _C.StepRequest(
                purpose, weight, own.get("grad_scale"), own.get("found_inf"), follows
            )
            members = packed.torch_params
            if members and named is not None:
                ids = {id(param) for param in named}
                members = [member for member in members if id(member.param) in ids]
            if members:
                request.before = lambda: torch_step(self, self._torch_class, members)
            return packed.step(self.param_groups, self.state, request, named)

        took_place = self._with_plan(step, named)
        if not took_place and purpose == _UPDATE and self._packed is not None:
            self._packed.undo()
        return None

    def _take_dispatched(
        self, purpose: Any, named: Sequence[Tensor] | None, *, scaled: bool
    ) -> None:
        """Takes a step under a TorchDispatchMode, by operators that it sees and may record."""
        if self._extras is not None or scaled or purpose != _UPDATE:
            asked = ", ".join(self._options.asked) or "GradScaler's scale or accumulate()"
            raise RuntimeError(
                f"a step with {asked} under a TorchDispatchMode (make_fx, FakeTensorMode, "
                "FlopCounterMode, ...), which would not see it; take the step outside of the mode, "
                "or without these"
            )
        packed = self._pack(named)
        ids = None if named is None else {id(param) for param in named}
        try:
            with torch.no_grad():
                for number, group in enumerate(self.param_groups):
                    self._step_operator(self._rule, group, packed.params(number, ids), self.state)
            members = [m for m in packed.torch_params if ids is None or id(m.param) in ids]
            if members:
                torch_step(self, self._torch_class, members)
        except BaseException:
            packed.undo()
            raise

    def _with_plan(
        self, call: Callable[[Packed], bool | str | None], named: Sequence[Tensor] | None = None
    ) -> bool | str | None:
        """What ``call`` makes of the plan; of a new one, if it says why the plan does not fit."""
        packed = self._packed
        outcome: bool | str | None = "there is none"
        try:
            if packed is not None and packed.memory is self._memory:
                outcome = packed.why_rerouted(self.param_groups, self._backend_of) or call(packed)
            if isinstance(outcome, str):
                self._packed = packed = None  # one that no longer fits must not survive a failure
                packed = self._pack(named)
                outcome = call(packed)
                if outcome == _C.UNSEEN_GRADIENT:
                    raise RuntimeError(
                        "step() after accumulate() found gradients that accumulate() was not "
                        "given: call it after every backward(), or zero_grad() if they are not "
                        "wanted. Nothing was changed"
                    )
                if isinstance(outcome, str):
                    raise RuntimeError(f"the step cannot be prepared: {outcome}")
                self._packed = packed
        except BaseException:
            if packed is not None:
                packed.undo()
            raise
        return outcome

    def _prepare(self, purpose: Any, *, keeps_state: bool = False) -> None:
        """Makes a plan, and the state, that such a step will need; raises where it could not be.

        Unless it ``keeps_state``, that is undone should the step fail.
        """
        request = _C.StepRequest(purpose)
        self._with_plan(lambda packed: packed.why_not(self.param_groups, self.state, request))
        if keeps_state and self._packed is not None:
            self._packed.keep()

    def _pack(self, named: Sequence[Tensor] | None) -> Packed:
        """A new plan, and the state that it needs.

        Raises:
            ValueError: more was asked for than torch.optim can do for a parameter it must step.
        """
        for group in self.param_groups:
            if not isinstance(group["params"], list):  # set by hand; torch takes any iterable
                group["params"] = list(group["params"])
        extras, members = self._extras, self._sort()
        alone = self._options.norm_group is None
        if alone and extras is not None and extras.core.options.measures:
            check_no_shards(self._params())
        for member in members.torch:
            self._check_torch(member)

        def initial(param: Tensor, name: str) -> Tensor:
            if extras is not None and name in ENTRIES:
                return extras.initial(param, name)
            return self._initial_state(param, name)

        new = NewState(
            self._state_names,
            partial(_C.scalar_states, self._rule),
            extras.entries() if extras is not None else [],
            initial,
            self._memory is not None and self._memory.options.may_skip,
        )
        packed = Packed(
            self._rule,
            self.param_groups,
            self.state,
            members,
            new,
            self._captured,
            self._memory,
            named,
        )
        if not self._reported_torch:
            self._reported_torch = packed.report(type(self).__name__, len(self._params()))
        return packed

    def _check_torch(self, member: Member) -> None:
        """Raises for a parameter that torch.optim must step, and that more was asked for."""
        group = self.param_groups[member.group]
        who = f"{describe(group, member.index)} of param group {member.group}"
        if self._extras is not None:
            asked = ", ".join(self._options.asked) or "accumulate()"
        elif self._options.backend != "auto":
            raise ValueError(
                f"backend={self._options.backend!r} cannot update {who}: {member.reason}; use "
                "backend='auto', which leaves it to torch.optim"
            )
        elif self._dtype_of_states(member.param) != member.param.dtype:
            asked = f"state_dtype={self._options.state_dtype}"
        else:
            return
        raise ValueError(
            f"{asked} cannot be had for {who}, which torch.optim must step: {member.reason}; leave "
            "it out, or give that parameter an optimizer of its own"
        )

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        """The state, less entries that are nobody's, which torch lets stand."""
        return {param: s for param, s in self.state.items() if isinstance(param, Tensor)}

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _state_names(self, group: dict[str, Any]) -> list[str]:
        return _C.state_names(self._rule, group)

    def _dtype_of_states(self, param: Tensor) -> torch.dtype:
        return (
            self._options.state_dtype
            if self._options.state_dtype and param.itemsize == 2
            else param.dtype
        )

    def _cast_states(self) -> None:
        """Gives the states that there are the dtype that they are to have."""
        for param, state in self._states().items():
            for name in self._all_state_names & state.keys():
                state[name] = state[name].to(self._dtype_of_states(param))

    def _initial_state(self, param: Tensor, name: str) -> Tensor:
        dtype = self._dtype_of_states(param)
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _backend_of(self, param: Tensor) -> Backend | None:
        """The backend whose kernels may update ``param``, None if its device has none."""
        if self._options.backend == "auto":
            return backend_for(param.device.type)
        backend = BACKENDS[self._options.backend]
        return backend if param.device.type in backend.device_types else None

    def _sort(self) -> Sorted:
        """The parameters by who updates them now."""
        entries = self._extras.entries() if self._extras is not None else []
        wanted = Wanted(
            self._state_names,
            self._dtype_of_states,
            [name for name in entries if name != WINDOW],
            [*["step"] * self._has_step, *[name for name in entries if name == WINDOW]],
        )
        return sort(self.param_groups, self.state, self._backend_of, wanted)

    @on_the_optimizer
    def refresh_hyperparameters(self) -> int:
        """Gives the numbers in ``param_groups`` to the CUDA graphs that captured this step.

        A replay uses the lr, betas and weight decay that it was captured with, unless they are
        device tensors, which are read at every replay. After a plain number in ``param_groups``
        changed, call this before the next replay, on the stream of the replays: it waits for
        nothing. Outside of graphs every step reads ``param_groups`` anyway.

        Returns:
            The number of captured tables that were refreshed, 0 without a graph.

        Raises:
            RuntimeError: a flag was changed that replays cannot follow (amsgrad, nesterov, ...).

        Example:
            >>> import torch, fusedopt
            >>> optimizer = fusedopt.AdamW([torch.nn.Parameter(torch.ones(3))], lr=1e-3)
            >>> optimizer.param_groups[0]["lr"] = 5e-4
            >>> optimizer.refresh_hyperparameters()  # nothing was captured
            0
        """
        return self._captured.refresh(self._rule, self.param_groups)

    @on_the_optimizer
    def routes(self) -> list[Route]:
        """Where each parameter is updated, judged by its present gradient.

        Returns:
            One `Route` a parameter, in the order of the groups.

        Example:
            >>> import torch, fusedopt
            >>> weight = torch.nn.Parameter(torch.ones(3))
            >>> optimizer = fusedopt.SGD([weight], lr=0.1)
            >>> optimizer.routes()[0].backend
            'cpu'
        """
        return routes(self.param_groups, self._sort())
