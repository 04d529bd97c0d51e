"""The tables of docs/support.md, row by row, against what the plan does."""

import re
from pathlib import Path

import pytest
import rehearsal
import torch
from cases import CASES
from test_layouts import channels_last, column_slice, misaligned, transposed

import fusedopt
from fusedopt import backends

PAGE = Path(__file__).resolve().parent.parent / "docs/support.md"


def given(value, grad, dtype=None):
    """A parameter with a gradient, whose dtype may be another one."""
    param = value.requires_grad_()
    if dtype:
        param.grad_dtype = dtype
    param.grad = grad
    return [param]


def dtypes(param, grad=None, **kwargs):
    """Parameters of a dtype, gradients of another, for every rule."""

    def make():
        wanted = grad or param
        value = torch.ones(3, 4).to(param)
        return given(value, torch.ones(3, 4).to(wanted), grad), kwargs

    return [(case.fused(), make) for case in CASES]


def tensors(make):
    """What `make` makes, for every rule."""
    return [(case.fused(), lambda: (make(), {})) for case in CASES]


def laid(layout, grad_layout=None):
    shape = (2, 3, 4, 5)
    return tensors(
        lambda: given(layout(torch.ones(shape)), (grad_layout or layout)(torch.ones(shape)))
    )


def arguments(**kwargs):
    """A plain parameter, for every rule whose class has these arguments."""
    classes = [case for case in CASES if kwargs.keys() <= case.torch_class([W]).defaults.keys()]
    assert classes
    return [
        (case.fused(), lambda: (given(torch.ones(3), torch.ones(3)), kwargs)) for case in classes
    ]


def sharing():
    storage = torch.ones(6)
    return given(storage[:4], torch.ones(4)) + given(storage[2:], torch.ones(4))


def in_inference_mode():
    with torch.inference_mode():
        param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return [param]


class Tagged(torch.Tensor):
    """A subclass that could give operations another meaning."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def own_memory():
    (param,) = given(torch.ones(3), None)
    param.grad = param.detach()
    return [param]


W = torch.nn.Parameter(torch.ones(1))
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TENSORS = (torch.tensor(0.9), torch.tensor(0.99))

ROWS = {
    "fp32": dtypes(FP32),
    "fp64": dtypes(torch.float64),
    "bf16": dtypes(BF16),
    "fp16": dtypes(FP16),
    "bf16 with fp32 gradients": dtypes(BF16, FP32),
    "fp16 with fp32 gradients": dtypes(FP16, FP32),
    "bf16 with `state_dtype=torch.float32`": dtypes(BF16, state_dtype=FP32),
    "fp16 with `state_dtype=torch.float32`": dtypes(FP16, state_dtype=FP32),
    "bf16 with fp32 gradients and `state_dtype=torch.float32`": dtypes(
        BF16, FP32, state_dtype=FP32
    ),
    "fp16 with fp32 gradients and `state_dtype=torch.float32`": dtypes(
        FP16, FP32, state_dtype=FP32
    ),
    "complex64": dtypes(torch.complex64),
    "complex128": dtypes(torch.complex128),
    "complex32": dtypes(torch.complex32),
    "fp32 with bf16 gradients": dtypes(FP32, BF16),
    "bf16 with fp16 gradients": dtypes(BF16, FP16),
    "contiguous": laid(torch.clone),
    "channels-last": laid(channels_last),
    "transposed": laid(transposed),
    "a strided slice": laid(column_slice),
    "misaligned storage": laid(misaligned),
    "a gradient of another memory layout": laid(torch.clone, transposed),
    "an expanded gradient": tensors(lambda: given(torch.ones(3, 4), torch.ones(4).expand(3, 4))),
    "0-dim": tensors(lambda: given(torch.ones(()), torch.ones(()))),
    "zero-size": tensors(lambda: given(torch.ones(0), torch.ones(0))),
    "no gradient": tensors(lambda: given(torch.ones(3), None)),
    "an expanded parameter": tensors(lambda: given(torch.ones(4).expand(3, 4), torch.ones(3, 4))),
    "two parameters that share memory": tensors(sharing),
    "a parameter listed twice": tensors(lambda: given(torch.ones(3), torch.ones(3)) * 2),
    "a sparse gradient": tensors(lambda: given(torch.ones(3), torch.ones(3).to_sparse())),
    "a gradient that is lazily conjugated": tensors(
        lambda: given(torch.ones(3) + 1j, torch.ones(3).to(torch.complex64).conj())
    ),
    "a parameter made in inference mode": tensors(in_inference_mode),
    "a subclass with a `__torch_function__` of its own": tensors(
        lambda: given(torch.ones(3).as_subclass(Tagged), torch.ones(3))
    ),
    "a gradient that is the parameter's own memory": tensors(own_memory),
    "a device without a backend": tensors(
        lambda: given(torch.ones(3, device="meta"), torch.ones(3, device="meta"))
    ),
    "`maximize`": arguments(maximize=True),
    "`weight_decay`": arguments(weight_decay=0.1),
    "`momentum`, `dampening`": arguments(momentum=0.9, dampening=0.5),
    "`nesterov`": arguments(momentum=0.9, nesterov=True),
    "`centered`": arguments(centered=True),
    "`amsgrad`": arguments(amsgrad=True),
    "`decoupled_weight_decay`": arguments(decoupled_weight_decay=True)[:1],  # AdamW has it set
    "`lr_decay`, `initial_accumulator_value`": arguments(
        lr_decay=0.1, initial_accumulator_value=0.1
    ),
    "`lr` in a tensor": arguments(lr=torch.tensor(0.1)),
    "`betas` in tensors": arguments(lr=torch.tensor(0.1), betas=TENSORS),
    "`foreach`": arguments(foreach=True),
    "`fused`": arguments(fused=True),
    "`capturable`": arguments(capturable=True),
    "`differentiable`": arguments(differentiable=True),
}


def table():
    """The rows of the page that say who updates what: name, CPU, GPU."""
    found = re.findall(
        r"^\| (.+?) \| (kernels|torch) \| (kernels|torch) \|$", PAGE.read_text(), re.M
    )
    return {name: (cpu, gpu) for name, cpu, gpu in found}


def test_the_page_and_this_file_have_the_same_rows():
    assert list(table()) == list(ROWS)


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:The .grad attribute")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("backend", ["cpu", "rehearsal"])
def test_kernels_update_what_the_table_says(backend, row, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "rehearsal", rehearsal.BACKEND)
    who = table()[row][backend != "cpu"]
    for optimizer_class, make in ROWS[row]:
        params, kwargs = make()
        if who == "kernels":
            optimizer = optimizer_class(params, backend=backend, **kwargs)
            optimizer.step()
            assert {route.backend for route in optimizer.routes()} == {backend}
        else:
            with pytest.raises(ValueError, match=f"backend='{backend}' cannot update parameter"):
                optimizer_class(params, backend=backend, **kwargs).step()


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:The .grad attribute")
@pytest.mark.parametrize("row", ROWS)
def test_auto_leaves_the_rest_to_torch(row):
    who = {"kernels": "cpu", "torch": "torch"}[table()[row][0]]
    for optimizer_class, make in ROWS[row]:
        params, kwargs = make()
        routes = optimizer_class(params, **kwargs).routes()
        assert {route.backend for route in routes} == {who}
        assert all(bool(route.reason) == (who == "torch") for route in routes)


def test_the_optimizers_are_all_in_the_table():
    (listed,) = re.findall(r"^\| (.*) \| kernels on all backends \|$", PAGE.read_text(), re.M)
    assert set(re.findall(r"\w+", listed)) == {case.fused_class for case in CASES}
    assert all(hasattr(fusedopt, case.fused_class) for case in CASES)
