"""The base of every fusedopt optimizer: torch.optim's class with another `step`."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fusedopt import docstrings
from fusedopt._extension import _C
from fusedopt.accumulation import AccumulationMixin
from fusedopt.backward_parts import skip_tracing
from fusedopt.loading import by_param, check_states, check_steps
from fusedopt.routing import Member, why_torch
from fusedopt.step_extras import (
    ACCUMULATOR,
    AVERAGE,
    ENTRIES,
    WINDOW,
    Options,
    arithmetic_dtype,
    is_unstarted,
)
from fusedopt.wrappers import on_the_optimizer


class FusedOptimizer(AccumulationMixin):
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
            ``.grad``. ``float("inf")`` measures the norm only, None does neither; see `grad_norm`.
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
        norm_group: The process group, or list of groups, over which ranks hold different parts of
            the model as plain tensors: pipeline stages, shards of FSDP1 or ZeRO. Norms are those of
            all, and finite checks and skips are decided together, so all of their ranks must step.
            DTensors are counted once and need none. ``[]`` says that this rank has everything.

    None of these needs a pass of its own over the parameters, or waits for a device. They are for
    all parameters of the optimizer: one that torch.optim must step raises. Each is an attribute,
    too, which can be set and is in force from the next step on.

    Raises:
        ValueError: an unknown backend, or a named one that cannot update some parameter; another
            state_dtype, or one that a parameter which torch.optim must step cannot have; another of
            the options above, out of range or for such a parameter.
        RuntimeError: a backend that is not available here.
    """

    def __init_subclass__(cls, rule: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if rule is None:  # a user's subclass of one of ours
            return
        cls._rule = rule
        scalars = _C.rules()[rule]["scalar_states"]
        cls._has_step = "step" in scalars
        cls._private_names = {name for name in scalars if name.startswith("_")}
        cls._all_state_names = {name for names in _C.rules()[rule]["states"] for name in names}
        mixed_in = FusedOptimizer.__mro__  # whose last are torch's Optimizer and object
        cls._torch_class = next(  # type: ignore[assignment]
            base
            for base in cls.__mro__
            if not issubclass(base, FusedOptimizer) and base not in mixed_in
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
        skip_tracing(init)
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
        norm_group: Any = None,
        **kwargs: Any,
    ) -> None:
        self._options = Options(
            backend,
            state_dtype,
            max_grad_norm,
            skip_nonfinite,
            ema_decay,
            zero_grads,
            accumulation_steps,
            accumulation_reduction,
            accumulation_dtype,
            norm_group,
        )
        self._forget()
        super().__init__(*args, **kwargs)
        self._cast_states()  # some torch classes create states here

    def _forget(self) -> None:
        """Starts without a plan and without what plans leave behind."""
        self._stand_alone()
        self._packed = None
        self._captured = _C.CapturedTables()
        self._reported_torch = False
        self._swapped = False
        self._in_backward = None
        # None as long as a step is an update and nothing else.
        self._extras = self._memory = None
        self._take_scale()
        if self._options.needed:
            self._need_extras()

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, None without one.
        """
        if self._me() is not self:
            return self._step_of_wrapper(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None and self._in_backward.took_step():
            return loss
        if self._options.norm_group:
            self._check_scaler()
        if self._extras is None:
            self._take()
        else:
            self._check_not_swapped()
            self._step_window(closure)
        return loss

    def _step_of_wrapper(self, closure: Callable[[], Any] | None) -> Any:
        """The step of the optimizer, with what GradScaler has set on the wrapper."""
        own = self._own()
        scaler = {
            n: self.__dict__.pop(n) for n in ("grad_scale", "found_inf") if n in self.__dict__
        }
        own.__dict__.update(scaler)
        try:
            return own._step(closure)
        finally:
            for name in scaler:
                own.__dict__.pop(name, None)
                self.__dict__[name] = scaler[name]  # GradScaler deletes them

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
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _C.profiled()
        ) and type(self).step is FusedOptimizer.step:
            return self._hooked_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    step.__name__ = "step"
    step.__qualname__ = "FusedOptimizer.step"
    step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it again

    # No frame of ours is traced, which would end in frames that are compiled anew with every plan.
    step._torchdynamo_disable = True  # type: ignore[attr-defined]
    step._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "a step is kernels already; with fullgraph=True, call torch.ops.fusedopt's instead"
    )
    skip_tracing(step)

    @on_the_optimizer
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises for one to train that a named backend cannot update, and adds none."""
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            for index, param in enumerate(group["params"]) if self.backend != "auto" else ():
                reason = why_torch(group, param, self._backend_of(param))
                if reason and (param.requires_grad or param.grad is not None):
                    self._check_torch(Member(number, index, param, None, reason))
            if self._in_backward is not None:
                self._in_backward.adopt()
        except BaseException:
            self.param_groups.pop()
            raise

    @on_the_optimizer
    def state_dict(self) -> dict[str, Any]:
        """As torch's. State of parameters whose every step was skipped may be left out."""
        self._settle()
        state_dict = super().state_dict()
        if self._extras is not None:
            self._extras.complete(self._params(), state_dict["state"])
        for number, state in state_dict["state"].items():
            if isinstance(state, dict) and self._private_names & state.keys():
                saved = {n: value for n, value in state.items() if n not in self._private_names}
                state_dict["state"][number] = saved
        return state_dict

    def _settle(self) -> None:
        """Makes the state tell what devices and the window know."""
        if self._extras is not None and self._extras.core.options.accumulates:
            return self._extras.settle(self._states(), self._private_names)
        for param in self._params() if self._private_names else ():
            state = self.state.get(param, {})
            if is_unstarted(state, self._private_names):
                for name in (*self._all_state_names, *self._private_names):
                    state.pop(name, None)
                if not state:
                    del self.state[param]
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but all or nothing; states take the dtype that ``state_dtype`` declares."""
        if self._own() is not self and self._copied_from is None:
            return self._own().load_state_dict(state_dict)
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
        self.state, self.param_groups = new.state, new.param_groups
        self._extras, self._memory = new._extras, new._memory
        self._packed = None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
        return None

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
        if self._extras is not None or any(WINDOW in state for state in self._states().values()):
            block = self._extras.block if self._extras is not None else None
            extras = self._adopt_extras()
            extras.restore(self._states(), self._all_state_names)
            extras.block = extras.group = block

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), "_options": self._options}

    def __copy__(self) -> Any:
        """As torch's, which shares groups and state. So does what steps are asked for."""
        new = object.__new__(type(self))
        if self._own() is not self:  # of a wrapper, another wrapper
            new.__dict__.update(self.__dict__)
        else:
            new.__setstate__(self.__getstate__())
            new._me, new._copied_from = self._me, self
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_me" not in self.__dict__:  # not constructed, and perhaps a state of torch's class
            state = {"_options": Options(), **state}
        super().__setstate__(state)
        for name, kind in (("param_groups", list), ("state", dict)):  # any iterable, for torch
            if not isinstance(self.__dict__[name], kind):
                self.__dict__[name] = kind(self.__dict__[name])
        if "_options" in state:  # of a copy or a pickle, and not what torch loads
            self._forget()
            self._restore_window()


def fused_optimizer(optimizer: Any, caller: str) -> FusedOptimizer:
    """The optimizer that a function of ours was given, itself or in a wrapper.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(optimizer, FusedOptimizer):
        return optimizer._own()
    inside = isinstance(getattr(optimizer, "optimizer", None), FusedOptimizer)
    raise TypeError(
        f"optimizer is a {type(optimizer).__name__}; {caller} needs a fusedopt optimizer"
        + ", which is its attribute .optimizer" * inside
    )
