"""A GPU's part, rehearsed on the host: the plan's device path with the kernels' bodies run here.

``backend="rehearsal"`` serves CPU tensors as the CUDA backend serves a GPU's: a table in "device"
memory, uploads of what moved, prepare kernels, graphs. What is missing is the GPU itself; see
cpp/rehearsal.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache

from compiled import NOT_INLINED, ROOT, linked, object_of

from fusedopt import backends

# Every kernel, fast enough for a test.
FLAGS = ("-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", NOT_INLINED)


@cache
def library() -> ctypes.CDLL:
    """The compiled launcher."""
    sources = [ROOT / f"tests/cpp/{name}.cpp" for name in ("rehearsal", "bodies")]
    objects = [object_of(source, *FLAGS) for source in sources]
    loaded = ctypes.CDLL(str(linked(".so", *objects, flags=("-shared",))))
    loaded.rehearsal_launcher.restype = loaded.rehearsal_begin.restype = ctypes.c_void_p
    loaded.rehearsal_count.restype = ctypes.c_int64
    loaded.rehearsal_replay.argtypes = loaded.rehearsal_destroy.argtypes = [ctypes.c_void_p]
    loaded.rehearsal_fail.argtypes = [ctypes.c_char_p]
    return loaded


_NAME = b"fusedopt.Launcher"  # which the capsule does not keep alive


@cache
def launcher() -> object:
    """Its capsule, as ``_C.cuda_launcher()`` returns one."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(library().rehearsal_launcher(), _NAME, None)


BACKEND = backends.Backend("rehearsal", ("cpu",), lambda: "", "", launcher)


# What is launched.
KINDS = ("update", "prepare", "norm", "accumulate")


def launches() -> dict[str, int]:
    """How many of each kind were launched since the library was loaded."""
    return {kind: library().rehearsal_count(place) for place, kind in enumerate(KINDS)}


def placed() -> int:
    """How many captured tables there are."""
    return library().rehearsal_count(len(KINDS))


def fail_next(status: bytes) -> None:
    """Makes the next launch fail with this status, whose memory must outlive it."""
    library().rehearsal_fail(status)


class Graph:
    """What a CUDA graph is to a step."""

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Records launches instead of performing them."""
        self._graph = library().rehearsal_begin()
        try:
            yield
        finally:
            library().rehearsal_end()

    def replay(self) -> None:
        """Performs what was recorded, without any host code of the step."""
        library().rehearsal_replay(self._graph)

    def destroy(self) -> None:
        """Lets go of what the graph kept."""
        library().rehearsal_destroy(self._graph)
