"""Who can take a step: torch, other libraries, fusedopt and the traffic floor, in one table.

Every provider builds its own parameters (copies of the gradients, which all share) and its own
states, takes its steps on them and drops them with the step it returned. To add a library, add a
`Provider` to ``PEERS``. Every class is given torch's defaults by name, for libraries have others
(optimi's eps is 1e-6), and only equal work can be compared; whether it then does the same
arithmetic, `parity` checks.
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
from .timing import Step


@dataclass(frozen=True)
class Contestant:
    """A step ready to be timed, and the optimizer that takes it, where there is one."""

    step: Step
    optimizer: Any = None

    def backends(self) -> str:
        """Backends of a fusedopt optimizer's parameters, such as ``cpu: 148``; else empty."""
        if not hasattr(self.optimizer, "routes"):
            return ""
        counts = Counter(route.backend for route in self.optimizer.routes())
        return ", ".join(f"{backend}: {count}" for backend, count in sorted(counts.items()))


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

    def offers(self, optimizer: str, device: str) -> bool:
        """Whether it may have a step for `optimizer`: it is not tried."""
        if not self.installed() or device not in self.devices:
            return False
        if self.classes is not None:
            return optimizer in self.classes
        return hasattr(importlib.import_module(self.library), optimizer)

    def unavailable(
        self, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> str:
        """Why there is no step for `optimizer` on `dtype`; empty when one was taken."""
        if not self.installed():
            return f"{self.library} is not installed; {self.remedy}"
        if device not in self.devices:
            return f"{self.title} does not run on {device}"
        if not self.offers(optimizer, device):
            return f"{self.title if self.is_peer else self.library} has no {optimizer}"
        if self.tier and (device != "cpu" or self.tier not in _C.available_tiers()):
            return f"tier {self.tier} does not run on this machine's {device}"
        if not self.is_peer:
            cls = getattr(importlib.import_module(self.library), optimizer)
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

    def build(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Contestant:
        """A step of `optimizer` over new parameters that have these gradients."""
        parameters = [torch.nn.Parameter(gradient.clone()) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        groups = [{"params": [parameter]} for parameter in parameters] if grouped else parameters
        settings = optimizers.settings(optimizer).step
        made = self.optimizer(optimizer, groups, lr=optimizers.STEP_LR, **settings)
        step: Step = made.step
        if self.compiled:
            torch._dynamo.reset()  # beyond a few recompilations it would fall back to eager
            step = torch.compile(made.step)
        return Contestant(_in_tier(self.tier, step) if self.tier else step, made)


@dataclass(frozen=True)
class FloorProvider(Provider):
    """The traffic floor: reads and writes what the optimizer has to, and does no maths."""

    def offers(self, optimizer: str, device: str) -> bool:
        """Bytes can be moved for any optimizer."""
        return True

    def unavailable(
        self, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> str:
        """Why bytes cannot be moved on a device."""
        return floor.unavailable(device)

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


@cache
def _trial(name: str, optimizer: str, dtype: torch.dtype, device: str) -> str:
    """Why a step fails on two elements; asked once, for libraries compile themselves."""
    provider = PROVIDERS[name]
    try:
        with quiet() if provider.is_peer else contextlib.nullcontext():
            provider.build(optimizer, [torch.ones(2, dtype=dtype, device=device)]).step()
    except Exception as error:  # another library's code: it may raise anything
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return ""


@cache
def torch_defaults(optimizer: str) -> dict[str, Any]:
    """The numbers torch's constructor takes when it is told nothing, by keyword."""
    parameters = inspect.signature(getattr(torch.optim, optimizer)).parameters
    kinds = {name: parameter.default for name, parameter in parameters.items()}
    return {
        name: value for name, value in kinds.items()
        if isinstance(value, int | float | tuple) and not isinstance(value, bool) and name != "lr"
    }  # fmt: skip


def imported(path: str) -> Any:
    """The class that ``package.module.Class`` or ``package.module:Class`` names."""
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(importlib.import_module(module), name)


def make(cls: Any, optimizer: str, parameters: Sequence[Any], **settings: Any) -> Any:
    """`cls` over `parameters`, told torch's defaults as far as it takes them."""
    known = inspect.signature(cls).parameters
    told = torch_defaults(optimizer) if hasattr(torch.optim, optimizer) else {}
    defaults = {key: value for key, value in told.items() if key in known}
    return cls(parameters, **{**defaults, **settings})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps a library's chatter off the table, its C++ code's and compilers' included.

    The environment's programs are on PATH meanwhile: libraries compile themselves with its ninja.
    """
    path = os.environ.get("PATH", "")
    sys.stdout.flush()
    sys.stderr.flush()
    with Path(os.devnull).open("w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = [(number, os.dup(number)) for number in (1, 2)]
        try:
            os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
            for number, _ in kept:
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)
            os.environ["PATH"] = path


def _named(module: str, names: str, form: str, **keywords: Any) -> dict[str, Any]:
    """Classes that are called as torch's, in the form ``Flash{}`` or ``{}32bit``."""
    return {name: (f"{module}.{form.format(name)}", keywords) for name in names.split()}


PEERS = (
    Provider(
        "apex", "apex", "apex",
        {"Adam": ("apex.optimizers.FusedAdam", {"adam_w_mode": False}),
         **_named("apex.optimizers", "SGD Adagrad", "Fused{}"),
         "AdamW": ("apex.optimizers.FusedAdam", {})},
        devices=("cuda",), remedy="its README says how to build it; PyPI's apex is another",
    ),
    Provider(
        "transformer-engine", "TransformerEngine", "transformer_engine",
        {"Adam": ("transformer_engine.pytorch.optimizers.FusedAdam", {"adam_w_mode": False}),
         "AdamW": ("transformer_engine.pytorch.optimizers.FusedAdam", {}),
         "SGD": ("transformer_engine.pytorch.optimizers.FusedSGD", {})},
        devices=("cuda",), remedy="pip install transformer-engine[pytorch], beside a CUDA torch",
    ),
    Provider(
        "deepspeed", "DeepSpeed FusedAdam", "deepspeed",
        {"Adam": ("deepspeed.ops.adam.FusedAdam", {"adam_w_mode": False}),
         "AdamW": ("deepspeed.ops.adam.FusedAdam", {})},
        devices=("cuda",),
    ),
    Provider(
        "deepspeed-cpu", "DeepSpeed on the CPU", "deepspeed",
        {"Adam": ("deepspeed.ops.adam.DeepSpeedCPUAdam", {"adamw_mode": False}),
         "AdamW": ("deepspeed.ops.adam.DeepSpeedCPUAdam", {}),
         "Adagrad": ("deepspeed.ops.adagrad.DeepSpeedCPUAdagrad", {})},
        devices=("cpu",),
    ),
    Provider(
        "bitsandbytes", "bitsandbytes 32-bit", "bitsandbytes",
        _named("bitsandbytes.optim", "SGD Adagrad RMSprop Adam AdamW", "{}32bit"),
    ),
    # Off by default: it compiles for every shape of tensor, for seconds each.
    Provider(
        "torchao", "torchao", "torchao", {"AdamW": ("torchao.optim.adam._AdamW", {})},
        default=False, most_tensors=200,
    ),
    Provider("optimi", "torch-optimi", "optimi", _named("optimi", "SGD Adam AdamW", "{}")),
    Provider(
        "flashoptim", "FlashOptim", "flashoptim",
        _named("flashoptim", "SGD Adam AdamW", "Flash{}", quantize=False, master_weight_bits=None),
        devices=("cuda",),
    ),
)  # fmt: skip

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
        *PEERS,
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

# Who is timed beside a floor and fusedopt where nobody asks for more: no peers, nobody slow.
OWN = ("torch-default", "torch-foreach", "torch-fused", "fusedopt", "fusedopt-triton", "floor")


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


def why_not(name: str, optimizer: str, dtype: torch.dtype, device: str, tensors: int) -> str:
    """Why a provider does not take part in a row; empty if it does."""
    most = PROVIDERS[name].most_tensors
    if tensors > most:
        return f"{tensors:,} tensors are more than {most:,} for it"
    return PROVIDERS[name].unavailable(optimizer, dtype, device)
