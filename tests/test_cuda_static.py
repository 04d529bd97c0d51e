"""What can be proved of the CUDA kernels without a GPU, from resources, PTX and machine code.

Every .cu compiles alone, with `-I csrc` and nothing else. Skipped, visibly, where there is no nvcc.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_registry import ROOT, listed_rules

from fusedopt import _C

NVCC = shutil.which("nvcc")
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-I", str(ROOT / "csrc")]
# Two rules, and no fp16: the rest is the same code. The long run has all of it.
FEW_RULES = ["-include", str(ROOT / "tests/cpp/small_registry.h")]
SIZES = {"float": 4, "double": 8, "fusedopt::BF16": 2, "fusedopt::F16": 2}
ACCESS_BYTES = 16

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: nothing can be compiled")


def cuobjdump():
    """Triton's package carries one; CUDA's images do not always."""
    found = Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin/cuobjdump")
    return str(found) if found.exists() else shutil.which("cuobjdump")


@dataclass
class Kernel:
    """One compiled kernel."""

    name: str
    ptx: str
    sass: str
    resources: str

    @property
    def arguments(self):
        """Its template arguments: rule, variant, storage types of parameter, gradient, states."""
        return re.search(r"<(.*)>\(", self.name).group(1).split(", ")

    @property
    def is_update(self):
        return "::update<" in self.name

    @property
    def in_double(self):
        return "double" in self.arguments

    def count(self, pattern):
        return len(re.findall(pattern, self.sass))


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def demangled(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def sections(text, heading):
    """A listing cut at its headings: what follows each, by the name in it."""
    parts = re.split(heading, text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def compile_unit(source, folder, flags):
    """The kernels of one .cu, for sm_90."""
    cubin, kept = folder / f"{source.stem}.cubin", folder / source.stem
    kept.mkdir()
    report = run(
        NVCC, *FLAGS, *flags, "-arch=sm_90", "-cubin", "-Xptxas", "-v", "--keep", "--keep-dir",
        str(kept), str(source), "-o", str(cubin),
    )  # fmt: skip
    ptx = kept / f"{source.stem}.ptx"  # on the way to the cubin
    assert "warning" not in report, report
    if "Compiling entry function" not in report:
        return []
    resources = sections(report, r"Compiling entry function '(\w+)'")
    code = sections(run(cuobjdump(), "-sass", str(cubin)), r"Function : (\w+)")
    texts = sections(ptx.read_text(), r"\.entry (\w+)\(")
    names = demangled(list(resources))
    return [Kernel(names[n], texts[n], code[n], resources[n]) for n in resources]


@pytest.fixture(scope="session", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def kernels(request, tmp_path_factory):
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: install triton, whose package carries one")
    folder = tmp_path_factory.mktemp("cubins")
    every = request.param == "all"
    sources = [s for s in SOURCES if every or s.stem != "update_f16"]
    flags = [] if every else FEW_RULES
    with ThreadPoolExecutor(2) as pool:
        units = pool.map(lambda source: compile_unit(source, folder, flags), sources)
        return [kernel for unit in units for kernel in unit]


@pytest.fixture(scope="session")
def updates(kernels):
    return [kernel for kernel in kernels if kernel.is_update]


def complaints(kernels, good):
    return [kernel.name for kernel in kernels if not good(kernel)]


@pytest.mark.parametrize("kernels", [pytest.param("all", marks=pytest.mark.slow)], indirect=True)
def test_every_rule_has_its_kernels(kernels, updates):
    structs = {struct: rule for rule, struct in listed_rules(ROOT) if rule != "adamw"}
    wanted = {
        (f"fusedopt::{struct}", str(variant))
        for struct, rule in structs.items()
        for variant in range(len(_C.rules()[rule]["states"]))
    }
    storages = {tuple(kernel.arguments[2:]) for kernel in updates}
    assert {tuple(kernel.arguments[:2]) for kernel in updates} == wanted
    assert len(storages) == 10
    assert len(updates) == len(wanted) * len(storages)
    prepares = [kernel for kernel in kernels if "::update_prepare<" in kernel.name]
    assert len(prepares) == 2 * len(structs)
    around = [kernel for kernel in kernels if "::gradient_" in kernel.name]
    # A norm and an accumulation for each of the types that gradients have.
    assert len(around) == 2 * len({kernel.arguments[3] for kernel in updates})
    assert len(kernels) == len(updates) + len(prepares) + len(around)


def test_no_spill_and_no_local_memory(kernels):
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert complaints(kernels, lambda kernel: clean in kernel.resources) == []
    assert complaints(kernels, lambda kernel: kernel.count(r"\b(LDL|STL)\b") == 0) == []


def test_no_fused_multiply_add(kernels):
    """In PTX: in machine code a correctly rounded quotient is itself made of them."""
    assert complaints(kernels, lambda kernel: not re.search(r"\bfma\.", kernel.ptx)) == []


def test_no_approximate_maths(kernels):
    pattern = r"\.approx|\.ftz|\.full"
    assert complaints(kernels, lambda kernel: not re.search(pattern, kernel.ptx)) == []


def test_no_double_arithmetic_but_for_doubles_and_norms(kernels, updates):
    fp64 = r"\b(DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w*64H|[FI]2F\.\w*F64\w*)"
    accumulations = [kernel for kernel in kernels if "::gradient_accumulate<" in kernel.name]
    singles = [kernel for kernel in updates + accumulations if not kernel.in_double]
    assert complaints(singles, lambda kernel: kernel.count(fp64) == 0) == []
    doubles = [kernel for kernel in updates if kernel.in_double]
    assert doubles
    assert complaints(doubles, lambda kernel: kernel.count(fp64) > 0) == []


def test_aligned_bodies_move_sixteen_bytes_at_a_time(updates):
    """As many 16-byte accesses as the arrays need: none that could be is moved more narrowly.

    Rows of half the alignment have a body of their own, where larger types still fill an access.
    More than needed is a loop that the compiler has written out twice.
    """
    states = {f"fusedopt::{s}": _C.rules()[rule]["states"] for rule, s in listed_rules(ROOT)}
    for kernel in updates:
        rule, variant, *storage = kernel.arguments
        param, grad, state = (SIZES[name] for name in storage)
        width = ACCESS_BYTES // min(param, grad, state)
        wide = 8 if kernel.in_double else 4  # of the accumulator and the average
        arrays = [param, grad, *[state] * len(states[rule][int(variant)]), wide, wide]
        widths = [width >> halvings for halvings in range(width.bit_length())]

        def accesses(arrays, widths=widths):
            return sum(w * size // ACCESS_BYTES for w in widths for size in arrays)

        stores, loads = (kernel.count(rf"\b{op}\.E\.128\b") for op in ("STG", "LDG"))
        assert stores >= accesses([*arrays, grad]), kernel.name  # gradients: unscaled, or cleared
        assert loads >= accesses(arrays), kernel.name  # and parts of the table


def test_gradients_are_read_sixteen_bytes_at_a_time(kernels):
    for kernel in kernels:
        if "::gradient_" not in kernel.name:
            continue
        grad, compute = (SIZES[name] for name in kernel.arguments)
        elements = ACCESS_BYTES // grad
        turns = 1024 // (32 * elements) if "norm" in kernel.name else 1
        loads = turns * (1 + elements * compute // ACCESS_BYTES)  # and of the accumulator
        assert kernel.count(r"\bLDG\.E\.128\b") >= loads, kernel.name


def test_halves_are_rounded_by_the_hardware(updates):
    for kernel in updates:
        for name, instruction in (("BF16", "cvt.rn.bf16"), ("F16", "cvt.rn.f16")):
            if f"fusedopt::{name}" in kernel.arguments[2:]:
                assert instruction in kernel.ptx, kernel.name


def test_graphs_find_their_calls_in_the_runtime_library():
    """csrc/device/graph_runtime.cpp asks a loaded library by name for what nothing links."""
    libraries = [*Path(NVCC).resolve().parent.parent.rglob("libcudart.so*")]
    libraries += [*Path("/usr/local/cuda").resolve().rglob("libcudart.so*")]
    if not libraries:
        pytest.skip("no libcudart.so beside nvcc")
    code = f"import ctypes; ctypes.CDLL({str(libraries[0])!r}); from fusedopt import _C; "
    told = run(sys.executable, "-c", code + "print(_C.gpu_runtime())")
    assert "libcudart.so" in told
