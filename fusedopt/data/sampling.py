"""The order of rows, the same as in a torch DataLoader with the same arguments.

It draws as many random numbers from the same generators in the same order as a DataLoader, so that
a program that changes its loader gets the same batches, and the same random numbers afterwards:

- At the start of an epoch a DataLoader draws a seed for its workers, from its generator or from
  torch's default one, even without workers.
- RandomSampler without a generator seeds one from torch's default generator. At the end of the data
  it draws another permutation and does not use it.
- DistributedSampler seeds its own generator with ``seed + epoch``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, Any]


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed as DataLoader and RandomSampler draw it."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


@dataclass
class Epoch:
    """The order of one epoch.

    Attributes:
        index: row numbers, in order; None for all rows in storage order.
        state: from which the same order can be drawn again.
        generator: the generator that RandomSampler draws from once more at the end.
    """

    index: torch.Tensor | None
    state: State
    generator: torch.Generator | None = None

    def finish(self, rows: int) -> None:
        """Draws the unused permutation of RandomSampler after the last row; once."""
        if self.generator is not None:
            torch.randperm(rows, generator=self.generator)
        self.generator = None


class Order(ABC):
    """Base class of orders.

    Attributes:
        samples: number of rows in an epoch.
        resumed: state of an interrupted epoch, with which `begin` continues.
    """

    samples: int
    resumed: State | None = None

    @abstractmethod
    def begin(self) -> Epoch:
        """The next epoch."""

    @abstractmethod
    def between(self) -> State:
        """The state from which the next epoch can be drawn."""

    def restore(self, state: State, under_way: bool) -> None:
        """Restores a state: of an epoch under way, or between two epochs."""
        self.resumed = state if under_way else None

    def _take_resumed(self) -> State | None:
        resumed, self.resumed = self.resumed, None
        return resumed


class InOrder(Order):
    """Rows in storage order, or shuffled.

    Args:
        rows: number of rows.
        shuffle: whether their order is random.
        generator: draws the order; None seeds one from torch's default generator.
    """

    def __init__(self, rows: int, shuffle: bool, generator: torch.Generator | None) -> None:
        self.rows = self.samples = rows
        self.shuffle = shuffle
        self.generator = generator

    def begin(self) -> Epoch:
        """The next epoch."""
        resumed = self._take_resumed()
        state = self.between()
        # A resumed epoch has already drawn its seeds from torch's default generator.
        if resumed is None or self.generator is not None:
            draw_seed(self.generator)
        if not self.shuffle:
            return Epoch(None, state)
        if self.generator is not None:
            index = torch.randperm(self.rows, generator=self.generator)
            return Epoch(index, state, self.generator)
        seed = draw_seed() if resumed is None else resumed["seed"]
        own = torch.Generator().manual_seed(seed)
        return Epoch(torch.randperm(self.rows, generator=own), {**state, "seed": seed})

    def between(self) -> State:
        """The state from which the next epoch can be drawn."""
        return {"generator": None if self.generator is None else self.generator.get_state()}

    def restore(self, state: State, under_way: bool) -> None:
        """Restores a state, and sets the generator's at once."""
        super().restore(state, under_way)
        if self.generator is not None:
            self.generator.set_state(state["generator"])


class Distributed(Order):
    """One rank's share of the rows, as DistributedSampler's.

    Args:
        rows: number of rows.
        shuffle: whether their order is random, and different in every epoch.
        rank: of this process.
        world_size: number of processes.
        seed: the same on all ranks.
        drop_last: makes shares equal by leaving out rows at the end, instead of repeating some.
    """

    def __init__(
        self, rows: int, shuffle: bool, rank: int, world_size: int, seed: int, drop_last: bool
    ) -> None:
        self.rows = rows
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.samples = rows // world_size if drop_last else -(-rows // world_size)

    def begin(self) -> Epoch:
        """The epoch that was set."""
        if self._take_resumed() is None:
            draw_seed()
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = (
            torch.randperm(self.rows, generator=generator)
            if self.shuffle
            else torch.arange(self.rows)
        )
        total = self.samples * self.world_size
        if self.rows < total:  # repeat rows to fill all shares
            order = order.repeat(-(-total // self.rows))
        return Epoch(order[self.rank : total : self.world_size].contiguous(), self.between())

    def between(self) -> State:
        """The state from which the next epoch can be drawn."""
        return {"epoch": self.epoch}

    def restore(self, state: State, under_way: bool) -> None:
        """Restores a state; a later `set_epoch` overrides it."""
        super().restore(state, under_way)
        self.epoch = state["epoch"]


class Sampled(Order):
    """Rows in the order of a sampler.

    Args:
        sampler: iterated over for every epoch; yields row numbers.
        generator: a DataLoader's, of which it draws its workers' seed.
    """

    def __init__(self, sampler: Iterable[int], generator: torch.Generator | None) -> None:
        self.sampler = sampler
        self.generator = generator

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The sampler's length."""
        return len(self.sampler)  # type: ignore[arg-type]

    def begin(self) -> Epoch:
        """The sampler's next order, or that of an epoch under way."""
        resumed = self._take_resumed()
        if resumed is not None:
            return Epoch(resumed["index"], resumed)
        draw_seed(self.generator)
        index = torch.as_tensor(list(self.sampler), dtype=torch.int64)
        return Epoch(index, {"index": index})

    def between(self) -> State:
        """Empty, since only the sampler knows its next order."""
        return {}
