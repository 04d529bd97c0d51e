"""Options of a step beside the update: to clip, to check, to average, to clear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedopt.planned_steps import PlannedSteps
from fusedopt.step_extras import StepExtras
from fusedopt.wrappers import on_the_optimizer


class _Option:
    """One of `Options`, read and set as an attribute; it is in force from the next step on."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: StepOptionsMixin | None, owner: type) -> Any:
        return self if optimizer is None else getattr(optimizer._own()._options, self._name)

    def __set__(self, optimizer: StepOptionsMixin, value: Any) -> None:
        optimizer._own()._set_options(**{self._name: value})


class StepOptionsMixin(PlannedSteps):
    """The part of `FusedOptimizer` that is about what a step does beside the update."""

    _swapped: bool

    backend = _Option("What updates parameters: 'auto', or the one backend that may.")
    state_dtype = _Option("The dtype of 16-bit parameters' states; None for their own.")
    max_grad_norm = _Option("The global norm that gradients are clipped to, or None.")
    skip_nonfinite = _Option("Whether gradients that are not all finite make a step of nothing.")
    ema_decay = _Option("The decay of the averages; None leaves them as they are.")
    zero_grads = _Option("Whether the update leaves gradients at zero.")
    accumulation_steps = _Option("Calls of `step` that make one update. To set between windows.")
    accumulation_reduction = _Option("'mean' or 'sum' of a window's gradients.")
    accumulation_dtype = _Option("torch.float32 makes accumulators with the rest of the state.")
    norm_group = _Option("Process groups that norms, checks and skips are decided over, or None.")

    def _need_extras(self) -> StepExtras:
        return self._extras if self._extras is not None else self._adopt_extras()

    def _adopt_extras(self) -> StepExtras:
        self._extras = extras = StepExtras(self._options)
        self._memory = extras.core
        return extras

    def _set_options(self, **changes: Any) -> None:
        options = replace(self._options, **changes)  # raises before anything is changed
        steps = options.accumulation_steps
        micro_batches = self._extras.micro_batches if self._extras is not None else 0
        if micro_batches and steps != self._options.accumulation_steps:
            raise RuntimeError(
                f"accumulation_steps={steps!r} in the middle of a window, which has "
                f"{micro_batches} of {self._options.accumulation_steps} micro-batches: set it "
                "after a step that updates (will_step is True before one). Nothing was changed"
            )
        before, self._options = self._options, options
        if (options.backend, options.state_dtype) != (before.backend, before.state_dtype):
            self._packed = None
            self._cast_states()
        if options.norm_group != before.norm_group:
            self._packed = None  # a plan is made where it is seen who needs one
            self._take_scale()
        if self._extras is not None or options.needed:
            self._need_extras().adopt(options)

    def _take_scale(self) -> None:
        """Has torch's GradScaler call all steps, for which the ranks of a group wait."""
        if self._options.norm_group:
            self.__dict__["_step_supports_amp_scaling"] = True

    def _check_scaler(self) -> None:
        """Has all ranks find what one has found, where torch's GradScaler steps an optimizer.

        Raises:
            RuntimeError: the scaler has asked this rank's gradients alone, and changes its scale
                accordingly.
        """
        if self.__dict__.get("found_inf") is None:
            return
        if self.__dict__.get("grad_scale") is not None:
            raise RuntimeError(
                "torch's GradScaler decides on every rank alone, and norm_group on all of them "
                "together: use fusedopt.GradScaler; ShardedGradScaler works after "
                "scaler.unscale_(optimizer). Nothing was changed"
            )
        self._need_extras().adopt(self._options, check=True)

    # ---- What a step found out -----------------------------------------------------------------

    @property
    @on_the_optimizer
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients that the last update saw, before it was clipped.

        Unscaled and averaged over the window; a tensor on the parameters' device (the first one's),
        which nothing waits for until it is read. None without ``max_grad_norm`` or
        ``skip_nonfinite``.
        """
        return self._extras.grad_norm() if self._extras is not None else None

    @property
    @on_the_optimizer
    def step_was_skipped(self) -> Tensor:
        """Whether the last update did not take place, as a bool on the parameters' device."""
        return self._extras.was_skipped() if self._extras is not None else torch.tensor(False)

    # ---- Averaged parameters -------------------------------------------------------------------

    @on_the_optimizer
    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Puts the averages in place of the parameters for the time of a ``with`` block.

        Parameters that have not been updated yet stay as they are. Their own values are kept in
        memory meanwhile and come back at the end, whatever was written to the parameters.

        Raises:
            RuntimeError: the optimizer has no ``ema_decay``; blocks are nested; a step is taken
                inside.

        Example:
            >>> import torch, fusedopt
            >>> weight = torch.nn.Parameter(torch.ones(1))
            >>> optimizer = fusedopt.SGD([weight], lr=1.0, ema_decay=0.5)
            >>> weight.sum().backward()
            >>> optimizer.step()
            >>> with optimizer.swap_ema():
            ...     weight.item()
            0.5
            >>> weight.item()
            0.0
        """
        if self._options.ema_decay is None:
            raise RuntimeError(
                "swap_ema() without averages: construct the optimizer with ema_decay, such as 0.999"
            )
        self._check_not_swapped()
        averaged = [(p, s["ema"]) for p, s in self._states().items() if "ema" in s]
        with torch.no_grad():
            own = [param.detach().clone() for param, _ in averaged]
            self._swapped = True
            try:
                for param, average in averaged:
                    param.copy_(average)
                with torch.enable_grad():
                    yield
            finally:
                for (param, _), value in zip(averaged, own, strict=True):
                    param.copy_(value)
                self._swapped = False

    def _check_not_swapped(self) -> None:
        if self._swapped:
            raise RuntimeError(
                "the parameters are their averages inside of swap_ema(); leave it before a step or "
                "another swap"
            )
