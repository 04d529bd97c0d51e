"""DevicePrefetcher: copies any loader's batches to a device ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fusedopt import _C

from .lanes import Lane, lane_to
from .prefetching import END, Channel, Ended, Iteration, Producer

# Buffers needed for each tensor of a batch, besides those of the prefetched batches: for the batch
# that is being made, the one that the consumer uses, and a copy that the device has not finished.
MORE_BUFFERS = 3


class DevicePrefetcher:
    """Yields the batches of a loader on a device, some of them ahead of the consumer.

    A thread takes batches from the loader, copies their tensors into page-locked buffers and from
    there to the device, on a stream of its own, while the consumer's kernels run. The buffers grow
    to the largest batch and are then reused. A batch may be used on the stream that is current when
    the consumer asks for it, and is never overwritten.

    On the CPU the thread prefetches the loader's own batches.

    Args:
        loader: any iterable of batches: a DataLoader, a torchdata node, a generator. Tensors,
            mappings, sequences, named tuples, dataclasses and objects with ``pin_memory`` and
            ``to`` methods are sent; other leaves stay as they are. All batches must have one
            structure; lists may have any length.
        device: where batches go: ``"cuda"``, ``"cuda:1"``, ``"cpu"``.
        depth: how many batches are made ahead, at least 1. Default: 2.
        transform: is called with every batch on its device, on the thread's stream, and returns
            the batch to yield. Converting uint8 images to fp32 here, for example, means copying a
            fourth of the bytes.

    Raises:
        TypeError: `loader` cannot be iterated over.
        ValueError: `depth` is less than 1, or batches cannot be sent to such a device; while
            iterating: a batch has another structure than the first.
        RuntimeError: the device is not there; while iterating: in a child process after a fork.

    An error of the loader or of `transform` is raised in place of its batch. The prefetcher has all
    attributes of the loader (``dataset``, ``sampler``, ``batch_sampler``, ``batch_size``, ...).
    ``state_dict`` is the loader's state after the last batch that was yielded, not after those that
    were prefetched. A loader without workers runs in the thread, concurrently with the consumer:
    for reproducible runs, give it its own generator.

    Example:
        >>> batches = [{"x": torch.full((2, 3), float(i))} for i in range(3)]
        >>> loader = DevicePrefetcher(batches, "cpu", transform=lambda b: b["x"].sum().item())
        >>> list(loader)
        [0.0, 6.0, 12.0]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: torch.device | str | int,
        depth: int = 2,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(
                f"loader is a {type(loader).__name__}; wanted: an iterable of batches, such as a "
                "torch.utils.data.DataLoader"
            )
        self.loader = loader
        self.device = torch.device(device)
        self.depth = checked_depth(depth)
        self.transform = transform
        self._lane = lane_to(device)
        self._ring = pinned_ring(self._lane, depth)
        self._state: Any = None

    def __iter__(self) -> Iterator[Any]:
        snapshot = getattr(self.loader, "state_dict", None)

        def source() -> Iterator[tuple[Any, Any]]:
            batches = iter(self.loader)
            try:
                for batch in batches:
                    yield batch, snapshot and snapshot()
                yield END, snapshot and snapshot()
            finally:
                del batches  # in the thread that runs it, rather than where it is garbage collected

        for batch, state in ahead(source(), self.depth, self._lane, self._ring, self.transform):
            self._state = state
            if batch is not END:
                yield batch
            del batch  # do not keep a batch alive that the consumer has dropped

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def set_epoch(self, epoch: int) -> None:
        """Tells the loader, or its sampler, which epoch comes next.

        Raises:
            AttributeError: neither has such a method.
        """
        places = (self.loader, getattr(self.loader, "sampler", None),
                  getattr(self.loader, "batch_sampler", None))  # fmt: skip
        for place in places:
            if callable(method := getattr(place, "set_epoch", None)):
                method(epoch)
                return
        raise AttributeError(
            f"set_epoch({epoch}): neither the loader, a {type(self.loader).__name__}, nor its "
            "sampler has a set_epoch method; give it a sampler that has, such as DistributedSampler"
        )

    def state_dict(self) -> Any:
        """The loader's state after the last batch that was yielded."""
        current = self.loader.state_dict  # type: ignore[attr-defined]  # its AttributeError is right
        return current() if self._state is None else self._state

    def load_state_dict(self, state_dict: Any) -> None:
        """Hands a state to the loader; the next iteration goes on from there."""
        self.loader.load_state_dict(state_dict)  # type: ignore[attr-defined]
        self._state = None


def checked_depth(depth: int) -> int:
    """Checks `depth`, and returns it."""
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f"depth={depth!r}: wanted a whole number of batches, at least 1")
    return depth


def pinned_ring(lane: Lane | None, depth: int) -> _C.Ring | None:
    """The page-locked buffers; None without a device."""
    return None if lane is None else _C.Ring(depth + MORE_BUFFERS, True)


def ahead(
    source: Iterator[tuple[Any, Any]],
    depth: int,
    lane: Lane | None,
    ring: _C.Ring | None,
    transform: Callable[[Any], Any] | None,
) -> Iterator[tuple[Any, Any]]:
    """Yields the (batch, state) pairs of a source, prefetched by `depth`; then (END, state)."""
    iteration = Iteration(Producer(source, Channel(depth), lane, ring, transform))
    try:
        while True:
            item = iteration.next()
            if isinstance(item, Ended):
                yield END, item.state
                return
            yield item.batch, item.state
            del item
    finally:
        iteration.close()
