"""Windows of micro-batches, whose gradients one update takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedopt import distributed
from fusedopt._extension import _C
from fusedopt.framework_checks import check_no_framework_accumulates
from fusedopt.options_mixin import StepOptionsMixin
from fusedopt.step_extras import ACCUMULATOR, check_weight, initializes
from fusedopt.wrappers import on_the_optimizer


class AccumulationMixin(StepOptionsMixin):
    """The part of `FusedOptimizer` that is about windows, and about steps in parts."""

    _in_backward: Any  # what `step_in_backward` returned, None as long as steps are ordinary

    @property
    @on_the_optimizer
    def will_step(self) -> bool:
        """Whether the next `step` updates, instead of only counting a micro-batch."""
        return self._extras is None or self._extras.will_step

    # ---- Accumulating --------------------------------------------------------------------------

    @on_the_optimizer
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
        weight = check_weight(weight)
        if self._options.accumulation_steps > 1:
            raise RuntimeError(
                f"accumulate() with accumulation_steps={self._options.accumulation_steps}, with "
                "which step() itself counts micro-batches; leave accumulation_steps out, or call "
                "step() alone"
            )
        check_no_framework_accumulates()
        if not self._options.norm_group and all(p.grad is None for p in self._params()):
            raise RuntimeError(
                "accumulate() found no gradient: call it once after every backward(), before "
                "zero_grad(); nothing was counted"
            )
        extras = self._need_extras()
        extras.left_out_before = None
        extras.adopt(self._options, accumulates=True)
        self._accumulate(weight)

    @contextmanager
    def _accumulating_over(self, group: Any) -> Iterator[None]:
        """Gradients are one rank's alone; their sums are added up over a process group's ranks."""
        extras = self._need_extras()
        if extras.micro_batches and extras.group is None and not extras.to_add_up:
            raise RuntimeError(
                f"the window has {extras.micro_batches} micro-batches that are summed up over the "
                "ranks already; enter accumulating() where a window begins"
            )
        if extras.group is not None and extras.group is not group:
            raise RuntimeError(
                "the window is one of another process group; models that share an optimizer must "
                "share their process group, too"
            )
        # A rank without a micro-batch takes part all the same.
        extras.adopt(self._options, accumulates=True)
        around = extras.block
        extras.block = extras.group = group
        try:
            yield
        finally:
            extras = self._need_extras()  # load_state_dict() makes another one
            extras.block = around
            if not extras.micro_batches:
                extras.group = around

    # ---- Steps of a window -----------------------------------------------------------------------

    def _step_window(self, closure: Callable[[], Any] | None) -> None:
        """Takes a step, or counts a micro-batch; the closure is that of ``step()``."""
        extras = self._need_extras()
        steps = self._options.accumulation_steps
        if (steps > 1) == (extras.micro_batches == 0):  # once a window, of either kind
            check_no_framework_accumulates(closure)
        extras.left_out_before = None
        if steps == 1:
            # Gradients inside of accumulating() are this rank's alone, and never an update's.
            flushes = extras.micro_batches or extras.group is not None
            self._update(_C.Purpose.FLUSH if flushes else _C.Purpose.UPDATE)
        elif initializes(self.param_groups, self.state):
            self._prepare(_C.Purpose.ACCUMULATE)  # creates the state
        elif not extras.will_step:
            self._accumulate(1.0)
        elif extras.group is not None:
            self._accumulate(1.0)
            left_out = extras.left_out()
            self._update(_C.Purpose.FLUSH)
            extras.left_out_before, extras.flushed = left_out, False
        else:
            self._update(_C.Purpose.CLOSE)

    def _accumulate(self, weight: float | Tensor) -> None:
        extras = self._need_extras()
        self._take(_C.Purpose.ACCUMULATE, weight)
        extras.flushed = False
        extras.count(weight)

    def _update(self, purpose: Any) -> None:
        extras = self._need_extras()
        if extras.to_add_up and extras.group is None:
            raise RuntimeError(
                "the window that was loaded has been accumulated inside of accumulating(), and its "
                "sums are still to be added up over the ranks: finish it inside of accumulating(). "
                "Nothing was changed"
            )
        if extras.group is not None:
            self._add_up_window()
            extras.group, extras.to_add_up = None, False
        elif purpose == _C.Purpose.FLUSH:
            extras.check_weights(extras.micro_batches, weighed=extras.weighed)
        self._take(purpose)
        extras.flushed = purpose == _C.Purpose.FLUSH
        if purpose != _C.Purpose.UPDATE:
            extras.end_window()

    def _add_up_window(self) -> None:
        """Adds up the accumulators and weights of the window over the ranks.

        Raises:
            Exception: a rank cannot step. All of them raise, none is left waiting, and nothing has
                been changed.
        """
        extras = self._need_extras()
        core = extras.core
        params = self._params()
        device = next((p for p in params if p.requires_grad), params[0]).device
        failure = None
        try:
            self._prepare(_C.Purpose.FLUSH)
        except Exception as error:  # for the others to hear of
            failure = error
        accumulated = [float(p in self.state and core.has_accumulated(p)) for p in params]
        window = [float(extras.micro_batches), float(extras.weighed), core.window_weight]
        failed, micro_batches, weighed, weight, *accumulated = distributed.add_up_numbers(
            [float(failure is not None), *window, *accumulated], device, extras.group
        )
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(
                f"{failed:.0f} of the other ranks cannot step, and say why. Nothing was changed"
            )
        extras.check_weights(micro_batches, weighed=weighed > 0)
        members = [p for p, ranks in zip(params, accumulated, strict=True) if ranks]
        new = [p for p in members if ACCUMULATOR not in self.state.get(p, {})]
        for param in new:  # only other ranks have had gradients of it
            param.grad = torch.zeros_like(param)
        if new:
            self._prepare(_C.Purpose.ACCUMULATE, keeps_state=True)
        for param in new:
            param.grad = None
        sums = [self.state[p][ACCUMULATOR] for p in members]
        distributed.add_up_tensors(sums, extras.group, mean=not core.options.mean)
        for param in members:
            core.remember(param)
        core.window_weight = weight

    # ---- A step in parts, of a backward ----------------------------------------------------------

    def _step_part(
        self, params: Sequence[Tensor], *, closes: bool, began: bool, last: bool
    ) -> bool:
        """Steps these parameters, and frees their gradients.

        Args:
            params: Those that have a gradient.
            closes: The micro-batch that they are a part of is a window's last one.
            began: Other parts of it have come before.
            last: No other part follows.

        Returns:
            Whether the step has begun.
        """
        self._check_not_swapped()
        windowed, purpose = self._options.accumulation_steps > 1, _C.Purpose.UPDATE
        if windowed:
            purpose = _C.Purpose.CLOSE if closes else _C.Purpose.ACCUMULATE
        if windowed and closes and last:  # and accumulators that have got no further gradient
            core, having = self._need_extras().core, {id(param) for param in params}
            left = (p for p in self._params() if id(p) not in having)
            params = [*params, *filter(core.has_accumulated, left)]
        if params:
            self._take(purpose, named=params, follows=began)
            for param in params:
                param.grad = None
        if windowed and last:
            self._end_parts(closes=closes, began=began or bool(params))
        return began or bool(params)

    def _check_parts(self) -> None:
        """Raises unless steps can be had in parts, with the options of now."""
        options, extras = self._options, self._extras
        for name, why in (
            ("max_grad_norm", "looks at all gradients before the first update"),
            ("skip_nonfinite", "looks at all gradients before the first update"),
            ("zero_grads", "keeps gradients in memory as zeros"),
        ):
            value = getattr(options, name)
            if value is not None and value is not False:
                raise ValueError(
                    f"{name}={value!r} cannot be had under step_in_backward(): it {why}, and these "
                    "are used and freed one after the other; leave out one of the two"
                )
        if extras is None:
            return
        if extras.core.options.measures:
            raise RuntimeError(
                "a GradScaler has stepped this optimizer, which looks at all gradients since; "
                "construct a new one for step_in_backward(), and load this one's state_dict()"
            )
        if extras.micro_batches and options.accumulation_steps == 1:
            raise RuntimeError(
                f"accumulate() has begun a window of {extras.micro_batches} micro-batches; call "
                "step() before step_in_backward()"
            )
        if extras.group is not None or extras.to_add_up:
            raise RuntimeError(
                "the window of micro-batches is one of accumulating(), whose sums are still to be "
                "added up over the ranks; finish it there before step_in_backward()"
            )

    def _end_parts(self, *, closes: bool, began: bool) -> None:
        """Counts the micro-batch whose parts have come."""
        extras = self._need_extras()
        extras.flushed = False
        if not began:  # one without gradients counts all the same
            extras.core.window_weight = 0.0 if closes else extras.core.window_weight + 1.0
        if closes:
            extras.end_window()
        else:
            extras.count(1.0)

    def _drop_window(self) -> None:
        """Ends the window without an update, after a part of a step has failed."""
        if self._options.accumulation_steps > 1:
            self._need_extras().drop_window(self._states())
