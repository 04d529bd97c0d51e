"""The order of rows: the same as in a torch DataLoader with the same arguments.

As many random numbers are drawn from the same generators in the same order as by a DataLoader, so a
program that changes its loader gets the same batches, and the same random numbers afterwards:

- `iter()` draws a seed for workers, from the DataLoader's generator or from torch's default one,
  even without workers. Everything else is drawn when the first batch is asked for, or later.
- RandomSampler without a generator seeds one from torch's default generator. At the end of the data
  it draws another permutation and does not use it.
- DistributedSampler seeds its own generator with ``seed + epoch``.
- Of any other sampler, the row numbers of one batch are taken at a time.
"""

from __future__ import annotations

import itertools
import operator
import reprlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

State = dict[str, Any]
# The rows of a batch: row numbers (None: all rows in storage order), the first of them, how many.
Rows = tuple[torch.Tensor | None, int, int]


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed as DataLoader and RandomSampler draw it; on the CPU, whatever the default device."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator).item())


@dataclass
class Epoch:
    """One pass over the rows.

    Attributes:
        state: from which the same order can be had again.
        done: how many batches the loader has yielded.
        left: of a sampler: the batches that it has not yielded.
        waiting: of a sampler: row numbers of the batches that it has yielded, but the loader not.
    """

    state: State
    done: int = 0
    left: Iterator[Any] = field(default_factory=lambda: iter(()))
    waiting: deque[torch.Tensor] = field(default_factory=deque)

    def passed(self) -> None:
        """Counts a batch that the loader yields."""
        self.done += 1
        if self.waiting:
            self.waiting.popleft()


class Order(ABC):
    """Base class of orders.

    Args:
        batches: iterated over for every epoch; yields the row numbers of a batch.
        generator: a DataLoader's, of which it draws its workers' seed.
    """

    def __init__(self, batches: Iterable[Any], generator: torch.Generator | None) -> None:
        self.batches = batches
        self.generator = generator

    def begin(self) -> Epoch:
        """The next epoch; draws the workers' seed."""
        left = iter(self.batches)
        draw_seed(self.generator)
        return Epoch(self.between(), left=left)

    def resume(self, state: State, done: int) -> Epoch:
        """An epoch that goes on after `done` batches."""
        return Epoch({**state}, done)

    @abstractmethod
    def rows(self, epoch: Epoch) -> Iterator[Rows]:
        """The rows of each batch that is left of an epoch, drawn as they are asked for."""

    @abstractmethod
    def between(self) -> State:
        """The state from which the next epoch can be drawn."""

    def state(self, epoch: Epoch) -> State:
        """The state from which the rest of an epoch can be drawn."""
        return {**epoch.state}

    @abstractmethod
    def restore(self, state: State) -> None:
        """Sets the generator or the sampler to where it was: in an epoch, or between two."""


class Whole(Order):
    """An order that is drawn at once, as a tensor: faster than a sampler that yields numbers."""

    batches: BatchSampler

    @property
    def sampler(self) -> Any:
        """The sampler that has this order."""
        return self.batches.sampler

    def rows(self, epoch: Epoch) -> Iterator[Rows]:
        """The rows of each batch that is left of an epoch; draws the order at the first."""
        index = self._draw(epoch.state)
        size, samples = self.batches.batch_size, len(self.sampler)
        whole, done = samples - samples % size, epoch.done * size
        for first in range(done, whole, size):
            yield index, first, size
        self._finish()  # a DataLoader sees the end of the data here
        if done <= whole < samples and not self.batches.drop_last:
            yield index, whole, samples - whole

    @abstractmethod
    def _draw(self, state: State) -> torch.Tensor | None:
        """The order of an epoch; notes in its state what was drawn."""

    def _finish(self) -> None:
        """Draws what the sampler draws after its last row."""


class InOrder(Whole):
    """SequentialSampler's order, or RandomSampler's, whose generator is the DataLoader's."""

    def _draw(self, state: State) -> torch.Tensor | None:
        if isinstance(self.sampler, SequentialSampler):
            return None
        generator = self.generator
        if generator is None:
            if "seed" not in state:
                state["seed"] = draw_seed()
            generator = torch.Generator().manual_seed(state["seed"])
        return torch.randperm(len(self.sampler), generator=generator, device="cpu")

    def _finish(self) -> None:
        if self.generator is not None and isinstance(self.sampler, RandomSampler):
            torch.randperm(len(self.sampler), generator=self.generator, device="cpu")

    def between(self) -> State:
        """The state from which the next epoch can be drawn."""
        return {"generator": None if self.generator is None else self.generator.get_state()}

    def restore(self, state: State) -> None:
        """Sets the generator to where it was."""
        if self.generator is not None:
            self.generator.set_state(state["generator"])


class Distributed(Whole):
    """DistributedSampler's order: one rank's share of the rows."""

    def _draw(self, state: State) -> torch.Tensor:
        state["epoch"] = self.sampler.epoch
        rows, total = len(self.sampler.dataset), self.sampler.total_size
        generator = torch.Generator().manual_seed(self.sampler.seed + self.sampler.epoch)
        order = (
            torch.randperm(rows, generator=generator, device="cpu")
            if self.sampler.shuffle
            else torch.arange(rows, device="cpu")
        )
        if rows < total:  # repeat rows to fill all shares
            order = order.repeat(-(-total // rows))
        return order[self.sampler.rank : total : self.sampler.num_replicas].contiguous()

    def between(self) -> State:
        """The state from which the next epoch can be drawn."""
        return {"epoch": self.sampler.epoch}

    def restore(self, state: State) -> None:
        """Sets the sampler's epoch; a later `set_epoch` overrides it."""
        self.sampler.set_epoch(state["epoch"])


class Sampled(Order):
    """The order of any sampler, of which the row numbers of one batch are taken at a time."""

    def resume(self, state: State, done: int) -> Epoch:
        """What was left of an epoch after `done` batches."""
        return Epoch(state, done, iter(state["batches"][done - state["first"] :]))

    def rows(self, epoch: Epoch) -> Iterator[Rows]:
        """The rows of each batch that is left of an epoch."""
        while (batch := next(epoch.left, END)) is not END:
            epoch.waiting.append(row_numbers(batch))
            yield epoch.waiting[-1], 0, len(epoch.waiting[-1])

    def state(self, epoch: Epoch) -> State:
        """All batches that are left; draws them, since only the sampler knows them."""
        if not epoch.state:
            try:
                total = len(self.batches)  # type: ignore[arg-type]
            except TypeError as error:
                raise TypeError(
                    "state_dict: the sampler has no length, and may have no end, so the rest of "
                    "its epoch cannot be saved; give it a __len__, or save between two epochs"
                ) from error
            drawn = list(itertools.islice(epoch.left, total - epoch.done - len(epoch.waiting)))
            epoch.left = itertools.chain(drawn, epoch.left)
            batches = [*epoch.waiting, *map(row_numbers, drawn)]
            epoch.state = {"first": epoch.done, "batches": batches}
        return epoch.state

    def between(self) -> State:
        """Empty, since only the sampler knows its next order."""
        return {}

    def restore(self, state: State) -> None:
        """Leaves the sampler as it is."""


END = object()


def row_numbers(batch: Any) -> torch.Tensor:
    """What a sampler yielded for a batch, as an int64 tensor.

    Raises:
        IndexError: it is something else than a list, array or tensor of row numbers.
    """
    try:
        numbers = batch.tolist() if hasattr(batch, "tolist") else list(batch)
        if set(map(type, numbers)) - {int}:
            numbers = [_row_number(number) for number in numbers]
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise IndexError(
            f"the sampler yielded {reprlib.repr(batch)} for a batch ({error}); wanted: whole "
            "numbers of rows; a sampler of whole batches is given as batch_sampler, and a mask as "
            "its mask.nonzero().flatten()"
        ) from error


def _row_number(number: Any) -> int:
    if isinstance(number, bool) or getattr(number, "dtype", None) is torch.bool:
        raise TypeError("a bool is no row number")
    if getattr(number, "ndim", 0):
        raise TypeError("an array is no row number")
    return operator.index(number)
