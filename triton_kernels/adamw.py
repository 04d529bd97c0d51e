"""AdamW, Adam with decoupled weight decay: the twin of ``csrc/rules/adamw.h``.

The arithmetic is Adam's, with the group's ``decoupled_weight_decay``, which torch.optim.AdamW sets.
"""

from .adam import Hyper, Scalars, prepare, update

__all__ = ["Hyper", "Scalars", "prepare", "update"]
