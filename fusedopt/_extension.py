"""Loads the compiled extension, or raises an error that says why not and how to fix it."""

from __future__ import annotations

import torch

_REMEDY = "run `pip install --no-build-isolation .` (or `make build`) in fusedopt's sources"


def _release(version: str) -> str:
    """The part of a torch version that decides binary compatibility: "2.13.0+cpu" -> "2.13"."""
    return ".".join(version.split(".")[:2])


try:
    from fusedopt import _build_info
except ImportError as error:
    raise ImportError(f"fusedopt's extension has not been built; {_REMEDY}") from error

if _release(_build_info.TORCH_VERSION) != _release(torch.__version__):
    raise ImportError(
        f"fusedopt was built for torch {_build_info.TORCH_VERSION} and cannot run under torch "
        f"{torch.__version__}; to rebuild it for this one, {_REMEDY}"
    )

try:
    import fusedopt._C as _C
except ImportError as error:
    raise ImportError(f"fusedopt's extension cannot be loaded ({error}); {_REMEDY}") from error

__all__ = ["_C", "_build_info"]
