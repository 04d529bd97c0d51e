"""Breaks the arithmetic, one line at a time, and requires the C++ tests to notice.

A test suite that passes says little unless it fails when the code is wrong. Each mutation is some
text of one source, which must be there exactly once, and what takes its place; the affected
torch-free test is compiled from a copy and must fail, naming a case that shows the defect.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")
# The arithmetic flags of the build; the least optimization, which compiles and runs fastest in sum.
FLAGS = ["-O1", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]

# The sources that each test is linked with, besides its own.
SOURCES = {
    "rule_test": [],
    "dtype_test": [],
    "gather_test": ["data/gather.cpp"],
    "driver_test": [
        *("core/registry.cpp", "core/table.cpp", "cpu/driver.cpp", "cpu/tiers.cpp"),
        *("cpu/tier_generic.cpp", "cpu/tier_avx2.cpp", "cpu/tier_avx512.cpp"),
    ],
}
SOURCES["onepass_test"] = [*SOURCES["driver_test"], "device/table.cpp"]
SOURCES["cuda_body_test"] = [*SOURCES["onepass_test"], "device/image.cpp"]
# As in CMakeLists.txt.
OWN_FLAGS = {test: ["-DFUSEDOPT_HD=inline"] for test in ("cuda_body_test", "onepass_test")}


@dataclass(frozen=True)
class Mutation:
    """One defect.

    Attributes:
        name: What goes wrong.
        file: Source below csrc that is changed.
        old: Text in it, found exactly once; runs of white space match any other.
        new: What takes its place.
        shows: Pattern of the failure's message: the case that must notice.
        test: The C++ test that must fail.
        rebuild: The one source compiled from the copy, where the others need not be.
    """

    name: str
    file: str
    old: str
    new: str
    shows: str
    test: str = "rule_test"
    rebuild: str = ""


_DECAY = "if (s.weight_decay != 0) grad = grad + s.weight_decay * param;"
_BF16_ROUNDING = "+ 0x7fffu + ((bits >> 16) & 1u)"
# The generic tier alone is broken and rebuilt: the test compares each tier with the scalar path.
_GENERIC = {"test": "driver_test", "rebuild": "cpu/tier_generic.cpp"}
_DRIVER = {"test": "driver_test", "rebuild": "cpu/driver.cpp"}
_TABLE = {"test": "driver_test", "rebuild": "core/table.cpp"}
_GATHER = {"test": "gather_test", "rebuild": "data/gather.cpp"}
_BODY = {"test": "cuda_body_test"}
_ONEPASS = {"test": "onepass_test"}

MUTATIONS = [
    Mutation("sgd drops decay", "rules/sgd.h", _DECAY, "", r"sgd/default/\S*decay=0.1"),
    Mutation("adagrad drops decay", "rules/adagrad.h", _DECAY, "", r"adagrad/default/\S*decay=0.1"),
    Mutation("rmsprop drops decay", "rules/rmsprop.h", _DECAY, "", r"rmsprop/default/\S*decay=0.1"),
    Mutation("adam drops coupled decay", "rules/adam.h", _DECAY, "", r"adam/default/\S*decay=0.1"),
    Mutation(
        "adamw drops decoupled decay",
        "rules/adam.h",
        "param = param * s.decay;",
        "",
        r"adamw/default/\S*decay=0.1",
    ),
    Mutation(
        "adam swaps betas",
        "rules/adam.h",
        "double lr, beta1, beta2,",
        "double lr, beta2, beta1,",
        r"adam/default/step=10/",
    ),
    Mutation(
        "adam forgets the first bias correction",
        "rules/adam.h",
        "T(h.lr / bias_correction1)",
        "T(h.lr)",
        r"adam/default/step=1/",
    ),
    Mutation(
        "adam forgets the second bias correction",
        "rules/adam.h",
        "T(1.0 / sqrt(bias_correction2))",
        "T(1.0)",
        r"adam/default/step=1/",
    ),
    Mutation(
        "adam ignores amsgrad's maximum",
        "rules/adam.h",
        "second_moment = max_exp_avg_sq;",
        "",
        r"adam/amsgrad/step=2/",
    ),
    Mutation(
        "sgd ignores nesterov",
        "rules/sgd.h",
        "grad = grad + s.momentum * buffer;",
        "grad = buffer;",
        r"sgd/nesterov/step=1/",
    ),
    Mutation(
        "sgd ignores dampening",
        "rules/sgd.h",
        "T(first ? 1.0 : 1.0 - h.dampening)",
        "T(1.0)",
        r"sgd/dampening/step=2/",
    ),
    Mutation(
        "sgd dampens the first step",
        "rules/sgd.h",
        "T(first ? 1.0 : 1.0 - h.dampening)",
        "T(1.0 - h.dampening)",
        r"sgd/dampening/step=1/",
    ),
    Mutation(
        "sgd forgets momentum",
        "rules/sgd.h",
        "T(first ? 0.0 : h.momentum)",
        "T(0.0)",
        r"sgd/momentum/step=2/",
    ),
    Mutation(
        "adagrad's lr_decay is off by one",
        "rules/adagrad.h",
        "(step - 1.0) * h.lr_decay",
        "step * h.lr_decay",
        r"adagrad/lr_decay/step=1/",
    ),
    Mutation(
        "adagrad ignores lr_decay",
        "rules/adagrad.h",
        "(1.0 + (step - 1.0) * h.lr_decay)",
        "1.0",
        r"adagrad/lr_decay/step=2/",
    ),
    Mutation(
        "rmsprop ignores centered",
        "rules/rmsprop.h",
        "variance = square_avg - grad_avg * grad_avg;",
        "",
        r"rmsprop/centered/step=1/",
    ),
    Mutation(
        "rmsprop ignores momentum",
        "rules/rmsprop.h",
        "buffer = s.momentum * buffer + grad / root;",
        "buffer = grad / root;",
        r"rmsprop/momentum/step=2/",
    ),
    Mutation(
        "adam forgets eps",
        "rules/adam.h",
        "* s.inv_sqrt_bias_correction2 + s.eps;",
        "* s.inv_sqrt_bias_correction2;",
        r"adam/non-default_betas_and_eps/step=1/",
    ),
    Mutation(
        "bf16 rounds ties away from zero",
        "core/dtype.h",
        _BF16_ROUNDING,
        "+ 0x8000u",
        "bfloat16: rounding float",
        "dtype_test",
    ),
    Mutation(
        "bf16 truncates", "core/dtype.h", _BF16_ROUNDING, "", "bfloat16: rounding", "dtype_test"
    ),
    Mutation(
        "fp16 rounds ties away from zero",
        "core/dtype.h",
        "magnitude + 0xfffu + ((magnitude >> 13) & 1u)",
        "magnitude + 0x1000u",
        "float16: rounding float",
        "dtype_test",
    ),
    Mutation(
        "a tier rounds bf16 ties away from zero",
        "cpu/vec.h",
        "(up & 0xffffu) == 0 ? up & ~0x10000u : up",
        "up",
        "conversions: bfloat16 on generic rounds",
        **_GENERIC,
    ),
    Mutation(
        "a tier skips the tail",
        "cpu/kernels.h",
        "loop(rest.span, V::kLanes, rest.span, task);",
        "",
        "sizes: sgd variant 0 float32/float32/float32 on generic",
        **_GENERIC,
    ),
    Mutation(
        "a tier ignores maximize",
        "cpu/kernels.h",
        "const T factor = slot.grad_factor * around.factor;",
        "const T factor = around.factor;",
        "sizes: sgd variant 0 float32/float32/float32 on generic",
        **_GENERIC,
    ),
    Mutation(
        "the driver reads one scalar slot for all rows",
        "cpu/driver.cpp",
        "table.slots.data() + row.slot * table.slot_size",
        "table.slots.data()",
        "sizes: sgd variant 0 float32/float32/float32",
        **_DRIVER,
    ),
    Mutation(
        "the driver does not write a strided parameter back",
        "cpu/driver.cpp",
        "if (array == nullptr || !writes(work, a)) continue;",
        "if (array == nullptr || a == 0 || !writes(work, a)) continue;",
        "layouts: sgd variant 0 float32/float32/float32 on generic",
        **_DRIVER,
    ),
    Mutation(
        "the driver skips chunks",
        "cpu/driver.cpp",
        "table->chunks[c - before]",
        "table->chunks[(c - before) / 2]",
        "chunks of 1000: adamw variant 0 bfloat16/bfloat16/bfloat16 on generic",
        **_DRIVER,
    ),
    Mutation(
        "a cut loses an element",
        "core/table.cpp",
        "begin += count;",
        "begin += count + 1;",
        "chunks of 1024: pieces leave a gap",
        **_TABLE,
    ),
    Mutation(
        "a CUDA body takes the head twice and leaves the tail",
        "cuda/body.h",
        "r < head ? r : r + skipped",
        "r",
        "rows, chunks of 64: sgd variant 0 float32/float32/float32",
        **_BODY,
    ),
    Mutation(
        "a CUDA body ignores maximize",
        "cuda/body.h",
        "chunk.factor = chunk.slot.grad_factor;",
        "chunk.factor = 1;",
        "rows, chunks of 64: sgd variant 0 float32/float32/float32",
        **_BODY,
    ),
    Mutation(
        "a CUDA body keeps the scaled gradient",
        "cuda/body.h",
        "store(chunk.grad + at[1], grad);",
        "",
        "grad_scale",
        **_BODY,
    ),
    Mutation(
        "a CUDA body walks all arrays by the parameter's strides",
        "cuda/body.h",
        "for (int a = 0; a < 2 + kStates; ++a) at[a] += index * layout.strides[a][d];",
        "for (int a = 0; a < 2 + kStates; ++a) at[a] += index * layout.strides[0][d];",
        "layouts: sgd variant 0 float32/float32/float32",
        **_BODY,
    ),
    Mutation(
        "a prepare kernel bumps no step",
        "device/prepare.h",
        "slot.step.get() + 1.0",
        "slot.step.get()",
        "prepare",
        **_BODY,
    ),
    Mutation(
        "a prepare kernel takes every step for the first",
        "device/prepare.h",
        "*slot.first = 0;",
        "",
        "prepare",
        **_BODY,
    ),
    Mutation(
        "an upload begins at the last row that changed",
        "device/image.cpp",
        "first = std::min(first, r);",
        "first = r;",
        "image",
        rebuild="device/image.cpp",
        **_BODY,
    ),
    Mutation(
        "a row keeps its old scalar slot",
        "device/table.cpp",
        "if (!moved && row.slot == from.slot && row.norm_block == from.norm_block) return false;",
        "if (!moved) return false;",
        "image",
        rebuild="device/table.cpp",
        **_BODY,
    ),
    # ---- Around the update
    Mutation(
        "a check is forgotten",
        "core/onepass.h",
        "(q.check == 0 || is_finite(sums.with))",
        "true",
        "a sum that is not finite skips",
        **_ONEPASS,
    ),
    Mutation(
        "a micro-batch that is left out counts",
        "core/onepass.h",
        "if (take) v.weight = v.weight + weight;",
        "v.weight = v.weight + weight;",
        "one that is not finite does not count",
        **_ONEPASS,
    ),
    Mutation(
        "a window keeps its weight",
        "core/onepass.h",
        "v.weight = 0.0;",
        "",
        "the window is empty",
        **_ONEPASS,
    ),
    Mutation(
        "a window of nothing is an update",
        "core/onepass.h",
        "v.skip = total > 0.0 && (q.check == 0 || is_finite(squares)) ? 0 : 1;",
        "v.skip = 0;",
        "nothing is left",
        **_ONEPASS,
    ),
    Mutation(
        "the norm of a window ignores what was left out",
        "core/onepass.h",
        "const double squares = take ? sums.with : sums.without;",
        "const double squares = sums.with;",
        "the last one is left out",
        **_ONEPASS,
    ),
    Mutation(
        "clipping forgets the scale",
        "core/onepass.h",
        "factor = factor * coefficient;",
        "factor = coefficient;",
        "unscaled, clipped",
        **_ONEPASS,
    ),
    Mutation(
        "a norm keeps the sums of rows that take no part",
        "cpu/driver.cpp",
        "std::fill_n(task.sums, norm_blocks(piece.count), NormSums{});",
        "",
        "norm: .* on generic: block",
        rebuild="cpu/driver.cpp",
        **_ONEPASS,
    ),
    Mutation(
        "a norm skips a block's tail",
        "cpu/kernels.h",
        "__builtin_memcpy(buffer, array, count * size);",
        "__builtin_memcpy(buffer, array, (count - 1) * size);",
        "norm: .* on generic: block",
        rebuild="cpu/tier_generic.cpp",
        **_ONEPASS,
    ),
    Mutation(
        "a norm forgets what gradients weigh",
        "cpu/kernels.h",
        "load(accumulator + i) + load(grad + i) * in",
        "load(accumulator + i) + load(grad + i)",
        "norm: .* on generic: block",
        rebuild="cpu/tier_generic.cpp",
        **_ONEPASS,
    ),
    Mutation(
        "gradients that are left out are accumulated",
        "cpu/kernels.h",
        "const bool take = task.pass.verdict->take != 0;",
        "const bool take = true;",
        "accumulation: .* on generic",
        rebuild="cpu/tier_generic.cpp",
        **_ONEPASS,
    ),
    Mutation(
        "an accumulator is not cleared",
        "cpu/kernels.h",
        "store(at.accumulator + i, V{});",
        "",
        "surroundings: .* on generic",
        **_GENERIC,
    ),
    Mutation(
        "the average is of the parameter before",
        "cpu/kernels.h",
        "around.decay * average + around.rest * load(at.param + i)",
        "around.decay * average + around.rest * p",
        "surroundings: .* bfloat16/.* on generic",
        **_GENERIC,
    ),
    Mutation(
        "a lane's sums are taken for neighbours",
        "cuda/norm.h",
        "sum / kWidth * kTurn + lane * kWidth + sum % kWidth",
        "lane * kSums + sum",
        "norm: .* on a CUDA body: block",
        **_ONEPASS,
    ),
    Mutation(
        "a device's accumulation takes every second access",
        "cuda/norm.h",
        "i < done; i += threads * kWidth",
        "i < done; i += 2 * threads * kWidth",
        "accumulation: .* on a CUDA body",
        **_ONEPASS,
    ),
    Mutation(
        "a skipped step leaves the accumulators full",
        "cuda/body.h",
        "if (accumulator != nullptr) { clear<1>(",
        "if (false) { clear<1>(",
        "skips",
        **_BODY,
    ),
    Mutation(
        "the average is of the unrounded parameter",
        "cuda/body.h",
        "rest * T(from_storage(to_storage<P>(param[i])))",
        "rest * param[i]",
        "surroundings: .* bfloat16/.* on a CUDA body",
        **_BODY,
    ),
    Mutation(
        "the last piece of a batch is left out",
        "data/gather.cpp",
        "begin < count; begin += length",
        "begin + length <= count; begin += length",
        ": label",
        **_GATHER,
    ),
    Mutation(
        "rows in order begin at the first",
        "data/gather.cpp",
        "index == nullptr ? first + i",
        "index == nullptr ? i",
        "in order: (row|label)",
        **_GATHER,
    ),
    Mutation(
        "rows are taken to follow one another",
        "data/gather.cpp",
        "* source.stride;",
        "* source.bytes;",
        "rows of 1 bytes, 2 apart.*: row",
        **_GATHER,
    ),
    Mutation(
        "a negative index is in range",
        "data/gather.cpp",
        "static_cast<uint64_t>(i) >= limit",
        "i >= static_cast<int64_t>(limit)",
        "a negative one",
        **_GATHER,
    ),
]


def mutate(text: str, mutation: Mutation) -> str:
    """The text with the mutation in it.

    Raises:
        AssertionError: The text to replace is not there exactly once.
    """
    pattern = r"\s+".join(re.escape(word) for word in mutation.old.split())
    found = len(re.findall(pattern, text))
    assert found == 1, (
        f"csrc/{mutation.file} has {mutation.old!r} {found} times, wanted once: "
        "bring this mutation up to date"
    )
    return re.sub(pattern, lambda _: mutation.new, text)


def compile_cpp(arguments: list[str | Path], tree: Path) -> None:
    """Runs the compiler on sources that see `tree`'s headers."""
    command = [CXX, *FLAGS, "-I", tree / "csrc", "-I", tree / "tests/cpp", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}: {result.stderr}"


def run(binary: Path, golden: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary, golden], capture_output=True, text=True, check=False)


class Workshop:
    """The unmutated tests: sources copied and objects compiled once, for all mutations."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.objects = folder / "objects"
        self.objects.mkdir()
        copy_tree(self.tree)
        self.golden = folder / "golden.txt"
        subprocess.run(
            [sys.executable, ROOT / "tests/oracle.py", "--write", self.golden], check=True
        )

    def object(self, source: Path) -> Path:
        """The object of an unmutated source."""
        path = self.objects / f"{source.parent.name}_{source.stem}.o"
        if not path.exists():
            flags = OWN_FLAGS.get(source.stem, [])
            compile_cpp([*flags, "-c", source, "-o", path], self.tree)
        return path

    def build(self, test: str, binary: Path, tree: Path | None = None, rebuild: str = "") -> None:
        """Links a test; `rebuild`, or the test's own source, is compiled from `tree`."""
        own = Path("tests/cpp") / f"{test}.cpp"
        sources = [own, *(Path("csrc") / source for source in SOURCES[test])]
        fresh = Path("csrc") / rebuild if rebuild else own
        inputs = [
            tree / source if tree and source == fresh else self.object(self.tree / source)
            for source in sources
        ]
        flags = [] if rebuild else OWN_FLAGS.get(test, [])
        compile_cpp([*flags, *inputs, "-pthread", "-o", binary], tree or self.tree)


def copy_tree(target: Path) -> None:
    shutil.copytree(ROOT / "csrc", target / "csrc")
    shutil.copytree(ROOT / "tests/cpp", target / "tests/cpp")


def marks(test: str) -> list:
    """Those of the drivers are slow: each compiles a tier, or the bodies of all kernels."""
    quick = ("rule_test", "dtype_test", "gather_test")
    return [] if test in quick else [pytest.mark.slow]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler {CXX!r}; set CXX")
    return Workshop(tmp_path_factory.mktemp("mutations"))


@pytest.mark.parametrize("test", [pytest.param(test, marks=marks(test)) for test in SOURCES])
def test_unmutated_passes(workshop: Workshop, tmp_path: Path, test: str) -> None:
    workshop.build(test, tmp_path / test)
    result = run(tmp_path / test, workshop.golden)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"{test}: [1-9]\d* checks, 0 failures", result.stderr)


@pytest.mark.parametrize(
    "mutation", [pytest.param(m, id=m.name, marks=marks(m.test)) for m in MUTATIONS]
)
def test_mutation_fails(workshop: Workshop, tmp_path: Path, mutation: Mutation) -> None:
    copy_tree(tmp_path)
    source = tmp_path / "csrc" / mutation.file
    source.write_text(mutate(source.read_text(), mutation))
    binary = tmp_path / mutation.test
    workshop.build(mutation.test, binary, tmp_path, mutation.rebuild)
    result = run(binary, workshop.golden)
    assert result.returncode == 1, f"{mutation.name} went unnoticed: {result.stderr}"
    assert re.search(mutation.shows, result.stderr), result.stderr
