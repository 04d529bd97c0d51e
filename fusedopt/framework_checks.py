"""Detects gradient accumulation by a training framework, with which counting here counts twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Modules that step an optimizer of a share of the parameters, or of flat pieces of them.
_SHARDING = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
    "deepspeed.runtime": "DeepSpeed",
    "fairscale.optim.oss": "FairScale's OSS",
}


def check_no_framework_accumulates(closure: Callable[[], Any] | None = None) -> None:
    """Raises RuntimeError if Accelerate or Lightning accumulates gradients.

    What they say of themselves is asked where a window begins. Accelerate's state counts while one
    of its data loaders is being read, because the settings alone outlive what they were made for.
    The same state tells of transformers' Trainer, but only in the middle of the Trainer's window.

    Args:
        closure: What ``step()`` was given. Lightning's, a `functools.partial`, knows its module.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and (state := accelerate.GradientState()).in_dataloader:
        if state.num_steps > 1:
            raise _twice("Accelerate", f"gradient_accumulation_steps={state.num_steps}")
        if not state.sync_gradients:
            raise _twice("transformers' Trainer", "gradient_accumulation_steps")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if (lightning := sys.modules.get(name)) is None:
            continue
        for argument in getattr(closure, "args", ()):
            if isinstance(argument, lightning.LightningModule):
                steps = argument.trainer.accumulate_grad_batches
                if steps > 1:
                    raise _twice("Lightning", f"accumulate_grad_batches={steps}")


def check_no_shards(params: Iterable[Tensor]) -> None:
    """Raises RuntimeError if it can be seen that other ranks have other parts of the gradients.

    FSDP1 marks its parameters; who hands out whole parameters is known by its calls.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    who = ""
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        who = "FullyShardedDataParallel"
    frame = sys._getframe()
    while frame is not None and not who:
        module = frame.f_globals.get("__name__", "")
        who = next((name for prefix, name in _SHARDING.items() if module.startswith(prefix)), "")
        frame = frame.f_back  # type: ignore[assignment]
    if who:
        raise RuntimeError(
            f"max_grad_norm, skip_nonfinite and fusedopt.GradScaler under {who}, whose ranks hold "
            "different parts of the gradients as plain tensors: every rank would clip and skip by "
            "its own part. Set the optimizer's norm_group to the process group of the shards, or "
            "to [] where every rank has everything (NO_SHARD). Nothing was changed"
        )


def _twice(who: str, option: str) -> RuntimeError:
    return RuntimeError(
        f"gradients are accumulated twice: by {who} ({option}), which calls step() once a window, "
        "and by this optimizer; use one of them. Nothing was changed"
    )
