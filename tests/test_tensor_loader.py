"""TensorLoader: a DataLoader's batches and random numbers, from reused buffers, resumable."""

import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lanes import EarlyRing, PoisonedRing, RehearsedLane, needs_cuda
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SubsetRandomSampler,
    TensorDataset,
)

from fusedopt import _C
from fusedopt.data import DevicePrefetcher, TensorLoader


def to_host(*tensors, **kwargs):
    return TensorLoader(*tensors, **kwargs)


def to_rehearsed(*tensors, **kwargs):
    """As on a GPU: batches are made ahead in a thread, and copied late."""
    loader = TensorLoader(*tensors, **kwargs)
    loader._lane = RehearsedLane()
    return loader


def to_cuda(*tensors, **kwargs):
    return TensorLoader(*tensors, device="cuda", **kwargs)


@pytest.fixture(
    params=[
        pytest.param(to_host, id="cpu"),
        pytest.param(to_rehearsed, id="rehearsed"),
        pytest.param(to_cuda, id="cuda", marks=needs_cuda),
    ]
)
def make(request):
    return request.param


def data(rows=50):
    return torch.arange(rows * 6.0).view(rows, 2, 3), torch.arange(rows)


def same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        keys = a if isinstance(a, dict) else range(len(a))
        assert len(a) == len(b)
        for key in keys:
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key].cpu(), b[key])


# ---- rows of every kind -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.int32, torch.float64,
              torch.complex128], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("width", [(), (1,), (3,), (17,), (5, 7), (5000,), (0,)], ids=str)
def test_every_dtype_and_width_of_rows(dtype, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (40, *width), generator=generator).to(dtype)
    order = torch.randint(0, 40, (100,), generator=generator)
    (batch,) = next(iter(TensorLoader(x, batch_size=100, sampler=order.tolist())))
    assert batch.dtype == dtype
    assert torch.equal(batch, x[order])


def test_rows_that_do_not_follow_one_another():
    base = torch.arange(400.0).view(20, 20)
    for x in (base[:, 3:9], base[::3], base[5:6].expand(20, 20), base[::2, :1]):
        (batch,) = next(iter(TensorLoader(x, batch_size=len(x))))
        assert torch.equal(batch, x)
        assert batch.is_contiguous()


def test_large_batches_on_every_number_of_threads():
    x = torch.randn(3000, 777)
    order = torch.randperm(3000)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            (batch,) = next(iter(TensorLoader(x, batch_size=3000, sampler=order.tolist())))
            assert torch.equal(batch, x[order])
    finally:
        torch.set_num_threads(before)


def test_tensors_mapped_from_a_file(tmp_path):
    path = tmp_path / "rows.bin"
    values = np.arange(600, dtype=np.float32).reshape(100, 6)
    values.tofile(path)
    mapped = torch.from_numpy(np.memmap(path, np.float32, "c", shape=(100, 6)))
    from_file = torch.from_file(str(path), size=600).view(100, 6)
    for x in (mapped, from_file):
        generator = torch.Generator().manual_seed(1)
        found = torch.cat([b[0] for b in TensorLoader(x, batch_size=7, shuffle=True,
                                                      generator=generator)])  # fmt: skip
        assert torch.equal(found[found[:, 0].argsort()], torch.from_numpy(values))


# ---- batches belong to the consumer --------------------------------------------------------------


def test_all_batches_at_once_are_right(make):
    x, y = data(200)
    same(list(make(x, y, batch_size=4)), DataLoader(TensorDataset(x, y), batch_size=4))


def test_a_batch_is_a_copy_of_the_rows(make):
    x, y = data()
    for batch in make(x, y, batch_size=8):
        batch[0].zero_()
    assert torch.equal(x, data()[0])


def consume(loader, rows, patience):
    """Holds on to parts and views of some batches for a while; finds torn ones."""
    chance = random.Random(0)
    held = []
    for x, y in loader:
        expected = y.clone()
        views = [x, x[1:], x.view(-1), x.numpy() if x.device.type == "cpu" else x]
        held.append((chance.choice(views), x[:, 0].clone(), expected))
        del views
        if not torch.equal(x[:, 0], rows[expected.cpu()].to(x.device)):
            return "a new batch is torn"
        del x, y
        for view, first, labels in held:
            values = torch.as_tensor(view).reshape(-1)
            wanted = rows[labels.cpu()].to(values.device).repeat_interleave(64)
            if not torch.equal(values, wanted[len(wanted) - len(values) :]):
                return f"a held batch is torn, {len(first)} rows"
        held = [entry for entry in held if chance.random() < patience]
    return ""


def wide(rows=600):
    x = torch.arange(float(rows)).view(rows, 1).repeat(1, 64)
    return x, torch.arange(rows), x[:, 0].clone()


@pytest.mark.parametrize("patience", [0.0, 0.5, 0.9])
def test_no_batch_is_torn_though_reused_buffers_are_poisoned(make, patience):
    x, y, rows = wide()
    loader = make(x, y, batch_size=4, shuffle=True)
    loader._ring = PoisonedRing(loader._ring)
    for _ in range(2):
        assert consume(loader, rows, patience) == ""


@pytest.mark.parametrize("which", [to_host, to_rehearsed])
def test_early_reuse_is_found(which):
    x, y, rows = wide()
    loader = which(x, y, batch_size=4, shuffle=True)
    loader._ring = EarlyRing(3)
    assert any(consume(loader, rows, 0.9) for _ in range(5))


def test_a_leaf_that_is_kept_keeps_no_other():
    """Who collects the labels of an epoch does not collect its images."""
    x, y = data(400)
    loader = TensorLoader(x, y, batch_size=4)
    labels = [batch[1] for batch in loader]
    assert torch.equal(torch.cat(labels), y)
    assert len({batch[0].data_ptr() for batch in loader}) <= 2


def test_buffers_are_not_reused_behind_lazy_copies_or_other_processes():
    ring = _C.Ring(1, False)
    x = torch.arange(8.0).view(4, 2)
    (batch,) = ring.gather([x], None, 0, 2)
    lazy = torch._lazy_clone(batch)
    del batch
    (other,) = ring.gather([x], None, 2, 2)
    assert torch.equal(lazy, x[:2])
    assert torch.equal(other, x[2:])
    there = other.data_ptr()
    other.share_memory_()  # as a queue to another process does
    del other
    (third,) = ring.gather([x], None, 0, 2)
    assert third.data_ptr() != there
    assert not third.is_shared()


def freed(*sizes, dtype=None):
    tensor = torch.ones(*sizes, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("arguments", [
    ([], None, 0, 0), ([torch.ones(3, device="meta")], None, 0, 1), ([torch.tensor(1)], None, 0, 1),
    ([freed(4, 2)], None, 0, 4), ([torch.eye(3).to_sparse()], None, 0, 1),
    ([torch.ones(3), torch.ones(2)], None, 0, 3), ([torch.ones(2, 3, 4).mT], None, 0, 2),
    *(([torch.ones(4)], index, 0, 1) for index in (
        torch.ones(1), torch.ones(1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int64),
        torch.arange(4)[::2], torch.arange(4, device="meta"), freed(4, dtype=torch.int64))),
    *(([torch.ones(4)], index, first, count) for index in (None, torch.arange(4))
      for first, count in ((-1, 1), (0, 5), (4, 1), (0, -1), (5, 0), (2**62, 2**62))),
])  # fmt: skip
def test_a_ring_checks_what_it_reads(arguments):
    ring = _C.Ring(2, False)
    with pytest.raises(ValueError, match=r"sources: |index: |first, count: "):
        ring.gather(*arguments)
    with pytest.raises(ValueError, match="tensors: "):
        ring.copy([freed(3)])


def test_a_freed_tensor_is_an_error_at_its_batch():
    loader = TensorLoader(tensor := torch.ones(4, 2))
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has a storage been freed"):
        next(iter(loader))


# ---- memory --------------------------------------------------------------------------------------


def resident():
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_batches_in_flat_memory():
    x, y = torch.randn(4096, 256), torch.arange(4096)
    loader = TensorLoader(x, y, batch_size=128, shuffle=True)

    def epoch():
        return sum(1 for _ in loader)

    epoch()
    settled = loader._ring.allocations
    before = resident()
    assert sum(epoch() for _ in range(313)) > 10_000
    assert loader._ring.allocations == settled <= 6
    assert resident() - before < 4 * 2**20  # all batches together were 1.3 GB


def test_thousands_of_prefetched_batches_allocate_nothing():
    x, y = torch.randn(2048, 16), torch.arange(2048)
    loader = to_rehearsed(x, y, batch_size=8)
    loader._lane._copies.launch = lambda task: task()  # no delays
    loader._lane._consumer.launch = lambda task: task()
    for _ in range(2):
        for _ in loader:
            pass
    settled = loader._ring.allocations
    for _ in range(10):
        for _ in loader:
            pass
    assert loader._ring.allocations == settled


@needs_cuda
def test_steady_state_on_a_gpu_allocates_nothing():
    x, y = torch.randn(4096, 256), torch.arange(4096)
    loader = TensorLoader(x, y, batch_size=128, shuffle=True, device="cuda")

    def epoch():
        for inputs, _ in loader:
            inputs.mul_(2)

    for _ in range(3):
        epoch()
    torch.cuda.synchronize()
    settled = loader._ring.allocations
    pinned = torch.cuda.host_memory_stats().get("num_host_alloc")
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    for _ in range(312):  # 10,000 batches
        epoch()
    assert loader._ring.allocations == settled
    assert torch.cuda.host_memory_stats().get("num_host_alloc") == pinned
    assert torch.cuda.memory_stats()["segment.all.allocated"] == segments


# ---- going on where it was -----------------------------------------------------------------------


def epochs_from(loader, count, before=lambda epoch: None, first=0):
    """Labels of every batch of the next epochs."""
    for epoch in range(first, count):
        before(epoch)
        for batch in loader:
            yield epoch, batch[1].tolist()


KINDS = {
    "in order": {},
    "a generator": {"shuffle": True, "generator": 5},
    "torch's generator": {"shuffle": True},
    "a generator, in order": {"generator": 5},
    "a rank": {"shuffle": True, "rank": 1, "world_size": 3},
    "a sampler": {"sampler": 5},
    "batches": {"batch_sampler": 5},
}


@pytest.mark.parametrize("at", [0, 1, 3, 7, 8, 13])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_loaded_state_goes_on_exactly(make, kind, at, tmp_path):
    def new():
        kwargs = dict(kind)
        if "generator" in kwargs:
            kwargs["generator"] = torch.Generator().manual_seed(5)
        drawn = SubsetRandomSampler(range(15), generator=torch.Generator().manual_seed(5))
        if "sampler" in kwargs:
            kwargs["sampler"] = drawn
        if "batch_sampler" in kwargs:
            return make(*data(15), batch_sampler=BatchSampler(drawn, 2, False))
        rows = 45 if "rank" in kwargs else 15
        return make(*data(rows), batch_size=2, **kwargs)

    def before(loader):
        return loader.set_epoch if "rank" in kind else lambda epoch: None

    torch.manual_seed(9)
    whole = list(epochs_from(loader := new(), 2, before(loader)))
    torch.manual_seed(9)
    loader = new()
    running = epochs_from(loader, 2, before(loader))
    found = list(itertools.islice(running, at))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    default = torch.get_rng_state()
    own = getattr(loader.sampler, "generator", None) if "sampler" in str(kind) else None
    sampled = own and own.get_state()
    running.close()

    other = new()
    torch.manual_seed(1234)
    torch.rand(7)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.set_rng_state(default)  # a training run restores it, too
    if sampled is not None:
        other.sampler.generator.set_state(sampled)
    first = found[-1][0] if found else 0
    found += epochs_from(other, 2, before(other), first)
    assert found == whole


def test_a_state_between_two_epochs_begins_the_next():
    loader = TensorLoader(*data(), batch_size=8, shuffle=True, generator=torch.Generator())
    list(loader)
    state = loader.state_dict()
    following = list(loader)
    other = TensorLoader(*data(), batch_size=8, shuffle=True, generator=torch.Generator())
    other.load_state_dict(state)
    same(other, following)


def test_a_prefetcher_around_it_has_its_state():
    def new():
        generator = torch.Generator().manual_seed(1)
        loader = TensorLoader(*data(), batch_size=4, shuffle=True, generator=generator)
        return DevicePrefetcher(loader, "cpu", depth=3)

    whole = [batch[1].tolist() for batch in new()]
    running = new()
    found = [batch[1].tolist() for batch in itertools.islice(running, 4)]
    other = new()
    other.load_state_dict(running.state_dict())
    assert found + [batch[1].tolist() for batch in other] == whole


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({}, "wanted what state_dict.. of a TensorLoader returned"),
        (None, "wanted what state_dict"),
        (TensorLoader(*data(49), batch_size=8).state_dict(), "rows=49 instead of 50"),
        (TensorLoader(*data(), batch_size=4).state_dict(), "batch_size=4 instead of 8"),
        (TensorLoader(*data(), batch_size=8, shuffle=True).state_dict(), "shuffle=True instead of"),
        (TensorLoader(*data(), batch_size=8, rank=0, world_size=2).state_dict(),
         "order='Distributed' instead of 'InOrder', seed=0 instead of None, world_size=2 instead"),
        (TensorLoader(*data(), batch_size=8, generator=torch.Generator()).state_dict(),
         "of a loader with a generator, this one is without"),
    ],
)  # fmt: skip
def test_a_state_of_another_loader_is_an_error_and_changes_nothing(state, told):
    loader = TensorLoader(*data(), batch_size=8)
    before = loader.state_dict()
    with pytest.raises(ValueError, match=f"state_dict: .*{told}"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before
    assert len(list(loader)) == 7


# ---- bad input -----------------------------------------------------------------------------------

X, Y = data()


@pytest.mark.parametrize(
    ("tensors", "kwargs", "error", "told"),
    [
        ((), {}, ValueError, "tensors: got none"),
        (({},), {}, ValueError, "tensors: got none"),
        (([1, 2],), {}, TypeError, "tensor 0 is a list; .*torch.from_numpy"),
        (({"x": np.zeros(3)},), {}, TypeError, "x is a ndarray"),
        ((X, Y[:-1]), {}, ValueError, r"lengths differ \(tensor 0: 50, tensor 1: 49\)"),
        (({"x": X, "y": Y[1:]},), {}, ValueError, r"lengths differ \(x: 50, y: 49\)"),
        ((torch.tensor(1.0),), {}, ValueError, "tensor 0 has no dimension"),
        ((torch.zeros(3, device="meta"),), {}, ValueError, "tensor 0 is on meta .*on the CPU"),
        ((torch.eye(3).to_sparse(),), {}, ValueError, "layout torch.sparse_coo"),
        ((X.transpose(1, 2),), {}, ValueError, r"rows that are scattered .*call contiguous\(\)"),
        ((torch.ones(2, dtype=torch.complex64).conj(),), {}, ValueError, "resolve_conj"),
        ((X,), {"batch_size": 0}, ValueError, "batch_size=0: wanted a whole number of rows"),
        ((X,), {"batch_size": 2.0}, ValueError, "batch_size=2.0"),
        ((X,), {"depth": 0}, ValueError, "depth=0"),
        ((X,), {"rank": 1}, ValueError, "rank=1, world_size=None: wanted both or neither"),
        ((X,), {"rank": 2, "world_size": 2}, ValueError, "rank=2: wanted a number from 0 to .* 1"),
        ((X,), {"rank": 0, "world_size": 2, "generator": torch.Generator()}, ValueError,
         "generator: excludes rank"),
        ((X,), {"sampler": [1], "shuffle": True}, ValueError, "sampler: excludes shuffle"),
        ((X,), {"device": "meta"}, ValueError, "device='meta': wanted 'cpu', 'cuda' or 'xpu'"),
        ((X,), {"device": "cuda:99"}, RuntimeError, "device='cuda:99' is not there"),
    ],
)  # fmt: skip
def test_bad_arguments(tensors, kwargs, error, told):
    with pytest.raises(error, match=told):
        TensorLoader(*tensors, **kwargs)


@pytest.mark.parametrize("index", [50, -1, 2**40])
def test_an_index_out_of_range_is_an_error_at_its_batch(make, index):
    iterator = iter(make(X, Y, batch_size=2, sampler=[0, 1, 2, index]))
    assert next(iterator)[1].tolist() == [0, 1]
    with pytest.raises(IndexError, match=f"index {index} at position 1 of a batch is out of range "
                                         "for 50 rows; wanted: 0 to 49"):  # fmt: skip
        next(iterator)


def test_an_epoch_means_nothing_to_a_generator():
    with pytest.raises(ValueError, match=r"set_epoch\(3\): .* does not depend on an epoch"):
        TensorLoader(X, batch_size=2, shuffle=True).set_epoch(3)


def test_no_rows_are_no_batches(make):
    for kwargs in ({}, {"shuffle": True}, {"rank": 0, "world_size": 2}):
        loader = make(X[:0], Y[:0], batch_size=4, **kwargs)
        assert len(loader) == 0
        assert list(loader) == []


def test_the_transform_is_applied(make):
    if make is to_rehearsed:
        pytest.skip("the rehearsed device has no kernels")
    x = (torch.arange(256) % 256).to(torch.uint8).view(256, 1)
    loader = make(x, batch_size=64, transform=lambda batch: batch[0].to(torch.bfloat16) / 256)
    found = torch.cat([batch.cpu() for batch in loader])
    assert torch.equal(found, x.to(torch.bfloat16) / 256)
