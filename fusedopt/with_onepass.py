"""What users see of a step that is more than an update: windows, findings, averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fusedopt.onepass import OnePass, Options

if TYPE_CHECKING:
    from fusedopt.in_backward import InBackward
    from fusedopt.optimizer import FusedOptimizer
    from fusedopt.packing import Packed


class WithOnePass(torch.optim.Optimizer):
    """The part of `FusedOptimizer` that is about what a step does beside the update."""

    _options: Options
    _onepass: OnePass | None  # None as long as a step is an update and nothing else
    _packed: Packed | None
    _in_backward: InBackward | None
    _swapped: bool

    def _need_onepass(self) -> OnePass:
        if self._onepass is None:
            self._onepass = OnePass(self._options)
            self._packed = None
        return self._onepass

    # ---- Accumulating --------------------------------------------------------------------------

    def accumulate(self, weight: float | Tensor = 1.0) -> None:
        """Adds the gradients to those of the present window, and frees them.

        Call it after every ``backward()``; the next `step` then updates from the weighted mean of
        what it was given (``accumulation_reduction="sum"``: the weighted sum), and starts another
        window. With each micro-batch's number of samples or tokens as its weight, that is the
        gradient of the one big batch, whatever the sizes. A parameter without a gradient adds zero;
        one that had none in the whole window is not updated. Where backwards add up gradients over
        ranks, all ranks must give a micro-batch the same weight; inside of `accumulating` they need
        not.

        Args:
            weight: A number, or a tensor of one element, which is not waited for.

        Raises:
            ValueError: a negative or infinite weight. Of a device tensor that cannot be seen: a
                window whose weight is not above 0 is skipped.
            RuntimeError: there is no gradient at all; ``accumulation_steps`` counts already;
                Accelerate or Lightning accumulate, too. Nothing is counted.

        Example:
            >>> import torch, fusedopt
            >>> weight = torch.nn.Parameter(torch.zeros(1))
            >>> optimizer = fusedopt.SGD([weight], lr=1.0)
            >>> for batch in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6.0])):
            ...     (weight * batch).mean().backward()
            ...     optimizer.accumulate(weight=len(batch))
            >>> optimizer.step()
            >>> weight.item()  # less the mean of all four
            -3.0
        """
        self._check_not_swapped()
        if self._in_backward is not None:
            self._in_backward.refuse_accumulate()
        self._need_onepass().accumulate(cast("FusedOptimizer", self), weight)

    @contextmanager
    def _accumulating_over(self, group: Any) -> Iterator[None]:
        """Gradients are one rank's alone; their sums are added up over a process group's ranks."""
        onepass = self._need_onepass()
        if onepass.micro_batches and onepass.group is None and not onepass.to_add_up:
            raise RuntimeError(
                f"the window has {onepass.micro_batches} micro-batches that are summed up over the "
                "ranks already; enter accumulating() where a window begins"
            )
        if onepass.group is not None and onepass.group is not group:
            raise RuntimeError(
                "the window is one of another process group; models that share an optimizer must "
                "share their process group, too"
            )
        if not onepass.core.accumulates:  # a rank without a micro-batch takes part all the same
            onepass.core.accumulates = True
            self._packed = None
        around = onepass.block
        onepass.block = onepass.group = group
        try:
            yield
        finally:
            onepass = self._need_onepass()  # load_state_dict() makes another one
            onepass.block = around
            if not onepass.micro_batches:
                onepass.group = around

    @property
    def will_step(self) -> bool:
        """Whether the next `step` updates, instead of only counting a micro-batch."""
        return self._onepass is None or self._onepass.will_step

    @property
    def accumulation_steps(self) -> int:
        """Calls of `step` that make one update. Can be set where a window begins."""
        return self._options.accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, steps: int) -> None:
        micro_batches = self._onepass.micro_batches if self._onepass is not None else 0
        if micro_batches and steps != self._options.accumulation_steps:
            raise RuntimeError(
                f"accumulation_steps={steps!r} in the middle of a window, which has "
                f"{micro_batches} of {self._options.accumulation_steps} micro-batches: set it "
                "after a step that updates (will_step is True before one). Nothing was changed"
            )
        self._set_options(accumulation_steps=steps)

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm that gradients are clipped to. Can be set at any time."""
        return self._options.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, limit: float | None) -> None:
        self._set_options(max_grad_norm=limit)

    def _set_options(self, **changes: Any) -> None:
        options = replace(self._options, **changes)  # raises before anything is changed
        self._options = options
        if self._onepass is None and not options.needed:
            return
        measured = self._need_onepass().core.measures
        accumulated = self._need_onepass().core.accumulates
        self._need_onepass().adopt(options)
        core = self._need_onepass().core
        if (measured, accumulated) != (core.measures, core.accumulates):
            self._packed = None

    # ---- What a step found out -----------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients that the last update saw, before it was clipped.

        Unscaled and averaged over the window; a tensor on the parameters' device (the first one's),
        which nothing waits for until it is read. None without ``max_grad_norm`` or
        ``skip_nonfinite``.
        """
        return self._onepass.grad_norm() if self._onepass is not None else None

    @property
    def step_was_skipped(self) -> Tensor:
        """Whether the last update did not take place, as a bool on the parameters' device."""
        return self._onepass.was_skipped() if self._onepass is not None else torch.tensor(False)

    # ---- Averaged parameters -------------------------------------------------------------------

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
        averaged = [(p, s["ema"]) for p, s in self.state.items() if "ema" in s]
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
