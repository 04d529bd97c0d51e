"""Peak memory of a step above parameters and gradients, each provider in a process of its own.

In the process of a race, everybody's states lie beside each other and what one frees another takes.
Here a process is started for each provider, which imports the library once and forks for every
task, so that each finds a fresh heap. On a GPU the caching allocator counts exactly, and no fork is
needed (CUDA would not survive it).

``python -m fusedopt.bench.memory PROVIDER TASKS PEAKS`` reads tasks and writes a line for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .providers import PROVIDERS, why_not
from .step import DTYPES, Task
from .timing import Step
from .workloads import WORKLOADS

STEPS = 2  # the first allocates the states, the second has them and the temporaries


def measure(
    tasks: Sequence[Task], providers: Sequence[str], advance: Callable[[str], None]
) -> dict[tuple[str, Task], int]:
    """Peak bytes by provider and task; a provider that cannot take a step is left out."""
    # Shapes go along: a workload may be of this command line alone.
    content = [
        {"task": dataclasses.asdict(task), "shapes": WORKLOADS[task.workload].shapes,
         "grouped": WORKLOADS[task.workload].grouped}
        for task in tasks
    ]  # fmt: skip
    found = {}
    for provider in providers:
        advance(f"memory / {provider}")
        with tempfile.TemporaryDirectory() as folder:
            asked, told = Path(folder, "tasks.json"), Path(folder, "peaks.jsonl")
            asked.write_text(json.dumps(content))
            module = "fusedopt.bench.memory"
            command = [sys.executable, "-m", module, provider, str(asked), str(told)]
            subprocess.run(command, capture_output=True)
            lines = told.read_text().splitlines() if told.exists() else []
        peaks = [json.loads(line) for line in lines]  # fewer than tasks if the process died
        found |= {(provider, task): peak for task, peak in zip(tasks, peaks, strict=False)
                  if peak is not None}  # fmt: skip
    return found


def peak_on_cpu(step: Step) -> int | None:
    """Bytes by which resident memory grows at most during steps; None where no kernel tells."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

    try:
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(STEPS):
            step()
        return max(0, status("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def peak_on_gpu(step: Step) -> int:
    """Bytes by which allocated memory grows at most during steps."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_of(provider: str, entry: dict[str, Any]) -> int | None:
    """Peak of one task, in this process; None where the provider has no step for it."""
    task, shapes = Task(**entry["task"]), entry["shapes"]
    dtype, taker = DTYPES[task.dtype], PROVIDERS[provider]
    if why_not(provider, task.optimizer, dtype, task.device, len(shapes)):
        return None
    # Full of ones, not normal: that takes as long as all the rest.
    gradients = [torch.ones(shape, dtype=dtype, device=task.device) for shape in shapes]
    # A first step elsewhere loads what a library loads late, code that is no memory of the step's.
    taker.build(task.optimizer, [torch.ones(2, dtype=dtype, device=task.device)]).step()
    step = taker.build(task.optimizer, gradients, entry["grouped"]).step
    return peak_on_cpu(step) if task.device == "cpu" else peak_on_gpu(step)


def main(provider: str, asked: Path, told: Path) -> None:
    """Measures the tasks of one file by one provider."""

    def tell(entry: dict[str, Any]) -> None:
        peak = None
        try:
            peak = peak_of(provider, entry)
        finally:
            with told.open("a") as file:
                file.write(f"{json.dumps(peak)}\n")

    entries = json.loads(asked.read_text())
    importlib.import_module("torch._dynamo")  # once for all forks: optimizers load it late
    for name in {entry["task"]["optimizer"] for entry in entries}:  # and so does the library
        with contextlib.suppress(Exception):
            PROVIDERS[provider].optimizer(name, [torch.nn.Parameter(torch.ones(1))], lr=1.0)
    for entry in entries:
        if entry["task"]["device"] != "cpu":
            tell(entry)
            torch.cuda.empty_cache()
        elif (child := os.fork()) == 0:
            try:
                tell(entry)
            finally:
                os._exit(0)
        else:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
