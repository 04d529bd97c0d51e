"""The backend table: which kernels exist in this build, and which device they serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusedopt._extension import _C


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: What ``backend=`` takes.
        device_types: The ``torch.device.type`` of the parameters it updates.
        missing: Returns why it cannot be used here, "" when it can.
        remedy: What to do about that.
    """

    name: str
    device_types: tuple[str, ...]
    missing: Callable[[], str]
    remedy: str


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", ("cpu",), lambda: "", ""),
        Backend(
            "cuda",
            ("cuda",),
            lambda: "this version of fusedopt has no CUDA kernels",
            "use backend='auto': torch.optim steps the parameters on that device",
        ),
        Backend(
            "triton",
            ("cuda",),
            lambda: "this version of fusedopt has no Triton kernels",
            "use backend='auto': torch.optim steps the parameters on that device",
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


def backend_for(device_type: str) -> str | None:
    """The first backend of the table that is available and serves the device; None without one."""
    for backend in BACKENDS.values():
        if device_type in backend.device_types and not backend.missing():
            return backend.name
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
