"""DevicePrefetcher: the right batches, whole, ahead, for every kind of loader and way to end."""

import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch
from lanes import WAYS, EarlyRing, PoisonedRing, RehearsedLane, needs_cuda, rehearsed, to_cpu
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from fusedopt import _C
from fusedopt.data import DevicePrefetcher, prefetching
from fusedopt.data.structure import leaves_of


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def batch_of(number, size=8):
    return {"x": torch.full((size, 16), float(number)), "y": [torch.full((size,), number)]}


def batches(count):
    return [batch_of(number) for number in range(count)]


def numbers(found):
    """Which batches these are; fails if one is torn."""
    result = []
    for batch in found:
        values = torch.cat([leaf.flatten().double() for leaf in leaves_of(batch)])
        assert values.unique().numel() == 1
        result.append(int(values[0].item()))
    return result


def collect(loader, found):
    """Appends all batches, so that those before an error are there."""
    for batch in loader:
        found.append(batch)


def threads():
    return [t for t in threading.enumerate() if t.name == "fusedopt.data"]


def no_threads():
    """Whether all of the prefetchers' threads end soon."""
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads()


class Source:
    """A loader that counts how far it was asked, and may fail."""

    def __init__(self, count, fail_at=None):
        self.count = count
        self.fail_at = fail_at
        self.asked = 0

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            self.asked += 1
            if number == self.fail_at:
                raise ZeroDivisionError(f"batch {number}")
            yield batch_of(number)


# ---- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_same_batches_in_the_same_order_again_and_again(way, count, depth):
    prefetcher = way(batches(count), depth)
    for _ in range(3):
        assert numbers(prefetcher) == list(range(count))
    assert len(prefetcher) == count
    assert no_threads()


def test_a_list_of_all_batches_is_right(way):
    """Each belongs to the consumer: none is written to again."""
    found = list(way(Source(40)))
    assert numbers(found) == list(range(40))


def test_a_generator_and_an_uneven_last_batch(way):
    sizes = [8, 8, 3]
    found = list(way(batch_of(n, size) for n, size in enumerate(sizes)))
    assert numbers(found) == [0, 1, 2]
    assert [len(batch["x"]) for batch in found] == sizes


def test_other_leaves_come_through_as_they_are(way):
    class Stranger:
        pass

    stranger = Stranger()
    batch = {"x": torch.ones(2), "name": "cat", "n": 3, "none": None, "s": (stranger, b"b")}
    (found,) = way([batch])
    assert {key: found[key] for key in ("name", "n", "none")} == {
        "name": "cat",
        "n": 3,
        "none": None,
    }
    assert found["s"][0] is stranger


def test_layout_dtype_and_views_are_kept(way):
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    leaves = [images, torch.arange(6)[::2], torch.ones(3, 1).expand(3, 4), torch.tensor(2.5),
              torch.empty(0, 3), torch.tensor([True, False]), torch.ones(2, dtype=torch.bfloat16),
              torch.arange(6.0).view(2, 3).t()]  # fmt: skip
    (found,) = way([leaves])
    for old, new in zip(leaves, found, strict=True):
        assert torch.equal(old, new.cpu())
        assert new.dtype == old.dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_tensors_that_are_more_than_values_come_through(way):
    weight = torch.ones(3, requires_grad=True)
    loader = [[weight * 2, torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64).conj()]]
    (found,) = way(loader)
    assert found[0].requires_grad
    assert found[1].is_sparse
    assert torch.equal(found[2].resolve_conj().cpu(), torch.ones(2, dtype=torch.complex64))


def test_the_transform_is_given_every_batch_on_its_device(way):
    def halved(batch):
        devices.append(batch["x"].device.type)
        return batch["x"].to(torch.bfloat16) / 2

    devices = []
    if way is rehearsed:
        pytest.skip("the rehearsed device has no kernels")
    found = list(way([{"x": torch.full((4,), 2 * n, dtype=torch.uint8)} for n in range(5)],
                     transform=halved))  # fmt: skip
    assert numbers(found) == list(range(5))
    assert found[0].dtype == torch.bfloat16
    assert set(devices) == {"cpu" if way is to_cpu else "cuda"}


def test_it_is_ahead_by_its_depth_and_no_more(way):
    source = Source(20)
    iterator = iter(way(source, 3))
    for taken in range(1, 8):
        next(iterator)
        deadline = time.monotonic() + 5
        while source.asked < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        assert source.asked == taken + 3
    iterator.close()


# ---- whole batches -------------------------------------------------------------------------------


def consume(prefetcher, patience):
    """Holds on to some batches for a while, reads all of them again and again; finds torn ones."""
    held = []
    chance = random.Random(0)
    for number, batch in enumerate(prefetcher):
        held.append((number, batch))
        for n, kept in held:
            for leaf in leaves_of(kept):
                if not bool((leaf == n).all()):
                    return f"batch {n} is torn, after {number}"
        held = [pair for pair in held if chance.random() < patience]
    return ""


@pytest.mark.parametrize("patience", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("depth", [1, 3])
def test_no_batch_is_torn_though_reused_buffers_are_poisoned(patience, depth):
    ring = PoisonedRing(_C.Ring(depth + 3, False))
    assert consume(rehearsed(Source(150), depth, ring), patience) == ""
    assert ring.allocations >= 2


def test_early_reuse_is_found():
    """In a ring that does not ask who holds a buffer, copies under way read the next batch."""
    assert any(consume(rehearsed(Source(150), 3, EarlyRing(2)), 0.5) for _ in range(5))


def test_a_copy_under_way_that_nobody_remembers_is_found(monkeypatch):
    """The same where the producer forgets the pinned memory of copies before they are made."""
    real = prefetching.Producer._sent

    def forgetful(self, batch, sent):
        return real(self, batch, [])

    monkeypatch.setattr(prefetching.Producer, "_sent", forgetful)
    found = ""
    for _ in range(5):
        lane = RehearsedLane()
        lane.send = slow_send(lane)
        prefetcher = rehearsed(Source(60), 3, PoisonedRing(_C.Ring(6, False)))
        prefetcher._lane = lane
        found = found or consume(prefetcher, 0.5)
    assert found


def slow_send(lane):
    """A rehearsed copy that holds no reference to what it copies from, as a GPU holds none."""

    def send(tensor):
        arrived = torch.full_like(tensor, -1)
        source = torch.from_dlpack(Address(tensor))
        lane._copies.launch(lambda: arrived.copy_(source))
        return arrived

    return send


class Address:
    """A tensor's memory without a reference to it."""

    def __init__(self, tensor):
        import numpy as np

        pointer = (tensor.data_ptr(), False)
        self.__array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": np.dtype(str(tensor.dtype)[6:]).str,
            "data": pointer, "version": 3,
        }  # fmt: skip
        self.array = np.asarray(self)

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_the_same_copies_are_whole_when_they_are_remembered():
    lane = RehearsedLane()
    lane.send = slow_send(lane)
    prefetcher = rehearsed(Source(150), 3, PoisonedRing(_C.Ring(6, False)))
    prefetcher._lane = lane
    assert consume(prefetcher, 0.5) == ""


class Unhurried(RehearsedLane):
    """Its consumer's stream waits for copies, and its host does not: as on a GPU."""

    def hand_over(self, done, tensors):
        self.handed_over += len(list(tensors))
        return self._consumer.record()


def test_the_last_copies_of_an_epoch_are_remembered():
    """A ring outlives an epoch's producer: copies may be under way when the next one begins."""
    prefetcher = rehearsed([batch_of(0), batch_of(1)], 2)
    prefetcher._lane = lane = Unhurried()
    lane.send = slow_send(lane)
    found = []
    for epoch in range(30):
        prefetcher.loader = [batch_of(2 * epoch), batch_of(2 * epoch + 1)]
        found += list(prefetcher)
    lane._copies.record().synchronize()
    assert numbers(found) == list(range(60))


def test_the_ring_grows_to_the_largest_batch_and_then_no_more():
    prefetcher = rehearsed([batch_of(n, size) for n, size in enumerate([2, 8, 5, 8, 3] * 40)])
    assert numbers(prefetcher) == list(range(200))
    settled = prefetcher._ring.allocations
    assert settled <= 2 * 2 * 5  # two leaves, a small buffer and a large one for each of five
    for _ in range(3):
        numbers(prefetcher)
    assert prefetcher._ring.allocations == settled


# ---- ways to end ---------------------------------------------------------------------------------


def test_a_break_ends_the_thread_and_the_source(way):
    closed = []

    class Closing:
        def __iter__(self):
            try:
                for number in range(1000):
                    yield batch_of(number)
            finally:
                closed.append(threading.current_thread().name)

    for number, _ in enumerate(way(Closing())):
        if number == 3:
            break
    assert no_threads()
    assert closed == ["fusedopt.data"]


def test_an_exception_in_the_consumer_ends_the_thread(way):
    class Refuses:
        def append(self, batch):
            raise KeyError

    with pytest.raises(KeyError):
        collect(way(Source(1000)), Refuses())
    assert no_threads()


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_exception_of_the_source_comes_at_its_batch(way, at):
    found = []
    with pytest.raises(ZeroDivisionError, match=f"batch {at}") as caught:
        collect(way(Source(10, fail_at=at)), found)
    assert numbers(found) == list(range(at))
    assert "in __iter__" in "".join(str(entry) for entry in caught.traceback)
    assert no_threads()


def test_an_exception_of_the_transform_comes_at_its_batch():
    def refuse(batch):
        if batch["x"][0, 0] == 4:
            raise OverflowError("four")
        return batch

    found = []
    with pytest.raises(OverflowError, match="four"):
        collect(to_cpu(Source(10), transform=refuse), found)
    assert numbers(found) == [0, 1, 2, 3]


class Failing(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 9:
            raise ZeroDivisionError("row 9")
        return torch.full((2,), index // 3)


# Torch waits five seconds for every worker of a loader that failed: one of them, once.
@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_a_worker_comes_at_its_batch(workers):
    found = []
    with pytest.raises(ZeroDivisionError, match="row 9"):
        collect(to_cpu(DataLoader(Failing(), batch_size=3, num_workers=workers)), found)
    assert numbers(found) == [0, 1, 2]
    assert no_threads()


def test_a_worker_loader_is_prefetched_and_iterated_again(way):
    data = TensorDataset(torch.arange(23).repeat_interleave(4).view(23, 4).float())
    loader = DataLoader(data, batch_size=1, num_workers=2)
    prefetcher = way(loader)
    for _ in range(2):
        assert numbers(prefetcher) == list(range(23))
    assert no_threads()


def test_two_at_once(way):
    """Over one loader, and two iterations of one prefetcher."""
    loader = batches(30)
    one, two = way(loader), way(loader)
    pairs = list(zip(one, two, one, strict=True))
    for which in range(3):
        assert numbers([pair[which] for pair in pairs]) == list(range(30))
    assert no_threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_after_a_fork_the_child_says_so_and_starts_anew():
    prefetcher = to_cpu(batches(10))
    iterator = iter(prefetcher)
    next(iterator)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        try:
            with pytest.raises(RuntimeError, match=r"belongs to process .* call iter\(\) on"):
                next(iterator)
            del iterator
            os.write(write, b"right" if numbers(prefetcher) == list(range(10)) else b"wrong")
        finally:
            os._exit(0)
    os.close(write)
    deadline = threading.Timer(20, os.kill, (child, 9))
    deadline.start()
    assert os.read(read, 5) == b"right"
    deadline.cancel()
    os.waitpid(child, 0)
    os.close(read)
    assert numbers(iterator) == list(range(1, 10))  # the parent's goes on


PROGRAM = """
import torch
from fusedopt.data import DevicePrefetcher, TensorLoader

def endless():
    while True:
        yield torch.ones(3)

loader = DevicePrefetcher(endless(), "cpu")
iterator = iter(loader)
next(iterator)
rows = iter(TensorLoader(torch.arange(1000.0), batch_size=2, shuffle=True))
next(rows)
{ending}
"""


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)"])
def test_the_interpreter_exits_in_the_middle_of_an_iteration(ending):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(ending=ending)],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# ---- what it keeps of the loader -----------------------------------------------------------------


def test_attributes_and_epochs_are_the_loaders():
    data = TensorDataset(torch.arange(10.0))
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    loader = DataLoader(data, batch_size=2, sampler=sampler)
    prefetcher = to_cpu(loader)
    assert prefetcher.dataset is data
    assert prefetcher.sampler is sampler
    assert prefetcher.batch_sampler is loader.batch_sampler
    assert prefetcher.batch_size == 2
    assert len(prefetcher) == 3
    prefetcher.set_epoch(7)
    assert sampler.epoch == 7
    with pytest.raises(AttributeError, match=r"set_epoch\(1\): neither the loader, a list"):
        to_cpu([]).set_epoch(1)
    assert not hasattr(to_cpu([]), "dataset")
    with pytest.raises(TypeError):
        len(to_cpu(iter([])))


def test_its_state_is_that_of_the_last_batch_yielded(way):
    nodes = pytest.importorskip("torchdata.nodes", reason="torchdata is not installed")

    def make():
        return way(nodes.Loader(nodes.IterableWrapper(list(range(12)))))

    def take(prefetcher, count):
        iterator = iter(prefetcher)
        found = [next(iterator) for _ in range(count)]
        return found, prefetcher.state_dict()

    prefetcher = make()
    found, state = take(prefetcher, 5)
    assert found == [0, 1, 2, 3, 4]
    again = make()
    again.load_state_dict(state)
    assert list(again) == [5, 6, 7, 8, 9, 10, 11]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ((5, "cpu"), TypeError, "loader is a int; wanted: an iterable of batches"),
        (([], "cpu", 0), ValueError, "depth=0: wanted a whole number of batches, at least 1"),
        (([], "cpu", 1.5), ValueError, "depth=1.5"),
        (([], "cpu", True), ValueError, "depth=True"),
        (([], "meta"), ValueError, "device='meta': wanted 'cpu', 'cuda' or 'xpu'"),
        (([], "cuda:99"), RuntimeError, "device='cuda:99' is not there: torch sees . cuda devices"),
    ],
)
def test_bad_arguments(arguments, error, told):
    with pytest.raises(error, match=told):
        DevicePrefetcher(*arguments)


# ---- on a GPU ------------------------------------------------------------------------------------


@needs_cuda
def test_on_a_gpu_kernels_of_the_consumers_stream_see_whole_batches():
    """Late kernels on another stream, batches dropped at once, a copy stream that runs ahead."""
    count, size = 200, 1 << 20
    loader = (torch.full((size,), float(n)) for n in range(count))
    totals = torch.zeros(count, dtype=torch.float64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for n, batch in enumerate(DevicePrefetcher(loader, "cuda", 3)):
            torch.cuda._sleep(100_000)
            totals[n] = batch.double().sum()
            del batch
    torch.cuda.synchronize()
    assert totals.tolist() == [float(n * size) for n in range(count)]


@needs_cuda
def test_on_a_gpu_steady_state_allocates_no_pinned_and_no_device_memory():
    data = torch.randn(4096, 256)
    prefetcher = DevicePrefetcher(DataLoader(TensorDataset(data), batch_size=64), "cuda")
    for _ in range(2):
        for _ in prefetcher:
            pass
    pinned = prefetcher._ring.allocations
    before = torch.cuda.host_memory_stats().get("num_host_alloc")
    blocks = torch.cuda.memory_stats()["segment.all.allocated"]
    for _ in range(5):
        for _ in prefetcher:
            pass
    assert prefetcher._ring.allocations == pinned
    assert torch.cuda.host_memory_stats().get("num_host_alloc") == before
    assert torch.cuda.memory_stats()["segment.all.allocated"] == blocks


@needs_cuda
def test_on_a_gpu_what_is_there_already_and_what_moves_itself_are_sent():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    loader = [{"there": torch.full((3,), 5.0, device="cuda"), "packed": packed}]
    (found,) = DevicePrefetcher(loader, "cuda")
    assert found["there"].tolist() == [5.0] * 3
    assert found["packed"].data.is_cuda


@needs_cuda
def test_on_a_gpu_memory_inside_of_objects_is_marked_as_used(monkeypatch):
    """Else torch's allocator would give it out again under kernels that read it."""
    marked = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: marked.append(t.data_ptr())
    )
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    sparse = torch.eye(3).to_sparse()
    (found,) = DevicePrefetcher([{"packed": packed, "sparse": sparse}], "cuda")
    assert {found["packed"].data.data_ptr(), found["sparse"]._values().data_ptr()} <= set(marked)
