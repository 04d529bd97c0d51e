"""The base of every fusedopt optimizer: torch.optim's class with another `step`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fusedopt import amp
from fusedopt._extension import _C
from fusedopt.backends import check_backend
from fusedopt.packing import Packed, Route, check_loaded_state, describe, routes, why_torch


class FusedOptimizer(torch.optim.Optimizer):
    """Mixin that steps a torch.optim optimizer through fused kernels.

    A subclass names its rule and inherits from this class first and from its torch class second:
    ``class SGD(FusedOptimizer, torch.optim.SGD, rule="sgd")``. Everything but `step` is torch's:
    constructor, validation, errors, hooks, ``state_dict``, ``add_param_group``.

    Parameters that kernels cannot update (sparse gradients, ``differentiable=True``, devices
    without a backend, tensor subclasses) are stepped by torch.optim's own code, one by one, as
    `routes` lists; a named ``backend`` raises instead.

    Args:
        *args, **kwargs: As the torch.optim class of the same name.
        backend: "auto" (kernels where they can, torch.optim elsewhere) or the name of a backend
            that must update every parameter.

    Raises:
        ValueError: an unknown backend, or a named one that cannot update some parameter.
        RuntimeError: a backend that is not available here.
    """

    _rule: ClassVar[str]
    _has_step: ClassVar[bool]
    _torch_class: ClassVar[type[torch.optim.Optimizer]]

    def __init_subclass__(cls, rule: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if rule is None:  # a user's subclass of one of ours
            return
        cls._rule = rule
        cls._has_step = _C.rules()[rule]["has_step"]
        cls._torch_class = next(
            base for base in cls.__mro__ if base.__module__.startswith("torch.optim.")
        )

        def init(self: FusedOptimizer, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
            FusedOptimizer.__init__(self, *args, backend=backend, **kwargs)

        # Programs inspect optimizers ("fused" in signature(AdamW).parameters), so the signature is
        # the installed torch's, with ours after it.
        signature = inspect.signature(cls._torch_class.__init__)
        ours = inspect.signature(init).parameters["backend"]
        init.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), ours.replace(annotation=str)]
        )
        init.__name__ = "__init__"
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        init.__doc__ = cls._torch_class.__init__.__doc__
        cls.__init__ = init  # type: ignore[method-assign]

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        self.backend = check_backend(backend)
        self._packed: Packed | None = None
        self._reported_torch = False
        super().__init__(*args, **kwargs)

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
        packed = self._packed
        if packed is None or packed.refresh() is not None:
            packed = self._pack()
        try:
            if packed.rows == 0:  # all torch's, which reads AMP's tensors on their device
                packed.launch()
            elif not amp.overflowed(self):
                amp.unscale_(self)
                packed.launch()
        finally:
            packed.undo()
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

    def _pack(self) -> Packed:
        self._packed = None  # first: a plan that no longer fits must not survive a failure
        packed = Packed(self)
        reason = packed.refresh()
        if reason is not None:
            packed.undo()
            raise RuntimeError(f"the step cannot be prepared: {reason}")
        self._packed = packed
        return packed

    def _state_names(self, group: dict[str, Any]) -> list[str]:
        return _C.state_names(self._rule, group)

    def _initial_state(self, param: Tensor, name: str) -> Tensor:
        return torch.zeros_like(param, memory_format=torch.preserve_format)

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
        return list(routes(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a parameter that a named backend cannot update raises and adds nothing."""
        super().add_param_group(param_group)
        if self.backend == "auto":
            return
        group = self.param_groups[-1]
        for index, param in enumerate(group["params"]):
            reason = why_torch(group, param)
            if reason:
                self.param_groups.pop()
                raise ValueError(
                    f"backend={self.backend!r} cannot update {describe(group, index)}: {reason}; "
                    "use backend='auto', which leaves it to torch.optim"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a pickled or loaded state; one that does not fit leaves everything as it was."""
        before = self.__dict__.copy()
        try:
            super().__setstate__(state)
            check_loaded_state(self)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        self.__dict__.setdefault("backend", "auto")
        self.__dict__.setdefault("_reported_torch", False)
        self._packed = None
