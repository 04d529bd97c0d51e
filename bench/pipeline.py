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

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt

from . import floor, optimizers
from .providers import PROVIDERS, Provider
from .rows import CANDIDATE, FLOOR, Row
from .step import compared, make_gradients
from .timing import Race, Step, look, run_race, stage_of
from .workloads import WORKLOADS

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


def plan(
    workloads: Sequence[str], chains: Sequence[str], names: Sequence[str], device: str
) -> list[Task]:
    """The tasks, workload by workload."""
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

    def optimizer(self, provider: Provider, made: Sequence[torch.nn.Parameter], **own: Any) -> Any:
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
        optimizer = self.optimizer(
            PROVIDERS[CANDIDATE], made, max_grad_norm=MAX_NORM, zero_grads=not free,
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


def torch_provider(task: Task) -> Provider:
    """Torch's fused step where it has one, its default where not."""
    fused, default = PROVIDERS["torch-fused"], PROVIDERS["torch-default"]
    return default if fused.unavailable(task.optimizer, device=task.device) else fused


# ---- the race ----


def measure(
    tasks: Sequence[Task],
    rounds: int,
    seconds: float,
    advance: Callable[[str], None] = lambda label: None,
) -> Iterator[list[Row]]:
    """Times every task and yields its rows; an interrupt yields those of whole rounds first.

    Args:
        tasks: what to measure, those of one workload next to each other.
        rounds: rounds of a task.
        seconds: what one entrant may take of a task's time before it sits rounds out.
        advance: called before each round with a label, to move a progress bar.
    """
    master: list[torch.Tensor] = []
    made_for = None
    for task in tasks:
        if made_for != task.workload:
            master.clear()  # before the next are made: the largest task decides the peak
            master += scaled_gradients(task)
            made_for = task.workload
        race, seen = Race(), dict[str, Row]()
        try:
            _race(task, race, seen, master, rounds, seconds, advance)
        except KeyboardInterrupt:
            if race.seconds:
                yield rows_of(task, race, seen)
            raise
        yield rows_of(task, race, seen)


def rows_of(task: Task, race: Race, seen: Mapping[str, Row]) -> list[Row]:
    """A row an entrant, and one a stage of torch's chain."""
    chain, workload = CHAINS[task.chain], WORKLOADS[task.workload]
    theirs, ours = chain.torch_bytes(task.states), chain.fused_bytes(task.states)
    common = {
        "job": "pipeline", **asdict(task), "dtype": "float32", "tensors": len(workload.shapes),
        "elements": workload.elements,
    }  # fmt: skip
    moved = {TORCH: theirs, STAGED: theirs, CANDIDATE: ours, FLOOR: ours}
    found = []
    for name in [name for name in moved if name in race.seconds]:
        row = {**common, "provider": name, "bytes": sum(moved[name].values()), "baseline": TORCH}
        row |= {**race.columns(name, TORCH, FLOOR), **seen.get(name, {})}
        if name == TORCH:
            row["torch_step"] = torch_provider(task).title
        if name in (TORCH, CANDIDATE):
            row["stages"] = moved[name]
        found.append(row)
    for stage, count in theirs.items():
        timed = race.columns(stage_of(STAGED, stage))
        found.append({**common, "provider": TORCH, "stage": stage, "bytes": count, **timed})
    return found


def _race(
    task: Task, race: Race, seen: dict[str, Row], master: Sequence[torch.Tensor], rounds: int,
    seconds: float, advance: Callable[[str], None],
) -> None:  # fmt: skip
    """Builds the entrants of a task, races them, looks at each on a GPU, and drops them."""
    stand = Stand(task, master)
    entrants = {TORCH: stand.torch_chain(), CANDIDATE: stand.fused_call()}
    if not floor.unavailable(task.device):
        entrants[FLOOR] = stand.floor()
    label = f"{task.workload} / {task.optimizer} {task.chain}"
    calls: dict[str, Any] = {name: entrant.call for name, entrant in entrants.items()}
    restores = {name: entrant.restore for name, entrant in entrants.items()}
    # Torch's stages once more: a clock between them waits for the device, which the chain does not.
    calls[STAGED], restores[STAGED] = entrants[TORCH].stages, restores[TORCH]
    run_race(race, calls, rounds, seconds, lambda: advance(label), restores)
    if task.device == "cuda":
        for name, entrant in entrants.items():
            seen[name] = look(entrant.call, entrant.restore, 1)
    entrants.clear()
    calls.clear()
    restores.clear()
    del stand
    gc.collect()  # optimizers hang in reference cycles: their memory would outlive the task


def scaled_gradients(task: Task) -> list[torch.Tensor]:
    """The step job's gradients as a scaled loss has them."""
    gradients = make_gradients(WORKLOADS[task.workload], torch.float32, task.device)
    torch._foreach_mul_(gradients, SCALE)
    return gradients


def summary(rows: Sequence[Row]) -> list[str]:
    """One sentence for each chain and optimizer."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in [row for row in rows if row["provider"] == CANDIDATE]:
        text = f"on {row['workload']} {compared(row['faster'])} torch's chain"
        if row.get("floor_share"):
            text += f" and {1 / row['floor_share']:.2f}x the floor"
        said.setdefault((row["optimizer"], row["chain"]), []).append(text)
    return [
        f"fusedopt's {optimizer} with {chain}: {'; '.join(parts)}."
        for (optimizer, chain), parts in said.items()
    ]
