"""torch's own database of optimizers: every sample and every error sample, beside torch.optim.

The database (``torch.testing._internal.common_optimizers``) is what torch's test suite runs over.
Its samples for the CPU are the first ones of cases.py, and go through every suite; here they meet
torch's flags for implementations. Its samples for GPUs are run wherever their kernels are. What its
error samples raise, at construction or at the first step, must be raised here in the same words.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from harness import checked_step, clone_params, make_params, set_grads, states_of

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# In a process of its own: importing torch's test utilities freezes global flags, and wants a
# package that only their TestCase needs. Samples for a GPU make their tensors there; here they have
# to do with the CPU's.
_READ_DATABASE = """
import pickle, sys, types, unittest
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
import torch
from torch.testing._internal import common_optimizers as database

empty = torch.empty
torch.empty = lambda *shape, device=None, **kwargs: empty(*shape, **kwargs)

def sample(given):
    return given.desc, given.params, given.kwargs

def error(given):
    return (*sample(given.optimizer_error_input), given.error_on.name, given.error_type.__name__)

with open(sys.argv[1], "wb") as file:
    pickle.dump({
        info.optim_cls.__name__: {
            "implementations": info.supported_impls,
            "supports_fused_on": info.supports_fused_on,
            "supports_sparse": info.supports_sparse,
            "supports_complex": info.supports_complex,
            "capturable": info.has_capturable_arg,
            "samples": {
                (device, dtype): list(map(sample, info.optim_inputs_func(device, dtype=dtype)))
                for device in ("cpu", "cuda") for dtype in (torch.float32, torch.float16)
            },
            "errors": [
                error(given) for device in ("cpu", "cuda")
                for given in info.optim_error_inputs_func(device, torch.float32)
            ],
        }
        for info in database.optim_db
        if info.optim_cls.__name__ in sys.argv[2:]
    }, file)
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("database") / "samples.pickle"
    classes = [case.torch_class.__name__ for case in CASES]
    command = [sys.executable, "-c", _READ_DATABASE, path, *classes]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return pickle.loads(Path(path).read_bytes())


def entry(database: dict[str, dict[str, Any]], case: Case) -> dict[str, Any]:
    return database[case.torch_class.__name__]


def comparable(kwargs: dict[str, Any]) -> list[list[str]]:
    """Keyword arguments as texts; that of a tensor holds its values, dtype and shape."""
    return sorted([key, repr(value)] for key, value in kwargs.items())


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_sample_of_torchs_database_is_in_ours(
    case: Case, dtype: torch.dtype, database: dict[str, Any]
) -> None:
    theirs = entry(database, case)["samples"]["cpu", dtype]
    assert theirs
    ours = [comparable(case.kwargs(sample, dtype)) for sample in case.samples]
    missing = [desc for desc, _, kwargs in theirs if comparable(kwargs) not in ours]
    assert not missing, f"add these samples of torch's database to {case.name}: {missing}"


def outcome(cls: type[torch.optim.Optimizer], params: Any, kwargs: dict[str, Any]) -> Any:
    """What construction, a step, and warnings on the way come to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            optimizer = cls(params, **kwargs)
            members = [p for group in optimizer.param_groups for p in group["params"]]
            set_grads(members, 0)
            optimizer.step()
            end: Any = [param.detach() for param in members]
        except Exception as error:
            end = (type(error), str(error))
    return end, [(warning.category, str(warning.message)) for warning in caught]


def assert_same_outcome(ours: Any, theirs: Any, what: str) -> None:
    assert ours[1] == theirs[1], f"{what}: other warnings"
    if isinstance(theirs[0], tuple):
        assert ours[0] == theirs[0], what
    else:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6, msg=what)


@EACH_CASE
def test_every_error_sample_gives_torchs_outcome(case: Case, database: dict[str, Any]) -> None:
    """Type and message, of errors and warnings, and what the step does where there is none."""
    samples = entry(database, case)["errors"]
    assert len(samples) >= 7
    for desc, params, kwargs, _, error_type in samples:
        outcomes = []
        for cls in (case.fused(), case.torch_class):
            given = make_params([(3,)]) if params is None else pickle.loads(pickle.dumps(params))
            outcomes.append(outcome(cls, given, pickle.loads(pickle.dumps(kwargs))))
        assert_same_outcome(*outcomes, f"{case.name}: {desc}")
        (end, caught) = outcomes[0]
        seen = {category.__name__ for category, _ in caught}
        seen |= {end[0].__name__} if isinstance(end, tuple) else set()
        assert error_type in seen, f"{case.name}: {desc} no longer fails"


def implementations(info: dict[str, Any]) -> list[dict[str, bool]]:
    """The flags that torch's suite adds to each sample: none of them, and each one."""
    names = [
        n for n in info["implementations"] if n != "fused" or "cpu" in info["supports_fused_on"]
    ]
    none = dict.fromkeys(names, False)
    return [none, *({**none, name: True} for name in names)]


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_sample_under_every_flag_gives_torchs_outcome(
    case: Case, dtype: torch.dtype, database: dict[str, Any]
) -> None:
    """for-loop, foreach, fused and differentiable; samples for GPUs fail here as torch's do."""
    info = entry(database, case)
    count = 0
    for device in ("cpu", "cuda"):
        for desc, _, kwargs in info["samples"][device, torch.float32]:
            for flags in implementations(info):
                ends = []
                for cls in (case.fused(), case.torch_class):
                    given = pickle.loads(pickle.dumps({**kwargs, **flags}))
                    params: list[Any] = make_params([(), (3, 5), (40,)], dtype)
                    if flags.get("differentiable"):
                        params = [param.clone() for param in params]
                    ends.append(outcome(cls, params, given))
                assert_same_outcome(*ends, f"{case.name}: {desc}, {flags}")
                count += 1
    assert count >= 2 * len(info["samples"]["cpu", torch.float32]) * 3


@EACH_CASE
def test_every_sample_for_gpus_steps_where_kernels_are(
    place: Any, case: Case, database: dict[str, Any]
) -> None:
    """capturable, with lr and betas in tensors: every step within the oracle's bound."""
    samples = entry(database, case)["samples"]["cuda", torch.float32]
    assert entry(database, case)["capturable"] == any("capturable" in k for _, _, k in samples)
    for desc, _, kwargs in samples:
        if kwargs == {}:
            assert desc == "default"
        params = make_params([(), (3, 5), (40,)], device=place.device)
        optimizer = case.fused()(params, backend=place.backend, **kwargs)
        for step in range(3):
            set_grads(params, step)
            checked_step(case, optimizer)
        counts = {int(states_of(optimizer, param).get("step", 3)) for param in params}
        assert counts == {3}, desc


@EACH_CASE
def test_support_for_sparse_and_complex_is_torchs(case: Case, database: dict[str, Any]) -> None:
    """Over all samples of the database: the same values, or the same error."""
    info = entry(database, case)
    accepted = []
    for desc, _, kwargs in info["samples"]["cpu", torch.float32]:
        for kind in ("sparse", "complex"):
            ends: list[Any] = []
            for cls in (case.fused(), case.torch_class):
                dtype = torch.complex64 if kind == "complex" else torch.float32
                generator = torch.Generator().manual_seed(0)
                values = [torch.randn(6, 4, dtype=dtype, generator=generator) for _ in range(4)]
                param = torch.nn.Parameter(values[0])
                optimizer = cls([param], **pickle.loads(pickle.dumps(kwargs)))
                try:
                    for grad in values[1:]:
                        param.grad = grad.to_sparse() if kind == "sparse" else grad
                        optimizer.step()
                    ends.append(([param.detach(), *states_of(optimizer, param).values()], []))
                except RuntimeError as error:
                    ends.append(((type(error), str(error)), []))
            assert_same_outcome(*ends, f"{case.name}: {desc}, {kind}")
            accepted += [kind] if isinstance(ends[0][0], list) else []
    assert ("sparse" in accepted) == info["supports_sparse"]
    assert ("complex" in accepted) == info["supports_complex"]


@EACH_CASE
def test_steps_without_gradients_or_over_zeros_do_nothing(case: Case, database: Any) -> None:
    """Torch's test_step_is_noop_*: parameters and gradients stay; zeros decay only with decay."""
    for _, _, kwargs in entry(database, case)["samples"]["cpu", torch.float32]:
        params = make_params()
        before = clone_params(params)
        optimizer = case.fused()(params, **pickle.loads(pickle.dumps(kwargs)))
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        assert not any(param.grad.any() for param in params)
        if not optimizer.param_groups[0]["weight_decay"]:
            assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@EACH_CASE
def test_every_state_is_there_after_a_step(case: Case, database: Any) -> None:
    """Torch's test_non_empty_state, with torch's own keys in torch's order."""
    for desc, _, kwargs in entry(database, case)["samples"]["cpu", torch.float32]:
        keys = []
        for cls in (case.fused(), case.torch_class):
            params = make_params([(3,), (2, 2)])
            optimizer = cls(params, **pickle.loads(pickle.dumps(kwargs)))
            set_grads(params, 0)
            optimizer.step()
            keys.append([list(states_of(optimizer, param)) for param in params])
        assert keys[0] == keys[1], desc
        assert all(keys[0]) or not case.has_step
