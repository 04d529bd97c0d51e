"""pin_batch: every structure is kept, what can be pinned is, and what cannot be says so once."""

import dataclasses
import warnings
from collections import OrderedDict, UserDict, UserList, defaultdict, namedtuple

import pytest
import torch
from devices import needs_cuda

from fusedopt.data import pin_batch, pinning, structure

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str
    more: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Derived:
    data: torch.Tensor
    rows: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.rows = len(self.data)


class Knows:
    def __init__(self, pinned=False):
        self.pinned = pinned

    def pin_memory(self):
        return Knows(True)


class Stranger:
    pass


class Encoding(UserDict):
    """A mapping that holds more than its items, as Hugging Face's BatchEncoding does."""

    def __init__(self, items, note):
        super().__init__(items)
        self.note = note


@pytest.fixture
def pins(monkeypatch):
    """Lets tensors be pinned where there is no GPU; gives those that were."""
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(pinning, "_warned", set())
    return pinned


def tensor():
    return torch.arange(3.0)


STRUCTURES = {
    "tensor": tensor(),
    "dict": {"x": tensor(), 3: "name"},
    "OrderedDict": OrderedDict(b=tensor(), a=tensor()),
    "defaultdict": defaultdict(list, x=tensor()),
    "list": [tensor(), [tensor(), None]],
    "tuple": (tensor(), 1.5, (tensor(),)),
    "namedtuple": Pair(tensor(), Pair(1, tensor())),
    "dataclass": Sample(tensor(), "cat", [tensor()]),
    "dataclass with a derived field": Derived(tensor()),
    "own sequence": UserList([tensor(), tensor()]),
    "own mapping": Encoding({"ids": tensor()}, "kept"),
    "nested": {"a": [Pair(tensor(), {"b": (Sample(tensor(), "x"),)})]},
    "empty": {"a": [], "b": ()},
}


@pytest.mark.parametrize("batch", STRUCTURES.values(), ids=STRUCTURES)
def test_structure_and_values_are_kept_and_every_tensor_is_pinned(pins, batch):
    found = pin_batch(batch)
    assert repr(structure.map_leaves(found, type)) == repr(structure.map_leaves(batch, type))
    assert type(found) is type(batch)
    before, after = list(structure.leaves_of(batch)), list(structure.leaves_of(found))
    tensors = [leaf for leaf in before if isinstance(leaf, torch.Tensor)]
    assert [id(t) for t in pins] == [id(t) for t in tensors]
    for old, new in zip(before, after, strict=True):
        if isinstance(old, torch.Tensor):
            assert new is not old
            assert torch.equal(new, old)
        else:
            assert new is old


def test_what_a_container_holds_beside_its_items_is_kept(pins):
    assert pin_batch(STRUCTURES["own mapping"]).note == "kept"
    assert pin_batch(STRUCTURES["defaultdict"]).default_factory is list
    assert pin_batch(STRUCTURES["dataclass with a derived field"]).rows == 3
    assert list(pin_batch(STRUCTURES["OrderedDict"])) == ["b", "a"]


def test_an_object_that_pins_itself_does(pins):
    found = pin_batch({"x": Knows(), "y": [Knows()]})
    assert found["x"].pinned
    assert found["y"][0].pinned


def test_a_leaf_that_cannot_be_pinned_is_passed_through_with_one_warning_of_its_type(pins):
    stranger = Stranger()
    with pytest.warns(UserWarning, match=r"test_pin_batch\.Stranger cannot be pinned") as caught:
        first = pin_batch([stranger, tensor(), Stranger()])
    assert len(caught) == 1
    assert first[0] is stranger
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pin_batch([Stranger()])  # known by now
        pin_batch([1, 2.5, True, None, "text", b"bytes", 3j])  # nothing to pin, nothing to say
    with pytest.warns(UserWarning, match="object"):
        pin_batch([object()])


def test_a_tensor_that_has_no_pinned_memory_is_passed_through_with_a_warning(pins, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("cannot pin this one")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    sparse = torch.eye(3).to_sparse()
    with pytest.warns(UserWarning, match="layout torch.sparse_coo .cannot pin this one"):
        assert pin_batch([sparse])[0] is sparse


def test_what_is_pinned_or_on_a_device_stays(pins, monkeypatch):
    there = torch.empty(3, device="meta")
    assert pin_batch([there])[0] is there
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    batch = [tensor()]
    assert pin_batch(batch) is batch
    assert not pins


class Sealed(UserList):
    """A sequence that is not made of values."""

    def __init__(self, values, *, key):
        super().__init__(values)


def test_a_container_that_cannot_be_made_again_is_an_error(pins):
    with pytest.raises(TypeError, match=r"a batch holds a Sealed, .*pin_memory method"):
        pin_batch({"x": Sealed([tensor()], key=1)})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_pinned_and_that_is_said_once(monkeypatch):
    monkeypatch.setattr(pinning, "_warned", set())
    batch = {"x": tensor()}
    with pytest.warns(UserWarning, match="torch sees no GPU"):
        assert pin_batch(batch) is batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pin_batch(batch) is batch


@needs_cuda
def test_on_a_gpu_memory_is_page_locked():
    found = pin_batch({"x": tensor(), "y": Sample(tensor(), "cat", [tensor()])})
    assert all(leaf.is_pinned() for leaf in structure.leaves_of(found) if torch.is_tensor(leaf))
    assert torch.equal(found["y"].image, tensor())
