"""Other libraries with an optimizer step: what makes each a `Provider`.

By name as given to ``--providers``: the title in tables, the library as imported, its classes by
torch's names with the keywords that make them do the same, and other attributes of a `Provider`.
"""

from __future__ import annotations

from typing import Any

Classes = dict[str, tuple[str, dict[str, Any]]]


def _named(module: str, names: str, form: str, **keywords: Any) -> Classes:
    """Classes that are called as torch's, in the form ``Flash{}`` or ``{}32bit``."""
    return {name: (f"{module}.{form.format(name)}", keywords) for name in names.split()}


def _adams(path: str, **not_decoupled: bool) -> Classes:
    """A class that is AdamW, and Adam with a keyword."""
    return {"Adam": (path, not_decoupled), "AdamW": (path, {})}


GPU: dict[str, Any] = {"devices": ("cuda",)}
PEERS: dict[str, tuple[str, str, Classes, dict[str, Any]]] = {
    "apex": (
        "apex", "apex",
        {**_adams("apex.optimizers.FusedAdam", adam_w_mode=False),
         **_named("apex.optimizers", "SGD Adagrad", "Fused{}")},
        {**GPU, "remedy": "its README says how to build it; PyPI's apex is another"},
    ),
    "transformer-engine": (
        "TransformerEngine", "transformer_engine",
        {**_adams("transformer_engine.pytorch.optimizers.FusedAdam", adam_w_mode=False),
         "SGD": ("transformer_engine.pytorch.optimizers.FusedSGD", {})},
        {**GPU, "remedy": "pip install transformer-engine[pytorch], beside a CUDA torch"},
    ),
    "deepspeed": (
        "DeepSpeed FusedAdam", "deepspeed",
        _adams("deepspeed.ops.adam.FusedAdam", adam_w_mode=False), GPU,
    ),
    "deepspeed-cpu": (
        "DeepSpeed on the CPU", "deepspeed",
        {**_adams("deepspeed.ops.adam.DeepSpeedCPUAdam", adamw_mode=False),
         "Adagrad": ("deepspeed.ops.adagrad.DeepSpeedCPUAdagrad", {})},
        {"devices": ("cpu",)},
    ),
    "bitsandbytes": (
        "bitsandbytes 32-bit", "bitsandbytes",
        _named("bitsandbytes.optim", "SGD Adagrad RMSprop Adam AdamW", "{}32bit"), {},
    ),
    # Off by default: it compiles for every shape of tensor, for seconds each.
    "torchao": (
        "torchao", "torchao", {"AdamW": ("torchao.optim.adam._AdamW", {})},
        {"default": False, "most_tensors": 200},
    ),
    "optimi": ("torch-optimi", "optimi", _named("optimi", "SGD Adam AdamW", "{}"), {}),
    "flashoptim": (
        "FlashOptim", "flashoptim",
        _named("flashoptim", "SGD Adam AdamW", "Flash{}", quantize=False, master_weight_bits=None),
        GPU,
    ),
}  # fmt: skip
