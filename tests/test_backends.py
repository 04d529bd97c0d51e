"""Choosing a backend and an instruction tier, the doctor, and the symbols of the tiers."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from harness import make_params, set_grads

import fusedopt
from fusedopt import __main__ as doctor
from fusedopt import backends
from fusedopt.backends import BACKENDS, check_backend, covers


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='gpu' is not a backend; use one of 'auto', "):
        fusedopt.SGD(make_params(), backend="gpu")


@pytest.mark.parametrize("name", [name for name in BACKENDS if BACKENDS[name].missing()])
def test_missing_backend_says_why(name):
    with pytest.raises(RuntimeError, match=f"backend='{name}' is not available: .*; use backend"):
        fusedopt.AdamW(make_params(), backend=name)
    assert check_backend("auto") == "auto"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0 9.0", (8, 6), True),
        ("8.0 9.0", (7, 5), False),
        ("8.0 9.0", (10, 0), False),
        ("8.6", (8, 0), False),
        ("8.0 9.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
    ],
)
def test_which_devices_a_build_covers(architectures, capability, runs):
    assert covers(architectures, capability) is runs


def test_every_reason_why_there_is_no_cuda(monkeypatch):
    """backend="cuda" tells what of build, torch and device is in the way."""

    def reason():
        with pytest.raises(RuntimeError) as caught:
            fusedopt.AdamW(make_params(), backend="cuda")
        return str(caught.value)

    monkeypatch.setattr(backends._C, "cuda_launcher", lambda: None)
    monkeypatch.setattr(backends._build_info, "CUDA_MISSING", "there is no nvcc")
    assert "this build has no CUDA kernels (there is no nvcc); use backend='auto'" in reason()
    monkeypatch.setattr(backends._C, "cuda_launcher", object)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in reason()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - 2 * index, 0))
    monkeypatch.setattr(backends._build_info, "CUDA_ARCHITECTURES", "8.0 9.0+PTX")
    assert "device 1 (GPU 1) has compute capability 7.0, the kernels were built for" in reason()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fusedopt.AdamW(make_params(), backend="auto")
    assert BACKENDS["cuda"].missing() == ""


@pytest.mark.parametrize(
    ("param", "reason"),
    [
        (torch.zeros(3, device="meta", requires_grad=True), "on device meta"),
        (torch.zeros(3).expand(4, 3).requires_grad_(), "share one memory location"),
    ],
)
def test_named_backend_refuses_a_parameter_it_cannot_take(param, reason):
    good = make_params([(3,)])
    with pytest.raises(ValueError, match=rf"backend='cpu' cannot update parameter 1 .*{reason}"):
        fusedopt.SGD([*good, param], backend="cpu")
    optimizer = fusedopt.SGD(good, backend="cpu")
    with pytest.raises(ValueError, match=reason):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_named_backend_refuses_differentiable():
    with pytest.raises(ValueError, match="differentiable=True; use backend='auto'"):
        fusedopt.SGD(make_params(), differentiable=True, backend="cpu")


def test_named_backend_refuses_a_sparse_gradient_and_changes_nothing():
    params = make_params([(4, 3), (5,)])
    optimizer = fusedopt.Adagrad(params, backend="cpu")
    set_grads(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(ValueError, match="its gradient is sparse; use backend='auto'"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1]


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "", **env}, capture_output=True, text=True
    )


@pytest.mark.parametrize("tier", fusedopt.cpu_tiers())
def test_environment_forces_a_tier(tier):
    result = python("import fusedopt; print(fusedopt.cpu_tier())", FUSEDOPT_CPU_TIER=tier)
    assert result.stdout.strip() == tier, result.stderr


def test_environment_naming_no_tier():
    code = (
        "import torch, fusedopt\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)\n"
        "optimizer = fusedopt.AdamW([p])\n"
        "try:\n    optimizer.step()\n"
        "except RuntimeError as error:\n    print(error)\n"
        "print(p.tolist(), len(optimizer.state), p._version)\n"
    )
    result = python(code, FUSEDOPT_CPU_TIER="sse9")
    message, after = result.stdout.strip().splitlines()
    assert "FUSEDOPT_CPU_TIER='sse9' is not a CPU instruction tier this machine can run" in message
    assert "generic" in message
    assert after == "[1.0, 1.0] 0 0", "an error must change nothing"


def test_selecting_a_tier_that_is_not_there():
    before = fusedopt.cpu_tier()
    with pytest.raises(RuntimeError, match="tier='mmx' is not a CPU instruction tier"):
        fusedopt._C.select_tier("mmx")
    assert fusedopt.cpu_tier() == before


def test_thread_count_of_torch_is_obeyed():
    """One OpenMP runtime, torch's: with one torch thread, the step starts no other."""
    code = (
        "import os, torch, fusedopt\n"
        "torch.set_num_threads(1)\n"  # before the tensors, which torch fills with all it has
        "def threads(): return len(os.listdir('/proc/self/task'))\n"
        "p = torch.nn.Parameter(torch.ones(4_000_000)); p.grad = torch.ones(4_000_000)\n"
        "optimizer = fusedopt.AdamW([p])\n"
        "optimizer.step()\n"
        "before = threads(); optimizer.step(); alone = threads() - before\n"
        "torch.set_num_threads(3); optimizer.step(); three = threads() - before\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print(alone, three, len({line.split()[-1] for line in maps if 'libgomp' in line}))\n"
    )
    result = python(code)
    assert result.stdout.split() == ["0", "2", "1"], result.stdout + result.stderr


def test_the_doctor_explains():
    result = python("import runpy; runpy.run_module('fusedopt', run_name='__main__')")
    assert result.returncode == 0, result.stderr
    for expected in (
        fusedopt.__version__,
        torch.__version__,
        f"{fusedopt.cpu_tier()} (in use)",
        "CUDA kernels",
        "backend triton",
        "FUSEDOPT_CPU_TIER",
        "device cpu      cpu kernels",
    ):
        assert expected in result.stdout


def test_the_doctor_says_why_a_device_has_its_backend(monkeypatch):
    def told(**missing):
        rows = {
            name: backends.Backend(name, ("cuda",), lambda m=m: m, "")
            for name, m in missing.items()
        }
        for module in (backends, doctor):
            monkeypatch.setattr(module, "BACKENDS", rows)
        monkeypatch.setattr(doctor, "_devices", lambda: ["cuda"])
        return dict(doctor.report())["device cuda"]

    assert told(cuda="", triton="") == "cuda kernels"
    assert told(cuda="no", triton="") == "triton kernels, because backend cuda is not available"
    assert told(cuda="no", triton="no").startswith("torch.optim's own step, because no backend")


def object_of(tier, folder):
    """A tier's object: the build's, where that is newer than the sources; else one made here."""
    root = Path(__file__).parent.parent
    newest = max(path.stat().st_mtime for path in (root / "csrc").rglob("*.*"))
    for built in (root / "build").glob(f"temp.*/csrc/cpu/tier_{tier}.o"):
        if built.stat().st_mtime > newest:
            return built
    target = folder / f"{tier}.o"
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    source = root / f"csrc/cpu/tier_{tier}.cpp"
    subprocess.run(["g++", *flags, "-I", root / "csrc", "-c", source, "-o", target], check=True)
    return target


def test_tiers_share_no_symbol(tmp_path):
    """A weak symbol in two tiers' objects would be merged by the linker: wrong code on old CPUs."""
    owners = Counter()
    for tier in ("generic", "avx2", "avx512"):
        target = object_of(tier, tmp_path)
        listing = subprocess.run(["nm", target], check=True, capture_output=True, text=True).stdout
        defined = [line.split()[-2:] for line in listing.splitlines() if len(line.split()) == 3]
        assert defined
        owners.update(name for kind, name in defined if kind in "WVuTDBRi")
        code = subprocess.run(["objdump", "-d", target], capture_output=True, text=True).stdout
        assert "vfmadd" not in code
        assert "vfmsub" not in code
    assert owners
    assert {name for name, count in owners.items() if count > 1} == set()
