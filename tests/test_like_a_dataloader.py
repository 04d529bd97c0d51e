"""TensorLoader and DevicePrefetcher in a DataLoader's place: a loop sees no difference.

Traces of whole runs are compared: batches and their types, errors, and the states of the random
generators after every `iter()` and every batch.
"""

import contextlib
import contextvars
import copy
import itertools
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from lanes import RehearsedLane, rehearsed, to_cpu
from test_pin_batch import Sealed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    StackDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fusedopt.data import TensorLoader
from fusedopt.data.lanes import HostLane
from fusedopt.data.structure import parts_of


def seeded():
    return torch.Generator().manual_seed(5)


class Endless:
    """Has no end, and no length."""

    def __iter__(self):
        return itertools.cycle(range(50))


class Lazy:
    """Draws every row number when it is asked for it, from torch's default generator; may fail."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at

    def __len__(self):
        return 50

    def __iter__(self):
        for number in range(50):
            if number == self.fail_at:
                raise ZeroDivisionError
            yield torch.randint(50, ()).item()


def share(rows, rank, world_size, **kwargs):
    sampler = DistributedSampler(range(rows), world_size, rank, kwargs["shuffle"], 11,
                                 kwargs["drop_last"])  # fmt: skip
    return {"batch_size": 8, "drop_last": kwargs["drop_last"], "sampler": sampler}


# A loader's rows, its arguments (made anew for each run), and ours if they are others.
CASES = [
    *(pytest.param(rows, lambda k=kwargs, g=own: k | ({"generator": seeded()} if g else {}), None,
                   id=f"{rows} rows, {kwargs}{', a generator' * own}")
      for rows, size in ((50, 8), (48, 8), (3, 8), (1, 1), (65, 64))
      for drop_last in (False, True) for shuffle in (False, True) for own in (False, True)
      for kwargs in [{"batch_size": size, "drop_last": drop_last, "shuffle": shuffle}]),
    *(pytest.param(rows, lambda a=(rows, rank, world_size), k=kwargs: share(*a, **k),
                   {"batch_size": 8, "rank": rank, "world_size": world_size, "seed": 11, **kwargs},
                   id=f"{rows} rows, rank {rank} of {world_size}, {kwargs}")
      for rows, world_size, rank in ((50, 2, 1), (51, 4, 0), (51, 4, 3), (3, 4, 3), (1, 5, 2))
      for drop_last in (False, True) for shuffle in (False, True)
      for kwargs in [{"drop_last": drop_last, "shuffle": shuffle}]),
    *(pytest.param(50, make, None, id=name) for name, make in {
        "numbers": lambda: {"sampler": [7, 7, 0, 49]},
        "NumPy numbers": lambda: {"sampler": np.array([3, 1, 2]), "batch_size": 2},
        "a tensor": lambda: {"sampler": torch.tensor([3, 1, 2], dtype=torch.int32)},
        "a subset": lambda: {"sampler": SubsetRandomSampler([3, 1, 4, 15, 9], seeded())},
        "weights": lambda: {"sampler": WeightedRandomSampler(torch.arange(50.0), 30),
                            "batch_size": 4, "generator": seeded()},
        "with replacement": lambda: {
            "sampler": RandomSampler(range(50), True, 70, seeded()), "batch_size": 7},
        "batches": lambda: {"batch_sampler": BatchSampler(RandomSampler(range(50)), 4, False)},
        "batches, no batch_size": lambda: {
            "sampler": BatchSampler(range(50), 4, True), "batch_size": None},
        "batches of any kind": lambda: {
            "batch_sampler": [[1, 2], (3,), torch.tensor([4, 5]), np.array([7]), range(9)]},
        "no end": lambda: {"sampler": Endless(), "batch_size": 3},
        "no such row": lambda: {"sampler": [0, 1, 2, 50], "batch_size": 2},
        "no such row, far": lambda: {"batch_sampler": [[0], [2**40]]},
        "fractions": lambda: {"sampler": [0, 1, 0.5], "batch_size": 2},
        "floats": lambda: {"sampler": torch.tensor([1.0, 0.0])},
        "two orders": lambda: {"sampler": [1], "shuffle": True},
        "two sizes": lambda: {"batch_sampler": [[1]], "batch_size": 2},
        "two samplers": lambda: {"batch_sampler": [[1]], "sampler": [1]},
        "no size but a rest": lambda: {"sampler": [[1]], "batch_size": None, "drop_last": True},
        "no rows in a batch": lambda: {"batch_size": 0},
        "an odd drop_last": lambda: {"drop_last": 2},
    }.items()),
]  # fmt: skip
# What is drawn ahead of the loop differs, as with a DataLoader that has workers.
LAZY = [pytest.param(50, make, None, id=name) for name, make in {
    "lazy": lambda: {"sampler": Lazy(), "batch_size": 8},
    "lazy, drop_last": lambda: {"sampler": Lazy(), "batch_size": 8, "drop_last": True},
    "lazy batches": lambda: {"batch_sampler": BatchSampler(Lazy(), 8, False)},
    "fails": lambda: {"sampler": Lazy(fail_at=11), "batch_size": 4},
}.items()]  # fmt: skip


def data(rows):
    numbers = torch.arange(rows, device="cpu")
    return torch.arange(rows * 6.0, device="cpu").view(rows, 2, 3), numbers


def in_a_dataloader(rows, kwargs):
    return DataLoader(TensorDataset(*data(rows)), **kwargs)


def in_ours(rows, kwargs):
    return TensorLoader(*data(rows), **kwargs)


def in_ours_ahead(rows, kwargs):
    loader = TensorLoader(*data(rows), **kwargs)
    loader._lane = RehearsedLane()
    return loader


def told(value):
    """All of a value that a loop may look at, to be compared."""
    if isinstance(value, torch.Tensor):
        values = value.tolist() if value.device.type == "cpu" else value.shape
        return values, value.dtype, value.device, value.is_inference(), value.requires_grad
    if isinstance(value, np.ndarray):
        return value.tolist()
    parts = parts_of(value)
    return value if parts is None else (type(value), [(key, told(part)) for key, part in parts])


def attempted(function, *arguments):
    try:
        return told(function(*arguments))
    except Exception as error:
        return type(error)


def trace(make, rows, kwargs, ahead=False, send=lambda loader: loader):
    """What a loop sees in three epochs; it leaves the second, and goes on with what `send` makes.

    Of a loader that works ahead, its own generator is looked at between epochs only.
    """
    torch.manual_seed(3)
    try:
        loader = make(rows, kwargs)
    except Exception as error:
        return type(error)

    def drawn(own=True):
        generators = (torch.default_generator, own and loader.generator)
        return [g.get_state().numpy().tobytes() for g in generators if g]

    seen = [attempted(len, loader)]
    for batches in (20, 2, 20):
        if callable(method := getattr(loader.sampler, "set_epoch", None)):
            method(batches)
        iterator = iter(loader)
        seen.append(drawn())
        for _ in range(batches):
            seen += [drawn(not ahead), attempted(next, iterator)]
            if isinstance(seen[-1], type):  # an error, or the end
                break
            torch.rand(1, device="cpu")  # so does a loop
        del iterator
        if batches == 2:
            loader = send(loader)
    return [*seen, drawn()]


@pytest.mark.parametrize(("rows", "make", "others"), [*CASES, *LAZY])
def test_a_tensor_loader_is_a_dataloader(rows, make, others):
    assert trace(in_ours, rows, others or make()) == trace(in_a_dataloader, rows, make())


@pytest.mark.parametrize(("rows", "make", "others"), CASES)
def test_so_it_is_when_it_works_ahead(rows, make, others):
    ahead = trace(in_ours_ahead, rows, others or make(), ahead=True)
    assert ahead == trace(in_a_dataloader, rows, make(), ahead=True)


@pytest.mark.parametrize(("rows", "make", "others"), CASES[::3])
@pytest.mark.parametrize("way", [to_cpu, rehearsed])
def test_a_prefetched_dataloader_is_one(way, rows, make, others):
    def prefetched(rows, kwargs):
        return way(in_a_dataloader(rows, kwargs))

    found = trace(prefetched, rows, make(), ahead=True)
    assert found == trace(in_a_dataloader, rows, make(), ahead=True)


SENT = {"copy": copy.copy, "deepcopy": copy.deepcopy,
        "pickle": lambda loader: pickle.loads(pickle.dumps(loader))}  # fmt: skip


@pytest.mark.parametrize("send", SENT.values(), ids=SENT)
@pytest.mark.parametrize(("rows", "make", "others"), CASES[:8] + CASES[60:72])
def test_what_is_sent_or_copied_goes_on_as_a_dataloader(send, rows, make, others):
    expected = trace(in_a_dataloader, rows, make(), send=send)
    assert trace(in_ours, rows, others or make(), send=send) == expected
    prefetched = trace(lambda *a: to_cpu(in_a_dataloader(*a)), rows, make(), True, send)
    assert prefetched == trace(in_a_dataloader, rows, make(), True, send)


def test_of_a_mapping_too():
    x, y = data(50)
    theirs = DataLoader(StackDataset(x=x, y=y), batch_size=7, shuffle=True, generator=seeded())
    loader = TensorLoader({"x": x, "y": y}, batch_size=7, shuffle=True, generator=seeded())
    assert told(list(loader)) == told(list(theirs))
    assert loader.dataset[4]["y"] == 4


@pytest.mark.parametrize("name", ["dataset", "batch_size", "sampler", "batch_sampler", "drop_last"])
def test_what_the_order_is_made_from_cannot_be_set_later(name):
    for loader in (in_a_dataloader(50, {}), in_ours(50, {})):
        with pytest.raises(ValueError, match=name):
            setattr(loader, name, 3)


@pytest.mark.parametrize("kwargs", [
    {"sampler": BatchSampler(range(20), 4, False)}, {"sampler": [[18, 19], [16, 17]]},
    {"sampler": [False] * 17 + [True] * 3}, {"sampler": torch.arange(20) > 17},
    {"sampler": np.arange(20) > 17}, {"sampler": [None]}, {"sampler": ["1"]}, {"sampler": [2**70]},
    {"sampler": [torch.tensor([1])]}, {"sampler": [torch.tensor(1.0)]}, {"sampler": [slice(2)]},
    {"sampler": [np.array([1])]}, {"sampler": [torch.tensor(1, device="meta")]},
    {"batch_sampler": [3]}, {"batch_sampler": [[[1, 2]]]}, {"batch_sampler": [[1.0]]},
    {"batch_sampler": [torch.ones(2, 2, dtype=torch.int64)]}, {"batch_sampler": ["12"]},
])  # fmt: skip
def test_what_is_no_row_number_is_refused(kwargs):
    """Most of it would be rows to a DataLoader, but not those that were meant."""
    with pytest.raises(IndexError, match=r"the sampler yielded .* wanted: .* batch_sampler"):
        list(in_ours(20, kwargs))


def test_an_endless_sampler_has_no_state_but_between_epochs():
    loader = in_ours(50, {"sampler": Endless()})
    assert loader.state_dict()["batches"] is None
    ahead = to_cpu(loader)
    for one in (loader, ahead):
        next(iter(one))
        with pytest.raises(TypeError, match="the sampler has no length"):
            one.state_dict()


# ---- what is set for the caller's thread ---------------------------------------------------------

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")
ENCODER = torch.nn.Linear(3, 3, dtype=torch.float32)


@contextlib.contextmanager
def with_variable():
    token = VARIABLE.set("set")
    yield
    VARIABLE.reset(token)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to fp16": lambda: torch.autocast("cpu", torch.float16),
    "a default device": lambda: torch.device("meta"),
    "a context variable": with_variable,
}


@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.usefixtures("float64")
def test_the_callers_settings_reach_transforms_and_sources(around):
    def settings():
        return torch.zeros(3), torch.is_grad_enabled(), VARIABLE.get()

    def transform(batch):
        return batch, ENCODER(batch["x"]), settings()

    def source():
        for _ in range(3):
            yield {"x": torch.ones(2, 3, dtype=torch.float32, device="cpu"), "at": settings()}

    rows = {"x": torch.ones(6, 3, dtype=torch.float32)}
    with around():
        expected = told([transform(batch) for batch in source()])
        assert told(list(to_cpu(source(), transform=transform))) == expected
        plain = TensorLoader(rows, batch_size=2, transform=transform)
        ahead = copy.copy(plain)
        ahead._lane = HostLane()
        assert told(list(ahead)) == told(list(plain))


@pytest.mark.parametrize("kwargs", [{}, {"shuffle": True}, {"generator": seeded()},
                                    {"rank": 0, "world_size": 2}, {"sampler": [1, 2]}])  # fmt: skip
def test_rows_and_their_order_are_on_the_cpu_whatever_the_default_device(kwargs):
    expected = trace(in_ours, 20, copy.deepcopy(kwargs))
    with torch.device("meta"):
        assert trace(in_ours, 20, copy.deepcopy(kwargs)) == expected


# ---- batches that differ, and memory that is used again -----------------------------------------

T = torch.zeros(2)
Pair = namedtuple("Pair", "first second")
STREAMS = {
    "keys in another order": [{"a": T, "b": T + 1}, {"b": T, "a": T + 1}],
    "an optional key": [{"a": T}, {"a": T, "mask": T}, {"mask": T}],
    "None, then a tensor": [{"a": T, "mask": None}, {"a": T, "mask": T}],
    "a tensor, then None": [(T, T), (T, None)],
    "a string, then None": [{"id": "x"}, {"id": None}],
    "metadata": [[T, {"boxes": 1}], [T, {"points": 2}]],
    "lists of any length": [[T] * n for n in range(4)],
    "other containers": [[T], (T,), {"a": T}, Pair(T, [T]), T, 3, None],
    "other tensors": [T, T.double(), torch.ones(5, 7), torch.empty(0), torch.tensor(1)],
    "one tensor twice": [[T, T], [T]],
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("way", [to_cpu, rehearsed])
def test_the_structure_may_change_from_batch_to_batch(way, stream):
    assert told(list(way(stream))) == told(stream)


def test_what_cannot_be_made_again_stays_on_the_host_as_it_is():
    batch = Sealed([T], key=1)
    assert next(iter(to_cpu([batch]))) is batch
    with pytest.raises(TypeError, match="a batch holds a Sealed"):
        next(iter(rehearsed([batch])))


def refilled(buffer, fill, batch):
    for number in range(5):
        fill(buffer, number)
        yield batch(buffer)


REFILLED = {
    "a tensor": lambda: refilled(T.clone(), torch.Tensor.fill_, lambda t: t),
    "a view": lambda: refilled(torch.zeros(4), torch.Tensor.fill_, lambda t: {"x": t[1:3]}),
    "a NumPy array": lambda: refilled(np.zeros(3), np.ndarray.fill, lambda t: [t]),
    "a tensor of an array": lambda: refilled(np.zeros(3), np.ndarray.fill, torch.from_numpy),
    "a dict": lambda: refilled({}, lambda d, n: d.update(n=n), lambda d: d),
    "a list in a tuple": lambda: refilled([], list.append, lambda numbers: (T, numbers)),
}


@pytest.mark.parametrize("source", REFILLED.values(), ids=REFILLED)
@pytest.mark.parametrize("way", [to_cpu, rehearsed])
def test_a_source_may_use_its_memory_again(way, source):
    expected = [told(batch) for batch in map(copy.deepcopy, source())]
    assert [told(batch) for batch in list(way(source()))] == expected


class Copies(list):
    """A loader that copies itself in its own way."""

    def __deepcopy__(self, memo):
        return Copies(["copied"])


def test_a_copy_of_a_prefetcher_is_one():
    assert list(copy.deepcopy(to_cpu(Copies([1])))) == ["copied"]
    assert type(copy.deepcopy(to_cpu(Copies()))) is type(to_cpu([]))
