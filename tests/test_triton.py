"""The Triton backend: choice, errors, large sizes. What every device's does: test_device.py."""

import os
import subprocess
import sys

import kernel_package
import numpy as np
import pytest
import torch
from harness import make_params, set_grads

import fusedopt
from fusedopt import _C, backends

# The structs of csrc/device/table.h.
ROW = np.dtype("u8, u8, 5u8, i8, i4, i4, i4, i4")
ROW.names = ("param", "grad", "state", "norm_block", "slot", "layout", "width", "head")
CHUNK = np.dtype([("begin", "i8"), ("count", "i4"), ("row", "i4")])
LAYOUT = np.dtype([("dims", "i8"), ("sizes", "i8", 64), ("strides", "i8", (7, 64))])


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_makes_it_a_backend_of_the_cpu():
    code = (
        "import torch, fusedopt\n"
        "params = [torch.nn.Parameter(torch.linspace(-1, 1, 999)) for _ in range(3)]\n"
        "for param, backend in zip(params, ('triton', 'cpu', 'auto')):\n"
        "    param.grad = torch.ones(999)\n"
        "    optimizer = fusedopt.AdamW([param], backend=backend)\n"
        "    for _ in range(2): optimizer.step()\n"
        "    print(optimizer.routes()[0].backend, torch.equal(param, params[0]))\n"
    )
    told = run(code, TRITON_INTERPRET="1")
    assert told.splitlines() == ["triton True", "cpu True", "cpu True"]


def test_importing_fusedopt_imports_no_kernels():
    code = "import sys, fusedopt; fusedopt.AdamW([__import__('torch').ones(1)]); "
    assert run(code + "print('fusedopt.triton_kernels.launcher' in sys.modules)") == "False\n"


def test_every_reason_why_there_is_no_triton(monkeypatch):
    import triton

    def reason():
        backends._triton_missing.cache_clear()
        with pytest.raises(RuntimeError) as caught:
            fusedopt.AdamW(make_params(), backend="triton")
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.5.1")
        assert "triton 3.5.1 is older than 3.6; use backend='auto'" in reason()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert "triton cannot be imported" in reason()
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        assert "triton finds no device to run on, and TRITON_INTERPRET=1 is not set" in reason()
    backends._triton_missing.cache_clear()


def test_cuda_is_preferred_where_both_are_there(monkeypatch):
    there = {name: backends.Backend(name, ("cuda",), lambda: "", "") for name in ("cuda", "triton")}
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": backends.BACKENDS["cpu"], **there})
    assert backends.backend_for("cuda").name == "cuda"
    there["cuda"] = backends.Backend("cuda", ("cuda",), lambda: "not built", "")
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": backends.BACKENDS["cpu"], **there})
    assert backends.backend_for("cuda").name == "triton"


def test_a_kernel_that_does_not_compile_changes_nothing(monkeypatch):
    class Broken:
        def load(self, *arguments):
            raise RuntimeError("no C compiler")

    launcher = _C.triton_launcher(Broken())
    row = backends.Backend("broken", ("cpu",), lambda: "", "", lambda: launcher)
    monkeypatch.setitem(backends.BACKENDS, "broken", row)
    params = make_params([(5,)])
    optimizer = fusedopt.AdamW(params, backend="broken")
    params[0].grad = torch.ones(5)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="no C compiler"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state


def test_a_second_table_without_room_changes_nothing_of_the_first(monkeypatch):
    asked = []

    class Cramped:
        def load(self, *arguments):
            pass

        def multiprocessors(self):
            asked.append(len(asked))
            if len(asked) == 2:
                raise RuntimeError("no room")
            return 1

        def launch(self, *arguments):
            launches.append(arguments)

    launches = []
    launcher = _C.triton_launcher(Cramped())
    row = backends.Backend("cramped", ("cpu",), lambda: "", "", lambda: launcher)
    monkeypatch.setitem(backends.BACKENDS, "cramped", row)
    params = [*make_params([(5,)]), *make_params([(5,)], torch.float64)]
    optimizer = fusedopt.AdamW(params, backend="cramped")
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="no room"):
        optimizer.step()
    assert launches == []
    assert not optimizer.state
    optimizer.step()
    assert [kind for kind, *_ in launches] == ["update"] * 2


@pytest.mark.parametrize("layout", [False, True], ids=["linear", "with a layout"])
def test_elements_past_two_to_the_31st(layout):
    """Of a row that begins far before the memory it is updated in."""
    count, begin, lr = 1030, 2**33, 0.25
    param, grad = torch.randn(2, count)
    expected = param - lr * grad
    rows, chunks, layouts = np.zeros(1, ROW), np.zeros(1, CHUNK), np.zeros(1, LAYOUT)
    addresses = param.data_ptr() - 4 * begin, grad.data_ptr() - 4 * begin
    rows[0] = (*addresses, (0,) * 5, 0, 0, 0 if layout else -1, 1 if layout else 4, 0)
    chunks[0] = (begin, count, 0)
    layouts[0]["dims"] = 2
    layouts[0]["sizes"][:2] = (2**34, 2)
    layouts[0]["strides"][:, :2] = (2, 1)
    slots = np.array([1.0, lr, 0, 0, 0, 0], np.float32)  # SGD's
    table = [part.ctypes.data for part in (rows, chunks, layouts, slots)]
    kernels = kernel_package.interpreted().Launcher()
    key = [*_C.rules()].index("sgd"), 0, 0, 0, 0
    kernels.launch("update", key, 1, 0, *table, 1, 0, 0, 0)
    assert torch.equal(param, expected)


def test_the_package_needs_no_triton_to_say_so():
    code = "import sys; sys.modules['triton'] = None; import fusedopt; "
    code += "print(fusedopt.backends.BACKENDS['triton'].missing())"
    assert "cannot be imported" in run(code)
