"""Named lists of parameter shapes: the work an optimizer step has to do.

==========  ============================  ========================================================
name        shapes                        what it shows
==========  ============================  ========================================================
huge        8 of 4Mi elements             memory speed alone
gpt2        the 148 parameters of GPT-2   a real model: sizes from 768 to 38.6M elements
many        1,000 of 4,096                the cost per tensor of a deep or mixture-of-experts model
tiny        5,000 of 64                   the cost per tensor alone
==========  ============================  ========================================================

The others are what a GPU's step is judged by; they run where they are asked for by name.

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

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A list of parameter shapes with a name.

    Attributes:
        name: as given to ``--workloads``.
        summary: what it is, in a few words, for table titles.
        shapes: one shape per parameter, in the model's order.
        grouped: each parameter is a param group of its own.
        standard: runs where no workload is named.
    """

    name: str
    summary: str
    shapes: tuple[Shape, ...]
    grouped: bool = False
    standard: bool = True

    @property
    def elements(self) -> int:
        """Number of parameters, counted as elements."""
        return sum(math.prod(shape) for shape in self.shapes)


def gpt2_shapes(width: int = 768, depth: int = 12) -> tuple[Shape, ...]:
    """Parameter shapes of GPT-2 in the order of the original model (Radford et al., 2019).

    The output projection shares the token embedding's tensor, so it is not listed again.

    Args:
        width: size of the residual stream; 768 in the 124M model.
        depth: number of transformer blocks; 12 in the 124M model.
    """
    vocabulary, context = 50257, 1024
    block: list[Shape] = [
        (width,), (width,),  # ln_1 weight, bias
        (width, 3 * width), (3 * width,),  # attn.c_attn
        (width, width), (width,),  # attn.c_proj
        (width,), (width,),  # ln_2
        (width, 4 * width), (4 * width,),  # mlp.c_fc
        (4 * width, width), (width,),  # mlp.c_proj
    ]  # fmt: skip
    return ((vocabulary, width), (context, width), *(block * depth), (width,), (width,))


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("huge", "8 tensors of 4Mi elements", ((4 * 2**20,),) * 8),
        Workload("gpt2", "the 148 parameters of GPT-2 124M", gpt2_shapes()),
        Workload("many", "1,000 tensors of 4,096 elements", ((4096,),) * 1000),
        Workload("tiny", "5,000 tensors of 64 elements", ((64,),) * 5000),
        Workload("billion", "8 tensors of 128Mi elements", ((2**27,),) * 8, standard=False),
        Workload("hundred", "24 tensors of 4Mi elements", ((2**22,),) * 24, standard=False),
        Workload("one", "1 tensor of 1Mi elements", ((2**20,),), standard=False),
        Workload("thousand", "1,000 tensors of 1,024", ((1024,),) * 1000, standard=False),
        Workload("swarm", "10,000 tensors of 64 elements", ((64,),) * 10_000, standard=False),
        Workload("groups", "465 groups of a tensor", ((4096,),) * 465, True, standard=False),
    )
}
