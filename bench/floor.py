"""The traffic floor: a step's reads and writes without its arithmetic, on the CPU and on a GPU.

A row has the arrays of one parameter: itself, its gradient, its states. A run reads all of them and
writes all but the gradient. On the CPU that is ``floor.c``, compiled when it is first used and run
on the threads that torch has; on a GPU the Triton kernel of ``stream``. Neither looks at what
the bytes mean, so any dtype is moved.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

Rows = Sequence[Sequence[torch.Tensor]]

SOURCE = Path(__file__).with_name("floor.c")
FLAGS = "-O3 -march=native -fopenmp -shared -fPIC"
# On a GPU: 32-bit words that a program moves of each array, in how many warps.
WORDS, WARPS = 4096, 8


@cache
def library() -> ctypes.CDLL:
    """``floor.c``, compiled for this machine, which takes a second.

    Its threads are torch's: whichever OpenMP runtime torch has loaded serves both.

    Raises:
        RuntimeError: there is no C compiler, or it fails; says why.
    """
    compiler = os.environ.get("CC", "cc")
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = str(Path(folder, "floor.so"))
            command = [*shlex.split(compiler), *FLAGS.split(), "-o", made, str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            loaded = ctypes.CDLL(made)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} does not compile it: {error.stderr.strip()}") from None
    except OSError as error:
        raise RuntimeError(f"it needs a C compiler, {compiler} or $CC ({error.strerror})") from None
    loaded.floor_new.restype = ctypes.c_void_p
    loaded.floor_new.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    loaded.floor_move.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    loaded.floor_read.argtypes = (ctypes.c_void_p, ctypes.c_int)
    loaded.floor_free.argtypes = (ctypes.c_void_p,)
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


def traffic(
    gradients: Sequence[torch.Tensor], states: int, measures: bool = False,
    zero_grads: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """What moves the bytes of a step over parameters that have these gradients.

    Args:
        gradients: contiguous.
        states: arrays that a parameter has beside itself and its gradient.
        measures: read the gradients before, in a pass of their own, as a norm does.
        zero_grads: write the gradients, too.
    """
    rows = [
        [gradient.clone(), gradient, *(torch.zeros_like(gradient) for _ in range(states))]
        for gradient in gradients
    ]
    move = on_cpu if gradients[0].device.type == "cpu" else on_gpu
    return move(rows, measures, zero_grads)


def on_cpu(rows: Rows, measures: bool, zero_grads: bool) -> Callable[[], None]:
    """A run of ``floor.c`` over rows of as many contiguous arrays, equal in bytes."""
    code = library()
    addresses = [tensor.data_ptr() for row in rows for tensor in row]
    sizes = [row[0].nbytes for row in rows]
    handle = code.floor_new(
        (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int64 * len(sizes))(*sizes),
        len(sizes), len(rows[0]),
    )  # fmt: skip
    if handle is None:
        raise MemoryError("no memory for the floor's list of pieces, or too many arrays a row")

    def run(rows: Rows = rows) -> None:  # the arrays live as long as this does
        threads = torch.get_num_threads()
        if measures:
            code.floor_read(handle, threads)
        code.floor_move(handle, zero_grads, threads)

    weakref.finalize(run, code.floor_free, handle)
    return run


def on_gpu(rows: Rows, measures: bool, zero_grads: bool) -> Callable[[], None]:
    """The same by the kernel of ``stream``, on the device that the rows are on."""
    from .stream import stream

    if any(row[0].nbytes % 4 for row in rows):
        raise ValueError("rows: got a number of bytes that is no multiple of 4")
    device, width = rows[0][0].device, len(rows[0])
    addresses = torch.tensor([[tensor.data_ptr() for tensor in row] for row in rows])
    pieces = [
        (index, begin, row[0].nbytes // 4)
        for index, row in enumerate(rows)
        for begin in range(0, row[0].nbytes // 4, WORDS)
    ]
    places, sink = addresses.to(device), torch.zeros(1, dtype=torch.int32, device=device)
    table = torch.tensor(pieces, dtype=torch.int64).to(device)

    def run(rows: Rows = rows) -> None:
        for reads_only in (True, False) if measures else (False,):
            stream[(len(pieces),)](
                places, table, sink, width, reads_only, zero_grads, WORDS, num_warps=WARPS
            )

    return run
