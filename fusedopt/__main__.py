"""The doctor: ``python -m fusedopt`` says what was built, what each device gets, and why."""

from __future__ import annotations

import platform
import sys

import torch

import fusedopt
from fusedopt._extension import _C, _build_info
from fusedopt.backends import BACKENDS, backend_for


def _tiers() -> str:
    available = _C.available_tiers()
    try:
        used = fusedopt.cpu_tier()
    except RuntimeError as error:
        return f"none: {error}"
    names = [f"{tier} (in use)" if tier == used else tier for tier in available]
    names += [
        f"{tier} (built, not supported by this CPU)"
        for tier in _C.built_tiers()
        if tier not in available
    ]
    return ", ".join(names)


def _cuda() -> str:
    if _build_info.CUDA_MISSING:
        return f"not built: {_build_info.CUDA_MISSING}"
    return f"CUDA {_build_info.CUDA_TOOLKIT}, for {_build_info.CUDA_ARCHITECTURES}"


def _choice(device: str) -> str:
    used = backend_for(device)
    if used is None:
        return "torch.optim's own step, because no backend for it is available"
    serving = [backend for backend in BACKENDS.values() if device in backend.device_types]
    preferred = [backend.name for backend in serving[: serving.index(used)]]
    if preferred:
        return f"{used.name} kernels, because backend {' and '.join(preferred)} is not available"
    return f"{used.name} kernels"


def _devices() -> list[str]:
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices.append(accelerator.type)
    return devices


def report() -> list[tuple[str, str]]:
    """The doctor's findings as (subject, finding) lines."""
    lines = [
        ("fusedopt", fusedopt.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", f"{torch.__version__}, built for {_build_info.TORCH_VERSION}"),
        ("compiler", _build_info.COMPILER),
        ("CUDA kernels", _cuda()),
        ("GPU graphs", _C.gpu_runtime() or "no CUDA or HIP runtime library is loaded"),
        ("rules", ", ".join(_C.rules())),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
        ("CPU tiers", _tiers()),
        ("", "FUSEDOPT_CPU_TIER=<tier> forces one"),
    ]
    for backend in BACKENDS.values():
        reason = backend.missing()
        finding = f"not available: {reason}; {backend.remedy}" if reason else "available"
        lines.append((f"backend {backend.name}", finding))
    for device in _devices():
        lines.append((f"device {device}", _choice(device)))
    return lines


def main() -> None:
    """Prints the report."""
    for subject, finding in report():
        print(f"{subject:16}{finding}")


if __name__ == "__main__":
    main()
