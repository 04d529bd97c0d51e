"""Breaks the arithmetic, one line at a time, and requires the C++ tests to notice.

A test suite that passes says little unless it fails when the code is wrong. Each mutation is some
text of one source, which must be there exactly once, and what takes its place; the affected
torch-free test is compiled with it and must fail, naming a case that shows the defect. Rules are
mutated all at once, in copies of their headers that one program holds; of anything else the one
object that the mutation is in is compiled anew, for a short registry.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from compiled import COMMAND, CXX, NOT_INLINED, ROOT, linked, object_of, run

# The sources of each test, below the checkout's root. Those in tests/cpp compile every kernel they
# use without inlining it; an instruction tier has to be compiled as it is shipped.
SOURCES = {
    "rule_test": ["tests/cpp/rule_test.cpp"],
    "dtype_test": ["tests/cpp/dtype_test.cpp"],
    "gather_test": ["tests/cpp/gather_test.cpp", "csrc/data/gather.cpp"],
}
_CPU = [
    *("tests/cpp/job.cpp", "csrc/core/registry.cpp", "csrc/core/table.cpp", "csrc/cpu/driver.cpp"),
    *(f"csrc/cpu/{name}.cpp" for name in ("tiers", "tier_generic", "tier_avx2", "tier_avx512")),
]
_DEVICE = ["tests/cpp/bodies.cpp", "csrc/device/table.cpp", "csrc/device/image.cpp"]
SOURCES["driver_test"] = ["tests/cpp/driver_test.cpp", *_CPU]
SOURCES["epilogue_test"] = ["tests/cpp/epilogue_test.cpp", *_CPU, *_DEVICE]
SOURCES["cuda_body_test"] = ["tests/cpp/cuda_body_test.cpp", *_CPU, *_DEVICE]
DRIVERS = ("driver_test", "epilogue_test", "cuda_body_test")
SMALL = ("-include", f"{ROOT}/tests/cpp/small_registry.h")


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
        rebuild: The one source of the test that is compiled with it; empty: the test's own file.
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
_GENERIC = {"test": "driver_test", "rebuild": "csrc/cpu/tier_generic.cpp"}
_DRIVER = {"test": "driver_test", "rebuild": "csrc/cpu/driver.cpp"}
_TABLE = {"test": "driver_test", "rebuild": "csrc/core/table.cpp"}
_GATHER = {"test": "gather_test", "rebuild": "csrc/data/gather.cpp"}
_BODY = {"test": "cuda_body_test", "rebuild": "tests/cpp/bodies.cpp"}
_EPILOGUE = {"test": "epilogue_test", "rebuild": "tests/cpp/bodies.cpp"}
_DECISION = {"test": "epilogue_test"}

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
        "T(h.momentum)",
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
        "chunks of 1000: adamw variant 0 bfloat16/bfloat16/float32 on generic",
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
        "store(chunk.grad + at[1], scaled);",
        "",
        "surroundings",
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
        "a prepare kernel advances no scalar state",
        "device/prepare.h",
        "slot.scalar_states[k].set(states[k]);",
        ";",
        "prepare",
        **_BODY,
    ),
    Mutation(
        "a prepare kernel takes every step for the first",
        "device/prepare.h",
        "states[k] = slot.scalar_states[k].get();",
        "states[k] = 0.0;",
        "prepare",
        **_BODY,
    ),
    Mutation(
        "an upload begins at the last row that changed",
        "device/image.cpp",
        "first = std::min(first, r);",
        "first = r;",
        "image",
        rebuild="csrc/device/image.cpp",
        test="cuda_body_test",
    ),
    Mutation(
        "a row keeps its old scalar slot",
        "device/table.cpp",
        "if (!moved && row.slot == from.slot && row.norm_block == from.norm_block) return false;",
        "if (!moved) return false;",
        "image",
        rebuild="csrc/device/table.cpp",
        test="cuda_body_test",
    ),
    # ---- Around the update
    Mutation(
        "a check is forgotten",
        "core/decision.h",
        "(q.check == 0 || is_finite(sums.with))",
        "true",
        "a sum that is not finite skips",
        **_DECISION,
    ),
    Mutation(
        "a micro-batch that is left out counts",
        "core/decision.h",
        "if (take) v.weight = v.weight + weight;",
        "v.weight = v.weight + weight;",
        "one that is not finite does not count",
        **_DECISION,
    ),
    Mutation(
        "a window keeps its weight",
        "core/decision.h",
        "v.weight = 0.0;",
        "",
        "the window is empty",
        **_DECISION,
    ),
    Mutation(
        "a window of nothing is an update",
        "core/decision.h",
        "v.skip = total > 0.0 && (q.check == 0 || is_finite(squares)) ? 0 : 1;",
        "v.skip = 0;",
        "nothing is left",
        **_DECISION,
    ),
    Mutation(
        "the norm of a window ignores what was left out",
        "core/decision.h",
        "const double squares = take ? sums.with : sums.without;",
        "const double squares = sums.with;",
        "the last one is left out",
        **_DECISION,
    ),
    Mutation(
        "clipping forgets the scale",
        "core/decision.h",
        "factor = factor * coefficient;",
        "factor = coefficient;",
        "unscaled, clipped",
        **_DECISION,
    ),
    Mutation(
        "a norm keeps the sums of rows that take no part",
        "cpu/driver.cpp",
        "std::fill_n(task.sums, norm_blocks(piece.count), NormSums{});",
        "",
        "norm: .* on generic: block",
        rebuild="csrc/cpu/driver.cpp",
        test="epilogue_test",
    ),
    Mutation(
        "a norm skips a block's tail",
        "cpu/kernels.h",
        "__builtin_memcpy(buffer, array, count * size);",
        "__builtin_memcpy(buffer, array, (count - 1) * size);",
        "norm: .* on generic: block",
        rebuild="csrc/cpu/tier_generic.cpp",
        test="epilogue_test",
    ),
    Mutation(
        "a norm forgets what gradients weigh",
        "cpu/kernels.h",
        "load(accumulator + i) + load(grad + i) * in",
        "load(accumulator + i) + load(grad + i)",
        "norm: .* on generic: block",
        rebuild="csrc/cpu/tier_generic.cpp",
        test="epilogue_test",
    ),
    Mutation(
        "gradients that are left out are accumulated",
        "cpu/kernels.h",
        "const bool take = task.epilogue.decision->take != 0;",
        "const bool take = true;",
        "accumulation: .* on generic",
        rebuild="csrc/cpu/tier_generic.cpp",
        test="epilogue_test",
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
        "store(at.param + i, p);"
        " for (int k = 0; k < kStates; ++k) store(at.state[k] + i, s[k]);"
        " if (!kPlain) finish(at, i, around);",
        "if (!kPlain) finish(at, i, around); store(at.param + i, p);"
        " for (int k = 0; k < kStates; ++k) store(at.state[k] + i, s[k]);",
        "surroundings: .* on generic",
        **_GENERIC,
    ),
    Mutation(
        "a lane's sums are taken for neighbours",
        "cuda/norm.h",
        "sum / kWidth * kTurn + lane * kWidth + sum % kWidth",
        "lane * kSums + sum",
        "norm: .* on a CUDA body: block",
        **_EPILOGUE,
    ),
    Mutation(
        "a device's accumulation takes every second access",
        "cuda/norm.h",
        "i < done; i += threads * kWidth",
        "i < done; i += 2 * threads * kWidth",
        "accumulation: .* on a CUDA body",
        **_EPILOGUE,
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


RULE_MUTATIONS = [mutation for mutation in MUTATIONS if mutation.test == "rule_test"]


def of_rules(mutation: Mutation | None) -> str:
    """The rules as a constant `kRules`, with the mutation, in a namespace of their own."""
    number = RULE_MUTATIONS.index(mutation) if mutation else len(RULE_MUTATIONS)
    text = ""
    if mutation:
        headers = [ROOT / "csrc" / mutation.file]
        text = mutate(headers[0].read_text(), mutation)
        # Whoever includes it means the mutated struct.
        for header in sorted((ROOT / "csrc/rules").glob("*.h")):
            if header.name != "all.h" and f'#include "{mutation.file}"' in header.read_text():
                text += header.read_text()
        text = re.sub(r"^#(include|pragma).*$", "", text, flags=re.M)
        text = text.replace("namespace fusedopt {", f"namespace fusedopt::mutation_{number} {{")
    return f"""{text}
namespace fusedopt::mutation_{number} {{
const testing::Rules kRules = {{FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_RUN_RULE)}};
}}
"""


@pytest.fixture(scope="module")
def rules_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rule_test with one more argument: which mutation; after the last of them, none."""
    copies = [*RULE_MUTATIONS, None]
    source = tmp_path_factory.mktemp("rules") / "rules_test.cpp"
    rules = ", ".join(f"&fusedopt::mutation_{number}::kRules" for number in range(len(copies)))
    source.write_text(
        f"""#include "rule_cases.h"
{"".join(map(of_rules, copies))}
int main(int, char** argv) {{
  const fusedopt::testing::Rules* rules[] = {{{rules}}};
  return fusedopt::testing::run_cases(*rules[std::atoi(argv[2])], argv[1]);
}}
"""
    )
    return linked("", object_of(source))


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "golden.txt"
    run(sys.executable, ROOT / "tests/oracle.py", "--write", path)
    return path


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler {CXX!r}; set CXX")


def flags_of(test: str, source: str, registry: tuple[str, ...] = SMALL) -> list[str]:
    """The flags of one of a test's sources."""
    if test not in DRIVERS:
        return []
    return [*registry, NOT_INLINED] if source.startswith("tests/") else [*registry]


def objects_of(test: str, without: str = "", registry: tuple[str, ...] = SMALL) -> list[Path]:
    """The unmutated objects of a test but one."""
    sources = [source for source in SOURCES[test] if source != without]
    return [object_of(ROOT / source, *flags_of(test, source, registry)) for source in sources]


def reported(*command: str | Path) -> tuple[int, str]:
    """A test's exit status and what it reports."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def check_passes(test: str, status: int, report: str) -> None:
    assert status == 0, report
    assert re.search(rf"{test}: [1-9]\d* checks, 0 failures", report)


def check_fails(mutation: Mutation, status: int, report: str) -> None:
    assert status == 1, f"{mutation.name} went unnoticed: {report}"
    assert re.search(mutation.shows, report), report


def test_unmutated_rules_pass(rules_test: Path, golden: Path) -> None:
    check_passes("rule_test", *reported(rules_test, golden, str(len(RULE_MUTATIONS))))


@pytest.mark.parametrize("mutation", RULE_MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_of_a_rule_fails(rules_test: Path, golden: Path, mutation: Mutation) -> None:
    number = RULE_MUTATIONS.index(mutation)
    check_fails(mutation, *reported(rules_test, golden, str(number)))


def marks(test: str) -> list:
    """Each of the drivers takes seconds."""
    return [pytest.mark.slow] if test in DRIVERS else []


@pytest.mark.parametrize(
    "test", [pytest.param(t, marks=marks(t)) for t in SOURCES if t != "rule_test"]
)
def test_unmutated_passes(test: str) -> None:
    check_passes(test, *reported(linked("", *objects_of(test))))


@pytest.mark.slow
@pytest.mark.parametrize("test", DRIVERS)
def test_every_kernel_passes(test: str) -> None:
    """All rules and storage tuples, which mutants and sanitizers leave out."""
    check_passes(test, *reported(linked("", *objects_of(test, registry=()))))


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, id=m.name, marks=marks(m.test)) for m in MUTATIONS if m.test != "rule_test"],
)
def test_mutation_fails(tmp_path: Path, mutation: Mutation) -> None:
    changed = tmp_path / mutation.file
    changed.parent.mkdir()
    changed.write_text(mutate((ROOT / "csrc" / mutation.file).read_text(), mutation))
    rebuild = mutation.rebuild or SOURCES[mutation.test][0]
    source = changed if rebuild == f"csrc/{mutation.file}" else ROOT / rebuild
    binary = tmp_path / "binary"
    # The mutated file is found first.
    command = [COMMAND[0], f"-I{tmp_path}", *COMMAND[1:], *flags_of(mutation.test, rebuild)]
    run(*command, source, "-pthread", *objects_of(mutation.test, rebuild), "-o", binary)
    check_fails(mutation, *reported(binary))
