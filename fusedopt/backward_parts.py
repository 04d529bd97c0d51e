"""A step in several parts, as `step_in_backward` takes it: their window, and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt.onepass import ACCUMULATOR, OnePass

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

# Place of the window's weight in a Verdict's memory; csrc/core/onepass.h.
_WEIGHT = slice(0, 8)


class Part:
    """What backwards do with a window of accumulation: several parts make one micro-batch."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._began = False
        self._closes = optimizer.will_step
        # Parameters whose accumulators the closing backward has still to use up. The plan would do
        # so in its first part, and so is shown each in its turn.
        self._waiting: dict[int, Tensor] = {}
        if self._closes:
            self._waiting = {id(p): p for p in self._members()}
            for param in self._waiting.values():
                self._set_taken(param, False)

    @property
    def _onepass(self) -> OnePass:
        return self._optimizer._need_onepass()

    def _members(self) -> list[Tensor]:
        """The parameters whose accumulators have gradients."""
        core = self._onepass.core
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        return [p for p in params if p in self._optimizer.state and core.taken(p)]

    def _set_taken(self, param: Tensor, taken: bool) -> None:
        core = self._onepass.core
        core.remember(param, taken, core.fresh(param))

    def _weigh(self, weight: float) -> None:
        """Sets the window's weight on all devices, without waiting for them as `core` does."""
        core = self._onepass.core
        if not core.verdicts:
            core.window_weight = weight
        for verdict in core.verdicts:
            verdict[_WEIGHT].view(torch.float64).fill_(weight)

    def step(self, having: dict[int, Tensor], *, last: bool) -> None:
        """Adds the gradients that there are to the window, or updates from both."""
        onepass = self._onepass
        if not self._closes:
            if having:
                self._began = True
                self._optimizer._fit(_C.Purpose.ACCUMULATE).launch_onepass(1.0)
            return
        turn = list(self._waiting if last else self._waiting.keys() & having.keys())
        if not turn and not having:
            return
        self._began = True
        for key in turn:
            self._set_taken(self._waiting.pop(key), True)
        self._weigh(onepass._given)  # every launch ends the window, and leaves a weight of 0
        self._optimizer._fit(_C.Purpose.CLOSE).launch_onepass(1.0)

    def count(self) -> None:
        """Counts the micro-batch whose parts these were."""
        onepass = self._onepass
        onepass.flushed = False
        if self._closes:
            onepass.micro_batches, onepass._given = 0, 0.0
        else:
            onepass.micro_batches += 1
            onepass._given += 1.0
        self._weigh(onepass._given)  # every launch has added to it

    def abandon(self) -> None:
        """Leaves the window as it was before this micro-batch; an empty one where that is lost."""
        for param in self._waiting.values():
            self._set_taken(param, True)
        if not self._began:
            return
        sums = []
        for param in self._members():
            self._set_taken(param, False)
            sums.append(self._optimizer.state[param][ACCUMULATOR])
        if sums:
            with torch.no_grad():
                torch._foreach_zero_(sums)
        self._onepass.micro_batches, self._onepass._given = 0, 0.0
        self._weigh(0.0)


class Streams:
    """The order of a backward's launches where gradients come from several CUDA streams."""

    def __init__(self) -> None:
        self._pending: dict[torch.device, Any] = {}
        self._last: dict[torch.device, Any] = {}

    def change(self, param: Tensor, step: Callable[[], None]) -> None:
        """Notes the stream that a gradient is complete on; steps first if others have another."""
        if not param.is_cuda:
            return
        stream = torch.cuda.current_stream(param.device)
        if self._pending.get(param.device, stream) != stream:
            step()
        self._pending[param.device] = stream

    @contextmanager
    def joined(self, grads: list[Tensor | None], *, last: bool) -> Iterator[None]:
        """Launches here follow the gradients and the launches before; the last are the caller's."""
        streams = {**self._last, **self._pending}
        with ExitStack() as stack:
            for device, stream in streams.items():
                if last:
                    stream = torch.cuda.current_stream(device)
                    self._after(stream, self._pending.get(device))
                self._after(stream, self._last.get(device))
                self._last[device] = stream
                stack.enter_context(torch.cuda.stream(stream))
            if last:  # memory of other streams, which is freed before this one has read it
                for grad in grads:
                    if grad is not None and grad.is_cuda and not grad.is_sparse:
                        local = getattr(grad, "_local_tensor", grad)
                        local.record_stream(torch.cuda.current_stream(local.device))
            yield
        self._pending = {}

    @staticmethod
    def _after(stream: Any, other: Any) -> None:
        if other is not None and other != stream:
            stream.wait_stream(other)
