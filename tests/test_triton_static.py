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
    ttgir: str = ""
    cubin: bytes = b""

    @property
    def arrays(self):
        """The sizes of its types: parameter, gradient, states."""
        param, grad, state = ([*DTYPES.values()][code] for code in self.storage)
        return [param, grad, *[state] * self.states]

    @property
    def compute(self):
        """The size of the arithmetic's type, which accumulators and averages have."""
        return 8 if self.storage[0] == F64 else 4

    def count(self, pattern):
        return len(re.findall(pattern, self.ptx))


@pytest.fixture(scope="session", autouse=True)
def cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(ROOT / "build/triton"))
        yield


def compiled(name, storage, instance, launcher=None, target=HOPPER):
    asm = (launcher or kernel_package.compiled()).compile_for(target, instance).asm
    text = asm["ptx" if target is HOPPER else "amdgcn"]
    states = getattr(instance, "states", 0)
    return Kernel(name, storage, states, text, asm["ttgir"], asm.get("cubin", b""))


def update_kernel(rule, variant, storage, launcher=None, target=HOPPER):
    launcher = launcher or kernel_package.compiled()
    instance = launcher.update_of([*_C.rules()].index(rule), variant, *storage)
    return compiled(f"{rule} {variant} {storage}", storage, instance, launcher, target)


def norm_kernel(param, grad, launcher=None, target=HOPPER):
    launcher = launcher or kernel_package.compiled()
    instance = launcher.norm_of(param, grad)
    return compiled(f"norm {grad}", (param, grad, param), instance, launcher, target)


def accumulate_kernel(param, grad, launcher=None, target=HOPPER):
    launcher = launcher or kernel_package.compiled()
    instance = launcher.accumulate_of(param, grad)
    return compiled(f"accumulate {grad}", (param, grad, param), instance, launcher, target)


# A type and a number of states each at least once; the product is in the long run.
SOME = [
    ("sgd", 0, (F32, F32, F32)),
    ("sgd", 1, (BF16, F32, BF16)),
    ("adam", 0, (F64, F64, F64)),
    ("adam", 1, (BF16, BF16, F32)),
    ("adam", 1, (F16, F16, F16)),
    ("rmsprop", 3, (F32, F32, F32)),
]
EVERY = [(*variant, storage) for variant, storage in product(variants(), STORAGES)]
# The types of parameters and gradients, as kernels of gradients alone have them.
SOME_GRADS = [(F32, F32), (BF16, BF16)]
EVERY_GRADS = [*SOME_GRADS, (F64, F64), (F16, F16)]
SETS = [
    pytest.param((SOME, SOME_GRADS), id="some"),
    pytest.param((EVERY, EVERY_GRADS), id="every", marks=pytest.mark.slow),
]


@pytest.fixture(scope="session", params=SETS)
def asked(request):
    return request.param


@pytest.fixture(scope="session")
def updates(asked):
    return [update_kernel(*asked_for) for asked_for in asked[0]]


@pytest.fixture(scope="session")
def norms(asked):
    return [norm_kernel(*types) for types in asked[1]]


@pytest.fixture(scope="session")
def accumulates(asked):
    return [accumulate_kernel(*types) for types in asked[1]]


@pytest.fixture(scope="session")
def kernels(updates, norms, accumulates):
    launcher, others = kernel_package.compiled(), []
    for rule, name in enumerate(_C.rules()):
        for in_double in (False, True):
            storage = (F64 if in_double else F32,) * 3
            instance = launcher.prepare_of(rule, in_double)
            others.append(compiled(f"{name} prepare", storage, instance))
    return updates + norms + accumulates + others


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


def wide_accesses(kernel):
    """How many loads and stores move 16 bytes."""
    return tuple(kernel.count(rf"\b{op}\.global\.v(4\.b32|2\.b64)\b") for op in ("ld", "st"))


def narrow_stores(kernel):
    return kernel.count(r"\bst\.global\.b(16|32|64)\b")


def moves_sixteen_bytes(kernel):
    """The aligned body, once with and once without a mask: as many accesses as the arrays need.

    What is left is the body of the other elements: an access an array. The accumulator and the
    average are read and written by steps that have them. A gradient is stored by steps that unscale
    it, and by those that clear it; steps that are skipped clear gradients and accumulators.
    """
    width = ACCESS_BYTES // min(kernel.arrays)
    read = [*kernel.arrays, kernel.compute, kernel.compute]
    cleared = [kernel.arrays[1]]
    loads, stores = (
        2 * sum(width * size // ACCESS_BYTES for size in sizes) for sizes in (read, read + cleared)
    )
    return wide_accesses(kernel) == (loads, stores) and narrow_stores(kernel) == 3 + len(read)


def sums_sixteen_bytes(kernel):
    """An access of gradients and those of accumulators for each of four turns over the classes."""
    width = ACCESS_BYTES // kernel.arrays[1]
    return wide_accesses(kernel)[0] == 4 * (1 + width * kernel.compute // ACCESS_BYTES)


def adds_sixteen_bytes(kernel):
    """Gradients and accumulators are read, and both may be written: aligned ones, and others."""
    width = ACCESS_BYTES // kernel.arrays[1]
    loads, stores = wide_accesses(kernel)
    wanted = 1 + width * kernel.compute // ACCESS_BYTES
    return loads == wanted and stores >= wanted and narrow_stores(kernel) == 2


def clears_after_reading(kernel):
    """Where other threads clear elements than have read them, there is a barrier before."""
    clears = re.findall(
        r"([^\n]*)\n[^\n]*tt\.store %\w+, %cst\w*[:, ][^\n]*tensor<(\d+x!tt\.ptr<\w+>), (#\w+)>",
        kernel.ttgir,
    )
    reads = set(re.findall(r"tt\.load [^\n]*tensor<(\d+x!tt\.ptr<\w+>), (#\w+)>", kernel.ttgir))
    waits = [
        "barrier" in before
        for before, places, layout in clears
        if any(places == read and layout != by for read, by in reads)
    ]
    wider = max(kernel.arrays[1], kernel.compute) > min(kernel.arrays)
    return len(clears) >= 4 and all(waits) and bool(waits) == wider


def chooses_no_order(kernel):
    """Of two numbers alone there is one sum."""
    pattern = r'"tt\.reduce".*?axis = (\d+).*?\}\) : \(tensor<([\dx]+)xf64'
    found = re.findall(pattern, kernel.ttgir, re.S)
    return bool(found) and all(int(sizes.split("x")[int(axis)]) <= 2 for axis, sizes in found)


def waits_for_its_sums(kernel):
    """Before a program says that it has ended, all of its threads have stored.

    Newer Tritons have a barrier of their own there.
    """
    before, drawn, _ = kernel.ttgir.partition("tt.atomic_rmw add, acq_rel, gpu")
    return bool(drawn) and "barrier" in before[before.rfind("tt.store") :]


# ---- The kernels --------------------------------------------------------------------------------


def test_no_fused_multiply_add(kernels):
    assert complaints(kernels, is_not_fused) == []


def test_no_approximate_maths(kernels):
    assert complaints(kernels, is_exact) == []


def test_no_double_arithmetic_but_for_doubles_and_norms(updates, accumulates):
    assert complaints(updates + accumulates, is_single) == []


def test_halves_are_rounded_to_nearest_by_the_hardware(updates):
    assert complaints(updates, rounds_to_nearest) == []


def test_aligned_bodies_move_sixteen_bytes_at_a_time(updates, norms, accumulates):
    assert complaints(updates, moves_sixteen_bytes) == []
    assert complaints(norms, sums_sixteen_bytes) == []
    assert complaints(accumulates, adds_sixteen_bytes) == []


def test_nothing_is_cleared_before_it_was_read(updates):
    assert complaints(updates, clears_after_reading) == []


def test_the_order_of_a_norm_is_not_the_compilers(norms):
    assert complaints(norms, chooses_no_order) == []


def test_a_norm_is_finished_after_all_has_been_summed(norms):
    assert complaints(norms, waits_for_its_sums) == []


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
    ("multi_tensor.py", "tl.debug_barrier()", "pass", clears_after_reading),
]
NORM_FAULTS = [
    ("launcher.py", '"enable_fp_fusion": False', '"enable_fp_fusion": True', is_not_fused),
    ("multi_tensor.py", "multiple_of(pointer, ACCESS_BYTES)", "multiple_of(pointer, 8)", None),
    ("norm.py", "2, NORM_CLASSES >> (k + 1)", "256 if k == 0 else 1, 1", chooses_no_order),
    ("norm.py", "tl.debug_barrier()", "pass", waits_for_its_sums),
    ("norm.py", 'sem="acq_rel"', 'sem="relaxed"', waits_for_its_sums),
]


@pytest.mark.parametrize(("file", "old", "new", "good"), FAULTS, ids=lambda v: None)
def test_a_fault_is_seen(tmp_path, file, old, new, good):
    good = good or moves_sixteen_bytes
    sound = update_kernel("adam", 1, (BF16, BF16, BF16))
    faulty = update_kernel(
        "adam", 1, (BF16, BF16, BF16), kernel_package.changed(tmp_path, file, old, new)
    )
    assert good(sound)
    assert not good(faulty)


@pytest.mark.parametrize(("file", "old", "new", "good"), NORM_FAULTS, ids=lambda v: None)
def test_a_fault_of_a_norm_is_seen(tmp_path, file, old, new, good):
    good = good or sums_sixteen_bytes
    assert good(norm_kernel(BF16, BF16))
    changed = kernel_package.changed(tmp_path, file, old, new)
    assert not good(norm_kernel(BF16, BF16, changed))


# ---- Another vendor's ---------------------------------------------------------------------------


@pytest.mark.skipif("amd" not in triton.backends.backends, reason="this Triton has no AMD backend")
@pytest.mark.parametrize("storage", [(F32, F32, F32), (F64, F64, F64), (BF16, BF16, F32)], ids=str)
@pytest.mark.parametrize("variant", [("sgd", 1), ("adam", 1)], ids=str)
def test_amd(variant, storage):
    """A quotient is itself made of fused operations there, so that only memory can be judged."""
    kernel = update_kernel(*variant, storage, target=CDNA3)
    width = ACCESS_BYTES // min(kernel.arrays)
    wide = sum(width * size // ACCESS_BYTES for size in kernel.arrays)
    assert kernel.count(r"\bglobal_store_dwordx4\b") >= wide
    assert kernel.count(r"\bglobal_load_dwordx4\b") >= wide
    assert not kernel.count(r"\bscratch_")


@pytest.mark.skipif("amd" not in triton.backends.backends, reason="this Triton has no AMD backend")
@pytest.mark.parametrize("make", [norm_kernel, accumulate_kernel])
def test_amd_gradients(make):
    kernel = make(BF16, BF16, target=CDNA3)
    assert kernel.count(r"\bglobal_load_dwordx4\b") >= 3
    assert not kernel.count(r"\bscratch_")
