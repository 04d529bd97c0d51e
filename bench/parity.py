"""Whether an optimizer does torch's arithmetic: a faster wrong answer must show.

The oracle is torch.optim itself on float64 copies. An optimizer takes a few steps on small tensors,
whose gradients span many magnitudes so that eps and its place count, twice: from zeros without
decay, where nothing but the update is there to be seen, and from weights with decay. Errors are in
units in the last place: |p - oracle| / (ulp of 1 * (|old p| + |oracle - old p|)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import optimizers
from .providers import torch_defaults
from .rows import Row

STEPS = 4
SIZES = (1, 7, 1000, 4097)
LR = 1e-2
# Ulps up to which arithmetic is the same. Steps that are right stay well below, even DeepSpeed's,
# whose approximate bias corrections cost 30; a decay in another place is off by millions. An ulp of
# a 16-bit type is so coarse that less has to do.
SAME = {torch.float64: 64.0, torch.float32: 64.0, torch.bfloat16: 16.0, torch.float16: 16.0}
# Powers of ten the gradients lie between; fp16 has room for few squares.
WIDE, NARROW = (-9.0, 0.0), (0.6, 1.6)
# Where the steps start, and their weight decay.
UPDATE, DECAYED = "from zeros", "with decay"
DECAYS = {UPDATE: 0.0, DECAYED: 0.1}

# Makes an optimizer from parameters and settings.
Maker = Callable[..., Any]


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
    make: Maker, start: Sequence[torch.Tensor], steps: Sequence[Sequence[torch.Tensor]],
    **chosen: Any,
) -> list[torch.Tensor]:  # fmt: skip
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
) -> Row:
    """Compares the optimizer that `make` makes with torch's `optimizer` in float64.

    Args:
        make: called with parameters and torch's keywords; gives something with a ``step``.
        optimizer: torch's name of it.
        dtype: of parameters and gradients.
        device: as torch names it.

    Returns:
        ``ulps``: the largest error of any element by where the steps start; ``parity``: same,
        decay differs, differs or unknown; ``error``: why it could not be compared.
    """
    steps, ulps = gradients(dtype, device), {}
    for start_at, decay in DECAYS.items():
        chosen = {"lr": LR, **optimizers.settings(optimizer).step}
        if "weight_decay" in torch_defaults(optimizer):
            chosen["weight_decay"] = decay
        elif decay:
            continue
        torch.manual_seed(3)
        start = [torch.zeros(n) if start_at == UPDATE else torch.randn(n) for n in SIZES]
        start = [tensor.to(device, dtype) for tensor in start]
        oracle = walk(
            getattr(torch.optim, optimizer), [tensor.double() for tensor in start], steps, **chosen
        )
        try:
            ended = walk(make, start, steps, **chosen)
        except Exception as error:  # another library's code: it may raise anything
            said = (str(error).strip().splitlines() or [""])[0]
            return {"ulps": {}, "parity": "unknown", "error": f"{type(error).__name__}: {said}"}
        triples = zip(start, ended, oracle, strict=True)
        ulps[start_at] = max(ulps_of_update(*triple) for triple in triples)
    differs = [start_at for start_at, error in ulps.items() if error > SAME[dtype]]
    verdict = "same" if not differs else "decay differs" if differs == [DECAYED] else "differs"
    return {"ulps": ulps, "parity": verdict, "error": ""}
