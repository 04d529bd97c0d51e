"""TensorLoader: batches gathered from tensors in memory, at memory speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    TensorDataset,
)

from fusedopt import _C

from .lanes import Lane, lane_to
from .prefetching import MORE_BUFFERS, ahead, checked_depth
from .sampling import Distributed, Epoch, InOrder, Order, Rows, Sampled, State

# What the order of rows is made from: cannot be set later.
FIXED = ("dataset", "batch_size", "sampler", "batch_sampler", "drop_last", "generator")


class TensorLoader:
    """Batches of rows of tensors, as a ``DataLoader`` over a ``TensorDataset`` makes them.

    One call gathers each batch, on all threads, into buffers that are reused once no tensor in them
    is alive. Batches, their order, and the random numbers drawn are those of
    ``DataLoader(TensorDataset(*tensors), batch_size, shuffle, drop_last=drop_last,
    generator=generator)``. You may keep batches: they are never overwritten.

    Args:
        *tensors: of one length in their first dimension, on the CPU, in memory or mapped from a
            file (``torch.from_file``, ``torch.from_numpy(numpy.memmap(...))``). Batches are lists
            of as many tensors. Or one mapping of names to tensors; batches are dicts then.
        batch_size: rows of a batch; None if `sampler` yields whole batches. Default: 1.
        shuffle: a new random order in every epoch. Default: False.
        drop_last: leaves out the last batch if it is smaller. Default: False.
        generator: draws the order; None seeds one from torch's default generator.
        sampler: an iterable of row numbers, such as a ``torch.utils.data.Sampler``, in place of
            `shuffle`. `set_epoch` calls its ``set_epoch``.
        batch_sampler: an iterable of lists, arrays or tensors of row numbers, the batches, such as
            a ``torch.utils.data.BatchSampler``.
        rank: of this process, which gets the rows that ``DistributedSampler`` would give it; call
            `set_epoch` before every epoch. Requires `world_size`.
        world_size: number of processes.
        seed: of the order that all ranks share. Default: 0.
        device: a GPU. Batches are gathered into page-locked buffers and copied to it ahead of time,
            as by `DevicePrefetcher`. Default: None, batches stay in host memory.
        depth: how many batches are made ahead for a GPU. Default: 2.
        transform: is called with every batch, on its device, and returns the batch to yield.

    Raises:
        TypeError: something is not a tensor.
        ValueError: tensors differ in length, are not on the CPU, or have rows that are scattered
            in memory; arguments exclude each other; a loaded state is of another loader.
        IndexError: while iterating: a sampler yields a row number that is out of range, or
            something else than row numbers.
        RuntimeError: the device does not exist.

    Example:
        >>> x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
        >>> for inputs, targets in TensorLoader(x, y, batch_size=4):
        ...     print(tuple(inputs.shape), targets.tolist())
        (4, 2) [0, 1, 2, 3]
        (2, 2) [4, 5]
    """

    def __init__(
        self,
        *tensors: torch.Tensor | Mapping[str, torch.Tensor],
        batch_size: int | None = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        device: torch.device | str | int | None = None,
        depth: int = 2,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        named, self._tensors = _checked_tensors(tensors)
        self.dataset: Dataset[Any] = (
            TensorDataset(*self._tensors)
            if named is None
            else StackDataset(**dict(zip(named, self._tensors, strict=True)))  # type: ignore[arg-type]
        )
        self._order = _order_of(self.dataset, batch_size, shuffle, drop_last, generator, sampler,
                                batch_sampler, rank, world_size, seed)  # fmt: skip
        self.batch_sampler = self._order.batches
        self.sampler = getattr(self.batch_sampler, "sampler", None) if sampler is None else sampler
        self.batch_size = batch_size if batch_sampler is None else None
        self.drop_last = drop_last
        self.generator = generator
        self.device = torch.device("cpu" if device is None else device)
        self.depth = checked_depth(depth)
        self.transform = transform
        self._names = named
        self._of = {
            "order": type(self._order).__name__,
            "rows": len(self._tensors[0]),
            "batch_size": self.batch_size,
            "drop_last": drop_last,
            "shuffle": bool(shuffle),
            "seed": None if rank is None else seed,
            "world_size": world_size or 1,
        }
        self._position: Epoch | None = None  # the epoch under way
        self._resumed: tuple[State, int] | None = None  # a loaded one; the next iteration goes on
        self._make_buffers()

    def __len__(self) -> int:
        return len(self._order.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        resumed, self._resumed = self._resumed, None
        epoch = self._order.resume(*resumed) if resumed else self._order.begin()
        self._position = epoch
        return self._batches(epoch)

    def _batches(self, epoch: Epoch) -> Iterator[Any]:
        """The batches of an epoch; draws their rows in the thread that asks for them."""
        rows, gather = self._order.rows(epoch), partial(map, self._gathered)
        made = (
            gather(rows)
            if self._lane is None
            else ahead(gather, rows, self.depth, self._lane, self._ring, self.transform)
        )
        for batch in made:
            epoch.passed()
            if self._position is not epoch:  # another iteration was in between
                self._position = epoch
            if self._lane is None and self.transform is not None:
                batch = self.transform(batch)
            yield batch
            del batch  # do not keep a batch alive that the consumer has dropped
        self._position = None

    def _gathered(self, rows: Rows) -> Any:
        batch = self._ring.gather(self._tensors, *rows)
        return batch if self._names is None else dict(zip(self._names, batch, strict=True))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and name in vars(self):
            raise ValueError(
                f"{name}: cannot be set, since the order of rows was made from it; make another "
                "TensorLoader"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, in this process or another, begins with an epoch of its own.
        return {**vars(self), "_position": None, "_lane": None, "_ring": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_buffers()

    def _make_buffers(self) -> None:
        lane = lane_to(self.device)
        self._lane: Lane | None = lane if lane.pinned else None
        self._ring = _C.Ring(self.depth + MORE_BUFFERS, lane.pinned)

    def _state_at(self, epoch: Epoch | None) -> State:
        return {
            "batches": None if epoch is None else epoch.done,
            "order": self._order.between() if epoch is None else self._order.state(epoch),
            "of": self._of,
        }

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next epoch: of all ranks, or of the sampler.

        Raises:
            ValueError: neither depends on it: the order of a generator follows from its state.
        """
        for place in (self.sampler, self.batch_sampler):
            if callable(method := getattr(place, "set_epoch", None)):
                return method(epoch)
        raise ValueError(
            f"set_epoch({epoch}): the order of this loader does not depend on an epoch; "
            "wanted: a loader with rank and world_size, or with a sampler that has set_epoch"
        )

    def state_dict(self) -> State:
        """The loader's position: after the last batch that was yielded, or between two epochs.

        A loader with the same arguments that loads it continues with the next batch, in the same
        order. Without a generator, the orders of later epochs come from torch's default generator,
        whose state is not included.
        """
        if self._resumed is None:
            return self._state_at(self._position)
        return {"batches": self._resumed[1], "order": self._resumed[0], "of": self._of}

    def load_state_dict(self, state_dict: State) -> None:
        """Makes the next iteration continue where `state_dict` was taken.

        Raises:
            ValueError: it is no state, or one of a loader with other arguments; nothing is changed.
        """
        mine = self._state_at(None)
        if not isinstance(state_dict, Mapping) or state_dict.keys() != mine.keys():
            raise ValueError(
                f"state_dict: wanted what state_dict() of a TensorLoader returned, with the keys "
                f"{list(mine)}"
            )
        theirs = state_dict["of"]
        other = [name for name, value in mine["of"].items() if theirs.get(name) != value]
        if other:
            told = ", ".join(f"{n}={theirs.get(n)!r} instead of {mine['of'][n]!r}" for n in other)
            raise ValueError(f"state_dict: it is of a loader with {told}; load it into such a one")
        given = state_dict["order"].get("generator") is not None
        if isinstance(self._order, InOrder) and given != (self.generator is not None):
            raise ValueError(
                f"state_dict: it is of a loader {'with' if given else 'without'} a generator, this "
                f"one is {'without' if given else 'with'}; load it into such a one"
            )
        self._order.restore(state_dict["order"])
        done = state_dict["batches"]
        self._resumed = None if done is None else (state_dict["order"], done)
        self._position = None


def _checked_tensors(
    tensors: tuple[Any, ...],
) -> tuple[list[str] | None, list[torch.Tensor]]:
    """Checks the tensors; returns their names, if there are any, and the tensors."""
    names = None
    if len(tensors) == 1 and isinstance(tensors[0], Mapping):
        names, tensors = list(tensors[0]), tuple(tensors[0].values())
    if not tensors:
        raise ValueError("tensors: got none; wanted at least one, or a mapping of at least one")
    labels = names or [f"tensor {i}" for i in range(len(tensors))]
    for label, tensor in zip(labels, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"tensors: {label} is a {type(tensor).__name__}; wanted: tensors, or one mapping "
                "of them; torch.from_numpy makes one of an array without copying"
            )
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ValueError(
                f"tensors: {label} is on {tensor.device} with layout {tensor.layout}; wanted: "
                "dense tensors on the CPU; of what is on a GPU already, index_select takes batches"
            )
        if tensor.dim() == 0:
            raise ValueError(f"tensors: {label} has no dimension; wanted: at least one, the rows")
        if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            raise ValueError(
                f"tensors: {label} is a lazy conjugate or negative, or quantized; wanted: values "
                "in memory; call resolve_conj(), resolve_neg() or dequantize()"
            )
        if len(tensor) > 0 and not tensor[0].is_contiguous():
            raise ValueError(
                f"tensors: {label} has rows that are scattered in memory (strides "
                f"{tuple(tensor.stride())}); wanted: rows that are contiguous; call contiguous()"
            )
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        told = ", ".join(f"{label}: {n}" for label, n in zip(labels, lengths, strict=True))
        raise ValueError(f"tensors: lengths differ ({told}); wanted: as many rows in each")
    return names, [tensor.detach() for tensor in tensors]


def _order_of(
    dataset: Any,
    batch_size: int | None,
    shuffle: bool,
    drop_last: bool,
    generator: torch.Generator | None,
    sampler: Iterable[Any] | None,
    batch_sampler: Iterable[Any] | None,
    rank: int | None,
    world_size: int | None,
    seed: int,
) -> Order:
    """The order that the arguments ask for."""
    given = batch_sampler if sampler is None else sampler
    if given is not None and (shuffle or rank is not None or world_size is not None):
        raise ValueError(
            "sampler: excludes shuffle, rank and world_size, since it is the order; wanted: either"
        )
    if batch_sampler is not None and (sampler is not None or batch_size != 1 or drop_last):
        raise ValueError(
            "batch_sampler: excludes sampler, batch_size and drop_last, since it makes the batches"
        )
    if batch_size is None and (sampler is None or drop_last):
        raise ValueError("batch_size=None: wanted a sampler of whole batches, and no drop_last")
    if batch_size is None or batch_sampler is not None:
        assert given is not None
        return Sampled(given, generator)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: wanted a whole number of rows, at least 1")
    if sampler is not None:
        return Sampled(BatchSampler(sampler, batch_size, drop_last), generator)
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"rank={rank!r}, world_size={world_size!r}: wanted both or neither; "
            "torch.distributed.get_rank() and get_world_size() tell them"
        )
    if rank is None or world_size is None:
        rows = (
            RandomSampler(dataset, generator=generator)
            if shuffle and len(dataset)
            else SequentialSampler(dataset)
        )
        return InOrder(BatchSampler(rows, batch_size, drop_last), generator)
    if generator is not None:
        raise ValueError(
            "generator: excludes rank and world_size: all ranks must draw one order; pass seed"
        )
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank={rank!r}: wanted a number from 0 to world_size - 1 = {world_size - 1}"
        )
    share: DistributedSampler[Any] = DistributedSampler(
        dataset, world_size, rank, shuffle, seed, drop_last
    )
    return Distributed(BatchSampler(share, batch_size, drop_last), None)
