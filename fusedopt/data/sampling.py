"""In which order rows are drawn: as a torch DataLoader with the same arguments draws them.

Random numbers are drawn from the same generators, in the same order and number, so that a program that
changes its loader sees the same batches, and the same random numbers after them:

- At the start of an epoch a DataLoader draws a seed for its workers, from its generator or from
  torch's default one, whether it has workers or not.
- RandomSampler without a generator draws the seed of one from torch's default; at the end of the data
  it draws another permutation, of which it uses nothing.
- DistributedSampler seeds a generator of its own with ``seed + epoch``.
"""

from __future__ import annotations

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
        """Draws what RandomSampler draws after the last row."""
        if self.generator is not None:
            torch.randperm(rows, generator=self.generator)


class InOrder:
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

    def begin(self, state: State | None) -> Epoch:
        """The next epoch's order; that of `state` again, if it is one of an epoch under way."""
        if state and state.get("generator") is not None:
            if self.generator is None:
                raise ValueError(
                    "the state is of a loader that was given a generator; wanted: one of a loader "
                    "without, like this one; pass generator=torch.Generator()"
                )
            self.generator.set_state(state["generator"])
        known = state.get("seed") if state else None
        start = self.generator.get_state() if self.generator is not None else None
        if known is None:
            draw_seed(self.generator)
        if not self.shuffle:
            return Epoch(None, {"generator": start})
        if self.generator is not None:
            index = torch.randperm(self.rows, generator=self.generator)
            return Epoch(index, {"generator": start}, self.generator)
        seed = draw_seed() if known is None else known
        own = torch.Generator().manual_seed(seed)
        return Epoch(torch.randperm(self.rows, generator=own), {"seed": seed})

    def between(self) -> State:
        """What the next epoch's order can be drawn from."""
        return {"generator": None if self.generator is None else self.generator.get_state()}


class Distributed:
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

    def begin(self, state: State | None) -> Epoch:
        """The order of the epoch that was set; that of `state`, if it is one of an epoch under way."""
        if state:
            self.epoch = state["epoch"]
        else:
            draw_seed()
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = (
            torch.randperm(self.rows, generator=generator)
            if self.shuffle
            else torch.arange(self.rows)
        )
        total = self.samples * self.world_size
        if self.rows < total:
            order = order.repeat(-(-total // max(self.rows, 1)))
        return Epoch(order[self.rank : total : self.world_size].contiguous(), self.between())

    def between(self) -> State:
        """What the next epoch's order can be drawn from."""
        return {"epoch": self.epoch}


class Sampled:
    """Rows in the order of a sampler, whose length may be any.

    Args:
        sampler: iterated over for every epoch; yields row numbers.
        generator: a DataLoader's, of which it draws its workers' seed.
    """

    def __init__(self, sampler: Iterable[int], generator: torch.Generator | None) -> None:
        self.sampler = sampler
        self.generator = generator

    @property
    def samples(self) -> int:
        """The sampler's length."""
        return len(self.sampler)  # type: ignore[arg-type]

    def begin(self, state: State | None) -> Epoch:
        """The sampler's next order, or the one in `state`."""
        if state:
            index = state["index"]
        else:
            draw_seed(self.generator)
            index = torch.as_tensor(list(self.sampler), dtype=torch.int64)
        return Epoch(index, {"index": index})

    def between(self) -> State:
        """Nothing: what comes next only the sampler knows."""
        return {}


Order = InOrder | Distributed | Sampled
