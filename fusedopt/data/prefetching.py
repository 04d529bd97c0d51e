"""The thread that makes batches ahead of their consumer, and the channel between the two."""

from __future__ import annotations

import atexit
import contextvars
import copy
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from fusedopt import _C

from .lanes import Event, Lane
from .structure import leaves_of, map_leaves, pins_itself

SHORTEST_PAUSE, LONGEST_PAUSE = 2e-5, 5e-4  # seconds between two polls of an event
# Buffers needed for each tensor of a batch, besides those of the prefetched batches: for the batch
# that is being made, the one that the consumer uses, and a copy that the device has not finished.
MORE_BUFFERS = 3
JOIN_SECONDS = 5.0  # a thread that is busy for longer ends by itself, after its current batch


@dataclass(frozen=True)
class Ready:
    """A batch for the consumer.

    Attributes:
        batch: on its device, or on its way there.
        done: event after its copies.
    """

    batch: Any
    done: Event


@dataclass(frozen=True)
class Failed:
    """An error that was raised in place of a batch, or of a row of tickets."""

    error: BaseException


END = object()  # comes after the last ticket, and after the last batch


class Channel:
    """Tickets for batches go to another thread, batches come back: at most `depth` are under way.

    Made of SimpleQueues, which release the GIL while they wait; conditions would acquire and
    release it several times for each batch.

    Args:
        tickets: what batches are made from. They are drawn in the consumer's thread, so that what
            they draw at random does not depend on the threads' timing.
        depth: how many batches the producer may be ahead.

    Attributes:
        reached: for each batch taken, an event of the consumer's stream at that time; None after
            `close`.
    """

    def __init__(self, tickets: Iterator[Any], depth: int) -> None:
        self.depth = depth
        self.reached: SimpleQueue[Event | None] = SimpleQueue()
        self._closed = False
        self._tickets = tickets
        self._drawn: SimpleQueue[Any] = SimpleQueue()
        self._made: SimpleQueue[Any] = SimpleQueue()
        for _ in range(depth):
            self._draw()

    def _draw(self) -> None:
        try:
            self._drawn.put(next(self._tickets, END))
        except Exception as error:  # comes up in place of the batch
            self._drawn.put(Failed(error))

    def drawn(self) -> Iterator[Any]:
        """Waits for tickets, until there are no more or the consumer wants none."""
        while (ticket := self._drawn.get()) is not END and not self._closed:
            if isinstance(ticket, Failed):
                raise ticket.error
            yield ticket

    def put(self, item: Any) -> None:
        """Gives the consumer a Ready, a Failed or END."""
        self._made.put(item)

    def take(self) -> Any:
        """Waits for the next item, and draws another ticket."""
        item = self._made.get()
        self._draw()
        return item

    def close(self) -> None:
        """Lets the producer end."""
        self._closed = True
        self._drawn.put(END)
        self.reached.put(None)


class Producer:
    """Takes batches from a source, copies them to the device, and transforms them.

    Args:
        source: the batches for a channel's tickets.
        channel: where they go.
        lane: to the device.
        ring: buffers that tensors are copied to: on the host, because the source may write to its
            own again; for a device, because they are page-locked.
        transform: what is done to a batch on its device.
    """

    def __init__(
        self,
        source: Iterator[Any],
        channel: Channel,
        lane: Lane,
        ring: _C.Ring,
        transform: Callable[[Any], Any] | None,
    ) -> None:
        self.source = source
        self.channel = channel
        self.lane = lane
        self.ring = ring
        self.transform = transform
        # Pinned memory, which must stay alive until the event after its copies.
        self._sending: deque[tuple[Event, list[Any]]] = deque()

    def run(self) -> None:
        """Runs until the source ends or fails, or the channel is closed."""
        with self.lane.working():
            try:
                self._make_all()
            finally:
                # A generator can only be closed where it is not running: in this thread.
                del self.source
                # Before the ring, which lives on, may reuse the memory of these copies.
                for done, _ in self._sending:
                    done.synchronize()

    def _make_all(self) -> None:
        for number in itertools.count():
            item = self._next(number)
            self.channel.put(item)
            if not isinstance(item, Ready):
                break
            del item  # do not keep a batch alive that the consumer drops

    def _next(self, number: int) -> Any:
        try:
            batch = next(self.source, END)
            if batch is END:
                return END
            self._wait_for_room(number)
            sent: list[Any] = []
            try:
                batch = self._sent(batch, sent)
                if self.transform is not None:
                    batch = self.transform(batch)
            finally:
                done = self.lane.done()
                self._sending.append((done, sent))
            return Ready(batch, done)
        except BaseException as error:  # every error is raised in the consumer
            return Failed(error)

    def _wait_for_room(self, number: int) -> None:
        # There is room for batch n once n - depth + 1 batches were taken. When the consumer took
        # batch n - depth, it had launched all its work on the batch before. Wait for that work; the
        # work on later batches keeps the device busy.
        if number >= self.channel.depth:
            reached = self.channel.reached.get()
            if reached is not None:
                wait_for(reached)
        while self._sending and self._sending[0][0].query():
            self._sending.popleft()

    def _sent(self, batch: Any, sent: list[Any]) -> Any:
        """A batch on its device; adds the memory that it is copied from to `sent`."""
        lane = self.lane
        leaves = list(leaves_of(batch))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu" for leaf in leaves):
            lane.wait_for_others()
        plain = [leaf for leaf in leaves if is_plain(leaf)]
        copied = [leaf for leaf in plain if not (lane.pinned and leaf.is_pinned())]
        copies = dict(zip(map(id, copied), self.ring.copy(copied) if copied else (), strict=True))
        sent += [copies.get(id(leaf), leaf) for leaf in plain]
        on_their_way = dict(zip(map(id, plain), sent, strict=True))

        def send(leaf: Any) -> Any:
            if (pinned := on_their_way.get(id(leaf))) is not None:
                return lane.send(pinned)
            if pins_itself(leaf) and lane.pinned:
                leaf = leaf.pin_memory()
                sent.append(leaf)
                return lane.send(leaf)
            if isinstance(leaf, torch.Tensor):
                return lane.send(leaf)
            # Other memory that a source may write to again, such as a NumPy array's.
            return copy.copy(leaf) if hasattr(leaf, "__array_interface__") else leaf

        try:
            return map_leaves(batch, send, anew=True)
        except TypeError:
            if lane.pinned:
                raise
            return batch  # can stay where it is


def wait_for(event: Event) -> None:
    """Waits on the host by polling.

    The driver's wait either spins, which occupies a core, or sleeps and returns 0.1 ms late, longer
    than copying a batch of a few MiB takes.
    """
    pause = SHORTEST_PAUSE
    while not event.query():
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is an ordinary dense tensor in host memory."""
    return (
        type(leaf) in (torch.Tensor, torch.nn.Parameter)
        and leaf.device.type == "cpu"
        and leaf.layout == torch.strided
        and not (leaf.requires_grad or leaf.is_conj() or leaf.is_neg() or leaf.is_quantized)
    )


def memory_of(batch: Any) -> Iterator[torch.Tensor]:
    """All tensors of a batch, including those inside objects and sparse tensors."""
    for leaf in leaves_of(batch):
        if pins_itself(leaf):
            yield from memory_of(list(leaf) if isinstance(leaf, tuple) else dict(vars(leaf)))
        elif isinstance(leaf, torch.Tensor):
            yield from PARTS.get(leaf.layout, lambda tensor: (tensor,))(leaf)


# The dense tensors that a tensor of another layout consists of.
PARTS: dict[torch.layout, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    torch.sparse_coo: lambda t: (t._indices(), t._values()),
    torch.sparse_csr: lambda t: (t.crow_indices(), t.col_indices(), t.values()),
    torch.sparse_bsr: lambda t: (t.crow_indices(), t.col_indices(), t.values()),
    torch.sparse_csc: lambda t: (t.ccol_indices(), t.row_indices(), t.values()),
    torch.sparse_bsc: lambda t: (t.ccol_indices(), t.row_indices(), t.values()),
}


_running: weakref.WeakSet[Iteration] = weakref.WeakSet()


class Iteration:
    """Iterates once over a source, with a thread that prefetches batches.

    Iteration and thread end when the source ends, at `close`, when the iterator is dropped, and at
    the interpreter's exit. In a child process after a fork, which has no thread, `next` raises.
    """

    def __init__(self, producer: Producer) -> None:
        self._channel = producer.channel
        self._lane = producer.lane
        self._process = os.getpid()
        self._thread = threading.Thread(
            target=with_settings_of_caller(producer.run), name="fusedopt.data", daemon=True
        )
        self._thread.start()
        _running.add(self)

    def next(self) -> Any:
        """The next batch, or END; raises an error that the source raised in its place."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this iterator belongs to process {self._process}, and its thread did not come "
                f"along to process {os.getpid()}; call iter() on the loader again there"
            )
        item = self._channel.take()
        if isinstance(item, Failed):
            try:
                raise item.error
            finally:
                del item  # avoids a reference cycle between the error and its traceback
        if not isinstance(item, Ready):
            return END
        self._channel.reached.put(self._lane.hand_over(item.done, memory_of(item.batch)))
        return item.batch

    def close(self) -> None:
        """Ends the thread; may be called several times."""
        if os.getpid() != self._process:
            return  # a thread of the parent may have held its lock at the fork
        self._channel.close()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)
        _running.discard(self)


def ahead(
    source: Callable[[Iterator[Any]], Iterator[Any]],
    tickets: Iterable[Any],
    depth: int,
    lane: Lane,
    ring: _C.Ring,
    transform: Callable[[Any], Any] | None,
) -> Iterator[Any]:
    """Yields the batches that `source`, in another thread, makes of an iterator of tickets."""
    channel = Channel(iter(tickets), depth)
    iteration = Iteration(Producer(source(channel.drawn()), channel, lane, ring, transform))
    del source, tickets  # what they hold is let go in the thread that runs it
    try:
        while (batch := iteration.next()) is not END:
            yield batch
            del batch  # do not keep a batch alive that the consumer has dropped
    finally:
        iteration.close()


def with_settings_of_caller(function: Callable[[], None]) -> Callable[[], None]:
    """`function`, for a thread of its own, under what is set for the caller's thread alone.

    Not torch's ThreadLocalState, which would keep a profiler or a dispatch mode alive in the thread
    that the caller has left.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in ("cpu", "cuda", "xpu")
    ]
    cache = torch.is_autocast_cache_enabled()
    device = torch.get_default_device()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        if device.type != "cpu":  # it would slow down every call
            torch.set_default_device(device)
        for kind, dtype, enabled in casts:
            torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_cache_enabled(cache)
        with torch.inference_mode(inference):  # sets the grad mode, too
            torch.set_grad_enabled(grad)
            function()

    return partial(contextvars.copy_context().run, run)


def checked_depth(depth: int) -> int:
    """Checks `depth`, and returns it."""
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f"depth={depth!r}: wanted a whole number of batches, at least 1")
    return depth


@atexit.register
def close_all() -> None:
    """Ends all threads at the interpreter's exit, while it can still wait for them."""
    for iteration in list(_running):
        iteration.close()
