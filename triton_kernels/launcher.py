"""Launches the kernels over tables: what ``csrc/device/launcher.h`` asks of a device, in Triton.

All numbers are plain integers: addresses, counts, a stream's handle, a place in the registry, a
place in `DType`. Calls are for the device that is current, and do not wait.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

from fusedopt import _C

from .math import INTERPRETED
from .multi_tensor import THREADS, Prepare, Update, fusedopt_update, fusedopt_update_prepare
from .norm import Accumulate, Norm, fusedopt_accumulate, fusedopt_norm

# In the order of `DType` in csrc/core/dtype.h.
DTYPES = (tl.float32, tl.float64, tl.bfloat16, tl.float16)
# Programs a multiprocessor: as many as it has threads for.
PROGRAMS_EACH = 2048 // THREADS

# What a kernel is compiled for, and the kernels, as profilers name them.
Instance = Update | Prepare | Norm | Accumulate
KERNELS = {
    Update: fusedopt_update,
    Prepare: fusedopt_update_prepare,
    Norm: fusedopt_norm,
    Accumulate: fusedopt_accumulate,
}

# Takes the number of programs, the stream and the kernel's arguments.
Launch = Callable[..., None]


@cache
def rules() -> tuple[ModuleType, ...]:
    """The rules' modules, in the order of the registry: a file here for each of its names."""
    return tuple(import_module(f".{name}", __package__) for name in _C.rules())


def update_of(rule: int, variant: int, param: int, grad: int, state: int) -> Update:
    """What a rule's update is compiled for."""
    module = rules()[rule]
    states = len([*_C.rules().values()][rule]["states"][variant])
    types = DTYPES[param], DTYPES[grad], DTYPES[state]
    return Update(module.update, module.Scalars, tl.constexpr(variant), states, *types)


def prepare_of(rule: int, in_double: bool) -> Prepare:
    """What a rule's prepare is compiled for."""
    module = rules()[rule]
    compute = tl.float64 if in_double else tl.float32
    return Prepare(module.prepare, module.Hyper, module.Scalars, compute)


def _of_gradients(param: int, grad: int) -> tuple[tl.dtype, tl.dtype]:
    compute = tl.float64 if DTYPES[param] == tl.float64 else tl.float32
    return DTYPES[grad], compute


def norm_of(param: int, grad: int) -> Norm:
    """What the norm of gradients is compiled for."""
    return Norm(*_of_gradients(param, grad))


def accumulate_of(param: int, grad: int) -> Accumulate:
    """What adds gradients to the accumulators is compiled for."""
    return Accumulate(*_of_gradients(param, grad))


def compile_for(target: GPUTarget, instance: Instance) -> CompiledKernel:
    """Compiles the kernel of an instance."""
    kernel = KERNELS[type(instance)]
    threads = target.warp_size if isinstance(instance, Prepare) else THREADS
    return triton.compile(
        ASTSource(
            kernel,
            {name: "constexpr" if name == "K" else "i64" for name in kernel.arg_names},
            {"K": instance},
        ),
        target=target,
        options={
            "num_warps": threads // target.warp_size,
            # Up to 3.8, fusing a multiplication and an addition is the default.
            "enable_fp_fusion": False,
            # Two programs a multiprocessor at least; without a number, CUDA's assembler spills here
            # and there to reach three. Other targets do not know it.
            "maxnreg": 65536 // (2 * THREADS),
        },
    )


def launch_of(instance: Instance) -> Launch:
    """The kernel of an instance, ready on the current device.

    A launch goes to the compiled kernel itself: to look it up by its arguments, as calling the
    decorated function does, would take longer than a small model's step.
    """
    if INTERPRETED:
        return _interpreted(KERNELS[type(instance)], instance)
    compiled = compile_for(driver.active.get_current_target(), instance)
    compiled[1, 1, 1]  # loads it, which a stream that is being captured would not allow

    def launch(programs: int, stream: int, *arguments: int) -> None:
        compiled[programs, 1, 1](*arguments, None, stream=stream)  # None: in place of K

    return launch


def _interpreted(kernel: triton.runtime.KernelInterface, instance: Instance) -> Launch:
    import numpy as np

    def launch(programs: int, stream: int, *arguments: int) -> None:
        with np.errstate(all="ignore"):  # infinities and NaN are values like others
            kernel[(programs,)](*arguments, instance)

    return launch


# By the kind of a launch.
INSTANCES = {
    "update": update_of,
    "prepare": prepare_of,
    "norm": norm_of,
    "accumulate": accumulate_of,
}


@cache
def _kernel(device: int, kind: str, key: tuple[int, ...]) -> Launch:
    return launch_of(INSTANCES[kind](*key))


@cache
def _multiprocessors(device: int) -> int:
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def _device() -> int:
    return 0 if INTERPRETED else driver.active.get_current_device()


class Launcher:
    """The calls of `Launcher` in csrc/device/launcher.h that Triton can serve.

    Rules and variants go by their place in the registry, dtypes by theirs in `DType`.
    """

    def multiprocessors(self) -> int:
        """Of the current device."""
        return 1 if INTERPRETED else _multiprocessors(_device())

    def load(self, rule: int, variant: int, param: int, grad: int, state: int) -> None:
        """Compiles and loads what a table's steps launch, so that a capture finds it there."""
        device = _device()
        _kernel(device, "update", (rule, variant, param, grad, state))
        _kernel(device, "prepare", (rule, DTYPES[param] == tl.float64))
        _kernel(device, "norm", (param, grad))
        _kernel(device, "accumulate", (param, grad))

    def launch(
        self, kind: str, key: tuple[int, ...], count: int, stream: int, *arguments: int
    ) -> None:
        """Launches a kernel with these arguments, which csrc/plan/triton.cpp puts in its order.

        `kind` is one of `INSTANCES`, and `key` is what that function takes. `count` is the number
        of chunks, which as many programs as run at once walk in steps of the grid; one at least,
        as a norm without chunks still has to be finished. For a prepare it is the number of slots,
        one a program.
        """
        programs = count
        if kind != "prepare":
            programs = max(1, min(count, PROGRAMS_EACH * self.multiprocessors()))
        _kernel(_device(), kind, key)(programs, stream, *arguments)
