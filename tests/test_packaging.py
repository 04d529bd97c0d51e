"""What a user installs: sdist, wheel, editable install, and the errors of a wrong set-up."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# What is built here has the CUDA kernels where they can be compiled, for one architecture. `make
# build` has compiled the CPU part alone.
NVCC = shutil.which("nvcc")
BUILD = {"FUSEDOPT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"} if NVCC else {}
NEVER_TOP_LEVEL = ("bench", "csrc", "tests", "triton_kernels")

# Run by an environment's interpreter, away from the checkout: where its fusedopt comes from, that
# the step is torch's, and what its folders offer under the names that must not be taken.
SMOKE = f"""
import importlib.metadata, importlib.util, torch, fusedopt, fusedopt.bench, fusedopt.triton_kernels

weights = [torch.linspace(-1, 1, 1001).requires_grad_() for _ in range(2)]
for weight, optim in zip(weights, (torch.optim, fusedopt)):
    optimizer = optim.AdamW([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
assert {{route.backend for route in optimizer.routes()}} == {{"cpu"}}, optimizer.routes()
assert not torch.equal(weights[1], torch.linspace(-1, 1, 1001))
torch.testing.assert_close(*weights)
assert importlib.metadata.version("fusedopt") == fusedopt.__version__
for name in {NEVER_TOP_LEVEL}:
    spec = importlib.util.find_spec(name)
    print(name, "none" if spec is None else [spec.origin, *(spec.submodule_search_locations or [])])
for module in (fusedopt, fusedopt._C, fusedopt.bench, fusedopt.triton_kernels):
    print(module.__name__, module.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The command's standard output; fails with everything it said when it does not exit 0."""
    # What the developer's shell and the running environment set must not help.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env | BUILD, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that sees the running one's packages.

    A line in a .pth file adds the folder to sys.path, but does not run the .pth files in it: the
    editable install of fusedopt under test is not seen.
    """
    path = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path)
    (site,) = path.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return path / "bin" / "python"


@contextlib.contextmanager
def installed(python: Path, *what: str | Path, cwd: Path) -> Iterator[None]:
    """Installs with the running torch; fusedopt's own metadata there do not count as installed."""
    pip = (python, "-m", "pip")
    flags = ("--no-build-isolation", "--no-deps", "--ignore-installed", "--no-index")
    run(*pip, "install", "--quiet", *flags, *what, cwd=cwd)
    try:
        yield
    finally:
        run(*pip, "uninstall", "--quiet", "--yes", "fusedopt", cwd=cwd)


def check_install(python: Path, home: Path, cwd: Path, *also_from: Path) -> None:
    """The environment trains, runs fusedopt from `home`, and offers nothing else at the top."""
    told = dict(line.split(" ", 1) for line in run(python, "-c", SMOKE, cwd=cwd).splitlines())
    for name in NEVER_TOP_LEVEL:
        found = told.pop(name)  # another distribution may own the name, never this project
        assert not any(str(place) in found for place in (home, python.parent.parent, *also_from))
    assert set(told) == {"fusedopt", "fusedopt._C", "fusedopt.bench", "fusedopt.triton_kernels"}
    for name, file in told.items():
        assert Path(file).is_relative_to(home), (name, file)

    assert torch.__version__ in run(python, "-m", "fusedopt", cwd=cwd)
    for bench in ([python.parent / "fusedopt-bench"], [python, "-m", "fusedopt.bench"]):
        assert "usage:" in run(*bench, "--help", cwd=cwd)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, made from a copy of the checkout."""
    work = tmp_path_factory.mktemp("sdist")
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, work / "checkout", ignore=skipped)
    run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", work),
        cwd=work / "checkout",
    )
    (archive,) = work.glob("fusedopt-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work / "unpacked", filter="data")
    (folder,) = (work / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the unpacked sdist: the one time that this module compiles."""
    out = tmp_path_factory.mktemp("wheel")
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    run(python, "-m", "pip", "wheel", *flags, "-w", out, f"{sources}{os.sep}", cwd=out)
    (built,) = out.iterdir()
    return built


@pytest.mark.slow
def test_sdist_has_every_source_and_nothing_built(sources: Path) -> None:
    packed = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}
    wanted = {
        str(path.relative_to(ROOT))
        for pattern in ("csrc/**/*.h", "csrc/**/*.cpp", "*/*.py", "setup.py", "pyproject.toml")
        for path in ROOT.glob(pattern)
        if path.relative_to(ROOT).parts[0] not in {"tests", "docs", "examples", "build"}
    }
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "fusedopt/py.typed"}
    wanted.discard("fusedopt/_build_info.py")
    assert len(wanted) > 40
    assert wanted <= packed, wanted - packed
    for name in packed:
        assert not re.search(r"\.so$|\.o$|\.pyc$|_build_info|^build/|^tests/", name), name


@pytest.mark.slow
def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        scripts = archive.read(entry).decode()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        requirements = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.M)
        info = archive.read("fusedopt/_build_info.py").decode()
    top = {name.split("/")[0] for name in names}
    assert top == {"fusedopt", metadata.split("/")[0]}
    expected = {"__init__.py", "py.typed", "bench/__main__.py", "triton_kernels/__init__.py"}
    assert {f"fusedopt/{name}" for name in expected} <= set(names)
    assert f"fusedopt/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert "fusedopt-bench = fusedopt.bench.__main__:main" in scripts
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.11"]
    assert f'TORCH_VERSION = "{torch.__version__}"' in info


@pytest.mark.slow
def test_installed_wheel_trains(wheel: Path, sources: Path, python: Path, tmp_path: Path) -> None:
    with installed(python, wheel, cwd=tmp_path):
        check_install(python, python.parent.parent, tmp_path, ROOT, sources)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install_trains(
    wheel: Path, sources: Path, python: Path, tmp_path: Path, mode: str
) -> None:
    """And recompiles nothing: the wheel was built in the same folder by the same interpreter."""

    def compiled() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (sources / "build").rglob("*.o")}

    before = compiled()
    assert len(before) > 5
    setting = f"editable_mode={mode}"
    with installed(python, "--config-settings", setting, "-e", sources, cwd=tmp_path):
        check_install(python, sources, tmp_path, ROOT)
    assert compiled() == before


def failure(code: str) -> str:
    """What `code` says on standard error, failing, with nothing on standard output."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    return done.stderr.rstrip("\n")


SETUP = "sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py', run_name='__main__')"
# As on a machine without a CUDA compiler, whatever this one has.
NO_NVCC = """import os, torch
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = None
os.environ.pop("CUDA_HOME", None)
os.environ["PATH"] = ""
"""


@pytest.mark.parametrize(
    ("set_up", "wanted"),
    [
        (
            "sys.modules['torch'] = None",
            ("found none", "pip install torch", "--no-build-isolation"),
        ),
        ("import torch; torch.__version__ = '2.10.1'", ("2.11 or newer", "2.10.1", "install -U")),
        ("import setuptools; setuptools.__version__ = '65.5.0'", ("77 or newer", "65.5.0", "-U")),
        (
            "import os; os.environ['FUSEDOPT_CUDA'] = 'yes'",
            ("FUSEDOPT_CUDA='yes'", "0 (never), 1 (or fail) or unset"),
        ),
        (
            f"{NO_NVCC}\nos.environ['FUSEDOPT_CUDA'] = '1'; torch.version.cuda = '13.0'",
            ("FUSEDOPT_CUDA=1", "cannot be built: there is no nvcc", "CUDA_HOME"),
        ),
    ],
    ids=["no torch", "old torch", "old setuptools", "wrong FUSEDOPT_CUDA", "no nvcc"],
)
def test_setup_stops_in_one_line_with_the_remedy(set_up: str, wanted: tuple[str, ...]) -> None:
    told = failure(f"import runpy, sys\n{set_up}\n{SETUP}")
    assert "\n" not in told
    assert told.startswith(("fusedopt ", "FUSEDOPT_CUDA"))
    for part in wanted:
        assert part in told


def test_setup_without_a_compiler_stops_in_failure(tmp_path: Path) -> None:
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path))
    env = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("fusedopt needs a C++20 compiler")
    for part in ("`no-such-compiler`", "install g++", "CXX"):
        assert part in last


TOLD = "import runpy, sys\n{}\nsetup = runpy.run_path('setup.py'); print(setup['cuda'].missing)"


@pytest.mark.parametrize(
    ("set_up", "wanted"),
    [
        ("import torch; torch.version.cuda = None", f"torch {torch.__version__} has no CUDA"),
        (f"{NO_NVCC}\ntorch.version.cuda = '13.0'", "there is no nvcc; install CUDA's toolkit"),
        ("import os; os.environ['FUSEDOPT_CUDA'] = '0'", "it was built with FUSEDOPT_CUDA=0"),
    ],
    ids=["torch without CUDA", "no nvcc", "FUSEDOPT_CUDA=0"],
)
def test_a_build_without_cuda_says_why(set_up: str, wanted: str) -> None:
    code = "import sys; sys.argv = ['setup.py', '--version']; import torch; "
    code = f"import os; os.environ.pop('FUSEDOPT_CUDA', None); {code}"
    told = run(sys.executable, "-c", code + TOLD.format(set_up), cwd=ROOT)
    assert told.splitlines()[-1].startswith(wanted)


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="needs nvcc, and there is none on PATH")
def test_a_build_with_cuda_loads_without_a_gpu(wheel: Path, python: Path, tmp_path: Path) -> None:
    """All kernels linked, even beside a torch without CUDA: what is missing is the device alone."""
    with installed(python, wheel, cwd=tmp_path):
        code = "import fusedopt.backends as b; print(b.BACKENDS['cuda'].missing())"
        assert torch.cuda.is_available() or "no CUDA device" in run(
            python, "-c", code, cwd=tmp_path
        )
        told = run(python, "-m", "fusedopt", cwd=tmp_path)
        assert re.search(r"CUDA kernels +CUDA \d+\.\d+, for 9\.0\n", told), told


# The user sees the last line of the traceback.
LOAD = "import sys, torch; {}; import fusedopt"


@pytest.mark.parametrize("release", ["2.99.0+cpu", "3.0.0"])
def test_extension_of_another_torch_says_so_in_failure(release: str) -> None:
    told = failure(LOAD.format(f"torch.__version__ = {release!r}")).split("\n")
    assert told[-1].startswith("ImportError: fusedopt was built for torch ")
    for part in (torch.__version__, release, "pip install --no-build-isolation .", "make build"):
        assert part in told[-1]


def test_patch_release_of_the_same_torch_loads() -> None:
    major, minor = torch.__version__.split(".")[:2]
    code = LOAD.format(f"torch.__version__ = '{major}.{minor}.99'") + "; print(fusedopt.cpu_tier())"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() in {"generic", "avx2", "avx512"}


@pytest.mark.parametrize("missing", ["fusedopt._build_info", "fusedopt._C"])
def test_missing_extension_says_so_in_failure(missing: str) -> None:
    told = failure(LOAD.format(f"sys.modules[{missing!r}] = None")).split("\n")
    assert told[-1].startswith("ImportError: fusedopt's extension ")
    assert "pip install --no-build-isolation ." in told[-1]
