"""The parts of the GPU check that need the built package; `gpu_check` runs each in a process.

``python -m fusedopt.bench.gpu_parts PART FILE [--rehearse]`` writes what it found to FILE, a row at
a time, so that a part which is cut off keeps what it measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from timeit import default_timer
from typing import Any

import torch

import fusedopt
from fusedopt._extension import _C

from . import optimizers, pipeline, rows, step, transfer
from .providers import PROVIDERS, parameters_with
from .rows import Row
from .timing import measure, time_once
from .workloads import WORKLOADS

OWN = ("torch-default", "torch-foreach", "torch-fused", "fusedopt", "fusedopt-triton", "floor")
# (workload, optimizer, dtype) of the step job and (workload, chain) of the pipeline job, by what
# they are worth if the time runs out.
FIGURES = (
    *(("billion", "AdamW", "float32"), ("swarm", "AdamW", "float32")),
    *(("thousand", "AdamW", "float32"), ("groups", "AdamW", "float32")),
    *(("one", "AdamW", "float32"), ("hundred", "RMSprop", "float32")),
    *(("gpt2", "AdamW", "float32"), ("huge", "AdamW", "bfloat16")),
    *(("huge", "SGD", "float32"), ("huge", "Adagrad", "float32")),
    *(("huge", "Adam", "float32"), ("many", "AdamW", "float32")),
)
CHAINS = (
    *(("hundred", "clip"), ("gpt2", "clip"), ("gpt2", "ema"), ("many", "clip")),
    *(("gpt2", "clip-none"), ("swarm", "clip"), ("one", "ema")),
)
REHEARSED = ("one", "groups")
ROUNDS = 20
SECONDS = 1.5  # that a step may take over all rounds before it sits some out
STORAGES = (
    *((torch.float32, None), (torch.float64, None), (torch.bfloat16, None)),
    *((torch.bfloat16, torch.float32), (torch.float16, None), (torch.float16, torch.float32)),
)
SIZES = (0, 1, 7, 64, 4097, 70_001, 1_000_003)


def figures(device: str, rehearse: bool) -> Iterator[Row]:
    """Times of the step beside torch's and beside a kernel of the same traffic."""
    for kind in FIGURES:
        if rehearse and kind[0] not in REHEARSED:
            continue
        # The temporaries of foreach, torch's default on a GPU, are large.
        wanted = OWN[2:] if kind[0] == "billion" else OWN
        yield from measure(step.task(*kind, device, wanted), 2 if rehearse else ROUNDS, SECONDS)


def chains(device: str, rehearse: bool) -> Iterator[Row]:
    """Times of the step and what is around it, as torch's chain and as one call."""
    for workload, chain in CHAINS:
        if rehearse and workload not in REHEARSED:
            continue
        task = pipeline.task(workload, chain, "AdamW", device)
        yield from measure(task, 2 if rehearse else ROUNDS, SECONDS)


def graphs(device: str, rehearse: bool) -> Iterator[Row]:
    """The step captured in a CUDA graph, replayed."""
    for workload in ("swarm", "thousand"):
        for name in ("fusedopt", "fusedopt-triton", "torch-fused"):
            params = parameters_with(
                step.make_gradients(WORKLOADS[workload], torch.float32, device)
            )
            flags = {"capturable": True} if "torch" in name else {"fused": True, "capturable": True}
            made = PROVIDERS[name].stepping("AdamW", params, False, **flags)
            made.step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made.step()
            for _ in range(3):
                graph.replay()
            ms = statistics.median(time_once(graph.replay) for _ in range(50)) * 1e3
            yield {"job": "graph", "workload": workload, "optimizer": "AdamW",
                   "dtype": "float32", "provider": name, "ms": ms}  # fmt: skip


def transfers(device: str, rehearse: bool) -> Iterator[Row]:
    """Rates of batches on their way to the device, beside a memcpy's."""
    yield from map(transfer.measure, transfer.SIZES)


def walk(made: Any, params: list[torch.nn.Parameter], steps: int) -> None:
    """Takes steps with random gradients, the same on every device."""
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param, device="cpu").to(param.device)
        made.step()


def trajectory(
    name: str, backend: str, dtype: torch.dtype, state_dtype: torch.dtype | None, steps: int
) -> list[torch.Tensor]:
    """All parameters and states after a few steps of every formula of an optimizer."""
    where = "cpu" if backend == "cpu" else "cuda"
    found: list[torch.Tensor] = []
    for kwargs in optimizers.variants(name):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n).to(where, dtype)) for n in SIZES]
        kinds = {"backend": backend, "state_dtype": state_dtype}
        made = getattr(fusedopt, name)(params, **kinds, **kwargs)
        walk(made, params, steps)
        for param in params:
            states = [v for v in made.state.get(param, {}).values() if torch.is_tensor(v)]
            found += [tensor.detach().cpu() for tensor in (param, *states)]
    return found


def bits(device: str, rehearse: bool) -> Iterator[Row]:
    """Every rule and storage type by every backend and by the CPU's, element by element."""
    for name in optimizers.names():
        for dtype, state_dtype in STORAGES:
            kinds = (dtype, state_dtype, 2 if rehearse else 4)
            wanted = trajectory(name, "cpu", *kinds)
            for backend in ("cpu",) if rehearse else ("cuda", "triton"):
                found = trajectory(name, backend, *kinds)
                pairs = [(a.view(-1), b.view(-1)) for a, b in zip(found, wanted, strict=True)]
                yield {"job": "bits", "optimizer": name, "backend": backend, "dtype": str(dtype),
                       "state_dtype": str(state_dtype),
                       "compared": sum(a.numel() for a, _ in pairs),
                       "differing": sum(int((a != b).sum()) for a, b in pairs)}  # fmt: skip


IN_THE_STEP = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grads": True,
               "accumulation_steps": 2}  # fmt: skip


def drive_some(name: str, device: str, dtype: torch.dtype, **kwargs: Any) -> None:
    """Heads, tails, strides, skips, scalars on the device."""
    base = torch.randn(3000, device=device, dtype=dtype)
    views = [base[1:38], base[64:1100], base[1100:1700].view(20, 30).t(), base[1700:1700]]
    params = [torch.nn.Parameter(view) for view in views]
    walk(getattr(fusedopt, name)(params, **kwargs), params, 2)
    if not PROVIDERS["torch-fused"].unavailable(name, device="cpu"):
        made = getattr(fusedopt, name)(params, fused=True, **kwargs)
        made.grad_scale = torch.full((), 2.0, device=device)
        made.found_inf = torch.zeros((), device=device)
        walk(made, params, 2)
    walk(getattr(fusedopt, name)(params, **IN_THE_STEP, **kwargs), params, 4)  # two windows


def drive(device: str, rehearse: bool, seconds: float = math.inf) -> Iterator[Row]:
    """A short run of the paths of both backends' kernels, until `seconds` are over.

    How far it gets under compute-sanitizer nobody knows, and one that is cut off tells nothing.
    """
    end = default_timer() + seconds
    for backend in ("cpu",) if rehearse else ("cuda", "triton"):
        for name in optimizers.names():
            for dtype in (torch.float32, torch.bfloat16):
                if default_timer() > end:
                    return
                for kwargs in optimizers.variants(name):
                    drive_some(name, device, dtype, backend=backend, **kwargs)
                yield {"job": "drive", "optimizer": name, "backend": backend, "dtype": str(dtype)}


PARTS = {"figures": figures, "pipeline": chains, "graphs": graphs, "load": transfers, "bits": bits,
         "drive": drive}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, briefly")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for drive: when to stop")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearse else "cuda"
    if not options.rehearse and _C.cuda_launcher() is None:
        parser.error("this build has no CUDA kernels; --rehearse runs on the CPU")
    found, where = [], rows.where(device)
    more = {"seconds": options.seconds} if options.part == "drive" else {}
    for row in PARTS[options.part](device, options.rehearse, **more):
        found.append({**row, **where})
        rows.write(options.file, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
