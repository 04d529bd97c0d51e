"""The places a device's kernels are tested in: a GPU, and on the host.

A test that takes the `place` fixture runs in all of them: the CUDA kernels' bodies and the Triton
kernels in their interpreter, both over CPU tensors as if these were a device's; and both on a GPU,
where there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import kernel_package
import pytest
import rehearsal
import torch
from torch.profiler import ProfilerActivity, profile

from fusedopt import _C, backends


def needs(backend: str) -> pytest.MarkDecorator:
    """Marks what runs on a GPU alone, with what is missing here; conftest.py leaves it out."""
    missing = backends.BACKENDS[backend].missing()
    if not missing and not torch.cuda.is_available():
        missing = "torch sees no CUDA device"
    return pytest.mark.gpu(missing)


needs_cuda = pytest.mark.gpu("" if torch.cuda.is_available() else "torch sees no CUDA device")
needs_two_gpus = pytest.mark.gpu("" if torch.cuda.device_count() > 1 else "there are no two GPUs")


class Place:
    """What places have in common."""

    @classmethod
    def launches(cls, function: Callable[[], Any]) -> tuple[int, int]:
        """How many update and prepare kernels `function` launches."""
        found = cls.all_launches(function)
        return found.get("update", 0), found.get("prepare", 0)


class Host:
    """The CPU, under its own kernels."""

    name = backend = device = "cpu"
    row = backends.BACKENDS["cpu"]


class Rehearsed(Place):
    """CPU tensors as a GPU's, under the CUDA kernels' bodies; see rehearsal.py."""

    name = backend = "rehearsal"
    device = "cpu"
    row = rehearsal.BACKEND
    Graph = rehearsal.Graph
    fail_next = staticmethod(rehearsal.fail_next)

    @staticmethod
    def all_launches(function: Callable[[], Any]) -> dict[str, int]:
        """How many kernels `function` launches, by kind; those that it does not are left out."""
        before = rehearsal.launches()
        function()
        after = rehearsal.launches()
        return {k: n - before[k] for k, n in after.items() if n != before[k]}

    @staticmethod
    def capturable_classes() -> bool:
        """Whether torch.optim's own capturable steps run here, for comparison."""
        return False


class WatchedKernels:
    """A Triton launcher that counts its calls, and fails when it is told to."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(rehearsal.KINDS, 0)
        self.failure = ""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(kernel_package.interpreted().Launcher(), name)

    def launch(self, kind: str, *arguments: Any) -> None:
        """One of the launches that are counted."""
        self.counts[kind] += 1
        failure, self.failure = self.failure, ""
        if failure:
            raise RuntimeError(failure)
        kernel_package.interpreted().Launcher().launch(kind, *arguments)


class Interpreted(Place):
    """CPU tensors as a GPU's, under the Triton kernels in their interpreter."""

    name = backend = "interpreted"
    device = "cpu"
    kernels = WatchedKernels()
    row = backends.Backend(
        "interpreted",
        ("cpu",),
        lambda: "",
        "",
        cache(lambda: _C.triton_launcher(Interpreted.kernels)),
    )

    @staticmethod
    def Graph() -> None:  # noqa: N802 - as the others' class
        """There is none."""
        pytest.skip("Triton's interpreter has no graphs")

    @classmethod
    def fail_next(cls, status: bytes) -> None:
        """Makes the next launch fail."""
        cls.kernels.failure = status.decode()

    @classmethod
    def all_launches(cls, function: Callable[[], Any]) -> dict[str, int]:
        """How many kernels `function` launches, by kind; those that it does not are left out."""
        before = dict(cls.kernels.counts)
        function()
        return {k: n - before[k] for k, n in cls.kernels.counts.items() if n != before[k]}

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


class Cuda(Place):
    """A GPU, under the CUDA kernels."""

    name = backend = device = "cuda"
    row = backends.BACKENDS["cuda"]
    Graph = CudaGraph

    @staticmethod
    def fail_next(status: bytes) -> None:
        """There is no way."""
        pytest.skip("a GPU's launches do not fail on demand")

    @staticmethod
    def all_launches(function: Callable[[], Any]) -> dict[str, int]:
        """How many kernels `function` launches, by kind, by torch's profiler."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if "fusedopt" in event.name]
        kinds = ("prepare", "norm", "accumulate")
        found = [next((kind for kind in kinds if kind in name), "update") for name in names]
        return dict(Counter(found))

    @staticmethod
    def capturable_classes() -> bool:
        """Whether torch.optim's own capturable steps run here, for comparison."""
        return True


class TritonOnCuda(Cuda):
    """A GPU, under the Triton kernels."""

    name = backend = "triton"
    row = backends.BACKENDS["triton"]


PLACES = [pytest.param(place, id=place.name) for place in (Rehearsed, Interpreted)] + [
    pytest.param(place, id=place.name, marks=needs(place.backend)) for place in (Cuda, TritonOnCuda)
]
ANYWHERE = [pytest.param(Host, id=Host.name), *PLACES]
