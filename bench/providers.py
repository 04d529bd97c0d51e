"""Who can take a step: torch, other libraries, fusedopt and the traffic floor, in one table.

Every provider builds its own parameters (copies of the gradients, which all share) and its own
states, and drops them with the entrant it returned. Every class is given torch's defaults by name,
for libraries have others (optimi's eps is 1e-6), and only equal work can be compared; whether it
then does the same arithmetic, `parity` checks.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fusedopt._extension import _C

from . import floor, optimizers
from .peers import PEERS
from .timing import Entrant, Step


@dataclass(frozen=True)
class Provider:
    """A library's steps.

    Attributes:
        name: as given to ``--providers``.
        title: as printed in tables.
        library: as imported; its classes have torch's names if there are no others.
        classes: by torch's name, the library's, and the keywords that make it do the same.
        keywords: what selects this provider's step, such as ``{"fused": True}``.
        devices: where it runs.
        default: whether it takes part where no providers are named and it is installed.
        remedy: how it is installed.
        tier: of fusedopt's CPU code, selected around each of its steps; empty for the one in use.
        compiled: the step goes through torch.compile.
        most_tensors: beyond so many it does not take part.
    """

    name: str
    title: str
    library: str
    classes: Mapping[str, tuple[str, dict[str, Any]]] | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    default: bool = True
    remedy: str = "make bench-peers installs it"
    tier: str = ""
    compiled: bool = False
    most_tensors: float = math.inf

    @property
    def is_peer(self) -> bool:
        """Whether it is another library's."""
        return self.classes is not None

    def installed(self) -> bool:
        """Whether the library is there; it may still not work here."""
        return importlib.util.find_spec(self.library.partition(".")[0]) is not None

    def unavailable(
        self, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu",
        tensors: int = 1,
    ) -> str:  # fmt: skip
        """Why there is no step for `optimizer` on so many tensors; empty when one was taken."""
        if tensors > self.most_tensors:
            return f"{tensors:,} tensors are more than {self.most_tensors:,} for it"
        if not self.installed():
            return f"{self.library} is not installed; {self.remedy}"
        if device not in self.devices:
            return f"{self.title} does not run on {device}"
        if self.tier and (device != "cpu" or self.tier not in _C.available_tiers()):
            return f"tier {self.tier} does not run on this machine's {device}"
        if self.classes is not None and optimizer not in self.classes:
            return f"{self.title} has no {optimizer}"
        if not self.is_peer:
            cls = getattr(importlib.import_module(self.library), optimizer, None)
            if cls is None:
                return f"{self.library} has no {optimizer}"
            for keyword in self.keywords:
                if keyword not in inspect.signature(cls).parameters:
                    return f"{self.library}.{optimizer} has no {keyword} step"
        if self.compiled:
            return ""  # a trial would compile, for a minute; the race says what comes of it
        reason = _trial(self.name, optimizer, dtype, device)
        return f"{self.library}.{optimizer}: {reason}" if reason and not self.is_peer else reason

    def optimizer(self, optimizer: str, parameters: Sequence[Any], **settings: Any) -> Any:
        """This provider's `optimizer` over `parameters`, or param groups, with torch's defaults."""
        path, keywords = (self.classes or {}).get(optimizer, (f"{self.library}.{optimizer}", {}))
        with quiet() if self.is_peer else contextlib.nullcontext():
            return make(
                imported(path), optimizer, parameters, **settings, **self.keywords, **keywords
            )

    def stepping(
        self, optimizer: str, parameters: Sequence[Any], grouped: bool, **options: Any
    ) -> Any:
        """The same with the step job's settings; grouped, each parameter in a group of its own."""
        groups = [{"params": [parameter]} for parameter in parameters] if grouped else parameters
        settings = {"lr": optimizers.STEP_LR, **optimizers.settings(optimizer).step}
        return self.optimizer(optimizer, groups, **settings, **options)

    def entrant(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Entrant:
        """A step of `optimizer` over new parameters that have these gradients."""
        made = self.stepping(optimizer, parameters_with(gradients), grouped)
        step: Step = made.step
        if self.compiled:
            torch._dynamo.reset()  # beyond a few recompilations it would fall back to eager
            step = torch.compile(made.step)
        step = _in_tier(self.tier, step) if self.tier else step
        if not hasattr(made, "routes"):
            return Entrant(step)
        counts = Counter(route.backend for route in made.routes())
        told = ", ".join(f"{backend}: {count}" for backend, count in sorted(counts.items()))
        return Entrant(step, columns={"backend": told})


@dataclass(frozen=True)
class FloorProvider(Provider):
    """The traffic floor: reads and writes what the optimizer has to, and does no maths."""

    def unavailable(
        self, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu",
        tensors: int = 1,
    ) -> str:  # fmt: skip
        """Why bytes cannot be moved on a device."""
        return floor.unavailable(device)

    def entrant(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Entrant:
        """One pass over rows [parameter, gradient, states...] of the optimizer's size."""
        return Entrant(floor.traffic(gradients, optimizers.count_states(optimizer)))


def parameters_with(
    gradients: Sequence[torch.Tensor], scale: float = 1.0
) -> list[torch.nn.Parameter]:
    """New parameters that have these gradients; their values are those of gradients over scale."""
    made = [torch.nn.Parameter(gradient / scale) for gradient in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = gradient
    return made


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


@cache
def _trial(name: str, optimizer: str, dtype: torch.dtype, device: str) -> str:
    """Why a step fails on two elements; asked once, for libraries compile themselves."""
    provider = PROVIDERS[name]
    try:
        with quiet() if provider.is_peer else contextlib.nullcontext():
            provider.entrant(optimizer, [torch.ones(2, dtype=dtype, device=device)]).call()
    except Exception as error:  # another library's code: it may raise anything
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return ""


@cache
def torch_defaults(optimizer: str) -> dict[str, Any]:
    """The numbers torch's constructor takes when it is told nothing, by keyword."""
    parameters = inspect.signature(getattr(torch.optim, optimizer)).parameters
    kinds = {name: parameter.default for name, parameter in parameters.items() if name != "lr"}
    return {name: value for name, value in kinds.items() if type(value) in (int, float, tuple)}


def imported(path: str) -> Any:
    """What ``package.module.name`` or ``package.module:name`` is."""
    module, _, name = path.replace(":", ".").rpartition(".")
    if str(Path.cwd()) not in sys.path:  # as python -m has it, and the console script has not
        sys.path.insert(0, str(Path.cwd()))
    return getattr(importlib.import_module(module), name)


def make(cls: Any, optimizer: str, parameters: Sequence[Any], **settings: Any) -> Any:
    """`cls` over `parameters`, told torch's defaults as far as it takes them."""
    known = inspect.signature(cls).parameters
    told = torch_defaults(optimizer) if hasattr(torch.optim, optimizer) else {}
    defaults = {key: value for key, value in told.items() if key in known}
    return cls(parameters, **{**defaults, **settings})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps a library's chatter off the table, its C++ code's and compilers' included."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            stack.callback(stream.flush)
            os.dup2(nowhere.fileno(), number)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("torch-default", "torch default", "torch.optim"),
        Provider("torch-foreach", "torch foreach", "torch.optim", keywords={"foreach": True}),
        Provider("torch-fused", "torch fused", "torch.optim", keywords={"fused": True}),
        # Off by default: it unrolls the list of tensors, and compiles for minutes.
        Provider(
            "torch-compiled", "torch compiled", "torch.optim", keywords={"foreach": True},
            default=False, compiled=True, most_tensors=200,
        ),
        *(Provider(name, *told, **more) for name, (*told, more) in PEERS.items()),
        Provider("fusedopt", "fusedopt", "fusedopt"),
        *(
            Provider(f"fusedopt-{backend}", f"fusedopt {title}", "fusedopt",
                     keywords={"backend": backend}, default=False)
            for backend, title in (("cuda", "CUDA"), ("triton", "Triton"))
        ),
        *(
            Provider(f"fusedopt-{tier}", f"fusedopt {tier}", "fusedopt",
                     keywords={"backend": "cpu"}, default=False, tier=tier)
            for tier in _C.built_tiers()
        ),
        FloorProvider("floor", "traffic floor", "fusedopt"),
    )
}  # fmt: skip


def title_of(name: str) -> str:
    """A provider's name in tables; that of a result file where this version knows no such one."""
    return PROVIDERS[name].title if name in PROVIDERS else name


def usual(device: str = "cpu") -> list[str]:
    """Who takes part where no providers are named: those of a default, as far as installed."""
    return [
        name
        for name, provider in PROVIDERS.items()
        if provider.default
        and (not provider.is_peer or (device in provider.devices and provider.installed()))
    ]
