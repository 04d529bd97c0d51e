"""The step job: how long is the bare ``optimizer.step()``, and how close to memory speed?

A task is one workload, optimizer and dtype. Its providers race round-robin in this process, each on
parameters and states of its own and on the same, fixed gradients. Nothing is kept from task to
task, so memory is bounded by the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from . import optimizers, parity
from .providers import PROVIDERS
from .rows import BEST, FLOOR, Row
from .timing import Advance, Entrant, Task
from .workloads import WORKLOADS, Workload, members

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def plan(
    workloads: Sequence[str], names: Sequence[str], dtypes: Sequence[str] | None, device: str,
    providers: Sequence[str], baseline: str = BEST,
) -> list[Task]:  # fmt: skip
    """The tasks, workload by workload; without dtypes, float32, and bfloat16 where bytes decide."""
    made = []
    for workload in [member for name in workloads for member in members(name)]:
        kinds = [(name, dtype) for dtype in dtypes or ["float32"] for name in names]
        if dtypes is None and workload in ("huge", "many") and "AdamW" in names:
            kinds.append(("AdamW", "bfloat16"))
        made += [task(workload, *kind, device, providers, baseline) for kind in kinds]
    return made


def task(
    workload: str, optimizer: str, dtype: str, device: str, providers: Sequence[str],
    baseline: str = BEST,
) -> Task:  # fmt: skip
    """What to measure, by the names of a workload, an optimizer, a dtype and its entrants."""
    work, kind = WORKLOADS[workload], DTYPES[dtype]
    states = optimizers.count_states(optimizer)
    absent = {
        name: PROVIDERS[name].unavailable(optimizer, kind, device, len(work.shapes))
        for name in providers
    }

    def build() -> dict[str, Entrant | str]:
        gradients = make_gradients(work, kind, device)
        return {
            name: reason or PROVIDERS[name].entrant(optimizer, gradients, work.grouped)
            for name, reason in absent.items()
        }

    return Task(
        {
            "job": "step", "workload": workload, "optimizer": optimizer, "dtype": dtype,
            "device": device, "tensors": len(work.shapes), "elements": work.elements,
            # What a step has to move: it reads all arrays and writes all but the gradient.
            "bytes": kind.itemsize * (3 + 2 * states),
        },
        build,
        baseline,
        # A copy of the parameters and the states for each entrant, the gradients once, and two
        # temporary lists of that size inside torch's foreach step.
        work.elements * kind.itemsize * ([*absent.values()].count("") * (1 + states) + 1 + 2),
    )  # fmt: skip


def check_arithmetic(
    tasks: Sequence[Task], providers: Sequence[str], advance: Advance
) -> dict[tuple[str, str, str], Row]:
    """Parity of whom the tasks need; who is not available or only moves bytes has no entry."""
    found = {}
    kinds = dict.fromkeys(tuple(map(task.columns.get, ("optimizer", "dtype", "device")))
                          for task in tasks)  # fmt: skip
    for name in [name for name in providers if name != FLOOR]:
        advance(f"arithmetic / {name}")
        for optimizer, dtype, device in kinds:
            provider = PROVIDERS[name]
            if not provider.unavailable(optimizer, DTYPES[dtype], device):
                maker = partial(provider.optimizer, optimizer)
                told = parity.check(maker, optimizer, DTYPES[dtype], device)
                worst = max(told["ulps"].values(), default=None)
                found[name, optimizer, dtype] = {"parity": told["parity"], "ulps": worst}
    return found


def make_gradients(
    workload: Workload, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """Normal random gradients of a standard deviation of 0.01, the same on every run."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.01, generator=generator)
        for shape in workload.shapes
    ]
