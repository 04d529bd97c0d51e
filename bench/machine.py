"""What a figure is worth nothing without: machine, versions, revision and date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fusedopt


def describe() -> dict[str, Any]:
    """Machine, versions and date of a run, as they stand in the result file."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tier": fusedopt.cpu_tier(),
        "load_average": os.getloadavg()[0],
        "memory_bytes": _meminfo("MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "git_revision": git_revision(),
    }


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def devices() -> list[str]:
    """The devices that steps can be timed on, as torch names them."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def available_memory(device: str = "cpu") -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not say."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return _meminfo("MemAvailable")


def git_revision() -> str | None:
    """Revision of the checkout this file belongs to, ``-dirty`` if edited; None outside one."""
    here = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's checkout: it has to be tracked there.
    if _git("ls-files", "--error-unmatch", here.name, directory=here.parent) is None:
        return None
    return _git("describe", "--always", "--dirty", "--exclude", "*", directory=here.parent)


def _git(*arguments: str, directory: Path) -> str | None:
    """Output of a git command; None when it fails or there is no git."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _meminfo(key: str) -> int | None:
    """One line of /proc/meminfo in bytes; None where there is no such file or line."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
