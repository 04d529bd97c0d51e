"""The parts of the GPU check that need the built package; `gpu_check` runs each in a process.

``python -m fusedopt.bench.gpu_parts PART FILE [--rehearse]`` writes what it found to FILE as JSON,
a row at a time, so that a part which is cut off keeps what it measured.
"""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from timeit import default_timer as _now  # torch.utils.benchmark's waits for the device
from typing import Any

import torch

import fusedopt
from fusedopt._extension import _C

from . import load, optimizers, pipeline, rows, step
from .providers import OWN, PROVIDERS, imported
from .rows import Row
from .timing import time_once
from .workloads import WORKLOADS

# (workload, optimizer, dtype), by what they are worth if the time runs out.
FIGURES = (
    ("billion", "AdamW", "float32"),
    ("swarm", "AdamW", "float32"),
    ("thousand", "AdamW", "float32"),
    ("groups", "AdamW", "float32"),
    ("one", "AdamW", "float32"),
    ("hundred", "RMSprop", "float32"),
    ("gpt2", "AdamW", "float32"),
    ("huge", "AdamW", "bfloat16"),
    ("huge", "SGD", "float32"),
    ("huge", "Adagrad", "float32"),
    ("huge", "Adam", "float32"),
    ("many", "AdamW", "float32"),
)
# (workload, chain) of the pipeline job, likewise.
CHAINS = (
    ("hundred", "clip"),
    ("gpt2", "clip"),
    ("gpt2", "ema"),
    ("many", "clip"),
    ("gpt2", "clip-none"),
    ("swarm", "clip"),
    ("one", "ema"),
)
ROUNDS = 20
SECONDS = 1.5  # that a step may take over all rounds before it sits some out


# ---- how long a step takes -----------------------------------------------------------------------


def figures(device: str, rehearse: bool) -> Iterator[Row]:
    """Times of the step beside torch's and beside a kernel of the same traffic."""
    for workload, optimizer, dtype in FIGURES:
        if rehearse and workload not in ("one", "groups"):
            continue
        wanted = list(OWN)  # the Triton kernels too
        if workload == "billion":  # the temporaries of foreach, torch's default on a GPU, are large
            wanted = [name for name in wanted if name not in ("torch-default", "torch-foreach")]
        task = step.Task(workload, optimizer, dtype, device)
        for found in step.measure([task], wanted, 2 if rehearse else ROUNDS, SECONDS):
            yield from found
        if device == "cuda":
            torch.cuda.empty_cache()


def chains(device: str, rehearse: bool) -> Iterator[Row]:
    """Times of the step and what is around it, as torch's chain and as one call."""
    for workload, chain in CHAINS:
        if rehearse and workload != "one":
            continue
        task = pipeline.Task(workload, chain, "AdamW", device)
        for found in pipeline.measure([task], 2 if rehearse else ROUNDS, SECONDS):
            yield from found
        if device == "cuda":
            torch.cuda.empty_cache()


def graphs(device: str, rehearse: bool) -> Iterator[Row]:
    """The step captured in a CUDA graph, replayed."""
    for workload in ("swarm", "thousand"):
        for name in ("fusedopt", "fusedopt-triton", "torch-fused"):
            provider = PROVIDERS[name]
            grads = step.make_gradients(WORKLOADS[workload], torch.float32, device)
            params = [torch.nn.Parameter(grad.clone()) for grad in grads]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            flags = {"fused": True, "capturable": True} | provider.keywords
            cls = imported(f"{provider.library}.AdamW")
            made = cls(params, lr=optimizers.STEP_LR, **flags)
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
    for size in load.TRANSFERS:
        yield load.transfer(size)


# ---- the same bits -------------------------------------------------------------------------------


SIZES = (0, 1, 7, 64, 4097, 70_001, 1_000_003)


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
        for _ in range(steps):
            for param in params:
                param.grad = torch.randn(param.shape).to(where, dtype)
            made.step()
        for param in params:
            states = [v for v in made.state.get(param, {}).values() if torch.is_tensor(v)]
            found += [tensor.detach().cpu() for tensor in (param, *states)]
    return found


def bits(device: str, rehearse: bool) -> Iterator[Row]:
    """Every rule and storage type by every backend and by the CPU's, element by element."""
    backends = ("cpu",) if rehearse else ("cuda", "triton")
    for name in optimizers.names():
        for dtype, state_dtype in (
            (torch.float32, None), (torch.float64, None),
            (torch.bfloat16, None), (torch.bfloat16, torch.float32),
            (torch.float16, None), (torch.float16, torch.float32),
        ):  # fmt: skip
            kinds = (dtype, state_dtype, 2 if rehearse else 4)
            wanted = trajectory(name, "cpu", *kinds)
            for backend in backends:
                found = trajectory(name, backend, *kinds)
                pairs = [(a.view(-1), b.view(-1)) for a, b in zip(found, wanted, strict=True)]
                yield {"job": "bits", "optimizer": name, "backend": backend, "dtype": str(dtype),
                       "state_dtype": str(state_dtype),
                       "compared": sum(a.numel() for a, _ in pairs),
                       "differing": sum(int((a != b).sum()) for a, b in pairs)}  # fmt: skip


# ---- what compute-sanitizer watches --------------------------------------------------------------

IN_THE_STEP = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grads": True,
               "accumulation_steps": 2}  # fmt: skip


def drive_some(name: str, device: str, dtype: torch.dtype, **kwargs: Any) -> None:
    """Heads, tails, strides, skips, scalars on the device."""
    base = torch.randn(3000, device=device, dtype=dtype)
    views = [base[1:38], base[64:1100], base[1100:1700].view(20, 30).t(), base[1700:1700]]
    params = [torch.nn.Parameter(view) for view in views]

    def steps(made: Any, count: int) -> None:
        for _ in range(count):
            for param in params:
                param.grad = torch.randn_like(param)
            made.step()

    steps(getattr(fusedopt, name)(params, **kwargs), 2)
    if "fused" in inspect.signature(getattr(torch.optim, name)).parameters:
        made = getattr(fusedopt, name)(params, fused=True, **kwargs)
        made.grad_scale = torch.full((), 2.0, device=device)
        made.found_inf = torch.zeros((), device=device)
        steps(made, 2)
    steps(getattr(fusedopt, name)(params, **IN_THE_STEP, **kwargs), 4)  # two windows


def drive(device: str, rehearse: bool, seconds: float = math.inf) -> Iterator[Row]:
    """A short run of the paths of both backends' kernels, until `seconds` are over.

    How far it gets under compute-sanitizer nobody knows, and one that is cut off tells nothing.
    """
    end = _now() + seconds
    backends = ("cpu",) if rehearse else ("cuda", "triton")
    for backend in backends:
        for name in optimizers.names():
            for dtype in (torch.float32, torch.bfloat16):
                if _now() > end:
                    return
                for kwargs in optimizers.variants(name):
                    drive_some(name, device, dtype, backend=backend, **kwargs)
                yield {"job": "drive", "optimizer": name, "backend": backend, "dtype": str(dtype)}


PARTS = {
    "figures": figures,
    "pipeline": chains,
    "graphs": graphs,
    "load": transfers,
    "bits": bits,
    "drive": drive,
}


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
