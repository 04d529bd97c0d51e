"""Named lists of parameter shapes: the work an optimizer step has to do."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import architectures
from .architectures import Shape
from .providers import imported


@dataclass(frozen=True)
class Workload:
    """A list of parameter shapes with a name.

    Those that are `standard` run where no workload is named; if `grouped`, each parameter is a
    param group of its own. A model that ``--scale`` can shrink has a `depth`, its number of blocks,
    and gives its shapes at another one (`deepen`). A `family` is asked for and shown as one.
    """

    name: str
    summary: str
    shapes: tuple[Shape, ...]
    standard: bool = False
    grouped: bool = False
    deepen: Callable[[int], tuple[Shape, ...]] | None = None
    depth: int = 0
    family: str = ""

    @property
    def elements(self) -> int:
        """Number of parameters, counted as elements."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def group(self) -> str:
        """What it is shown under: its family, or itself."""
        return self.family or self.name

    def scaled(self, scale: float) -> Workload:
        """The same model with `scale` times its blocks, at least one; itself if it has none."""
        depth = max(1, round(self.depth * scale))
        if self.deepen is None or depth == self.depth:
            return self
        summary = f"{self.summary}, {depth} of its {self.depth} blocks"
        name = f"{self.name}-{depth}-blocks"  # no result may be taken for the whole model's
        return replace(self, name=name, summary=summary, shapes=self.deepen(depth), standard=False)


def binary(number: int) -> str:
    """A power of two as people write it.

    Example:
        >>> binary(4096), binary(2**30)
        ('4K', '1G')
    """
    power = (number.bit_length() - 1) // 10
    return f"{number >> 10 * power}{('', 'K', 'M', 'G')[power]}"


def named_object(path: str) -> Any:
    """What an import path given on the command line names; an argument error says why nothing."""
    try:
        return imported(path)
    except Exception as error:  # somebody else's code: it may raise anything
        raise argparse.ArgumentTypeError(
            f"cannot import {path!r} ({type(error).__name__}: {error}); wanted: module:name"
        ) from None


def of_model(path: str) -> Workload:
    """The parameters of the user's own model, made by ``module:factory``.

    The model is built on the meta device where it can be, so that its weights take no memory.
    """
    factory = named_object(path)
    try:
        with torch.device("meta"):
            shapes = tuple(tuple(p.shape) for p in factory().parameters() if p.requires_grad)
    except Exception as error:  # somebody else's code: it may raise anything
        raise argparse.ArgumentTypeError(
            f"{path!r}: {type(error).__name__}: {error}; wanted: module:factory, a callable "
            "without arguments that makes a torch.nn.Module"
        ) from error
    if not shapes:
        raise argparse.ArgumentTypeError(f"{path!r} has no parameters that require gradients")
    return Workload("model", f"the {len(shapes)} parameters of {path}", shapes)


SWEEP = "sweep"


def _network(
    name: str, summary: str, shapes: Callable[..., tuple[Shape, ...]], depth: int,
    standard: bool = False,
) -> Workload:  # fmt: skip
    """A real model whose depth ``--scale`` changes."""
    return Workload(name, summary, shapes(), standard, depth=depth, deepen=shapes)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        # Memory speed alone; a real model, sizes from 768 to 38.6M elements; the cost per tensor of
        # a deep or mixture-of-experts model; the cost per tensor alone.
        Workload("huge", "8 tensors of 4Mi elements", ((2**22,),) * 8, standard=True),
        _network("gpt2", "the 148 parameters of GPT-2 124M", architectures.gpt2, 12, True),
        Workload("many", "1,000 tensors of 4,096 elements", ((4096,),) * 1000, standard=True),
        Workload("tiny", "5,000 tensors of 64 elements", ((64,),) * 5000, standard=True),
        # Further real models.
        Workload("resnet50", "the 161 parameters of ResNet-50", architectures.resnet50()),
        _network("bert-base", "the 199 parameters of BERT-base", architectures.bert, 12),
        _network("vit-l16", "the 296 parameters of ViT-L/16", architectures.vit, 24),
        _network("llama-3-8b", "Llama-3-8B", architectures.llama3, 32),
        # What a GPU's step is judged by: memory far beyond any cache; a model that fits beside
        # others; one short launch, which has to fill the chip; norms and biases; more of the cost
        # per tensor; the cost per param group.
        Workload("billion", "8 tensors of 128Mi elements", ((2**27,),) * 8),
        Workload("hundred", "24 tensors of 4Mi elements", ((2**22,),) * 24),
        Workload("one", "1 tensor of 1Mi elements", ((2**20,),)),
        Workload("thousand", "1,000 tensors of 1,024", ((1024,),) * 1000),
        Workload("swarm", "10,000 tensors of 64 elements", ((64,),) * 10_000),
        Workload("groups", "465 groups of a tensor", ((4096,),) * 465, grouped=True),
        *(
            Workload(f"{SWEEP}-{binary(2**power)}", f"1 tensor of {binary(2**power)}i elements",
                     ((2**power,),), family=SWEEP)
            for power in range(10, 31, 2)
        ),
    )
}  # fmt: skip


def choices() -> list[str]:
    """What ``--workloads`` accepts: a family by its one name."""
    return list(dict.fromkeys(workload.group for workload in WORKLOADS.values()))


def members(name: str) -> list[str]:
    """The workloads that a name given to ``--workloads`` stands for."""
    return [key for key, workload in WORKLOADS.items() if name in (key, workload.family)]
