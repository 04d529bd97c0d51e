"""Peak memory of a step above parameters and gradients, each provider in a process of its own.

In the process of a race, everybody's states lie beside each other and what one frees another takes.
Here a process is started for each provider, which imports the library once and forks for every
task, so that each finds a fresh heap. On a GPU the caching allocator counts exactly, and no fork is
needed (CUDA would not survive it).
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .providers import PROVIDERS, quiet
from .rows import Row, system_table
from .timing import Advance, Step

STEPS = 2  # the first allocates the states, the second has them and the temporaries


def measure(
    kinds: Sequence[Row], providers: Sequence[str], advance: Advance
) -> dict[tuple[str, str, str, str], Row]:
    """Peak bytes by provider, workload, optimizer and dtype, of those who can take a step.

    Args:
        kinds: columns of tasks, with the shapes of their workloads: a process may not know these.
        providers: by name.
        advance: called before each, to move a progress bar.
    """
    found = {}
    for name in providers:
        advance(f"memory / {name}")
        peaks = in_process("spawn", peaks_of, name, kinds) or []
        for kind, peak in zip(kinds, peaks, strict=False):
            if peak is not None:
                key = (name, kind["workload"], kind["optimizer"], kind["dtype"])
                found[key] = {"peak_bytes": peak}
    return found


def in_process(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process of its own; None if that dies."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(sender, function, *arguments))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        child.join()


def answer(sender: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    """Sends what a function gives: nothing if it raises, for it runs other libraries' code."""
    with quiet(), contextlib.suppress(Exception):
        sender.send(function(*arguments))


def peaks_of(provider: str, kinds: Sequence[Row]) -> list[int | None]:
    """The peak of each kind, in forks of this process, which has loaded what a step needs."""
    importlib.import_module("torch._dynamo")  # once for all forks: optimizers load it late
    for name in {kind["optimizer"] for kind in kinds}:  # and so does the library
        with contextlib.suppress(Exception):
            PROVIDERS[provider].optimizer(name, [torch.nn.Parameter(torch.ones(1))], lr=1.0)
    if kinds[0]["device"] == "cpu":
        return [in_process("fork", peak_of, provider, kind) for kind in kinds]
    return [peak_of(provider, kind) for kind in kinds]


def peak_of(name: str, kind: Row) -> int | None:
    """Peak of one kind, in this process; None where the provider has no step for it."""
    provider, optimizer, shapes = PROVIDERS[name], kind["optimizer"], kind["shapes"]
    where = {"dtype": getattr(torch, kind["dtype"]), "device": kind["device"]}
    if provider.unavailable(optimizer, **where, tensors=len(shapes)):
        return None
    # Full of ones, not normal: that takes as long as all the rest.
    gradients = [torch.ones(shape, **where) for shape in shapes]
    # A first step elsewhere loads what a library loads late, code that is no memory of the step's.
    provider.entrant(optimizer, [torch.ones(2, **where)]).call()
    step = provider.entrant(optimizer, gradients, kind["grouped"]).call
    return peak_on_cpu(step) if kind["device"] == "cpu" else peak_on_gpu(step)


def peak_on_cpu(step: Step) -> int | None:
    """Bytes by which resident memory grows at most during steps; None where no kernel tells."""

    def status(key: str) -> int:
        return int(system_table("/proc/self/status")[key].split()[0]) * 1024

    try:
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(STEPS):
            step()
        return max(0, status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def peak_on_gpu(step: Step) -> int:
    """Bytes by which allocated memory grows at most during steps."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
