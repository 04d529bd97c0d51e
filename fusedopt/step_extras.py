"""What a step does in the pass of its update: clip, check, average, accumulate, clear.

An optimizer whose step does none of this has no `StepExtras`, and its step is the update alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt.backends import check_backend
from fusedopt.distributed import add_up_shards, check_groups

State = dict[Tensor, dict[str, Any]]

# Entries of a parameter's state. The last is a tensor of five doubles, which is true to the window
# in `state_dict()` and in copies, and not kept up to date in between: micro-batches, weight,
# whether the parameter's accumulator has gradients, whether its state still waits for its first
# step, and whether the window is still to be added up over ranks.
ACCUMULATOR, AVERAGE, WINDOW = "accumulated_grad", "ema", "window"
ENTRIES = (ACCUMULATOR, AVERAGE, WINDOW)

# Where the fields of a StepDecision (csrc/core/decision.h) lie in its memory, by name.
_PLACES = _C.layout()


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """The dtype that kernels compute in, and accumulators and averages are kept in."""
    if param.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return param.dtype


def plain(value: Any) -> Any:
    """A Python number for one of NumPy's or a 0-dim tensor, anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


@dataclass(frozen=True)
class Options:
    """What an optimizer was asked for; see `FusedOptimizer`.

    Raises:
        ValueError: a value out of range.
        RuntimeError: the backend is not available here.
    """

    backend: str = "auto"
    state_dtype: torch.dtype | None = None
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    ema_decay: float | None = None
    zero_grads: bool = False
    accumulation_steps: int = 1
    accumulation_reduction: str = "mean"
    accumulation_dtype: torch.dtype | None = None
    norm_group: Any = None  # a tuple of process groups, whatever it was given as, or None

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, plain(getattr(self, name)))
        check_backend(self.backend)
        if self.state_dtype not in (None, torch.float32):
            raise ValueError(
                f"state_dtype={self.state_dtype!r} must be None, for states in the parameter's "
                "dtype as torch.optim has them, or torch.float32, for those of 16-bit parameters"
            )
        limit, decay, steps = self.max_grad_norm, self.ema_decay, self.accumulation_steps
        if limit is not None and not (_is_number(limit) and limit > 0):
            raise ValueError(
                f"max_grad_norm={limit!r} must be a number above 0 (float('inf') measures and does "
                "not clip), or None, which does neither"
            )
        if decay is not None and not (_is_number(decay) and 0 <= decay < 1):
            raise ValueError(
                f"ema_decay={decay!r} must be a number in [0, 1), usually 0.99 to 0.9999, or None"
            )
        for name in ("skip_nonfinite", "zero_grads"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"accumulation_steps={steps!r} must be a whole number, 1 or larger: how many calls "
                "of step() make one update"
            )
        if self.accumulation_reduction not in ("mean", "sum"):
            raise ValueError(
                f"accumulation_reduction={self.accumulation_reduction!r} must be 'mean', or 'sum' "
                "where the losses have been divided by the number of micro-batches already"
            )
        if self.accumulation_dtype not in (None, torch.float32):
            raise ValueError(
                f"accumulation_dtype={self.accumulation_dtype!r} must be torch.float32, or None "
                "(the same, made when first needed): narrower sums lose gradients; those of "
                "float64 parameters are float64"
            )
        if self.norm_group is not None:
            object.__setattr__(self, "norm_group", check_groups(self.norm_group))

    def __deepcopy__(self, memo: Any) -> Options:
        return self  # nothing changes it, and process groups have no copies

    def __getstate__(self) -> dict[str, Any]:
        if self.norm_group:
            raise TypeError(
                "an optimizer with norm_group cannot be pickled: its process groups are those of "
                "this process. Save its state_dict(), or set norm_group = None before and again "
                "where it is loaded"
            )
        return self.__dict__

    @property
    def asked(self) -> list[str]:
        """The options of a step that are on, as they were spelled."""
        off = Options(self.backend, self.state_dtype)
        return [
            f"{name}={getattr(self, name)!r}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(off, name)
        ]

    @property
    def needed(self) -> bool:
        """Whether a step is more than an update."""
        return bool(replace(self, accumulation_reduction="mean", norm_group=None).asked)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def check_weight(weight: Any) -> Any:
    """The weight of a micro-batch; raises unless it can have it."""
    if not isinstance(weight, Tensor):
        weight = plain(weight)
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex():
            raise ValueError(
                f"weight is a tensor of shape {tuple(weight.shape)} and {weight.dtype}; it must be "
                "a number or a tensor of one, such as the number of tokens of the micro-batch"
            )
    elif not (_is_number(weight) and 0 <= weight < math.inf):
        raise ValueError(
            f"weight={weight!r} must be a finite number, 0 or larger, or a tensor of one, such as "
            "the number of tokens of the micro-batch"
        )
    return weight


class StepExtras:
    """The options of an optimizer's step and the window that it is in.

    Attributes:
        core: What kernels and plans know of both.
        options: What the optimizer was asked for.
        micro_batches: Those in the present window.
        group: The process group over which the window's sums are still to be added up; None where
            gradients are complete.
        block: That of the `accumulating()` block around what is running now; None outside of one.
        to_add_up: The window comes from a checkpoint, and its sums are one rank's alone.
        weighed: Whether a micro-batch may have had a weight above 0: one on a device is not known.
        flushed: The last step was of accumulators alone.
        left_out_before: What `left_out` said before a flush that follows an accumulation.

    Args:
        options: What the optimizer was asked for.
    """

    def __init__(self, options: Options) -> None:
        self.core = _C.StepMemory(partial(add_up_shards, ()))
        self.micro_batches = 0
        self.group: Any = None
        self.block: Any = None
        self.to_add_up = False
        self.weighed = False
        self.flushed = False
        self.left_out_before: list[Tensor] | None = None
        self._views: dict[str, list[Tensor]] = {}
        self.options = options
        self.adopt(options)

    def adopt(self, options: Options, *, check: bool = False, accumulates: bool = False) -> None:
        """Takes over options. Gradients that were checked or accumulated once go on to be.

        Args:
            options: What the optimizer was asked for.
            check: Gradients that are not finite are left out, whatever the options.
            accumulates: Parameters have accumulators, whatever the options.
        """
        before = self.core.options
        limit = options.max_grad_norm
        check = (
            check or options.skip_nonfinite or (before.check and not self.options.skip_nonfinite)
        )
        accumulates = accumulates or before.accumulates or options.accumulation_steps > 1
        self.options = options
        self.core.options = _C.StepOptions(
            max_norm=-1.0 if limit is None or math.isinf(limit) else float(limit),
            measures=check or limit is not None,
            check=check,
            ema_decay=-1.0 if options.ema_decay is None else options.ema_decay,
            zero_grads=options.zero_grads,
            accumulates=accumulates or options.accumulation_dtype is not None,
            mean=options.accumulation_reduction == "mean",
            shared=bool(options.norm_group),
        )
        self.core.reduce = partial(add_up_shards, options.norm_group or ())

    # ---- What is in a parameter's state -------------------------------------------------------

    def entries(self) -> list[str]:
        """The entries that a parameter's state has."""
        options = self.core.options
        return [ACCUMULATOR, WINDOW] * options.accumulates + [AVERAGE] * options.averages

    def initial(self, param: Tensor, name: str) -> Tensor:
        """A new entry."""
        if name == WINDOW:
            return torch.zeros(5, dtype=torch.float64, device="cpu")
        dtype = arithmetic_dtype(param)
        if name == ACCUMULATOR:
            return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return param.detach().to(dtype, copy=True, memory_format=torch.preserve_format)

    def settle(self, state: State, private: Iterable[str]) -> None:
        """Makes the window's entries in the state true; `private` as for `is_unstarted`."""
        weight = self.core.window_weight if self.micro_batches else 0.0
        own = self.micro_batches > 0 and (self.group is not None or self.to_add_up)
        for param, entries in state.items():
            if WINDOW not in entries:
                continue
            waits = is_unstarted(entries, private)
            accumulated = self.core.has_accumulated(param)
            numbers = [self.micro_batches, weight, accumulated, waits, own]
            entries[WINDOW].copy_(torch.tensor(numbers, dtype=torch.float64))

    def complete(self, params: Iterable[Tensor], saved: dict[int, dict[str, Any]]) -> None:
        """Adds entries to a ``state_dict()``'s states that have not been stepped with them yet.

        Those that a constructor has made, or another optimizer: a distributed checkpoint loads into
        the entries that it finds here, and no others.
        """
        for number, param in enumerate(params):
            state = saved.get(number, {})
            missing = [name for name in self.entries() if name not in state]
            if state and missing:
                saved[number] = {**state, **{n: self.initial(param, n) for n in missing}}

    def restore(self, state: State, names: Iterable[str]) -> None:
        """Takes the window over from the entries in the state, of a rule with these states."""
        self.core.forget()
        self.micro_batches, self.group, self.to_add_up, weight = 0, None, False, 0.0
        for param, entries in state.items():
            if WINDOW in entries:
                self.adopt(self.options, accumulates=True)
                micro_batches, weight, accumulated, waits, own = entries[WINDOW].tolist()
                self.micro_batches, self.to_add_up = int(micro_batches), own != 0
                if accumulated:
                    self.core.remember(param)
                if waits:  # a state that is not there is made anew
                    for name in names:
                        entries.pop(name, None)
        self.core.window_weight, self.weighed = weight, weight > 0

    # ---- The window -----------------------------------------------------------------------------

    @property
    def will_step(self) -> bool:
        """Whether the next ``step()`` updates parameters."""
        return self.micro_batches + 1 >= self.options.accumulation_steps

    def count(self, weight: float | Tensor) -> None:
        """Counts a micro-batch whose gradients have been accumulated."""
        self.micro_batches += 1
        self.weighed = self.weighed or isinstance(weight, Tensor) or weight > 0

    def end_window(self) -> None:
        """Ends the window, whose update has been made."""
        self.core.end_window()
        self.micro_batches, self.weighed = 0, False
        self.group, self.to_add_up = self.block, False

    def drop_window(self, state: State) -> None:
        """Ends the window without an update: an accumulation has failed half-way."""
        sums = [s[ACCUMULATOR] for p, s in state.items() if self.core.has_accumulated(p)]
        if sums:
            with torch.no_grad():
                torch._foreach_zero_(sums)
        self.core.window_weight = 0.0
        self.end_window()

    @staticmethod
    def check_weights(micro_batches: float, *, weighed: bool) -> None:
        """Raises if micro-batches have been given no weight."""
        if micro_batches and not weighed:
            raise ValueError(
                f"the weights of all {micro_batches:.0f} accumulated micro-batches are 0, so their "
                "mean is undefined; give accumulate() their number of samples or tokens. Nothing "
                "was changed"
            )

    # ---- What the last step found out ---------------------------------------------------------

    def _found(self, field: str, dtype: torch.dtype) -> list[Tensor]:
        """A field of every decision, as a view of its memory."""
        decisions, place = self.core.decisions, _PLACES[field]
        if field not in self._views or len(self._views[field]) != len(decisions):
            self._views[field] = [
                decision[place : place + dtype.itemsize].view(dtype)[0] for decision in decisions
            ]
        return self._views[field]

    def grad_norm(self) -> Tensor | None:
        """The norm, on the device."""
        norms = self._found("DECISION_NORM32", torch.float32)
        return norms[0].clone() if self.core.options.measures and norms else None

    def was_skipped(self) -> Tensor:
        """Whether there was no update, on the device."""
        skips = self._found("DECISION_SKIP", torch.int32)
        return skips[0] != 0 if skips else torch.zeros((), dtype=torch.bool)

    def left_out(self) -> list[Tensor]:
        """For each device 1.0 if the last gradients were left out, else 0.0: a ``found_inf``."""
        if self.left_out_before is not None:
            return self.left_out_before
        return [(take == 0).float() for take in self._found("DECISION_TAKE", torch.int32)]


def is_unstarted(entries: dict[str, Any], private: Iterable[str]) -> bool:
    """Whether a state waits for its first step, as the entries that `state_dict` lacks say."""
    return any(name in entries and entries[name].item() == 1 for name in private)


def initializes(groups: list[dict[str, Any]], state: State) -> bool:
    """Whether this is the step by which a distributed checkpoint has the state made.

    It comes first, with learning rates of 0 and gradients of 0, and must leave no trace. One that
    has no gradients at all is a micro-batch, such as FSDP2's where it does not reduce them yet.
    """
    if state or any(float(group["lr"]) != 0 for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(grad.any() for grad in grads)
