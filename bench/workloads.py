"""Named lists of parameter shapes: the work an optimizer step has to do.

=======  ===============================  ========================================================
name     shapes                           what it shows
=======  ===============================  ========================================================
huge     8 of 4Mi elements                memory speed alone
gpt2     the 148 parameters of GPT-2    a real model: sizes from 768 to 38.6M elements
many     1,000 of 4,096                   the cost per tensor of a deep or mixture-of-experts model
tiny     5,000 of 64                      the cost per tensor alone
=======  ===============================  ========================================================
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
    """

    name: str
    summary: str
    shapes: tuple[Shape, ...]

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
    )
}
