"""What can be proved of the Triton kernels without a GPU: compiled ahead of time.

Kernels that were compiled before come out of Triton's cache, in build/.
"""

import re
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import kernel_package
import pytest
from test_registry import ROOT

from fusedopt import _C

triton = pytest.importorskip("triton")

HOPPER = triton.backends.compiler.GPUTarget("cuda", 90, 32)
CDNA3 = triton.backends.compiler.GPUTarget("hip", "gfx942", 64)
ACCESS_BYTES = 16
# As in csrc/core/dtype.h: what kernels are built for, by the places of their types in DType.
DTYPES = {"kF32": 4, "kF64": 8, "kBF16": 2, "kF16": 2}
HEADER = (ROOT / "csrc/core/dtype.h").read_text()
STORAGES = [
    tuple(map([*DTYPES].index, names.split(", ")))
    for names in re.findall(r"^  STORAGE\((.*?)\)", HEADER, re.M)
]
F32, F64, BF16, F16 = range(4)


def variants():
    """Rule and variant; AdamW's kernels are Adam's."""
    rules = {name: rule for name, rule in _C.rules().items() if name != "adamw"}
    return [(name, v) for name, rule in rules.items() for v in range(len(rule["states"]))]


@dataclass
class Kernel:
    """One compiled kernel."""

    name: str
    storage: tuple[int, int, int]
    states: int
    ptx: str
    cubin: bytes = b""

    @property
    def arrays(self):
        """The sizes of its types: parameter, gradient, states."""
        param, grad, state = ([*DTYPES.values()][code] for code in self.storage)
        return [param, grad, *[state] * self.states]

    def count(self, pattern):
        return len(re.findall(pattern, self.ptx))


@pytest.fixture(scope="session", autouse=True)
def cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(ROOT / "build/triton"))
        yield


def update_kernel(rule, variant, storage, launcher=None, target=HOPPER):
    launcher = launcher or kernel_package.compiled()
    instance = launcher.update_of([*_C.rules()].index(rule), variant, *storage)
    asm = launcher.compile_for(target, instance).asm
    text = asm["ptx" if target is HOPPER else "amdgcn"]
    name = f"{rule} {variant} {storage}"
    return Kernel(name, storage, instance.states, text, asm.get("cubin", b""))


# All storage types of one rule, and all rules in one type; the products are in the long run.
SOME = [*product([("adam", 3)], STORAGES), *product(variants(), [(F32,) * 3])]
EVERY = [*product(variants(), STORAGES)]
SETS = [pytest.param(SOME, id="some"), pytest.param(EVERY, id="every", marks=pytest.mark.slow)]


@pytest.fixture(scope="session", params=SETS)
def updates(request):
    return [update_kernel(*variant, storage) for variant, storage in request.param]


@pytest.fixture(scope="session")
def kernels(updates):
    launcher = kernel_package.compiled()
    floors = [(f"floor {n}", launcher.floor_of(n), n, (F32,) * 3) for n in range(4)]
    prepares = [
        (
            f"{name} prepare",
            launcher.prepare_of(rule, in_double),
            0,
            (F64 if in_double else F32,) * 3,
        )
        for rule, name in enumerate(_C.rules())
        for in_double in (False, True)
    ]
    others = []
    for name, instance, states, storage in floors + prepares:
        asm = launcher.compile_for(HOPPER, instance).asm
        others.append(Kernel(name, storage, states, asm["ptx"], asm["cubin"]))
    return updates + others


def complaints(kernels, good):
    return [kernel.name for kernel in kernels if not good(kernel)]


# ---- What is asserted of kernels, also of those with a fault ------------------------------------


def is_not_fused(kernel):
    return not kernel.count(r"\bfma\.|\bmad\.\w+\.f")


def is_exact(kernel):
    return not kernel.count(r"\.approx|\.ftz|\.full")


def is_single(kernel):
    return F64 in kernel.storage or not kernel.count(r"\.f64")


def rounds_to_nearest(kernel):
    halves = kernel.count(r"\bcvt\.r\w+\.(bf16|f16)(x2)?\.f32")
    nearest = kernel.count(r"\bcvt\.rn\.(bf16|f16)(x2)?\.f32")
    wanted = BF16 in kernel.storage or F16 in kernel.storage
    return halves == nearest and (nearest > 0) == wanted


def moves_sixteen_bytes(kernel):
    """The aligned body, once with and once without a mask: as many accesses as the arrays need.

    What is left is the body of the other elements: an access an array. A gradient is also stored,
    by steps that unscale it.
    """
    width = ACCESS_BYTES // min(kernel.arrays)
    wide = 2 * sum(width * size // ACCESS_BYTES for size in kernel.arrays)
    narrow = kernel.count(r"\bst\.global\.b(16|32|64)\b")
    loads, stores = (kernel.count(rf"\b{op}\.global\.v(4\.b32|2\.b64)\b") for op in ("ld", "st"))
    return loads == stores == wide and narrow == len(kernel.arrays)


# ---- The kernels --------------------------------------------------------------------------------


def test_no_fused_multiply_add(kernels):
    assert complaints(kernels, is_not_fused) == []


def test_no_approximate_maths(kernels):
    assert complaints(kernels, is_exact) == []


def test_no_double_arithmetic_but_for_doubles(updates):
    assert complaints(updates, is_single) == []


def test_halves_are_rounded_to_nearest_by_the_hardware(updates):
    assert complaints(updates, rounds_to_nearest) == []


def test_aligned_bodies_move_sixteen_bytes_at_a_time(updates):
    assert complaints(updates, moves_sixteen_bytes) == []


def test_no_local_memory(kernels, tmp_path):
    assert complaints(kernels, lambda kernel: not kernel.count(r"\.local\b")) == []
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("no cuobjdump in this Triton: what ptxas spilled is not known")
    for i, kernel in enumerate(kernels):
        (tmp_path / f"{i}.cubin").write_bytes(kernel.cubin)
        listed = subprocess.run(
            [tool, "-res-usage", tmp_path / f"{i}.cubin"], capture_output=True, text=True
        ).stdout
        assert "STACK:0" in listed, f"{kernel.name}: {listed}"
        assert "LOCAL:0" in listed, f"{kernel.name}: {listed}"


# ---- Planted faults -----------------------------------------------------------------------------

FAULTS = [
    ("launcher.py", '"enable_fp_fusion": False', '"enable_fp_fusion": True', is_not_fused),
    ("math.py", "tl.div_rn(x, y)", "x / y", is_exact),
    ("math.py", "tl.sqrt_rn(x)", "tl.sqrt(x)", is_exact),
    ("math.py", "tl.sqrt_rn(x)", "tl.sqrt(x.to(tl.float64) * 0.1).to(tl.float32)", is_single),
    ("math.py", "x.to(STORAGE)", 'x.to(STORAGE, fp_downcast_rounding="rtz")', rounds_to_nearest),
    ("multi_tensor.py", "multiple_of(pointer, ACCESS_BYTES)", "multiple_of(pointer, 8)", None),
    ("multi_tensor.py", "// WIDTH * WIDTH", "", None),
]


@pytest.mark.parametrize(("file", "old", "new", "good"), FAULTS, ids=lambda v: None)
def test_a_fault_is_seen(tmp_path, file, old, new, good):
    good = good or moves_sixteen_bytes
    sound = update_kernel("adam", 3, (BF16, BF16, BF16))
    faulty = update_kernel(
        "adam", 3, (BF16, BF16, BF16), kernel_package.changed(tmp_path, file, old, new)
    )
    assert good(sound)
    assert not good(faulty)


# ---- Another vendor's ---------------------------------------------------------------------------


@pytest.mark.skipif("amd" not in triton.backends.backends, reason="this Triton has no AMD backend")
@pytest.mark.parametrize("storage", [(F32, F32, F32), (F64, F64, F64), (BF16, BF16, F32)], ids=str)
@pytest.mark.parametrize("variant", [("sgd", 2), ("adam", 3)], ids=str)
def test_amd(variant, storage):
    """A quotient is itself made of fused operations there, so that only memory can be judged."""
    kernel = update_kernel(*variant, storage, target=CDNA3)
    width = ACCESS_BYTES // min(kernel.arrays)
    wide = sum(width * size // ACCESS_BYTES for size in kernel.arrays)
    assert kernel.count(r"\bglobal_store_dwordx4\b") >= wide
    assert kernel.count(r"\bglobal_load_dwordx4\b") >= wide
    assert not kernel.count(r"\bscratch_")
