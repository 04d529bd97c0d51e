"""The thread that makes batches ahead of their consumer, and the channel between the two."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from fusedopt import _C

from .lanes import Event, Lane, working
from .structure import difference, leaves_of, map_leaves, pins_itself

SHORTEST_PAUSE, LONGEST_PAUSE = 2e-5, 5e-4  # seconds between two polls of an event
JOIN_SECONDS = 5.0  # a thread that is busy for longer ends by itself, after its current batch


@dataclass(frozen=True)
class Ready:
    """A batch for the consumer.

    Attributes:
        batch: on its device, or on its way there.
        state: the source's state after it, for `state_dict`.
        done: event after its copies; None without a device.
    """

    batch: Any
    state: Any
    done: Event | None


@dataclass(frozen=True)
class Ended:
    """The end of the source; `state` as in `Ready`."""

    state: Any


@dataclass(frozen=True)
class Failed:
    """An error that the source raised in place of a batch."""

    error: BaseException


Item = Ready | Ended | Failed


class Channel:
    """A bounded queue between two threads, with at most `depth` batches, finished or in progress.

    Made of SimpleQueues, which release the GIL while they wait; conditions would acquire and
    release it several times for each batch.

    Attributes:
        depth: how many batches the producer may be ahead.
        closed: whether the consumer wants no more.
        reached: for each batch taken, an event of the consumer's stream at that time; None after
            `close`.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.closed = False
        self.reached: SimpleQueue[Event | None] = SimpleQueue()
        self._items: SimpleQueue[Item] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self._room.put(None)

    def reserve(self) -> bool:
        """Waits for room for another batch; False if the channel is closed."""
        self._room.get()
        return not self.closed

    def put(self, item: Item) -> None:
        """Appends an item, for which `reserve` was called."""
        self._items.put(item)

    def take(self) -> Item:
        """Waits for the next item."""
        item = self._items.get()
        self._room.put(None)
        return item

    def close(self) -> None:
        """Lets the producer end."""
        self.closed = True
        self._room.put(None)
        self.reached.put(None)


class Producer:
    """Takes batches from a source, copies them to the device, and transforms them.

    Args:
        source: yields (batch, state).
        channel: where they go.
        lane: to the device; None leaves batches where they are.
        ring: page-locked buffers that tensors are sent from.
        transform: what is done to a batch on its device.
    """

    def __init__(
        self,
        source: Iterator[tuple[Any, Any]],
        channel: Channel,
        lane: Lane | None,
        ring: _C.Ring | None,
        transform: Callable[[Any], Any] | None,
    ) -> None:
        self.source = source
        self.channel = channel
        self.lane = lane
        self.ring = ring
        self.transform = transform
        # Pinned memory, which must stay alive until the event after its copies.
        self._sending: deque[tuple[Event, list[Any]]] = deque()
        self._first: Any = None

    def run(self) -> None:
        """Runs until the source ends or fails, or the channel is closed."""
        with working(self.lane):
            try:
                self._make_all()
            finally:
                # A generator can only be closed where it is not running: in this thread.
                if callable(close := getattr(self.source, "close", None)):
                    close()
                # Before the ring, which lives on, may reuse the memory of these copies.
                for done, _ in self._sending:
                    done.synchronize()

    def _make_all(self) -> None:
        made = 0
        while self.channel.reserve():
            item = self._next(made)
            ended = not isinstance(item, Ready)
            self.channel.put(item)
            del item  # do not keep a batch alive that the consumer drops
            made += 1
            if ended:
                break

    def _next(self, number: int) -> Item:
        try:
            batch, state = next(self.source)
            if batch is END:
                return Ended(state)
            if number == 0:
                self._first = map_leaves(batch, _shape_of_leaf)
            elif found := difference(self._first, batch):
                raise ValueError(
                    f"batch {number} of the loader has another structure than the first: {found}; "
                    "wanted: the same containers, keys and tensors in every batch"
                )
            sent: list[Any] = []
            if self.lane is not None:
                self._wait_for_room(number)
                batch, sent = self._sent(batch, self.lane)
            try:
                if self.transform is not None:
                    batch = self.transform(batch)
            finally:
                if self.lane is not None:
                    done = self.lane.done()
                    self._sending.append((done, sent))
            return Ready(batch, state, done if self.lane is not None else None)
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

    def _sent(self, batch: Any, lane: Lane) -> tuple[Any, list[Any]]:
        """A batch on its device, and the pinned memory it is copied from."""
        leaves = list(leaves_of(batch))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu" for leaf in leaves):
            lane.wait_for_others()
        plain = [leaf for leaf in leaves if is_plain(leaf)]
        pageable = [leaf for leaf in plain if not leaf.is_pinned()]
        assert self.ring is not None
        copies = dict(
            zip(map(id, pageable), self.ring.copy(pageable) if pageable else (), strict=True)
        )
        sent: list[Any] = [copies.get(id(leaf), leaf) for leaf in plain]
        on_their_way = dict(zip(map(id, plain), sent, strict=True))

        def send(leaf: Any) -> Any:
            if (pinned := on_their_way.get(id(leaf))) is not None:
                return lane.send(pinned)
            if pins_itself(leaf):
                leaf = leaf.pin_memory()
                sent.append(leaf)
            if isinstance(leaf, torch.Tensor) or pins_itself(leaf):
                return lane.send(leaf)
            return leaf

        return map_leaves(batch, send), sent


def wait_for(event: Event) -> None:
    """Waits on the host by polling.

    The driver's wait either spins, which occupies a core, or sleeps and returns 0.1 ms late, longer
    than copying a batch of a few MiB takes.
    """
    pause = SHORTEST_PAUSE
    while not event.query():
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


END = object()  # a source yields it after its last batch


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


def _shape_of_leaf(leaf: Any) -> Any:
    """A placeholder of a leaf for `difference`, without its memory."""
    return torch.empty(0) if isinstance(leaf, torch.Tensor) else leaf


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
        self._thread = threading.Thread(target=producer.run, name="fusedopt.data", daemon=True)
        self._thread.start()
        _running.add(self)

    def next(self) -> Ready | Ended:
        """The next batch, or `Ended`; raises an error that the source raised in its place."""
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
        if isinstance(item, Ready) and item.done is not None and self._lane is not None:
            self._channel.reached.put(self._lane.hand_over(item.done, memory_of(item.batch)))
        return item

    def close(self) -> None:
        """Ends the thread; may be called several times."""
        if os.getpid() != self._process:
            return  # a thread of the parent may have held its lock at the fork
        self._channel.close()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)
        _running.discard(self)


@atexit.register
def close_all() -> None:
    """Ends all threads at the interpreter's exit, while it can still wait for them."""
    for iteration in list(_running):
        iteration.close()
