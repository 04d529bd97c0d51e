"""The order of a backward's launches where gradients come from several CUDA streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


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
