"""Copies batches to a device on a separate stream (a lane), ordered by events with the consumer's.

One thread produces batches, another consumes them.

- The consumer's stream waits for the event after a batch's copies (`hand_over`).
- The producing thread waits on the host until the consumer's stream has finished with an earlier
  batch. Otherwise a host that runs far ahead of its GPU would fill the GPU's memory.
- torch's allocator allocates a batch's memory on the lane's stream. `record_stream` tells it that
  the consumer's stream uses it too, so it is reused only after the consumer's kernels are done.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether everything before it is done."""

    def synchronize(self) -> None:
        """Waits until it is."""


class Lane(Protocol):
    """What the prefetcher needs from a stream to a device.

    Attributes:
        pinned: whether copies are made from page-locked memory.
    """

    pinned: bool

    def working(self) -> AbstractContextManager[Any]:
        """Context in which this thread's copies and kernels go to the lane's stream."""

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor in pinned memory to the device; does not wait."""

    def wait_for_others(self) -> None:
        """Makes the lane's stream wait for what this thread launched on the default stream."""

    def done(self) -> Event:
        """The point after all that was launched so far."""

    def hand_over(self, done: Event, tensors: Iterable[torch.Tensor]) -> Event:
        """Makes the consumer's current stream wait for `done`; marks `tensors` as used by it.

        Returns:
            The point after all that the consumer has launched on its stream before this call.
        """


class HostLane:
    """Leaves tensors in host memory, and has nothing to wait for."""

    pinned = False

    def working(self) -> AbstractContextManager[Any]:
        """Context that does nothing."""
        return nullcontext()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor."""
        return tensor

    def wait_for_others(self) -> None:
        """Does not wait."""

    def done(self) -> Event:
        """A point that has been reached."""
        return PAST

    def hand_over(self, done: Event, tensors: Iterable[torch.Tensor]) -> Event:
        """A point that has been reached."""
        return PAST


class Past:
    """A point that has been reached."""

    def query(self) -> bool:
        """Yes."""
        return True

    def synchronize(self) -> None:
        """Does not wait."""


PAST = Past()


class DeviceLane:
    """A lane to a GPU: of CUDA, ROCm or XPU.

    Args:
        device: with its index.
    """

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index = device.index  # torch parses a number several times as fast as a device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def working(self) -> AbstractContextManager[Any]:
        """Context in which this thread's copies and kernels go to the lane's stream."""
        context: AbstractContextManager[Any] = self._module.stream(self._stream)
        return context

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor in pinned memory to the device; does not wait."""
        return tensor.to(self.device, non_blocking=True)

    def wait_for_others(self) -> None:
        """Makes the lane's stream wait for what this thread launched on the default stream."""
        self._stream.wait_stream(self._module.default_stream(self._index))

    def done(self) -> Event:
        """The point after all that was launched so far."""
        event: Event = self._stream.record_event()
        return event

    def hand_over(self, done: Event, tensors: Iterable[torch.Tensor]) -> Event:
        """Makes the consumer's current stream wait for `done`; marks `tensors` as used by it."""
        stream = self._module.current_stream(self._index)
        reached: Event = stream.record_event()
        stream.wait_event(done)
        for tensor in tensors:
            if tensor.device.type != "cpu":
                tensor.record_stream(stream)
        return reached


def lane_to(device: torch.device | str | int) -> Lane:
    """The lane to a device.

    Raises:
        ValueError: batches cannot be sent to such a device.
        RuntimeError: the device is not there.
    """
    wanted = torch.device(device)
    if wanted.type == "cpu":
        return HostLane()
    if wanted.type not in ("cuda", "xpu"):
        raise ValueError(
            f"device={str(device)!r}: wanted 'cpu', 'cuda' or 'xpu', with or without index"
        )
    module = torch.get_device_module(wanted)
    count = module.device_count() if module.is_available() else 0
    if (wanted.index or 0) >= count:
        raise RuntimeError(
            f"device={str(device)!r} is not there: torch sees {count} {wanted.type} devices; "
            "pass device='cpu', or run where there is one"
        )
    index = module.current_device() if wanted.index is None else wanted.index
    return DeviceLane(torch.device(wanted.type, index))
