"""Whether somebody else is accumulating gradients, so that counting here would count twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from operator import attrgetter
from types import FrameType
from typing import Any

# Loops that accumulate and then call step(), by the module of their code: who that is, what the
# user has set, and where the ``self`` of a frame of it has that and the optimizers.
_LOOPS = {
    "transformers.trainer": (
        "transformers' Trainer",
        "gradient_accumulation_steps",
        attrgetter("args"),
        lambda loop: [loop.optimizer],
    ),
    **{
        f"{package}.loops.optimization.automatic": (
            "Lightning",
            "accumulate_grad_batches",
            attrgetter("trainer"),
            lambda loop: loop.trainer.optimizers,
        )
        for package in ("lightning.pytorch", "pytorch_lightning")
    },
}


def check_nobody_else_accumulates(optimizer: Any) -> None:
    """Raises RuntimeError if a training framework accumulates gradients itself.

    Accelerate, Lightning and transformers' Trainer call ``step()`` once a window of theirs. Nothing
    is imported to find out: Accelerate has a global state, the others are among the callers.

    Args:
        optimizer: The one that is about to accumulate; None for one of which nothing is known.
    """
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    if state is not None and state._shared_state:
        _check("Accelerate", "gradient_accumulation_steps", state().num_steps)
    if sys.modules.keys().isdisjoint(_LOOPS):
        return
    for frame in _callers():
        found = _LOOPS.get(frame.f_globals.get("__name__", ""))
        loop = frame.f_locals.get("self") if found is not None else None
        if found is None or loop is None:
            continue
        who, name, settings, optimizers = found
        if optimizer is None or any(_is_in(optimizer, other) for other in optimizers(loop)):
            _check(who, name, getattr(settings(loop), name, 1))
        return


def _check(who: str, name: str, steps: int) -> None:
    if steps > 1:
        raise RuntimeError(
            f"gradients are accumulated twice: by {who} ({name}={steps}), which calls step() once "
            "a window, and by this optimizer; use one of them. Nothing was changed"
        )


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_in(optimizer: Any, wrapper: Any) -> bool:
    """Whether a framework's optimizer is this one, or a wrapper of it."""
    for _ in range(4):  # wrappers of wrappers
        if wrapper is optimizer:
            return True
        wrapper = getattr(wrapper, "optimizer", None)
    return False
