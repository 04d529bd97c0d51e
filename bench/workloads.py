"""Named lists of parameter shapes: the work an optimizer step has to do.

==========  ============================  ========================================================
name        shapes                        what it shows
==========  ============================  ========================================================
huge        8 of 4Mi elements             memory speed alone
gpt2        the 148 parameters of GPT-2   a real model: sizes from 768 to 38.6M elements
many        1,000 of 4,096                the cost per tensor of a deep or mixture-of-experts model
tiny        5,000 of 64                   the cost per tensor alone
==========  ============================  ========================================================

The others run where they are asked for by name: further real models (``resnet50``, ``bert-base``,
``vit-l16``, ``llama-3-8b``), the user's own (`of_model`), a geometric ``sweep`` over sizes from 1Ki
to 1Gi elements, and what a GPU's step is judged by:

==========  ============================  ========================================================
billion     8 of 128Mi elements           memory speed alone, far beyond any cache
hundred     24 of 4Mi elements            the same, of a model that fits beside others
one         1 of 1Mi elements             one short launch: is the chip full?
thousand    1,000 of 1,024                launches and table, at the size of norms and biases
swarm       10,000 of 64                  the cost per tensor alone, more of it
groups      465 groups of one of 4,096    the cost per param group
==========  ============================  ========================================================
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import architectures
from .architectures import Shape


@dataclass(frozen=True)
class Workload:
    """A list of parameter shapes with a name.

    Attributes:
        name: as given to ``--workloads``.
        summary: what it is, in a few words, for table titles.
        shapes: one shape per parameter, in the model's order.
        grouped: each parameter is a param group of its own.
        standard: runs where no workload is named.
        deepen: the shapes at another depth, for models that ``--scale`` can shrink.
        depth: blocks the model has.
        family: the name it is asked for and shown under, together with others.
    """

    name: str
    summary: str
    shapes: tuple[Shape, ...]
    grouped: bool = False
    standard: bool = True
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


def of_model(path: str) -> Workload:
    """The parameters of the user's own model, made by ``module:factory``.

    The model is built on the meta device where it can be, so that its weights take no memory.

    Raises:
        ArgumentTypeError: there is no such factory, or what it makes has no parameters; says why.
    """
    module, _, name = path.partition(":")
    wanted = "wanted: module:factory, a callable without arguments that makes a torch.nn.Module"
    if not module or not name:
        raise argparse.ArgumentTypeError(f"got {path!r}; {wanted}")
    if str(Path.cwd()) not in sys.path:  # as python -m has it, and the console script has not
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), name)
        with torch.device("meta"):
            model = factory()
        parameters = [p for p in model.parameters() if p.requires_grad]
    except Exception as error:  # somebody else's code: it may raise anything
        raise argparse.ArgumentTypeError(
            f"{path!r}: {type(error).__name__}: {error}; {wanted}"
        ) from error
    if not parameters:
        raise argparse.ArgumentTypeError(
            f"{path!r} has no parameters that require gradients; {wanted}"
        )
    summary = f"the {len(parameters)} parameters of {path}"
    return Workload("model", summary, tuple(tuple(p.shape) for p in parameters), standard=False)


SWEEP = "sweep"
SWEEP_SIZES = tuple(2**power for power in range(10, 31, 2))


def _network(
    name: str, summary: str, shapes: Callable[..., tuple[Shape, ...]], depth: int
) -> Workload:
    """A real model whose depth ``--scale`` changes."""
    return Workload(
        name, summary, shapes(), standard=False, depth=depth,
        deepen=lambda blocks: shapes(depth=blocks),
    )  # fmt: skip


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("huge", "8 tensors of 4Mi elements", ((4 * 2**20,),) * 8),
        Workload(
            "gpt2", "the 148 parameters of GPT-2 124M", architectures.gpt2(), depth=12,
            deepen=lambda blocks: architectures.gpt2(depth=blocks),
        ),
        Workload("many", "1,000 tensors of 4,096 elements", ((4096,),) * 1000),
        Workload("tiny", "5,000 tensors of 64 elements", ((64,),) * 5000),
        Workload(
            "resnet50", "the 161 parameters of ResNet-50", architectures.resnet50(), standard=False
        ),
        _network("bert-base", "the 199 parameters of BERT-base", architectures.bert, 12),
        _network("vit-l16", "the 296 parameters of ViT-L/16", architectures.vit, 24),
        _network("llama-3-8b", "Llama-3-8B", architectures.llama3, 32),
        Workload("billion", "8 tensors of 128Mi elements", ((2**27,),) * 8, standard=False),
        Workload("hundred", "24 tensors of 4Mi elements", ((2**22,),) * 24, standard=False),
        Workload("one", "1 tensor of 1Mi elements", ((2**20,),), standard=False),
        Workload("thousand", "1,000 tensors of 1,024", ((1024,),) * 1000, standard=False),
        Workload("swarm", "10,000 tensors of 64 elements", ((64,),) * 10_000, standard=False),
        Workload("groups", "465 groups of a tensor", ((4096,),) * 465, True, standard=False),
        *(
            Workload(
                f"{SWEEP}-{binary(size)}", f"1 tensor of {binary(size)}i elements", ((size,),),
                standard=False, family=SWEEP,
            )
            for size in SWEEP_SIZES
        ),
    )
}  # fmt: skip


def choices() -> list[str]:
    """What ``--workloads`` accepts: a family by its one name."""
    return list(dict.fromkeys(workload.group for workload in WORKLOADS.values()))


def members(name: str) -> list[str]:
    """The workloads that a name given to ``--workloads`` stands for."""
    return [key for key, workload in WORKLOADS.items() if name in (key, workload.family)]
