"""Peak memory of a step above parameters and gradients, each provider in a process of its own.

In the process of a race, everybody's states lie beside each other and what one frees another takes.
Here a process is started for each provider, which imports the library once and forks for every
row, so that each row, too, finds a fresh heap. On a GPU the caching allocator counts exactly, and
no fork is needed (CUDA would not survive it).

``python -m fusedopt.bench.memory PROVIDER TASKS PEAKS`` reads tasks and writes a line for each.
"""

from __future__ import annotations

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

from .peers import Peer
from .providers import PROVIDERS, too_many
from .step import DTYPES, Task
from .timing import Step
from .workloads import WORKLOADS

STEPS = 2  # the first allocates the states, the second has them and the temporaries


def measure(
    tasks: Sequence[Task], providers: Sequence[str], advance: Callable[[str], None]
) -> dict[Task, dict[str, int]]:
    """Peak bytes by task and provider; a provider that cannot take a step is left out."""
    found: dict[Task, dict[str, int]] = {task: {} for task in tasks}
    for provider in providers:
        advance(f"memory / {provider}")
        for task, peak in zip(tasks, in_fresh_process(provider, tasks), strict=False):
            if peak is not None:
                found[task][provider] = peak
    return found


def in_fresh_process(provider: str, tasks: Sequence[Task]) -> list[int | None]:
    """Peaks of one provider, in the order of the tasks; shorter if its process died."""
    # Shapes go along: a workload may be of this command line alone.
    content = [
        {"task": dataclasses.asdict(task), "shapes": WORKLOADS[task.workload].shapes,
         "grouped": WORKLOADS[task.workload].grouped}
        for task in tasks
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "tasks.json"), Path(folder, "peaks.jsonl")
        asked.write_text(json.dumps(content))
        command = [sys.executable, "-m", "fusedopt.bench.memory", provider, str(asked), str(told)]
        subprocess.run(command, capture_output=True)
        lines = told.read_text().splitlines() if told.exists() else []
    return [json.loads(line) for line in lines]


def peak_on_cpu(step: Step) -> int | None:
    """Bytes by which resident memory grows at most during steps; None where no kernel tells."""
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(STEPS):
            step()
        return max(0, _status("VmHWM") - before)
    except OSError:
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


def _status(key: str) -> int:
    """One line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak_of(provider: str, entry: dict[str, Any]) -> int | None:
    """Peak of one task, in this process; None where the provider has no step for it."""
    task, shapes = Task(**entry["task"]), entry["shapes"]
    dtype = DTYPES[task.dtype]
    taker = PROVIDERS[provider]
    if too_many(provider, len(shapes)) or taker.unavailable(task.optimizer, dtype, task.device):
        return None
    # Full of ones, not normal: that takes as long as all the rest.
    gradients = [torch.ones(shape, dtype=dtype, device=task.device) for shape in shapes]
    # A first step elsewhere loads what a library loads late, code that is no memory of the step's.
    taker.build(task.optimizer, [torch.ones(2, dtype=dtype, device=task.device)]).step()
    step = taker.build(task.optimizer, gradients, entry["grouped"]).step
    return peak_on_cpu(step) if task.device == "cpu" else peak_on_gpu(step)


def in_fork(provider: str, entry: dict[str, Any], told: Path) -> None:
    """Adds the peak of one task to the file, from a process that ends with it."""
    child = os.fork()
    if child == 0:
        peak = None
        try:
            peak = peak_of(provider, entry)
        finally:
            with told.open("a") as file:
                file.write(f"{json.dumps(peak)}\n")
            os._exit(0)
    os.waitpid(child, 0)


def main(arguments: Sequence[str]) -> int:
    """Measures the tasks of one file by one provider."""
    provider, asked, told = arguments[0], Path(arguments[1]), Path(arguments[2])
    taker, entries = PROVIDERS[provider], json.loads(asked.read_text())
    importlib.import_module("torch._dynamo")  # once for all forks: optimizers load it late
    for name in {entry["task"]["optimizer"] for entry in entries}:
        if isinstance(taker, Peer) and taker.offers(name, entries[0]["task"]["device"]):
            taker.load(name)
    for entry in entries:
        if entry["task"]["device"] == "cpu":
            in_fork(provider, entry, told)
        else:
            with told.open("a") as file:
                file.write(f"{json.dumps(peak_of(provider, entry))}\n")
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
