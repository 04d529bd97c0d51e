"""Page-locked memory for batches of any structure."""

from __future__ import annotations

import numbers
import warnings
from typing import Any

import torch

from .structure import map_leaves, pins_itself

# Leaves without tensors, which need no pinning.
PLAIN = (numbers.Number, str, bytes, bytearray, range, type(None))
_warned: set[type] = set()


def pin_batch(batch: Any) -> Any:
    """Copies the tensors of a batch into page-locked memory, for asynchronous copies to a GPU.

    Structure and types are kept: tensors, mappings, sequences, named tuples, dataclasses, and
    objects with a ``pin_memory`` method, nested in any way. Tensors that are already pinned or on a
    device are returned unchanged, and so are numbers, strings and None.

    Args:
        batch: what a loader or a collate function returned.

    Returns:
        The same structure. Where nothing could be pinned, `batch` itself.

    Raises:
        TypeError: a container's type cannot be rebuilt with other values.

    Warns:
        UserWarning: a leaf is of a type that cannot be pinned, and is passed through (once for
            each type); or torch sees no GPU, and nothing is pinned.

    Example:
        >>> batch = {"images": torch.zeros(2, 3), "names": ["a", "b"]}
        >>> pinned = pin_batch(batch)  # on a machine with a GPU
        >>> pinned["images"].to("cuda", non_blocking=True)  # doctest: +SKIP
    """
    if not torch.accelerator.is_available():
        _warn_once(
            type(None), "pin_batch: torch sees no GPU, so nothing was pinned; leave it out here"
        )
        return batch
    return map_leaves(batch, pin_leaf)


def pin_leaf(leaf: Any) -> Any:
    """A leaf in page-locked memory; the leaf itself, with a warning, if it cannot be pinned."""
    if pins_itself(leaf):
        return leaf.pin_memory()
    if isinstance(leaf, torch.Tensor):
        if leaf.device.type != "cpu":
            return leaf
        try:
            return leaf if leaf.is_pinned() else leaf.pin_memory()
        except (RuntimeError, NotImplementedError) as error:
            return _passed(leaf, f"a {type(leaf).__name__} of layout {leaf.layout} ({error})")
    if isinstance(leaf, PLAIN):
        return leaf
    return _passed(leaf, f"a {type(leaf).__module__}.{type(leaf).__qualname__}")


def _passed(leaf: Any, what: str) -> Any:
    _warn_once(
        type(leaf),
        f"pin_batch: {what} cannot be pinned and is passed through; make it a tensor in the "
        "collate function, or give its class a pin_memory method",
    )
    return leaf


def _warn_once(kind: type, message: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, UserWarning, stacklevel=4)
