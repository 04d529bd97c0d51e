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


def map_leaves(batch: Any, function: Callable[[Any], Any], anew: bool = False) -> Any:
    """Applies `function` to every leaf; containers whose leaves stay the same are not rebuilt.

    Args:
        batch: of any structure.
        function: of a leaf.
        anew: rebuilds lists and dicts in any case.

    Raises:
        TypeError: a container cannot be rebuilt with other values.
    """
    parts = parts_of(batch)
    if parts is None:
        return function(batch)
    values = [map_leaves(value, function, anew) for _, value in parts]
    same = all(new is old for new, (_, old) in zip(values, parts, strict=True))
    if same and not (anew and type(batch) in (list, dict)):
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
