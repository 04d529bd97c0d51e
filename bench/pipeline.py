"""The pipeline job: what a training loop does around the step, as torch's chain and in one call.

With mixed precision, gradients come scaled, so a loop divides them by the scale and looks for
overflow, clips their global norm, steps, maybe averages the parameters, and clears the gradients.
In torch each is a pass of its own over the parameters; fusedopt's step does them all in two.

A row is one workload, chain and optimizer in float32. Its entrants race round-robin in this
process: torch's chain as a whole, the same chain stage by stage, fusedopt's call, and the traffic
floor of that call. All see the same scaled gradients, put back before each call outside of its
time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt

from . import floor, optimizers
from .providers import PROVIDERS, OptimizerProvider
from .step import make_gradients
from .timing import Race, Stats, Step, run_race, stage_of
from .workloads import WORKLOADS, Workload

TORCH, STAGED, CANDIDATE, FLOOR = "torch", "torch-stages", "fusedopt", "floor"
STANDARD = ("huge", "gpt2", "many")

MAX_NORM = 1.0  # the norm of every workload's gradients is above
EMA_DECAY = 0.999
SCALE = 2.0**10  # of the loss; a power of two, and far from overflow: no step is skipped
ITEMSIZE = torch.float32.itemsize


@dataclass(frozen=True)
class Chain:
    """What is done around the step.

    Attributes:
        name: as given to ``--chains``.
        summary: its stages, for the reader.
        averages: an exponential average of the parameters is kept.
        set_to_none: gradients are freed, not set to zero.
    """

    name: str
    summary: str
    averages: bool = False
    set_to_none: bool = False

    def torch_bytes(self, states: int) -> dict[str, int]:
        """Bytes a parameter that each of torch's stages reads and writes, by stage."""
        arrays = {
            "unscale": 2,
            "clip": 1 + 2,  # the norm, then the multiplication, whatever the norm was
            "step": 3 + 2 * states,
            **({"average": 3} if self.averages else {}),
            "zero": 0 if self.set_to_none else 1,
        }
        return {stage: ITEMSIZE * count for stage, count in arrays.items()}

    def fused_bytes(self, states: int) -> dict[str, int]:
        """The same of fusedopt's call; only the norm is a pass of its own."""
        arrays = {
            "norm": 1,
            "update": 3 + 2 * states,
            **({"average": 2} if self.averages else {}),
            "zero": 0 if self.set_to_none else 1,
        }
        return {stage: ITEMSIZE * count for stage, count in arrays.items()}


CHAINS: dict[str, Chain] = {
    chain.name: chain
    for chain in (
        Chain("clip", "unscale, clip, step, zero_grad(set_to_none=False)"),
        Chain("clip-none", "the same with zero_grad(set_to_none=True)", set_to_none=True),
        Chain("ema", "as clip, and an average of the parameters", averages=True),
    )
}


@dataclass(frozen=True)
class Task:
    """One row to measure: names of a workload, a chain and an optimizer."""

    workload: str
    chain: str
    optimizer: str = "AdamW"
    device: str = "cpu"

    @property
    def states(self) -> int:
        """States of a parameter's size."""
        return optimizers.count_states(self.optimizer)

    def memory(self) -> int:
        """Bytes the row needs while it runs, at most."""
        # Parameters, states and average three times, the gradients, what they are put back from,
        # and two temporary lists of that size inside torch's foreach step.
        arrays = 3 * (1 + self.states + CHAINS[self.chain].averages) + 2 + 2
        return WORKLOADS[self.workload].elements * ITEMSIZE * arrays


@dataclass
class Row:
    """What was measured for one task.

    Attributes:
        task: what was asked.
        torch_step: which of torch's steps its chain takes.
        race: times by entrant, and by stage of torch's chain, and round.
    """

    task: Task
    torch_step: str = ""
    race: Race = field(default_factory=Race)

    @property
    def workload(self) -> Workload:
        """The workload itself."""
        return WORKLOADS[self.task.workload]

    @property
    def chain(self) -> Chain:
        """The chain itself."""
        return CHAINS[self.task.chain]

    @property
    def torch_bytes(self) -> dict[str, int]:
        """Bytes a parameter of torch's stages."""
        return self.chain.torch_bytes(self.task.states)

    @property
    def fused_bytes(self) -> dict[str, int]:
        """Bytes a parameter of what fusedopt's call does; the floor's in all are the same."""
        return self.chain.fused_bytes(self.task.states)

    def nanoseconds(self, name: str) -> float:
        """Median nanoseconds a parameter of an entrant or of a stage of torch's."""
        if name in self.torch_bytes:
            name = stage_of(STAGED, name)
        return self.race.stats(name).median * 1e9 / self.workload.elements

    def speedup(self) -> Stats:
        """Torch's chain over fusedopt's call."""
        return self.race.ratio(TORCH, CANDIDATE)

    def over_floor(self) -> Stats:
        """Fusedopt's call over its traffic floor: 1 is memory speed."""
        return self.race.ratio(CANDIDATE, FLOOR)

    def to_json(self) -> dict[str, Any]:
        """Everything measured, as it stands in the result file; times in milliseconds."""
        entrants = (TORCH, STAGED, CANDIDATE, FLOOR)
        stats = {name: self.race.stats(name).scaled(1e3) for name in self.race.seconds}
        return {
            **asdict(self.task),
            "tensors": len(self.workload.shapes),
            "elements": self.workload.elements,
            "torch_step": self.torch_step,
            "chain_ms": {name: asdict(stats[name]) for name in entrants},
            "stage_ms": {
                stage: asdict(stats[stage_of(STAGED, stage)]) for stage in self.torch_bytes
            },
            "ns_per_parameter": {
                name: self.nanoseconds(name) for name in (*entrants, *self.torch_bytes)
            },
            "bytes_per_parameter": {TORCH: self.torch_bytes, CANDIDATE: self.fused_bytes},
            "ratios": {
                "torch_over_fusedopt": asdict(self.speedup()),
                "fusedopt_over_floor": asdict(self.over_floor()),
            },
            "seconds": {
                name: [None if math.isnan(value) else value for value in values]
                for name, values in self.race.seconds.items()
            },
        }


def plan_tasks(
    workloads: Sequence[str], chains: Sequence[str], names: Sequence[str], device: str = "cpu"
) -> list[Task]:
    """The rows to measure, workload by workload.

    Args:
        workloads: names in ``WORKLOADS``.
        chains: names in ``CHAINS``.
        names: names of optimizers.
        device: as torch names it.
    """
    return [
        Task(workload, chain, optimizer, device)
        for workload in workloads
        for optimizer in names
        for chain in chains
    ]


# ---- the entrants ----


@dataclass(frozen=True)
class Entrant:
    """One way to do the work, ready to be timed.

    Attributes:
        call: does all of it once.
        restore: puts the gradients back.
        stages: does it in parts, where there are parts.
        parameters: what it updates.
        optimizer: what updates them; None for the floor.
        averages: their averages, once there are some.
    """

    call: Step
    restore: Step
    stages: dict[str, Step] = field(default_factory=dict)
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    averages: Callable[[], list[torch.Tensor]] = list


class Stand:
    """The gradients of a row, which all its entrants share, and what its entrants are made of.

    Args:
        task: the row.
        master: scaled gradients, which stay as they are.
    """

    def __init__(self, task: Task, master: Sequence[torch.Tensor]) -> None:
        self.task = task
        self.chain = CHAINS[task.chain]
        self.master = list(master)
        self.gradients = [gradient.clone() for gradient in master]

    def entrant(self, call: Step, parameters: list[torch.nn.Parameter], **others: Any) -> Entrant:
        """An entrant whose gradients are put back as its chain needs it."""

        def restore() -> None:
            torch._foreach_copy_(self.gradients, self.master)
            if self.chain.set_to_none:
                for parameter, gradient in zip(parameters, self.gradients, strict=True):
                    parameter.grad = gradient

        return Entrant(call, restore, parameters=parameters, **others)

    def parameters(self) -> list[torch.nn.Parameter]:
        """New parameters that have the shared gradients."""
        made = [torch.nn.Parameter(gradient / SCALE) for gradient in self.master]
        for parameter, gradient in zip(made, self.gradients, strict=True):
            parameter.grad = gradient
        return made

    def optimizer(
        self, provider: OptimizerProvider, made: Sequence[torch.nn.Parameter], **own: Any
    ) -> torch.optim.Optimizer:
        """A provider's optimizer over `made`, set as in the step job."""
        name = self.task.optimizer
        grouped = WORKLOADS[self.task.workload].grouped
        groups = [{"params": [parameter]} for parameter in made] if grouped else made
        settings = optimizers.settings(name).step
        return provider.optimizer(name, groups, lr=optimizers.STEP_LR, **settings, **own)

    def scaler(self, kind: type[torch.amp.GradScaler]) -> torch.amp.GradScaler:
        """A scaler that has scaled a loss."""
        scaler = kind(self.task.device, init_scale=SCALE)
        scaler.scale(torch.ones((), device=self.task.device))
        return scaler

    # -- who runs --

    def torch_chain(self) -> Entrant:
        """Torch's own, each stage in its fastest form."""
        made = self.parameters()
        optimizer = self.optimizer(torch_provider(self.task), made)
        scaler = self.scaler(torch.amp.GradScaler)

        def step() -> None:
            scaler.step(optimizer)
            scaler.update()

        stages: dict[str, Step] = {
            "unscale": lambda: scaler.unscale_(optimizer),
            "clip": lambda: torch.nn.utils.clip_grad_norm_(made, MAX_NORM),
            "step": step,
        }
        averages: list[torch.Tensor] = []
        if self.chain.averages:
            model = torch.nn.ParameterList(made)
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
            # It has copied the parameters already: the first round is to average, as all others.
            average.n_averaged.fill_(1)
            averages.extend(average.parameters())
            stages["average"] = lambda: average.update_parameters(model)
        stages["zero"] = lambda: optimizer.zero_grad(set_to_none=self.chain.set_to_none)

        def chain() -> None:
            for stage in stages.values():
                stage()

        return self.entrant(
            chain, made, stages=stages, optimizer=optimizer, averages=lambda: averages
        )

    def fused_call(self) -> Entrant:
        """Fusedopt's step with the options that do the same."""
        made, free = self.parameters(), self.chain.set_to_none
        provider = PROVIDERS[CANDIDATE]
        assert isinstance(provider, OptimizerProvider)
        optimizer = self.optimizer(
            provider, made, max_grad_norm=MAX_NORM, zero_grads=not free,
            ema_decay=EMA_DECAY if self.chain.averages else None,
        )  # fmt: skip
        scaler = self.scaler(fusedopt.GradScaler)

        def call() -> None:
            scaler.step(optimizer)
            scaler.update()
            if free:
                optimizer.zero_grad(set_to_none=True)

        return self.entrant(
            call, made, optimizer=optimizer,
            averages=lambda: [optimizer.state[parameter]["ema"] for parameter in made],
        )  # fmt: skip

    def floor(self) -> Entrant:
        """The bytes of fusedopt's call: [parameter, gradient, states and average]."""
        made = self.parameters()
        more = self.task.states + self.chain.averages
        rows = [
            [parameter.detach(), gradient, *(torch.zeros_like(gradient) for _ in range(more))]
            for parameter, gradient in zip(made, self.gradients, strict=True)
        ]
        moved = floor.TrafficFloor(rows, measures=True, zero_grads=not self.chain.set_to_none)
        return self.entrant(moved.run, made)


def torch_provider(task: Task) -> OptimizerProvider:
    """Torch's fused step where it has one, its default where not."""
    fused, default = PROVIDERS["torch-fused"], PROVIDERS["torch-default"]
    assert isinstance(fused, OptimizerProvider)
    assert isinstance(default, OptimizerProvider)
    return default if fused.unavailable(task.optimizer, device=task.device) else fused


# ---- the race ----


def measure(
    tasks: Sequence[Task],
    rounds: int,
    seconds: float,
    on_round: Callable[[str], None] = lambda label: None,
) -> Iterator[Row]:
    """Times every task and yields its row; an interrupt yields the unfinished row first.

    Args:
        tasks: what to measure, those of one workload next to each other.
        rounds: rounds of a row.
        seconds: what one entrant may take of a row's time before it sits rounds out.
        on_round: called before each round with a label, to move a progress bar.
    """
    master: list[torch.Tensor] = []
    made_for = None
    for task in tasks:
        if made_for != task.workload:
            master.clear()  # before the next are made: the largest row decides the peak
            master.extend(scaled_gradients(task))
            made_for = task.workload
        row = Row(task)
        try:
            race_row(row, master, rounds, seconds, on_round)
        except KeyboardInterrupt:
            if row.race.seconds:
                yield row
            raise
        yield row


def race_row(
    row: Row,
    master: Sequence[torch.Tensor],
    rounds: int,
    seconds: float,
    on_round: Callable[[str], None],
    inspect: Callable[[str, Entrant], None] = lambda name, entrant: None,
) -> None:
    """Builds the entrants of one row, races them, lets `inspect` see each and drops them."""
    stand = Stand(row.task, master)
    row.torch_step = torch_provider(row.task).title
    entrants = {
        TORCH: stand.torch_chain(),
        CANDIDATE: stand.fused_call(),
        FLOOR: stand.floor(),
    }
    label = f"{row.task.workload} / {row.task.optimizer} {row.task.chain}"
    # Torch's stages once more: a clock between them waits for the device, which the chain does not.
    run_race(
        row.race,
        {**{name: entrant.call for name, entrant in entrants.items()},
         STAGED: entrants[TORCH].stages},
        rounds,
        seconds,
        lambda _: on_round(label),
        {**{name: entrant.restore for name, entrant in entrants.items()},
         STAGED: entrants[TORCH].restore},
    )  # fmt: skip
    for name, entrant in entrants.items():
        inspect(name, entrant)
    entrants.clear()
    del stand
    gc.collect()  # optimizers hang in reference cycles: their memory would outlive the row


def scaled_gradients(task: Task) -> list[torch.Tensor]:
    """The step job's gradients as a scaled loss has them."""
    gradients = make_gradients(WORKLOADS[task.workload], torch.float32, task.device)
    torch._foreach_mul_(gradients, SCALE)
    return gradients
