"""In which order rows are drawn: as a torch DataLoader with the same arguments draws them.

Random numbers are drawn from the same generators, in the same order and number, so that a program
that changes its loader sees the same batches, and the same random numbers after them:

- At the start of an epoch a DataLoader draws a seed for its workers, from its generator or from
  torch's default one, whether it has workers or not.
- RandomSampler without a generator draws the seed of one from torch's default; at the end of the
  data it draws another permutation, of which it uses nothing.
- DistributedSampler seeds a generator of its own with ``seed + epoch``.
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
    """The order of one pass.

    Attributes:
        index: the rows, in order; None for all of them as they lie.
        state: what the order can be drawn from again.
        generator: what is drawn from once more at the end.
    """

    index: torch.Tensor | None
    state: State
    generator: torch.Generator | None = None

    def finish(self, rows: int) -> None:
        """Draws what RandomSampler draws after the last row; once."""
        if self.generator is not None:
            torch.randperm(rows, generator=self.generator)
        self.generator = None


class Order(ABC):
    """What the orders have in common.

    Attributes:
        samples: how many rows an epoch has.
        resumed: the state of an epoch under way, which is begun next.
    """

    samples: int
    resumed: State | None = None

    @abstractmethod
    def begin(self) -> Epoch:
        """The next epoch."""

    @abstractmethod
    def between(self) -> State:
        """What the next epoch can be drawn from."""

    def restore(self, state: State, under_way: bool) -> None:
        """Goes back to a state, of an epoch that was under way or of the time between two."""
        self.resumed = state if under_way else None

    def _take_resumed(self) -> State | None:
        resumed, self.resumed = self.resumed, None
        return resumed


class InOrder(Order):
    """Rows as they lie, or shuffled.

    Args:
        rows: how many there are.
        shuffle: whether they are drawn in random order.
        generator: of the order; None draws its seed from torch's default one.
    """

    def __init__(self, rows: int, shuffle: bool, generator: torch.Generator | None) -> None:
        self.rows = self.samples = rows
        self.shuffle = shuffle
        self.generator = generator

    def begin(self) -> Epoch:
        """The next epoch."""
        resumed = self._take_resumed()
        state = self.between()
        # What torch's default generator gave to an epoch under way is not taken from it again.
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
        """What the next epoch can be drawn from."""
        return {"generator": None if self.generator is None else self.generator.get_state()}

    def restore(self, state: State, under_way: bool) -> None:
        """Goes back to a state; the generator's is set at once."""
        super().restore(state, under_way)
        if self.generator is not None:
            self.generator.set_state(state["generator"])


class Distributed(Order):
    """One rank's share of the rows, as DistributedSampler's.

    Args:
        rows: how many there are.
        shuffle: whether they are drawn in random order, another in every epoch.
        rank: of this process.
        world_size: number of processes.
        seed: the same on all ranks.
        drop_last: leaves out rows at the end, instead of repeating some, to make shares equal.
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
        if self.rows < total:  # as often over as it takes
            order = order.repeat(-(-total // self.rows))
        return Epoch(order[self.rank : total : self.world_size].contiguous(), self.between())

    def between(self) -> State:
        """What the next epoch can be drawn from."""
        return {"epoch": self.epoch}

    def restore(self, state: State, under_way: bool) -> None:
        """Goes back to a state; a later `set_epoch` counts all the same."""
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
        """Nothing: what comes next only the sampler knows."""
        return {}
