"""The base of every fusedopt optimizer: torch.optim's class with another `step`."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame as _eval_frame
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fusedopt import distributed, docstrings
from fusedopt._extension import _C
from fusedopt.amp import unscale_
from fusedopt.backends import BACKENDS, Backend, backend_for, check_backend
from fusedopt.loading import by_param, check_states, check_steps
from fusedopt.options_mixin import StepOptionsMixin
from fusedopt.packing import NewState, Packed, torch_step
from fusedopt.routing import Member, Route, Sorted, Wanted, describe, routes, sort, why_torch
from fusedopt.step_extras import (
    ACCUMULATOR,
    AVERAGE,
    ENTRIES,
    WINDOW,
    Options,
    StepExtras,
    arithmetic_dtype,
)

_UPDATE = _C.Purpose.UPDATE
# Of gradients that count fully in their window, for each purpose.
_REQUESTS = {p: _C.StepRequest(p) for p in _C.Purpose.__members__.values()}


class FusedOptimizer(StepOptionsMixin):
    """Mixin that steps a torch.optim optimizer through fused kernels.

    A subclass names its rule and inherits from this class first and from its torch class second:
    ``class SGD(FusedOptimizer, torch.optim.SGD, rule="sgd")``. Everything but `step` is torch's:
    constructor, validation, errors, hooks, ``state_dict``, ``add_param_group``.

    Parameters that kernels cannot update (sparse gradients, ``differentiable=True``, devices
    without a backend, tensor subclasses but DTensor) are stepped by torch.optim's own code, one by
    one, as `routes` lists; a named ``backend`` raises instead.

    Args:
        *args, **kwargs: As the torch.optim class of the same name.
        backend: "auto" (kernels where they can, torch.optim elsewhere) or the name of a backend
            that must update every parameter.
        state_dtype: torch.float32 keeps the states of bfloat16 and float16 parameters in fp32, so
            that small contributions are not rounded away; None has them in the parameter's dtype,
            as torch.optim does. Other parameters' states are in their own dtype either way.
        max_grad_norm: Clips the gradients of a step to this global norm, as
            ``torch.nn.utils.clip_grad_norm_`` does, but in the update's pass and without changing
            ``.grad``. ``float("inf")`` measures the norm only; see `grad_norm`.
        skip_nonfinite: A step whose gradients are not all finite changes no parameter, state or
            step count; see `step_was_skipped`.
        ema_decay: Averages the parameters: ``ema = ema_decay * ema + (1 - ema_decay) * p`` after
            every update, from the parameters before the first one on, in float32 for 16-bit
            parameters. Stands in ``state[p]["ema"]``; see `swap_ema`.
        zero_grads: The update leaves gradients at zero, in place, whether it was skipped or not.
        accumulation_steps: Calls of `step` that make one update, from the mean of their gradients.
            All but the last add the gradients to accumulators in float32 and free them.
        accumulation_reduction: "sum" where losses are divided by the number of micro-batches.
        accumulation_dtype: torch.float32 makes accumulators with the rest of the state; None when
            they are needed.

    None of these needs a pass of its own over the parameters, or waits for a device. They are for
    all parameters of the optimizer: one that torch.optim must step raises.

    Raises:
        ValueError: an unknown backend, or a named one that cannot update some parameter; another
            state_dtype, or one that a parameter which torch.optim must step cannot have; another of
            the options above, out of range or for such a parameter.
        RuntimeError: a backend that is not available here.
    """

    _rule: ClassVar[str]
    _has_step: ClassVar[bool]
    _all_state_names: ClassVar[set[str]]
    _torch_class: ClassVar[type[torch.optim.Optimizer]]

    def __init_subclass__(cls, rule: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if rule is None:  # a user's subclass of one of ours
            return
        cls._rule = rule
        cls._has_step = _C.rules()[rule]["has_step"]
        cls._all_state_names = {name for names in _C.rules()[rule]["states"] for name in names}
        cls._torch_class = next(
            base for base in cls.__mro__ if base.__module__.startswith("torch.optim.")
        )

        def init(self: FusedOptimizer, *args: Any, **kwargs: Any) -> None:
            FusedOptimizer.__init__(self, *args, **kwargs)

        # Programs inspect optimizers ("fused" in signature(AdamW).parameters), so the signature is
        # the installed torch's, with ours after it.
        theirs = inspect.signature(cls._torch_class.__init__).parameters.values()
        ours = inspect.signature(FusedOptimizer.__init__, eval_str=True).parameters.values()
        own = [option for option in ours if option.kind is inspect.Parameter.KEYWORD_ONLY]
        signature = inspect.Signature([*theirs, *own])
        init.__signature__ = signature  # type: ignore[attr-defined]
        init.__name__ = "__init__"
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        init.__doc__ = cls._torch_class.__init__.__doc__
        cls.__init__ = init  # type: ignore[method-assign]
        if cls.__doc__ and FusedOptimizer.__doc__:
            arguments = signature.replace(parameters=[*theirs, *own][1:])
            cls.__doc__ = docstrings.complete(cls.__doc__, FusedOptimizer.__doc__, arguments)

    def __init__(
        self,
        *args: Any,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        zero_grads: bool = False,
        accumulation_steps: int = 1,
        accumulation_reduction: str = "mean",
        accumulation_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise ValueError(
                f"state_dtype={state_dtype!r} must be None, for states in the parameter's dtype as "
                "torch.optim has them, or torch.float32, for those of 16-bit parameters"
            )
        self.backend = check_backend(backend)
        self.state_dtype = state_dtype
        self._options = Options(
            max_grad_norm,
            skip_nonfinite,
            ema_decay,
            zero_grads,
            accumulation_steps,
            accumulation_reduction,
            accumulation_dtype,
        )
        self._forget()
        super().__init__(*args, **kwargs)
        for param, state in self.state.items():  # some torch classes create states here
            for name in self._all_state_names & state.keys():
                state[name] = state[name].to(self._dtype_of_states(param))

    def _forget(self) -> None:
        """Starts without a plan and without what plans leave behind."""
        self._packed: Packed | None = None
        self._captured = _C.CapturedTables()
        # By parameter of a rule without step counts: an int32 on the device that is 1 until a step
        # took place, where GradScaler may have skipped those there were.
        self._first_flags: dict[Tensor, Tensor] = {}
        self._reported_torch = False
        self._swapped = False
        self._in_backward = None
        # None as long as a step is an update and nothing else.
        self._extras = None
        if self._options.needed:
            self._need_extras()

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None and self._in_backward.took_step():
            return loss
        if self._extras is None:
            self._take(_UPDATE)
        else:
            self._check_not_swapped()
            self._step_window(closure)
        return loss

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @functools.wraps(_step)
    def step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - `_step` has it
        # torch wraps every step in its hooks and a profiler range. That costs as much as walking
        # some hundred tensors, so it is done only where someone listens - and not around a user's
        # override of this method, which torch has wrapped already.
        if type(self).step is FusedOptimizer.step and (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _C.profiled()
        ):
            return self._hooked_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    step.__name__ = "step"
    step.__qualname__ = "FusedOptimizer.step"
    step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it again

    # A function under torch.compile calls a step as it is: its graph breaks there, and no frame of
    # ours is traced, which would end in frames that are compiled anew with every plan. This is what
    # torch.compiler.disable does, less its wrapper, which costs as much as a small step.
    step._torchdynamo_disable = True  # type: ignore[attr-defined]
    step._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "a step is kernels already; with fullgraph=True, call torch.ops.fusedopt's instead"
    )
    _eval_frame.set_code_exec_strategy(
        step.__code__,
        _eval_frame._FrameExecStrategy(
            _eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.SKIP
        ),
    )

    def _take(
        self,
        purpose: Any,
        weight: float | Tensor = 1.0,
        *,
        named: Sequence[Tensor] | None = None,
        follows: bool = False,
    ) -> bool:
        """Takes a step, with a new plan where the present one no longer fits.

        Args:
            purpose: What the gradients are for.
            weight: That of the gradients in their window.
            named: The parameters that take part; None for all.
            follows: The step is a further part of the last one, whose decision it obeys.

        Returns:
            Whether it took place, as far as the host knows.
        """
        own, packed, extras = self.__dict__, self._packed, self._extras
        scaled = "grad_scale" in own or "found_inf" in own
        if (
            packed is not None
            and type(weight) is float
            and weight == 1.0
            and packed.memory is (None if extras is None else extras.core)
            and not (scaled or packed.torch_params or follows or named is not None)
        ):  # nothing is asked for but what the plan knows
            request = None if purpose is _UPDATE else _REQUESTS[purpose]
            outcome = packed.step(self.param_groups, self.state, request)
            if outcome is True:
                return True
            if outcome is False:
                if purpose is _UPDATE:
                    packed.undo()
                return False

        def step(packed: Packed) -> bool | str:
            in_kernels = extras is not None or packed.on_device
            scaler = (own.get("grad_scale"), own.get("found_inf")) if in_kernels else (None, None)
            request = _C.StepRequest(purpose, weight, *scaler, follows)
            unscales = scaled and not in_kernels and packed.rows > 0
            if packed.torch_params or unscales:
                members = packed.torch_params
                if named is not None:
                    ids = {id(param) for param in named}
                    members = [member for member in members if id(member.param) in ids]
                request.before = lambda: self._before(members, unscales, packed.rows > 0)
            return packed.step(self.param_groups, self.state, request, named)

        took_place = self._with_plan(step, named)
        if not took_place and purpose == _C.Purpose.UPDATE and self._packed is not None:
            self._packed.undo()
        return bool(took_place)

    def _before(self, members: Sequence[Member], unscales: bool, unscaled: bool) -> bool:
        """What a step does on the host between the plan's walk and the kernels' launches.

        Args:
            members: The parameters that torch steps.
            unscales: Gradients are unscaled here, unless one was found that is not finite.
            unscaled: Torch's step has nothing to do with GradScaler.

        Returns:
            Whether the step takes place.
        """
        if unscales:
            found_inf, grad_scale = (self.__dict__.get(n) for n in ("found_inf", "grad_scale"))
            if found_inf is not None and found_inf.item() != 0:
                return False
            if grad_scale is not None:
                unscale_((p for g in self.param_groups for p in g["params"]), grad_scale)
        if members:
            torch_step(self, self._torch_class, members, amp=not unscaled)
        return True

    def _with_plan(
        self, call: Callable[[Packed], bool | str | None], named: Sequence[Tensor] | None = None
    ) -> bool | None:
        """What ``call`` makes of the plan; of a new one, if it says why the plan does not fit."""
        packed = self._packed
        memory = self._extras.core if self._extras is not None else None
        outcome: bool | str | None = "there is none"
        if packed is not None and packed.memory is memory:
            outcome = packed.why_rerouted(self.param_groups, self._backend_of)
            outcome = outcome or self._call(call, packed)
        if isinstance(outcome, str):
            self._packed = None  # first: a plan that no longer fits must not survive a failure
            packed = self._pack(named)
            outcome = self._call(call, packed)
            if outcome == _C.UNSEEN_GRADIENT:
                packed.undo()
                raise RuntimeError(
                    "step() after accumulate() found gradients that accumulate() was not given: "
                    "call it after every backward(), or zero_grad() if they are not wanted. "
                    "Nothing was changed"
                )
            if isinstance(outcome, str):
                packed.undo()
                raise RuntimeError(f"the step cannot be prepared: {outcome}")
            self._packed = packed
        return outcome

    @staticmethod
    def _call(call: Callable[[Packed], bool | str | None], packed: Packed) -> bool | str | None:
        try:
            return call(packed)
        except BaseException:
            packed.undo()
            raise

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
        extras, members = self._extras, self._sort()
        for member in members.torch:
            self._check_torch(member)

        def initial(param: Tensor, name: str) -> Tensor:
            if extras is not None and name in ENTRIES:
                return extras.initial(param, name)
            return self._initial_state(param, name)

        new = NewState(
            self._state_names,
            extras.entries() if extras is not None else [],
            initial,
            self._has_step,
            extras is not None and extras.core.options.may_skip,
        )
        packed = Packed(
            self._rule,
            self.param_groups,
            self.state,
            members,
            new,
            self._first_flags,
            self._captured,
            extras.core if extras is not None else None,
            named,
        )
        if not self._reported_torch:
            total = sum(len(group["params"]) for group in self.param_groups)
            self._reported_torch = packed.report(type(self).__name__, total)
        return packed

    def _check_torch(self, member: Member) -> None:
        """Raises for a parameter that torch.optim must step, and that more was asked for."""
        group = self.param_groups[member.group]
        who = f"{describe(group, member.index)} of param group {member.group}"
        if self._extras is not None:
            raise ValueError(
                f"{', '.join(self._options.asked) or 'accumulate()'} cannot be had for {who}, "
                f"which torch.optim must step: {member.reason}; leave it out, or give that "
                "parameter an optimizer of its own"
            )
        if self.backend != "auto":
            raise ValueError(
                f"backend={self.backend!r} cannot update {who}: {member.reason}; use "
                "backend='auto', which leaves it to torch.optim"
            )
        if self._dtype_of_states(member.param) != member.param.dtype:
            raise ValueError(
                f"state_dtype={self.state_dtype} cannot be had for {who}, which torch.optim must "
                f"step: {member.reason}; leave state_dtype out, or give that parameter an "
                "optimizer of its own"
            )

    def _state_names(self, group: dict[str, Any]) -> list[str]:
        return _C.state_names(self._rule, group)

    def _dtype_of_states(self, param: Tensor) -> torch.dtype:
        return self.state_dtype if self.state_dtype and param.itemsize == 2 else param.dtype

    def _initial_state(self, param: Tensor, name: str) -> Tensor:
        dtype = self._dtype_of_states(param)
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _backend_of(self, param: Tensor) -> Backend | None:
        """The backend whose kernels may update ``param``, None if its device has none."""
        if self.backend == "auto":
            return backend_for(param.device.type)
        backend = BACKENDS[self.backend]
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a parameter that a named backend cannot update raises and adds nothing."""
        super().add_param_group(param_group)
        if self._in_backward is not None:
            self._in_backward.adopt_group()
        if self.backend == "auto":
            return
        group = self.param_groups[-1]
        for index, param in enumerate(group["params"]):
            reason = why_torch(group, param, self._backend_of(param))
            if reason:
                self.param_groups.pop()
                raise ValueError(
                    f"backend={self.backend!r} cannot update {describe(group, index)}: {reason}; "
                    "use backend='auto', which leaves it to torch.optim"
                )

    def state_dict(self) -> dict[str, Any]:
        """As torch's. State of parameters whose every step GradScaler skipped is left out."""
        self._settle()
        state_dict = super().state_dict()
        if self._extras is not None:
            params = (param for group in self.param_groups for param in group["params"])
            self._extras.complete(params, state_dict["state"])
        return state_dict

    def _settle(self) -> None:
        """Makes the state tell what devices and the window know."""
        if self._extras is not None and self._extras.core.options.accumulates:
            self._extras.settle(self.state, self._first_flags)
        else:
            self._settle_first_flags()

    def _settle_first_flags(self) -> None:
        """Asks the device which parameters have taken a step; drops the state of the others."""
        flags, self._first_flags = self._first_flags, {}
        for param, flag in flags.items():
            if flag.item() and param in self.state:
                for name in self._all_state_names:
                    self.state[param].pop(name, None)
                if not self.state[param]:
                    del self.state[param]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but all or nothing; states take the dtype that ``state_dtype`` declares."""
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved = by_param(self.param_groups, state_dict)
        if self._has_step:
            check_steps(self.param_groups, saved, type(self).__name__)
        # torch loads into a stand-in, so that what does not fit leaves this as it was.
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._optimizer_load_state_dict_pre_hooks = OrderedDict()
        new._optimizer_load_state_dict_post_hooks = OrderedDict()
        super(FusedOptimizer, new).load_state_dict(state_dict)
        for param, state in saved.items():
            for name, value in state.items():
                # torch has cast all of them to the parameter's dtype.
                if isinstance(value, Tensor) and (where := self._declared(param, name)):
                    new.state[param][name] = value.to(*where)
        check_states(
            new.param_groups,
            new.state,
            self._state_names,
            (ACCUMULATOR, AVERAGE),
            type(self).__name__,
            complete=self._has_step,
        )
        new._restore_window()
        self.state, self.param_groups, self._extras = new.state, new.param_groups, new._extras
        self._packed = None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _declared(self, param: Tensor, name: str) -> tuple[torch.device, torch.dtype] | None:
        """Where an entry of the state is to be, and in which dtype; None where torch decides."""
        if name == WINDOW:
            return torch.device("cpu"), torch.float64
        if name in ENTRIES:
            return param.device, arithmetic_dtype(param)
        if self.state_dtype is not None and name in self._all_state_names:
            return param.device, self._dtype_of_states(param)
        return None

    def _restore_window(self) -> None:
        """Continues the window of micro-batches that the state was saved in."""
        if self._extras is not None or any(WINDOW in state for state in self.state.values()):
            block = self._extras.block if self._extras is not None else None
            self._extras = StepExtras(self._options, distributed.add_up_shards)
            self._extras.restore(self.state)
            self._extras.block = self._extras.group = block

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        ours = {"backend": self.backend, "state_dtype": self.state_dtype, "_options": self._options}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_options" in state:  # of a copy or a pickle, and not what torch loads
            self._forget()
            self._restore_window()
