"""The places a device's kernels are tested in: a GPU, and its rehearsal on the host.

A test that takes the `place` fixture runs in both; without a GPU its CUDA half is skipped, visibly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import rehearsal
import torch
from torch.profiler import ProfilerActivity, profile

from fusedopt import backends

NO_GPU = backends.BACKENDS["cuda"].missing()
needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=f"needs a GPU: {NO_GPU}")
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, there are {torch.cuda.device_count()}"
)


class Rehearsed:
    """CPU tensors as a device's, see rehearsal.py."""

    name = backend = "rehearsal"
    device = "cpu"
    Graph = rehearsal.Graph

    @staticmethod
    def launches(function: Callable[[], Any]) -> tuple[int, int]:
        """How many update and prepare kernels `function` launches."""
        before = rehearsal.launches()
        function()
        after = rehearsal.launches()
        return after[0] - before[0], after[1] - before[1]

    @staticmethod
    def capturable_classes() -> bool:
        """Whether torch.optim's own capturable steps run here, for comparison."""
        return False


class CudaGraph:
    """torch.cuda.CUDAGraph under the names of `rehearsal.Graph`."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Records what is launched instead of performing it."""
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            yield

    def replay(self) -> None:
        """Performs what was recorded."""
        self._graph.replay()

    def destroy(self) -> None:
        """Lets go of what the graph kept."""
        torch.cuda.synchronize()
        del self._graph


class Cuda:
    """A GPU."""

    name = backend = device = "cuda"
    Graph = CudaGraph

    @staticmethod
    def launches(function: Callable[[], Any]) -> tuple[int, int]:
        """How many update and prepare kernels `function` launches, by torch's profiler."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if "fusedopt::" in event.name]
        prepares = sum("update_prepare<" in name for name in names)
        return len(names) - prepares, prepares

    @staticmethod
    def capturable_classes() -> bool:
        """Whether torch.optim's own capturable steps run here, for comparison."""
        return True
