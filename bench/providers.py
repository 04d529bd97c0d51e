"""Who can take a step: one small adapter a library, which says why when it cannot.

Every provider builds its own parameters (copies of the gradients, which all share) and its own
states, takes its steps on them and drops them with the step it returned. To add one, append an
`OptimizerProvider` that knows where the library's classes are, or a class with the same
members, to ``PROVIDERS``.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import fusedopt
from fusedopt._extension import _C
from fusedopt.backends import backend_for

from . import optimizers

Step = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """A step ready to be timed.

    Attributes:
        step: takes one step.
        detail: says afterwards how the step was taken, where there is something to say.
    """

    step: Step
    detail: Callable[[], str] = lambda: ""


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
    """

    name: str
    title: str
    namespace: Any
    keywords: dict[str, Any] = field(default_factory=dict)
    default: bool = True

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
        try:  # the rest only the library knows, such as devices and dtypes
            self.build(optimizer, [torch.ones(2, dtype=dtype, device=device)]).step()
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return f"{owner}.{optimizer}: {str(error).splitlines()[0]}"
        return ""

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
        parameters = [torch.nn.Parameter(gradient.clone()) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        settings = optimizers.settings(optimizer).step
        groups = [{"params": [parameter]} for parameter in parameters] if grouped else parameters
        made = self.optimizer(optimizer, groups, lr=optimizers.STEP_LR, **settings)
        return Contestant(made.step, lambda: _describe_routes(made))


@dataclass(frozen=True)
class FloorProvider:
    """The traffic floor: reads and writes what the optimizer has to, and does no maths.

    It runs through the same chunks, threads and instruction tier as fusedopt's optimizers, so the
    ratio to it says what arithmetic and host work cost on top of moving the bytes.
    """

    name: str = "floor"
    title: str = "traffic floor"
    default: bool = True

    def unavailable(
        self, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> str:
        """Empty where the device has a backend: bytes can be moved for any optimizer and dtype."""
        return "" if backend_for(device) else f"no backend moves bytes on {device}"

    def build(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Contestant:
        """One pass over rows [parameter, gradient, states...] of the optimizer's size."""
        states = optimizers.count_states(optimizer)
        rows = [
            [gradient.clone(), gradient, *(torch.zeros_like(gradient) for _ in range(states))]
            for gradient in gradients
        ]
        backend = backend_for(gradients[0].device.type)
        assert backend is not None
        return Contestant(_C.TrafficFloor(rows, backend.launcher()).run)


def _describe_routes(optimizer: torch.optim.Optimizer) -> str:
    """Backends of a fusedopt optimizer's parameters, such as ``cpu: 148``; empty for others."""
    if not hasattr(optimizer, "routes"):
        return ""
    counts = Counter(route.backend for route in optimizer.routes())
    return ", ".join(f"{backend}: {count}" for backend, count in sorted(counts.items()))


PROVIDERS: dict[str, OptimizerProvider | FloorProvider] = {
    provider.name: provider
    for provider in (
        OptimizerProvider("torch-default", "torch default", torch.optim),
        OptimizerProvider("torch-foreach", "torch foreach", torch.optim, {"foreach": True}),
        OptimizerProvider("torch-fused", "torch fused", torch.optim, {"fused": True}),
        OptimizerProvider("fusedopt", "fusedopt", fusedopt),
        OptimizerProvider(
            "fusedopt-triton", "fusedopt Triton", fusedopt, {"backend": "triton"}, default=False
        ),
        FloorProvider(),
    )
}
