"""Whether somebody else is accumulating gradients, so that counting here would count twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True)
class _Loop:
    """Code that calls ``step()`` once a window of its own; its frames' ``self`` knows of how many.

    Attributes:
        who: What users call it.
        option: What they have set.
        steps: Micro-batches of its windows.
        optimizers: Those that it steps, or wrappers of them.
    """

    who: str
    option: str
    steps: Callable[[Any], int]
    optimizers: Callable[[Any], list[Any]]


_LIGHTNING = _Loop(
    "Lightning",
    "accumulate_grad_batches",
    lambda loop: loop.trainer.accumulate_grad_batches,
    lambda loop: loop.trainer.optimizers,
)
# By the module of the code.
_LOOPS = {
    "accelerate.optimizer": _Loop(
        "Accelerate",
        "gradient_accumulation_steps",
        lambda wrapper: wrapper.gradient_state.num_steps,
        lambda wrapper: [wrapper],
    ),
    "transformers.trainer": _Loop(
        "transformers' Trainer",
        "gradient_accumulation_steps",
        lambda trainer: trainer.args.gradient_accumulation_steps,
        lambda trainer: [trainer.optimizer],
    ),
    "lightning.pytorch.loops.optimization.automatic": _LIGHTNING,
    "pytorch_lightning.loops.optimization.automatic": _LIGHTNING,
}


def check_nobody_else_accumulates(optimizer: Any) -> None:
    """Raises RuntimeError if a training framework accumulates gradients itself.

    It is looked for among the callers, in modules that have been imported. One more sign is that a
    data loader of Accelerate's is being read; the settings alone outlive what they were made for.

    Args:
        optimizer: The one that is about to accumulate; None for one of which nothing is known.
    """
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    if state is not None and state._shared_state and state().in_dataloader:
        _check(_LOOPS["accelerate.optimizer"], state().num_steps)
    if sys.modules.keys().isdisjoint(_LOOPS):
        return
    for frame in _callers():
        loop = _LOOPS.get(frame.f_globals.get("__name__", ""))
        owner = frame.f_locals.get("self") if loop is not None else None
        if loop is None or owner is None:
            continue
        try:
            its = optimizer is None or any(_is_in(optimizer, o) for o in loop.optimizers(owner))
            steps = loop.steps(owner) if its else 1
        except AttributeError:  # another class of that module, or another version of it
            continue
        _check(loop, steps)


def _check(loop: _Loop, steps: int) -> None:
    if steps > 1:
        raise RuntimeError(
            f"gradients are accumulated twice: by {loop.who} ({loop.option}={steps}), which calls "
            "step() once a window, and by this optimizer; use one of them. Nothing was changed"
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
