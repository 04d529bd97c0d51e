"""Other libraries' optimizers: where their classes are, found if they are installed.

Every class is given torch's defaults by name, for libraries have others (optimi's eps is 1e-6), and
only equal work can be compared. Whether it then does the same arithmetic, `parity` checks.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .contestant import Contestant, race_optimizer, try_step


@dataclass(frozen=True)
class Peer:
    """A library's fused or fast steps.

    Attributes:
        name: as given to ``--providers``.
        title: as printed in tables.
        library: as imported.
        classes: by torch's name, the library's, and the keywords that make it do the same.
        devices: where it runs.
        default: whether it takes part where no providers are named and it is installed.
        remedy: how it is installed.
        most_tensors: beyond so many it does not take part.
    """

    name: str
    title: str
    library: str
    classes: Mapping[str, tuple[str, dict[str, Any]]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    default: bool = True
    remedy: str = "make bench-peers installs it"
    most_tensors: float = math.inf

    def installed(self) -> bool:
        """Whether the library is there; it may still not work here."""
        return importlib.util.find_spec(self.library) is not None

    def load(self, optimizer: str) -> None:
        """Imports what an optimizer needs, without a step; errors are told elsewhere."""
        with contextlib.suppress(Exception):
            self.optimizer(optimizer, [torch.nn.Parameter(torch.ones(1))], lr=1.0)

    def unavailable(
        self, optimizer: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> str:
        """Why there is no step for `optimizer` on `dtype`; empty when one was taken."""
        if not self.installed():
            return f"{self.library} is not installed; {self.remedy}"
        if device not in self.devices:
            return f"{self.title} does not run on {device}"
        if optimizer not in self.classes:
            return f"{self.title} has no {optimizer}"
        return _trial(self.name, optimizer, dtype, device)

    def offers(self, optimizer: str, device: str) -> bool:
        """Whether it may have such a step: it is not tried."""
        return self.installed() and device in self.devices and optimizer in self.classes

    def optimizer(self, optimizer: str, parameters: Sequence[Any], **settings: Any) -> Any:
        """This library's `optimizer` over `parameters`, with torch's defaults."""
        path, keywords = self.classes[optimizer]
        with quiet():
            return make(imported(path), optimizer, parameters, **settings, **keywords)

    def build(
        self, optimizer: str, gradients: Sequence[torch.Tensor], grouped: bool = False
    ) -> Contestant:
        """A step of `optimizer` over new parameters that have these gradients."""
        return race_optimizer(self.optimizer, optimizer, gradients, grouped)[1]


@cache
def _trial(name: str, optimizer: str, dtype: torch.dtype, device: str) -> str:
    """Why a peer's step fails on two elements; asked once, for libraries compile themselves."""
    (peer,) = (peer for peer in PEERS if peer.name == name)
    with quiet():
        return try_step(peer, optimizer, dtype, device)


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
    defaults = {key: value for key, value in torch_defaults(optimizer).items() if key in known}
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
    Peer(
        "apex", "apex", "apex",
        {"Adam": ("apex.optimizers.FusedAdam", {"adam_w_mode": False}),
         **_named("apex.optimizers", "SGD Adagrad", "Fused{}"),
         "AdamW": ("apex.optimizers.FusedAdam", {})},
        devices=("cuda",), remedy="its README says how to build it; PyPI's apex is another",
    ),
    Peer(
        "transformer-engine", "TransformerEngine", "transformer_engine",
        {"Adam": ("transformer_engine.pytorch.optimizers.FusedAdam", {"adam_w_mode": False}),
         "AdamW": ("transformer_engine.pytorch.optimizers.FusedAdam", {}),
         "SGD": ("transformer_engine.pytorch.optimizers.FusedSGD", {})},
        devices=("cuda",), remedy="pip install transformer-engine[pytorch], beside a CUDA torch",
    ),
    Peer(
        "deepspeed", "DeepSpeed FusedAdam", "deepspeed",
        {"Adam": ("deepspeed.ops.adam.FusedAdam", {"adam_w_mode": False}),
         "AdamW": ("deepspeed.ops.adam.FusedAdam", {})},
        devices=("cuda",),
    ),
    Peer(
        "deepspeed-cpu", "DeepSpeed on the CPU", "deepspeed",
        {"Adam": ("deepspeed.ops.adam.DeepSpeedCPUAdam", {"adamw_mode": False}),
         "AdamW": ("deepspeed.ops.adam.DeepSpeedCPUAdam", {}),
         "Adagrad": ("deepspeed.ops.adagrad.DeepSpeedCPUAdagrad", {})},
        devices=("cpu",),
    ),
    Peer(
        "bitsandbytes", "bitsandbytes 32-bit", "bitsandbytes",
        _named("bitsandbytes.optim", "SGD Adagrad RMSprop Adam AdamW", "{}32bit"),
    ),
    # Off by default: it compiles for every shape of tensor, for seconds each.
    Peer(
        "torchao", "torchao", "torchao", {"AdamW": ("torchao.optim.adam._AdamW", {})},
        default=False, most_tensors=200,
    ),
    Peer("optimi", "torch-optimi", "optimi", _named("optimi", "SGD Adam AdamW", "{}")),
    Peer(
        "flashoptim", "FlashOptim", "flashoptim",
        _named("flashoptim", "SGD Adam AdamW", "Flash{}", quantize=False, master_weight_bits=None),
        devices=("cuda",),
    ),
)  # fmt: skip
