"""Wrappers of an optimizer: what is called on one that inherits the optimizer's class reaches it.

Lightning's, Fabric's and others' wrappers imitate the class of what they wrap, and find its
attributes by ``__getattr__`` or in a copy of its ``__dict__``. A method that they do not override
runs with the wrapper as ``self``, and what it sets would stay there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def on_the_optimizer(method: Method) -> Method:
    """A method that runs on the optimizer when it is called on a wrapper."""

    @functools.wraps(method)
    def call(self: Wrappable, *args: Any, **kwargs: Any) -> Any:
        return method(self._own(), *args, **kwargs)

    return cast("Method", call)


class Wrappable(torch.optim.Optimizer):
    """The part of `FusedOptimizer` that knows it from its wrappers and shallow copies."""

    _me: Callable[[], Any]  # a weak reference to the optimizer, which wrappers find or copy
    _copied_from: Any = None  # of a shallow copy, the optimizer it shares groups and state with

    def _stand_alone(self) -> None:
        """Is an optimizer of its own from now on."""
        self._me = weakref.ref(self)
        self.__dict__.pop("_copied_from", None)

    def _own(self) -> Any:
        """The optimizer that this is, wraps, or is a shallow copy of."""
        optimizer, copied_from = self._me(), self.__dict__.get("_copied_from")
        shares = copied_from is None or (
            self.state is copied_from.state and self.param_groups is copied_from.param_groups
        )
        if optimizer is not None and shares:
            return optimizer
        self._stand_alone()  # a wrapper has outlived it, or groups or state were replaced
        return self
