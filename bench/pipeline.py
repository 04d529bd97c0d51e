"""The pipeline job: what a training loop does around the step, as torch's chain and in one call.

With mixed precision, gradients come scaled, so a loop divides them by the scale and looks for
overflow, clips their global norm, steps, maybe averages the parameters, and clears the gradients.
In torch each is a pass of its own over the parameters; fusedopt's step does them all in two.

A task is one workload, chain and optimizer in float32. Its entrants race round-robin in this
process: torch's chain as a whole, the same chain stage by stage, fusedopt's call, and the traffic
floor of that call. All see the same scaled gradients, put back before each call outside of its
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt

from . import floor, optimizers
from .providers import PROVIDERS, parameters_with
from .rows import CANDIDATE, FLOOR
from .step import make_gradients
from .timing import Entrant, Step, Task
from .workloads import WORKLOADS, Workload

TORCH, STAGED = "torch", "torch-stages"
STANDARD = ("huge", "gpt2", "many")

MAX_NORM = 1.0  # the norm of every workload's gradients is above
EMA_DECAY = 0.999
SCALE = 2.0**10  # of the loss; a power of two, and far from overflow: no step is skipped
ITEMSIZE = torch.float32.itemsize


@dataclass(frozen=True)
class Chain:
    """What is done around the step.

    Attributes:
        summary: its stages, for the reader.
        averages: an exponential average of the parameters is kept.
        set_to_none: gradients are freed, not set to zero.
    """

    summary: str
    averages: bool = False
    set_to_none: bool = False

    def torch_bytes(self, states: int) -> dict[str, int]:
        """Bytes a parameter that each of torch's stages reads and writes, by stage."""
        clip = 1 + 2  # the norm, then the multiplication, whatever the norm was
        return self._bytes({"unscale": 2, "clip": clip, "step": 3 + 2 * states}, average=3)

    def fused_bytes(self, states: int) -> dict[str, int]:
        """The same of fusedopt's call; only the norm is a pass of its own."""
        return self._bytes({"norm": 1, "update": 3 + 2 * states}, average=2)

    def _bytes(self, arrays: dict[str, int], average: int) -> dict[str, int]:
        averaged = {"average": average} if self.averages else {}
        arrays = {**arrays, **averaged, "zero": 0 if self.set_to_none else 1}
        return {stage: ITEMSIZE * count for stage, count in arrays.items()}


CHAINS: dict[str, Chain] = {
    "clip": Chain("unscale, clip, step, zero_grad(set_to_none=False)"),
    "clip-none": Chain("the same with zero_grad(set_to_none=True)", set_to_none=True),
    "ema": Chain("as clip, and an average of the parameters", averages=True),
}


def plan(
    workloads: Sequence[str], chains: Sequence[str], names: Sequence[str], device: str
) -> list[Task]:
    """The tasks, workload by workload."""
    return [
        task(workload, chain, optimizer, device)
        for workload in workloads
        for optimizer in names
        for chain in chains
    ]


def task(workload: str, chain: str, optimizer: str, device: str) -> Task:
    """What to measure, by the names of a workload, a chain and an optimizer."""
    work, states = WORKLOADS[workload], optimizers.count_states(optimizer)
    return Task(
        {"job": "pipeline", "workload": workload, "chain": chain, "optimizer": optimizer,
         "dtype": "float32", "device": device, "tensors": len(work.shapes),
         "elements": work.elements},
        lambda: Chained(work, CHAINS[chain], optimizer, device).entrants(),
        TORCH,
        # Parameters, states and average three times, the gradients, what they are put back from,
        # and two temporary lists of that size inside torch's foreach step.
        work.elements * ITEMSIZE * (3 * (1 + states + CHAINS[chain].averages) + 2 + 2),
    )  # fmt: skip


class Chained:
    """A chain's entrants, over gradients that all of them share."""

    def __init__(self, work: Workload, chain: Chain, optimizer: str, device: str) -> None:
        self.work, self.chain, self.name, self.device = work, chain, optimizer, device
        self.states = optimizers.count_states(optimizer)
        self.master = make_gradients(work, torch.float32, device)  # stay as they are
        torch._foreach_mul_(self.master, SCALE)
        self.gradients = [gradient.clone() for gradient in self.master]
        fused, default = PROVIDERS["torch-fused"], PROVIDERS["torch-default"]
        # Torch's fused step where it has one, its default where not.
        self.torchs = default if fused.unavailable(optimizer, device=device) else fused

    def entrants(self) -> dict[str, Entrant | str]:
        """By name, in the order of their rows."""
        torchs = self.torch_chain()
        # Once more in stages: a clock between them waits for the device; the chain does not.
        whole = Entrant(torchs.call, torchs.before, {}, torchs.columns)
        made: dict[str, Entrant | str] = {TORCH: whole, STAGED: torchs}
        made[CANDIDATE] = self.fused_call()
        return {**made, FLOOR: floor.unavailable(self.device) or self.floor()}

    def entrant(
        self, call: Step, moved: dict[str, int], made: Sequence[torch.nn.Parameter] = (),
        **others: Any,
    ) -> Entrant:  # fmt: skip
        """An entrant whose gradients are put back as its chain needs it."""

        def restore() -> None:
            torch._foreach_copy_(self.gradients, self.master)
            if self.chain.set_to_none:
                for parameter, gradient in zip(made, self.gradients, strict=False):
                    parameter.grad = gradient

        columns = {"bytes": sum(moved.values()), "stages": moved, "torch_step": self.torchs.title}
        return Entrant(call, restore, columns=columns, parameters=made, **others)

    def scaler(self, kind: type[torch.amp.GradScaler]) -> torch.amp.GradScaler:
        """A scaler that has scaled a loss."""
        scaler = kind(self.device, init_scale=SCALE)
        scaler.scale(torch.ones((), device=self.device))
        return scaler

    def torch_chain(self) -> Entrant:
        """Torch's own, each stage in its fastest form."""
        made = parameters_with(self.gradients, SCALE)
        optimizer = self.torchs.stepping(self.name, made, self.work.grouped)
        scaler = self.scaler(torch.amp.GradScaler)

        def step() -> None:
            scaler.step(optimizer)
            scaler.update()

        stages: dict[str, Step] = {
            "unscale": lambda: scaler.unscale_(optimizer),
            "clip": lambda: torch.nn.utils.clip_grad_norm_(made, MAX_NORM),
            "step": step,
        }
        if self.chain.averages:
            model = torch.nn.ParameterList(made)
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
            # It has copied the parameters already: the first round is to average, as all others.
            self.average.n_averaged.fill_(1)
            stages["average"] = lambda: self.average.update_parameters(model)
        stages["zero"] = lambda: optimizer.zero_grad(set_to_none=self.chain.set_to_none)

        def chain() -> None:
            for stage in stages.values():
                stage()

        moved = self.chain.torch_bytes(self.states)
        return self.entrant(chain, moved, made, stages=stages, optimizer=optimizer)

    def fused_call(self) -> Entrant:
        """Fusedopt's step with the options that do the same."""
        made, free = parameters_with(self.gradients, SCALE), self.chain.set_to_none
        optimizer = PROVIDERS[CANDIDATE].stepping(
            self.name, made, self.work.grouped, max_grad_norm=MAX_NORM, zero_grads=not free,
            ema_decay=EMA_DECAY if self.chain.averages else None,
        )  # fmt: skip
        scaler = self.scaler(fusedopt.GradScaler)

        def call() -> None:
            scaler.step(optimizer)
            scaler.update()
            if free:
                optimizer.zero_grad(set_to_none=True)

        moved = self.chain.fused_bytes(self.states)
        return self.entrant(call, moved, made, optimizer=optimizer)

    def floor(self) -> Entrant:
        """The bytes of fusedopt's call: [parameter, gradient, states and average]."""
        call = floor.traffic(
            self.gradients, self.states + self.chain.averages, measures=True,
            zero_grads=not self.chain.set_to_none,
        )  # fmt: skip
        return self.entrant(call, self.chain.fused_bytes(self.states))
