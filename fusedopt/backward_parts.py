"""What runs while a backward does: others inside of it, and several CUDA streams."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame as _eval_frame


class Streams:
    """The streams of the gradients that wait, and of the launches so far."""

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
    def joined(self, grads: Sequence[Tensor | None], *, last: bool) -> Iterator[None]:
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


class Backwards:
    """The backwards that run now: one, and those inside of it.

    A subclass says what to do when the outermost one begins, when it ends, and when one fails.
    """

    def __init__(self) -> None:
        # Hooks of parameters on several devices run in as many threads.
        self.lock = threading.RLock()
        # By torch's number, the callable that torch holds until the backward ends. One that dies
        # has ended in an exception.
        self._tasks: dict[int, weakref.ref[_Ending]] = {}
        self._way_out: weakref.ref[_WayOut] | None = None

    def begin(self) -> None:
        """Called inside of the outermost backward, once."""

    def finish(self) -> None:
        """Called at its end."""

    def abandon(self) -> None:
        """Called after an exception."""

    def enter(self) -> None:
        """Has torch call when the present backward ends."""
        task = torch._C._current_graph_task_id()
        if task in self._tasks:
            return
        if not self._tasks and self._on_the_way() is None:
            self.begin()
        ending = _Ending(self, task)
        self._tasks[task] = weakref.ref(ending, lambda _: self._died(task))
        torch.autograd.Variable._execution_engine.queue_callback(ending)

    def end(self, ending: _Ending) -> None:
        """Ends a backward, unless it runs inside of another one."""
        with self.lock, self.or_abandon():
            known = self._tasks.get(ending.task)
            if known is None or known() is not ending:  # of one that was abandoned
                return
            del self._tasks[ending.task]
            if self._tasks:
                return  # of the ones around it, which will end later
            # A node is being evaluated still if it is in its backward that this one runs.
            node = torch._C._current_autograd_node()
            nodes = [after for after, _ in node.next_functions if after is not None] if node else []
            if not nodes:
                self.finish()
            else:
                self._forget_way_out()  # a backward that failed may have left one
                way_out = _WayOut(self, nodes)
                self._way_out = weakref.ref(way_out, lambda _: self._died(-1))

    def leave(self) -> None:
        """Has the backward call that is around one that has ended."""
        with self.lock, self.or_abandon():
            self.enter()
            self._forget_way_out()

    def forget(self) -> None:
        """Forgets the backwards that are known."""
        self._tasks.clear()
        self._forget_way_out()

    @contextmanager
    def or_abandon(self) -> Iterator[None]:
        """Abandons everything if the block raises."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def _on_the_way(self) -> _WayOut | None:
        return self._way_out() if self._way_out is not None else None

    def _forget_way_out(self) -> None:
        way_out = self._on_the_way()
        self._way_out = None  # first: what dies then tells nobody
        if way_out is not None:
            way_out.remove()

    def _died(self, task: int) -> None:
        """A backward has ended in an exception."""
        with self.lock:
            self._tasks.pop(task, None)
            if not self._tasks and self._on_the_way() is None:
                self.abandon()


class _Ending:
    """What torch calls at the end of a backward, and drops where there is none."""

    def __init__(self, owner: Backwards, task: int) -> None:
        self._owner = owner
        self.task = task

    def __call__(self) -> None:
        self._owner.end(self)


class _WayOut:
    """From a backward that has ended to the one around it, which evaluates these nodes next."""

    def __init__(self, owner: Backwards, nodes: list[Any]) -> None:
        self._owner = weakref.ref(owner)
        self._handles = [node.register_prehook(self) for node in nodes]

    def __call__(self, _: object) -> None:
        owner = self._owner()
        if owner is not None:
            owner.leave()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def skip_tracing(function: Any) -> None:
    """Has a compiled function call this one as it is: its graph breaks, and no frame is traced.

    `torch.compiler.disable` does this with a wrapper, which costs as much as a small step.
    """
    skip = _eval_frame._FrameAction.SKIP
    _eval_frame.set_code_exec_strategy(
        function.__code__, _eval_frame._FrameExecStrategy(skip, skip)
    )


for _called in (_Ending.__call__, _WayOut.__call__):
    skip_tracing(_called)
