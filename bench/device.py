"""What one step does on a GPU, and what it costs the host: two times that a wall clock blends."""

from __future__ import annotations

import statistics
from timeit import default_timer  # torch.utils.benchmark's waits for the device
from typing import Any

import torch

from .timing import Step


def nothing() -> None:
    """What a step needs before it that leaves its gradients alone."""


def profile(step: Step, repeats: int = 5, before: Step = nothing) -> dict[str, Any]:
    """What one step does on the device: kernels, copies, and their microseconds.

    With `before`, which is not to be seen, there can be but one repeat.
    """
    before()
    step()
    before()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    return {
        "kernels": (len(events) - len(copies)) / repeats,
        "copies": len(copies) / repeats,
        "device_us": sum(event.device_time_total for event in events) / repeats,
    }


def host_microseconds(step: Step, repeats: int = 20, before: Step = nothing) -> float:
    """Median time until a step's call returns, with an idle device before it."""
    times = []
    for _ in range(repeats):
        before()
        torch.cuda.synchronize()
        start = default_timer()
        step()
        times.append(default_timer() - start)
    return statistics.median(times) * 1e6


def look(step: Step) -> dict[str, Any]:
    """All of it: kernels, copies, and the microseconds of device and host."""
    host = host_microseconds(step)
    return {**profile(step), "host_us": host}
