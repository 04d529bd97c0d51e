"""Traversal of batches: containers, which are rebuilt with the same types, and leaves.

Containers are mappings, lists, tuples and other sequences, named tuples and dataclasses. Everything
else is a leaf, and so are objects with a ``pin_memory`` method.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

# Sequences that are values, not containers.
VALUES = (str, bytes, bytearray, memoryview, range)


def pins_itself(leaf: object) -> bool:
    """Whether an object other than a tensor has a ``pin_memory`` method."""
    return not isinstance(leaf, torch.Tensor) and callable(getattr(leaf, "pin_memory", None))


def parts_of(batch: Any) -> list[tuple[Any, Any]] | None:
    """The (key, value) pairs of a container, in order; None for a leaf."""
    if isinstance(batch, torch.Tensor) or pins_itself(batch) or isinstance(batch, VALUES):
        return None
    if isinstance(batch, Mapping):
        return list(batch.items())
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [(field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch)]
    if isinstance(batch, Sequence):
        return list(enumerate(batch))
    return None


def leaves_of(batch: Any) -> Iterator[Any]:
    """All leaves, in order."""
    parts = parts_of(batch)
    if parts is None:
        yield batch
        return
    for _, value in parts:
        yield from leaves_of(value)


def map_leaves(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Applies `function` to every leaf; containers whose leaves stay the same are not rebuilt.

    Raises:
        TypeError: a container cannot be rebuilt with other values.
    """
    parts = parts_of(batch)
    if parts is None:
        return function(batch)
    values = [map_leaves(value, function) for _, value in parts]
    if all(new is old for new, (_, old) in zip(values, parts, strict=True)):
        return batch
    try:
        return _rebuilt(batch, [key for key, _ in parts], values)
    except Exception as error:
        raise TypeError(
            f"a batch holds a {type(batch).__name__}, which cannot be made again with other values "
            f"({error}); wanted: a mapping, sequence, named tuple or dataclass that can be copied, "
            "or an object with a pin_memory method"
        ) from error


def _rebuilt(batch: Any, keys: list[Any], values: list[Any]) -> Any:
    if type(batch) in (list, tuple):
        return type(batch)(values)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*values)
    if isinstance(batch, MutableMapping):  # a copy keeps the attributes of a subclass
        clone = copy.copy(batch)
        clone.update(zip(keys, values, strict=True))
        return clone
    if dataclasses.is_dataclass(batch):
        twin = copy.copy(batch)
        for key, value in zip(keys, values, strict=True):
            object.__setattr__(twin, key, value)  # works for frozen dataclasses too
        return twin
    if isinstance(batch, Mapping):
        return type(batch)(zip(keys, values, strict=True))  # type: ignore[call-arg]
    return type(batch)(values)


def difference(first: Any, other: Any, where: str = "") -> str:
    """Describes how the structure of `other` differs from that of `first`; empty if it does not.

    Containers must have the same types and keys, and tensors must be in the same places. Lists may
    have any length, because per-sample values often come as lists.
    """
    parts, others = parts_of(first), parts_of(other)
    if parts is None or others is None:
        tensors = isinstance(first, torch.Tensor), isinstance(other, torch.Tensor)
        if parts is None and others is None and tensors[0] == tensors[1]:
            return ""
        return f"{where or 'it'} is a {type(other).__name__}, was a {type(first).__name__}"
    if type(first) is not type(other):
        return f"{where or 'it'} is a {type(other).__name__}, was a {type(first).__name__}"
    if not isinstance(first, list):
        keys, names = [key for key, _ in parts], [key for key, _ in others]
        if keys != names:
            return f"{where or 'it'} has the keys {names}, had {keys}"
    for (key, old), (_, new) in zip(parts, others, strict=False):
        if found := difference(old, new, f"{where}[{key!r}]"):
            return found
    return ""
