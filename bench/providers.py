"""Who can take a step: one small adapter a library, which says why when it cannot.

Every provider builds its own parameters (copies of the gradients, which all share) and its own
states, takes its steps on them and drops them with the step it returned. To add a library, add a
`peers.Peer` to the table there; ``PROVIDERS`` has everybody: torch, fusedopt by backend and
instruction tier, the traffic floor, and the peers.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import fusedopt
from fusedopt._extension import _C

from . import floor, optimizers, peers
from .contestant import Contestant, Step, race_optimizer, try_step
from .peers import Peer


class Provider(Protocol):
    """What the step job needs of a provider."""

    name: str
    title: str
    default: bool

    def unavailable(self, optimizer: str, dtype: torch.dtype, device: str) -> str:
        """Why there is no step for `optimizer` on `dtype`; empty when there is one."""

    def build(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Contestant:
        """A step of `optimizer` over new parameters that have these gradients."""


@dataclass(frozen=True)
class OptimizerProvider:
    """A library whose optimizers look like torch.optim's.

    Attributes:
        name: as given to ``--providers``.
        title: as printed in tables.
        namespace: module that holds the classes under torch's names.
        keywords: what selects this provider's step, such as ``{"fused": True}``.
        default: whether it takes part where no providers are named.
        tier: of fusedopt's CPU code, selected around each of its steps; empty for the one in use.
        compiled: the step goes through torch.compile.
        most_tensors: beyond so many it does not take part.
    """

    name: str
    title: str
    namespace: Any
    keywords: dict[str, Any] = field(default_factory=dict)
    default: bool = True
    tier: str = ""
    compiled: bool = False
    most_tensors: float = math.inf

    def unavailable(
        self, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> str:
        """Why there is no step for `optimizer` on `dtype`; empty when one was taken."""
        owner = self.namespace.__name__
        cls = getattr(self.namespace, optimizer, None)
        if cls is None:
            return f"{owner} has no {optimizer}"
        for keyword in self.keywords:
            if keyword not in inspect.signature(cls).parameters:
                return f"{owner}.{optimizer} has no {keyword} step"
        if self.tier and (device != "cpu" or self.tier not in _C.available_tiers()):
            return f"tier {self.tier} does not run on this machine's {device}"
        if self.compiled:
            return ""  # a trial would compile, for a minute; the race says what comes of it
        reason = try_step(self, optimizer, dtype, device)
        return f"{owner}.{optimizer}: {reason}" if reason else ""

    def offers(self, optimizer: str, device: str) -> bool:
        """Whether it may have such a step: it is not tried."""
        return hasattr(self.namespace, optimizer)

    def optimizer(
        self, optimizer: str, parameters: Sequence[Any], **settings: Any
    ) -> torch.optim.Optimizer:
        """This provider's `optimizer` over `parameters`, or param groups."""
        made = getattr(self.namespace, optimizer)(parameters, **settings, **self.keywords)
        assert isinstance(made, torch.optim.Optimizer)
        return made

    def build(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Contestant:
        """A step of `optimizer` over new parameters that have these gradients."""
        made, contestant = race_optimizer(self.optimizer, optimizer, gradients, grouped)
        step = contestant.step
        if self.compiled:
            torch._dynamo.reset()  # beyond a few recompilations it would fall back to eager
            step = torch.compile(made.step)
        if self.tier:
            step = _in_tier(self.tier, step)
        return Contestant(step, lambda: _describe_routes(made))


@dataclass(frozen=True)
class FloorProvider:
    """The traffic floor: reads and writes what the optimizer has to, and does no maths."""

    name: str = "floor"
    title: str = "traffic floor"
    default: bool = True
    most_tensors: float = math.inf

    def unavailable(
        self, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> str:
        """Empty where bytes can be moved: for any optimizer and dtype."""
        return floor.unavailable(device)

    def offers(self, optimizer: str, device: str) -> bool:
        """Whether it may have such a step."""
        return True

    def build(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Contestant:
        """One pass over rows [parameter, gradient, states...] of the optimizer's size."""
        states = optimizers.count_states(optimizer)
        rows = [
            [gradient.clone(), gradient, *(torch.zeros_like(gradient) for _ in range(states))]
            for gradient in gradients
        ]
        return Contestant(floor.TrafficFloor(rows).run)


def _in_tier(tier: str, step: Step) -> Step:
    """The step, taken by another instruction tier than the process uses."""

    def take() -> None:
        usual = _C.current_tier()
        _C.select_tier(tier)
        try:
            step()
        finally:
            _C.select_tier(usual)

    return take


def _describe_routes(optimizer: torch.optim.Optimizer) -> str:
    """Backends of a fusedopt optimizer's parameters, such as ``cpu: 148``; empty for others."""
    if not hasattr(optimizer, "routes"):
        return ""
    counts = Counter(route.backend for route in optimizer.routes())
    return ", ".join(f"{backend}: {count}" for backend, count in sorted(counts.items()))


AnyProvider = OptimizerProvider | FloorProvider | Peer
PROVIDERS: dict[str, AnyProvider] = {
    provider.name: provider
    for provider in (
        OptimizerProvider("torch-default", "torch default", torch.optim),
        OptimizerProvider("torch-foreach", "torch foreach", torch.optim, {"foreach": True}),
        OptimizerProvider("torch-fused", "torch fused", torch.optim, {"fused": True}),
        # Off by default: it unrolls the list of tensors, and compiles for minutes.
        OptimizerProvider(
            "torch-compiled", "torch compiled", torch.optim, {"foreach": True}, default=False,
            compiled=True, most_tensors=200,
        ),
        *peers.PEERS,
        OptimizerProvider("fusedopt", "fusedopt", fusedopt),
        *(
            OptimizerProvider(
                f"fusedopt-{backend}", f"fusedopt {title}", fusedopt, {"backend": backend},
                default=False,
            )
            for backend, title in (("cuda", "CUDA"), ("triton", "Triton"))
        ),
        *(
            OptimizerProvider(
                f"fusedopt-{tier}", f"fusedopt {tier}", fusedopt, {"backend": "cpu"},
                default=False, tier=tier,
            )
            for tier in _C.built_tiers()
        ),
        FloorProvider(),
    )
}  # fmt: skip

# Who is timed beside a floor and fusedopt where nobody asks for more: no peers, nobody slow.
OWN = ("torch-default", "torch-foreach", "torch-fused", "fusedopt", "fusedopt-triton", "floor")


def usual(device: str = "cpu") -> list[str]:
    """Who takes part where no providers are named: those of a default, as far as installed."""
    return [
        name
        for name, provider in PROVIDERS.items()
        if provider.default
        and not (
            isinstance(provider, Peer)
            and (device not in provider.devices or not provider.installed())
        )
    ]


def too_many(name: str, tensors: int) -> str:
    """Why a provider does not take part with so many tensors; empty if it does."""
    most = PROVIDERS[name].most_tensors
    return f"{tensors:,} tensors are more than {most:,} for it" if tensors > most else ""
