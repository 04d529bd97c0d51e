"""Whether an optimizer does torch's arithmetic: a faster wrong answer must show.

The oracle is torch.optim itself on float64 copies. An optimizer takes a few steps on small tensors,
whose gradients span many magnitudes so that eps and its place count, twice: from zeros without
decay, where nothing but the update is there to be seen, and from weights with decay. Errors are in
units in the last place: |p - oracle| / (ulp of 1 * (|old p| + |oracle - old p|)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import optimizers
from .providers import torch_defaults
from .rows import Row

STEPS = 4
SIZES = (1, 7, 1000, 4097)
LR, DECAY = 1e-2, 0.1
# Ulps up to which arithmetic is the same. Steps that are right stay well below, even DeepSpeed's,
# whose approximate bias corrections cost 30; a decay in another place is off by millions. An ulp of
# a 16-bit type is so coarse that less has to do.
SAME = {torch.float64: 64.0, torch.float32: 64.0, torch.bfloat16: 16.0, torch.float16: 16.0}
# Powers of ten the gradients lie between; fp16 has room for few squares.
WIDE, NARROW = (-9.0, 0.0), (0.6, 1.6)

# Makes an optimizer from parameters and settings.
Maker = Callable[..., Any]


@dataclass(frozen=True)
class Scenario:
    """Where the steps start.

    Attributes:
        name: for tables.
        from_zero: parameters are zeros.
        decayed: weight decay is on.
    """

    name: str
    from_zero: bool
    decayed: bool


UPDATE = Scenario("from zeros", from_zero=True, decayed=False)
DECAYED = Scenario("with decay", from_zero=False, decayed=True)
SCENARIOS = (UPDATE, DECAYED)


@dataclass(frozen=True)
class Parity:
    """How far an optimizer is from the oracle.

    Attributes:
        ulps: by scenario, the largest error of any element, in ulps of the update; inf for a nan.
        dtype: of parameters, gradients and states.
        error: why it could not be compared; empty if it was.
    """

    ulps: dict[str, float]
    dtype: torch.dtype
    error: str = ""

    @property
    def worst(self) -> float:
        """The larger error of the two."""
        return max(self.ulps.values(), default=math.inf)

    @property
    def same(self) -> bool:
        """Whether it does the same arithmetic as torch."""
        return not self.error and self.worst <= SAME[self.dtype]

    @property
    def verdict(self) -> str:
        """The same in a word or two."""
        if self.same or self.error:
            return "unknown" if self.error else "same"
        update = self.ulps.get(UPDATE.name, math.inf)
        return "decay differs" if update <= SAME[self.dtype] else "differs"


def settings(optimizer: str, scenario: Scenario) -> dict[str, Any]:
    """Those of the step job, at a rate that is seen, with or without decay."""
    decay = DECAY if scenario.decayed else 0.0
    known = {"weight_decay": decay} if "weight_decay" in torch_defaults(optimizer) else {}
    return {"lr": LR, **optimizers.settings(optimizer).step, **known}


def gradients(dtype: torch.dtype, device: str) -> list[list[torch.Tensor]]:
    """Gradients step by step, of constant signs: sums that cancel blow up any rounding."""
    generator = torch.Generator().manual_seed(7)
    low, high = NARROW if dtype == torch.float16 else WIDE
    first = []
    for size in SIZES:
        sign = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
        magnitude = 10 ** (torch.rand(size, generator=generator) * (high - low) + low)
        first.append(sign * magnitude)
    scales = [1 + 0.5 * step for step in range(STEPS)]
    return [[(grad * scale).to(device, dtype) for grad in first] for scale in scales]


def walk(
    make: Maker,
    start: Sequence[torch.Tensor],
    steps: Sequence[Sequence[torch.Tensor]],
    **chosen: Any,
) -> list[torch.Tensor]:
    """The parameters after these steps from `start`, in its dtype."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    made = make(parameters, **chosen)
    for grads in steps:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.to(parameter.dtype, copy=True)
        made.step()
    return [parameter.detach() for parameter in parameters]


def ulps_of_update(start: torch.Tensor, found: torch.Tensor, oracle: torch.Tensor) -> float:
    """The largest error of an element, in ulps of its update; inf for a nan."""
    before, wanted, info = start.double(), oracle.double(), torch.finfo(found.dtype)
    unit = (info.eps * (before.abs() + (wanted - before).abs())).clamp(min=info.tiny)
    error = (found.double() - wanted).abs() / unit
    return float(error.nan_to_num(math.inf, math.inf).max())


def check(
    make: Maker, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Parity:
    """Compares the optimizer that `make` makes with torch's `optimizer` in float64.

    Args:
        make: called with parameters and torch's keywords; gives something with a ``step``.
        optimizer: torch's name of it.
        dtype: of parameters and gradients.
        device: as torch names it.
    """
    steps, found = gradients(dtype, device), {}
    for scenario in SCENARIOS:
        chosen = settings(optimizer, scenario)
        if scenario.decayed and "weight_decay" not in chosen:
            continue
        torch.manual_seed(3)
        start = [torch.zeros(n) if scenario.from_zero else torch.randn(n) for n in SIZES]
        start = [tensor.to(device, dtype) for tensor in start]
        oracle = walk(
            getattr(torch.optim, optimizer), [tensor.double() for tensor in start], steps, **chosen
        )
        try:
            ended = walk(make, start, steps, **chosen)
        except Exception as error:  # another library's code: it may raise anything
            said = (str(error).strip().splitlines() or [""])[0]
            return Parity({}, dtype, f"{type(error).__name__}: {said}")
        triples = zip(start, ended, oracle, strict=True)
        found[scenario.name] = max(ulps_of_update(*triple) for triple in triples)
    return Parity(found, dtype)


def measure(
    makers: Sequence[tuple[str, str, Maker]],
    dtypes: Sequence[torch.dtype],
    device: str,
    on_row: Callable[[str], None] = lambda label: None,
) -> Iterator[Row]:
    """Checks each (title, torch's name, maker) in each dtype; yields its row."""
    for title, optimizer, make in makers:
        for dtype in dtypes:
            on_row(f"{title} / {optimizer}")
            told = check(make, optimizer, dtype, device)
            yield {
                "job": "parity", "provider": title, "optimizer": optimizer,
                "dtype": str(dtype).removeprefix("torch."), "ulps": told.ulps,
                "parity": told.verdict, "error": told.error,
            }  # fmt: skip
