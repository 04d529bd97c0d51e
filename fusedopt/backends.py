"""The backend table: which kernels exist in this build, and which device they serve."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

import fusedopt.triton_kernels as triton_kernels
from fusedopt._extension import _C, _build_info


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: What ``backend=`` takes.
        device_types: The ``torch.device.type`` of the parameters it updates.
        missing: Returns why it cannot be used here, "" when it can.
        remedy: What to do about that.
        launcher: Returns the capsule through which a plan launches kernels on a device; None for
            the CPU driver.
    """

    name: str
    device_types: tuple[str, ...]
    missing: Callable[[], str]
    remedy: str
    launcher: Callable[[], object | None] = lambda: None


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for these architectures run on a device of this compute capability.

    Machine code runs on later minor versions of its major one, PTX on all later ones; what an "a"
    marks runs on that very device alone.

    Example:
        >>> covers("8.0 9.0 12.0+PTX", (8, 6)), covers("8.0 9.0 12.0+PTX", (7, 5))
        (True, False)
        >>> covers("9.0+PTX", (10, 3)), covers("9.0a", (9, 0)), covers("10.0a", (10, 3))
        (True, True, False)
    """
    for architecture in architectures.split():
        number, _, ptx = architecture.partition("+")
        version = tuple(int(part) for part in number.rstrip("af").split("."))
        if number.endswith("a"):
            runs = version == capability
        else:
            runs = version <= capability and (bool(ptx) or version[0] == capability[0])
        if runs:
            return True
    return False


def _interpreting() -> bool:
    """Whether Triton will run kernels in its interpreter; asked without importing it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _triton_missing() -> str:
    return triton_kernels.missing()


@cache
def _triton_launcher() -> object:
    from fusedopt.triton_kernels.launcher import Launcher  # which imports Triton

    return _C.triton_launcher(Launcher())


def _cuda_missing() -> str:
    if _C.cuda_launcher() is None:
        return f"this build has no CUDA kernels ({_build_info.CUDA_MISSING})"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not covers(_build_info.CUDA_ARCHITECTURES, capability):
            version = ".".join(map(str, capability))
            return (
                f"device {index} ({torch.cuda.get_device_name(index)}) has compute capability "
                f"{version}, the kernels were built for {_build_info.CUDA_ARCHITECTURES}"
            )
    return ""


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", ("cpu",), lambda: "", ""),
        Backend(
            "cuda",
            ("cuda",),
            _cuda_missing,
            "use backend='auto', with which torch.optim steps parameters on such devices, or "
            "install fusedopt where there are nvcc and a CUDA build of torch, with the device's "
            "architecture in TORCH_CUDA_ARCH_LIST",
            _C.cuda_launcher,
        ),
        Backend(
            "triton",
            ("cpu",) if _interpreting() else ("cuda", "xpu"),
            _triton_missing,
            "use backend='auto', with which torch.optim steps parameters on such devices, or "
            "install triton, which comes with a CUDA, ROCm or XPU build of torch",
            _triton_launcher,
        ),
    )
}


def check_backend(name: str) -> str:
    """Returns ``name`` if an optimizer can be given it.

    Raises:
        ValueError: ``name`` is neither "auto" nor in the table.
        RuntimeError: the backend is not available here; the message says why.
    """
    if name == "auto":
        return name
    if name not in BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"backend={name!r} is not a backend; use one of {known}")
    backend = BACKENDS[name]
    reason = backend.missing()
    if reason:
        raise RuntimeError(f"backend={name!r} is not available: {reason}; {backend.remedy}")
    return name


def backend_for(device_type: str) -> Backend | None:
    """The first backend of the table that is available and serves the device; None without one."""
    for backend in BACKENDS.values():
        if device_type in backend.device_types and not backend.missing():
            return backend
    return None


def cpu_tiers() -> list[str]:
    """The CPU instruction tiers this machine can run, slowest first.

    Example:
        >>> import fusedopt
        >>> fusedopt.cpu_tiers()[0]
        'generic'
    """
    return _C.available_tiers()


def cpu_tier() -> str:
    """The CPU instruction tier in use: the fastest, or what ``FUSEDOPT_CPU_TIER`` names.

    Raises:
        RuntimeError: the environment variable names a tier this machine cannot run.

    Example:
        >>> import fusedopt
        >>> fusedopt.cpu_tier() in fusedopt.cpu_tiers()
        True
    """
    return _C.current_tier()
