"""The traffic floor: a step's reads and writes without its arithmetic, on the CPU and on a GPU.

A row has the arrays of one parameter: itself, its gradient, its states. A run reads all of them and
writes all but the gradient. On the CPU that is ``floor.c``, compiled when it is first used and run
on the threads that torch has; on a GPU the Triton kernel of ``stream``. Neither looks at what
the bytes mean, so any dtype is moved.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .rows import cpu_name

SOURCE = Path(__file__).with_name("floor.c")
FLAGS = "-O3 -march=native -fopenmp -shared -fPIC"
# On a GPU: 32-bit words that a program moves of each array, in how many warps.
WORDS, WARPS = 4096, 8


@cache
def library() -> ctypes.CDLL:
    """``floor.c``, compiled for this machine; kept in the user's cache folder.

    Its threads are torch's: whichever OpenMP runtime torch has loaded serves both.

    Raises:
        RuntimeError: there is no C compiler, or it fails; says why.
    """
    compiler = os.environ.get("CC", "cc")
    known = f"{SOURCE.read_text()} {compiler} {FLAGS} {cpu_name()}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = home / "fusedopt" / f"floor-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    try:
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as folder:
                made = Path(folder, built.name)
                command = [*shlex.split(compiler), *FLAGS.split(), "-o", str(made), str(SOURCE)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                made.replace(built)  # at once: another process may be waiting for it
        loaded = ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} does not compile it: {error.stderr.strip()}") from None
    except OSError as error:
        raise RuntimeError(f"it needs a C compiler, {compiler} or $CC ({error.strerror})") from None
    loaded.floor_new.restype = ctypes.c_void_p
    loaded.floor_new.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    loaded.floor_move.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    loaded.floor_read.argtypes = (ctypes.c_void_p, ctypes.c_int)
    loaded.floor_free.argtypes = (ctypes.c_void_p,)
    loaded.floor_free.restype = None
    return loaded


def unavailable(device: str) -> str:
    """Why there is no floor on a device; empty if there is."""
    if device != "cpu":
        return "" if find_spec("triton") else "the floor was not measured: it needs Triton"
    try:
        library()
    except RuntimeError as error:
        return f"the floor was not measured: {str(error).splitlines()[0]}"
    return ""


class TrafficFloor:
    """Moves the bytes of a step over `rows`, each [parameter, gradient, states...].

    Args:
        rows: the tensors of a row are contiguous and of equal size in bytes.
        measures: read the gradients before, in a pass of their own, as a norm does.
        zero_grads: write the gradients, too.
    """

    def __init__(
        self, rows: Sequence[Sequence[torch.Tensor]], measures: bool = False,
        zero_grads: bool = False,
    ) -> None:  # fmt: skip
        self.width = len(rows[0])
        for row in rows:
            sizes = {tensor.nbytes for tensor in row}
            if len(row) != self.width or len(sizes) > 1 or not all(t.is_contiguous() for t in row):
                raise ValueError(
                    "rows: got tensors that differ in number or bytes or are not contiguous; "
                    "wanted: the same number in every row, contiguous, as many bytes each"
                )
        self.rows, self.measures, self.zero_grads = rows, measures, zero_grads
        prepare = self._on_cpu if rows[0][0].device.type == "cpu" else self._on_gpu
        self.run = prepare()

    def _on_cpu(self) -> Any:
        code = library()
        addresses = [tensor.data_ptr() for row in self.rows for tensor in row]
        sizes = [row[0].nbytes for row in self.rows]
        made = code.floor_new(
            (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int64 * len(sizes))(*sizes),
            len(sizes), self.width,
        )  # fmt: skip
        if made is None:
            raise MemoryError("no memory for the floor's list of pieces, or too many arrays a row")
        handle = _Handle(made)

        def run() -> None:
            threads = torch.get_num_threads()
            if self.measures:
                code.floor_read(handle.value, threads)
            code.floor_move(handle.value, self.zero_grads, threads)

        return run

    def _on_gpu(self) -> Any:
        from .stream import stream

        device = self.rows[0][0].device
        addresses = torch.tensor([[tensor.data_ptr() for tensor in row] for row in self.rows])
        pieces = [
            (index, begin, row[0].nbytes // 4)
            for index, row in enumerate(self.rows)
            for begin in range(0, row[0].nbytes // 4, WORDS)
        ]
        if any(row[0].nbytes % 4 for row in self.rows):
            raise ValueError("rows: got a number of bytes that is no multiple of 4")
        places, sink = addresses.to(device), torch.zeros(1, dtype=torch.int32, device=device)
        table = torch.tensor(pieces, dtype=torch.int64).to(device)
        grid, fixed = (len(pieces),), (places, table, sink)

        def run() -> None:
            for reads_only in (True, False) if self.measures else (False,):
                stream[grid](*fixed, self.width, reads_only, self.zero_grads, WORDS,
                             num_warps=WARPS)  # fmt: skip

        return run


class _Handle:
    """A floor of the C library, freed with the last function that uses it."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __del__(self) -> None:
        library().floor_free(self.value)
