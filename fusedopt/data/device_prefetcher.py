"""DevicePrefetcher: copies any loader's batches to a device ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from queue import SimpleQueue
from typing import Any

import torch

from fusedopt import _C

from .lanes import lane_to
from .prefetching import MORE_BUFFERS, Failed, ahead, checked_depth


class DevicePrefetcher:
    """Yields the batches of a loader on a device, some of them ahead of the consumer.

    A thread takes batches from the loader, copies their tensors into page-locked buffers and from
    there to the device, on a stream of its own, while the consumer's kernels run. The buffers grow
    to the largest batch and are then reused. A batch may be used on the stream that is current when
    the consumer asks for it, and is never overwritten.

    On the CPU the thread yields copies, since a source may use its memory again. It runs under the
    settings of the caller at the first batch: grad and inference mode, autocast, default device.

    Args:
        loader: any iterable of batches: a DataLoader, a torchdata node, a generator. Tensors,
            mappings, sequences, named tuples, dataclasses and objects with ``pin_memory`` and
            ``to`` methods are sent; other leaves stay as they are. The structure may change from
            batch to batch.
        device: where batches go: ``"cuda"``, ``"cuda:1"``, ``"cpu"``.
        depth: how many batches are made ahead, at least 1. Default: 2.
        transform: is called with every batch on its device, on the thread's stream, and returns
            the batch to yield. Converting uint8 images to fp32 here, for example, means copying a
            fourth of the bytes.

    Raises:
        TypeError: `loader` cannot be iterated over.
        ValueError: `depth` is less than 1, or batches cannot be sent to such a device.
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
        self._state: Any = None  # the loader's after the last batch that was yielded; None: now's
        self._make_buffers()

    def _make_buffers(self) -> None:
        self._lane = lane_to(self.device)
        self._ring = _C.Ring(self.depth + MORE_BUFFERS, self._lane.pinned)

    def __getstate__(self) -> dict[str, Any]:
        # Another process has other streams; no two copies share buffers.
        return {**vars(self), "_lane": None, "_ring": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_buffers()

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)  # draws what a DataLoader draws here, in this thread
        self._state = None
        return self._ahead(batches)

    def _ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        states: SimpleQueue[Any] = SimpleQueue()
        snapshot = getattr(self.loader, "state_dict", lambda: None)

        def with_state(_: None, batch: Any) -> Any:
            try:
                states.put(snapshot())
            except Exception as error:  # raised by state_dict(), if it is ever called
                states.put(Failed(error))
            return batch

        made = ahead(partial(_mapped, with_state, batches), repeat(None), self.depth, self._lane,
                     self._ring, self.transform)  # fmt: skip
        del batches  # let go in the thread that runs it
        for batch in made:
            self._state = states.get()
            yield batch
            del batch  # do not keep a batch alive that the consumer has dropped
        self._state = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Python's own protocols are about this object; while it is unpickled, it has no loader.
        if name == "loader" or name.startswith("__"):
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
        if isinstance(self._state, Failed):
            raise self._state.error
        current = self.loader.state_dict  # type: ignore[attr-defined]  # its AttributeError is right
        return current() if self._state is None else self._state

    def load_state_dict(self, state_dict: Any) -> None:
        """Hands a state to the loader; the next iteration goes on from there."""
        self.loader.load_state_dict(state_dict)  # type: ignore[attr-defined]
        self._state = None


def _mapped(
    function: Callable[[None, Any], Any], batches: Iterator[Any], tickets: Iterator[None]
) -> Iterator[Any]:
    return map(function, tickets, batches)
