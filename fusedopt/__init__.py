"""Multi-tensor fused optimizers: torch.optim's classes with a step that runs at memory speed.

Change one import (``from torch.optim import AdamW`` to ``from fusedopt import AdamW``);
constructors, errors, ``state_dict`` and trajectories stay torch's. ``python -m fusedopt`` prints
what was built and which backend each device gets.
"""

from fusedopt import functional
from fusedopt.adagrad import Adagrad
from fusedopt.adam import Adam
from fusedopt.adamw import AdamW
from fusedopt.backends import cpu_tier, cpu_tiers
from fusedopt.data_parallel import accumulating
from fusedopt.grad_scaler import GradScaler
from fusedopt.in_backward import step_in_backward
from fusedopt.rmsprop import RMSprop
from fusedopt.routing import Route
from fusedopt.sgd import SGD

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "GradScaler",
    "RMSprop",
    "Route",
    "accumulating",
    "cpu_tier",
    "cpu_tiers",
    "functional",
    "step_in_backward",
]
