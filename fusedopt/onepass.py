"""What a step does in the pass of its update: clip, check, average, accumulate, clear.

An optimizer whose step does none of this has no `OnePass`, and its step is the update alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import distributed
from fusedopt._extension import _C
from fusedopt.framework_checks import check_no_framework_accumulates

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

# Entries of a parameter's state. The last is a tensor of five doubles, which is true to the window
# in `state_dict()` and in copies, and not kept up to date in between: micro-batches, weight,
# whether the parameter's accumulator has gradients, whether its state still waits for its first
# step, and whether the window is still to be added up over ranks.
ACCUMULATOR, AVERAGE, WINDOW = "accumulated_grad", "ema", "window"
ENTRIES = (ACCUMULATOR, AVERAGE, WINDOW)

# Places of a Verdict's fields in its memory; csrc/core/onepass.h.
_NORM32, _TAKE, _SKIP = (64, 68), (68, 72), (72, 76)


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """The dtype that kernels compute in, and accumulators and averages are kept in."""
    if param.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return param.dtype


@dataclass(frozen=True)
class Options:
    """What an optimizer was asked for; see `FusedOptimizer`.

    Raises:
        ValueError: a value out of range.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    ema_decay: float | None = None
    zero_grads: bool = False
    accumulation_steps: int = 1
    accumulation_reduction: str = "mean"
    accumulation_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        limit, decay, steps = self.max_grad_norm, self.ema_decay, self.accumulation_steps
        if limit is not None and not (_is_number(limit) and limit >= 0):
            raise ValueError(
                f"max_grad_norm={limit!r} must be a number, 0 or larger (float('inf') measures and "
                "does not clip), or None"
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

    @property
    def asked(self) -> list[str]:
        """The options that are on, as they were spelled."""
        off = Options()
        return [
            f"{name}={getattr(self, name)!r}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(off, name)
        ]

    @property
    def needed(self) -> bool:
        """Whether a step is more than an update."""
        return self != replace(Options(), accumulation_reduction=self.accumulation_reduction)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def check_weight(weight: object) -> None:
    """Raises unless a micro-batch can have this weight."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex():
            raise ValueError(
                f"weight is a tensor of shape {tuple(weight.shape)} and {weight.dtype}; it must be "
                "a number or a tensor of one, such as the number of tokens of the micro-batch"
            )
    elif not (_is_number(weight) and 0 <= weight < math.inf):  # type: ignore[operator]
        raise ValueError(
            f"weight={weight!r} must be a finite number, 0 or larger, or a tensor of one, such as "
            "the number of tokens of the micro-batch"
        )


class OnePass:
    """The options of an optimizer's step and the window that it is in.

    Attributes:
        core: What kernels and plans know of both.
        micro_batches: Those in the present window.
        group: The process group over which the window's sums are still to be added up; None where
            gradients are complete.
        block: That of the `accumulating()` block around what is running now; None outside of one.
        to_add_up: The window comes from a checkpoint, and its sums are one rank's alone.
        flushed: The last step was of accumulators alone.
    """

    def __init__(self, options: Options) -> None:
        self.core = _C.OnePass()
        self.micro_batches = 0
        self.group: Any = None
        self.block: Any = None
        self.to_add_up = False
        self.flushed = False
        self._asked: list[Tensor] | None = None  # what `left_out` said before a flush
        self._given = 0.0  # weight of the window, as far as the host knows
        self._weighed_on_device = False
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self.adopt(options)
        if options.ema_decay is not None:
            self.core.ema_decay = options.ema_decay

    def adopt(self, options: Options) -> None:
        """Takes over options."""
        limit = options.max_grad_norm
        self.options = options
        self.core.max_norm = -1.0 if limit is None or math.isinf(limit) else float(limit)
        self.core.check = self.core.check or options.skip_nonfinite
        self.core.measures = self.core.check or limit is not None
        self.core.zero_grads = options.zero_grads
        self.core.mean = options.accumulation_reduction == "mean"
        if options.accumulation_steps > 1 or options.accumulation_dtype is not None:
            self.core.accumulates = True

    def check_gradients(self) -> None:
        """Leaves out gradients that are not finite from now on, whatever the options."""
        self.core.check = self.core.measures = True

    # ---- What is in a parameter's state -------------------------------------------------------

    def entries(self) -> list[str]:
        """The entries that a parameter's state has."""
        entries = []
        if self.core.accumulates:
            entries += [ACCUMULATOR, WINDOW]
        if self.core.ema_decay >= 0:
            entries.append(AVERAGE)
        return entries

    def initial(self, param: Tensor, name: str) -> Tensor:
        """A new entry."""
        if name == WINDOW:
            return torch.zeros(5, dtype=torch.float64, device="cpu")
        dtype = arithmetic_dtype(param)
        if name == ACCUMULATOR:
            return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return param.detach().to(dtype, copy=True, memory_format=torch.preserve_format)

    def settle(self, optimizer: FusedOptimizer) -> None:
        """Makes the window's entries in the state true."""
        if not self.core.accumulates:
            return
        weight = self.core.window_weight if self.micro_batches else 0.0
        for param, state in optimizer.state.items():
            if WINDOW not in state:
                continue
            flag = optimizer._first_flags.get(param)
            fresh = self.core.fresh(param) if flag is None else bool(flag.item())
            taken = self.core.taken(param)
            own = self.micro_batches > 0 and (self.group is not None or self.to_add_up)
            numbers = [self.micro_batches, weight, taken, fresh, own]
            state[WINDOW].copy_(torch.tensor(numbers, dtype=torch.float64))

    def complete(self, optimizer: FusedOptimizer, packed: dict[int, dict[str, Any]]) -> None:
        """Adds entries to a ``state_dict()``'s states that have not been stepped with them yet.

        Those that a constructor has made, or another optimizer: a distributed checkpoint loads into
        the entries that it finds here, and no others.
        """
        params = (p for group in optimizer.param_groups for p in group["params"])
        for number, param in enumerate(params):
            state = packed.get(number, {})
            missing = [name for name in self.entries() if name not in state]
            if state and missing:
                new = {name: self.initial(param, name) for name in missing}
                packed[number] = {**state, **new}

    def restore(self, optimizer: FusedOptimizer) -> None:
        """Takes the window over from the entries in the state."""
        self.core.forget()
        self.micro_batches, self.group, self.to_add_up, weight = 0, None, False, 0.0
        for param, state in optimizer.state.items():
            if WINDOW in state:
                self.core.accumulates = True
                micro_batches, weight, taken, fresh, own = state[WINDOW].tolist()
                self.micro_batches, self.to_add_up = int(micro_batches), own != 0
                self.core.remember(param, taken != 0, fresh != 0)
        self.core.window_weight = self._given = weight

    # ---- Steps --------------------------------------------------------------------------------

    @property
    def will_step(self) -> bool:
        """Whether the next ``step()`` updates parameters."""
        return self.micro_batches + 1 >= self.options.accumulation_steps

    def step(self, optimizer: FusedOptimizer, closure: Callable[[], Any] | None = None) -> None:
        """Takes a step, or counts a micro-batch; the closure is that of ``step()``."""
        steps = self.options.accumulation_steps
        if (steps > 1) == (self.micro_batches == 0):  # once a window, of either kind
            check_no_framework_accumulates(closure)
        self._asked = None
        if steps == 1:
            # Gradients inside of accumulating() are this rank's alone, and never an update's.
            flushes = self.micro_batches or self.group is not None
            self._update(optimizer, _C.Purpose.FLUSH if flushes else _C.Purpose.UPDATE)
        elif _initializes(optimizer):
            optimizer._fit(_C.Purpose.ACCUMULATE)  # creates the state
        elif not self.will_step:
            self._accumulate(optimizer, 1.0)
        elif self.group is not None:
            self._accumulate(optimizer, 1.0)
            asked = self.left_out()
            self._update(optimizer, _C.Purpose.FLUSH)
            self._asked, self.flushed = asked, False
        else:
            self._update(optimizer, _C.Purpose.CLOSE)

    def accumulate(self, optimizer: FusedOptimizer, weight: float | Tensor) -> None:
        """Adds the gradients to the window's."""
        check_weight(weight)
        if self.options.accumulation_steps > 1:
            raise RuntimeError(
                f"accumulate() with accumulation_steps={self.options.accumulation_steps}, with "
                "which step() itself counts micro-batches; leave accumulation_steps out, or call "
                "step() alone"
            )
        check_no_framework_accumulates()
        self._asked = None
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "accumulate() found no gradient: call it once after every backward(), before "
                "zero_grad(); nothing was counted"
            )
        if not self.core.accumulates:
            self.core.accumulates = True
            optimizer._packed = None
        self._accumulate(optimizer, weight)

    def _accumulate(self, optimizer: FusedOptimizer, weight: float | Tensor) -> None:
        packed = optimizer._fit(_C.Purpose.ACCUMULATE)
        packed.launch_onepass(weight)
        self.flushed = False
        self.micro_batches += 1
        if isinstance(weight, Tensor):
            self._weighed_on_device = True
        else:
            self._given += weight

    def _update(self, optimizer: FusedOptimizer, purpose: Any) -> None:
        if self.to_add_up and self.group is None:
            raise RuntimeError(
                "the window that was loaded has been accumulated inside of accumulating(), and its "
                "sums are still to be added up over the ranks: finish it inside of accumulating(). "
                "Nothing was changed"
            )
        if self.group is not None:
            self._add_up(optimizer)
            self.group, self.to_add_up = None, False
        elif purpose == _C.Purpose.FLUSH and not self._weighed_on_device:
            self.check_weights(self.micro_batches, self._given)
        packed = optimizer._fit(purpose)
        took_place = packed.launch_onepass(1.0)
        self.flushed = purpose == _C.Purpose.FLUSH
        if purpose != _C.Purpose.UPDATE:
            self.micro_batches, self._given, self._weighed_on_device = 0, 0.0, False
            self.group = self.block
        elif not took_place:
            packed.undo()

    def _add_up(self, optimizer: FusedOptimizer) -> None:
        """Adds up the accumulators and weights of the window over the ranks.

        Raises:
            Exception: a rank cannot step. All of them raise, none is left waiting, and nothing has
                been changed.
        """
        core = self.core
        params = [p for group in optimizer.param_groups for p in group["params"]]
        failure = None
        try:
            optimizer._fit(_C.Purpose.FLUSH)
        except Exception as error:  # for the others to hear of
            failure = error
        taken = [float(p in optimizer.state and core.taken(p)) for p in params]
        window = [float(self.micro_batches), self._given, float(self._weighed_on_device)]
        failed, micro_batches, given, on_devices, weight, *taken = distributed.add_up_numbers(
            [float(failure is not None), *window, core.window_weight, *taken],
            params[0].device,
            self.group,
        )
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(
                f"{failed:.0f} of the other ranks cannot step, and say why. Nothing was changed"
            )
        if not on_devices:
            self.check_weights(micro_batches, given)
        members = [p for p, ranks in zip(params, taken, strict=True) if ranks]
        new = [p for p in members if ACCUMULATOR not in optimizer.state.get(p, {})]
        for param in new:  # only other ranks have had gradients of it
            param.grad = torch.zeros_like(param)
        if new:
            optimizer._fit(_C.Purpose.ACCUMULATE).created.clear()
        for param in new:
            param.grad = None
        sums = [optimizer.state[p][ACCUMULATOR] for p in members]
        distributed.add_up_tensors(sums, self.group, mean=not core.mean)
        for param in members:
            core.remember(param, True, core.fresh(param))
        core.window_weight = weight

    def check_weights(self, micro_batches: float, given: float) -> None:
        """Raises if micro-batches have been given no weight."""
        if micro_batches and given == 0:
            raise ValueError(
                f"the weights of all {micro_batches:.0f} accumulated micro-batches are 0, so their "
                "mean is undefined; give accumulate() their number of samples or tokens. Nothing "
                "was changed"
            )

    # ---- What the last step found out ---------------------------------------------------------

    def _found(self, field: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """A field of every verdict, as a view of its memory."""
        verdicts = self.core.verdicts
        if field not in self._views or len(self._views[field]) != len(verdicts):
            self._views[field] = [verdict[slice(*field)].view(dtype)[0] for verdict in verdicts]
        return self._views[field]

    def grad_norm(self) -> Tensor | None:
        """The norm, on the device."""
        norms = self._found(_NORM32, torch.float32)
        return norms[0].clone() if self.core.measures and norms else None

    def was_skipped(self) -> Tensor:
        """Whether there was no update, on the device."""
        skips = self._found(_SKIP, torch.int32)
        return skips[0] != 0 if skips else torch.zeros((), dtype=torch.bool)

    def left_out(self) -> list[Tensor]:
        """For each device 1.0 if the last gradients were left out, else 0.0: a ``found_inf``."""
        if self._asked is not None:
            return self._asked
        return [(take == 0).float() for take in self._found(_TAKE, torch.int32)]


def _initializes(optimizer: FusedOptimizer) -> bool:
    """Whether this is the step by which a distributed checkpoint has the state made.

    It comes first, with learning rates of 0 and gradients of 0, and must leave no trace. One that
    has no gradients at all is a micro-batch, such as FSDP2's where it does not reduce them yet.
    """
    if optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    return bool(grads) and not any(grad.any() for grad in grads)
