"""The load job: who feeds, what is counted, what is refused."""

import json

import pytest
import torch

from fusedopt.bench import feeds, load, loading
from fusedopt.bench.__main__ import main

SMALL = feeds.Rows("small", "100 x 8, fp32", 100, (8,), torch.float32, 32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One small set of rows in place of all."""
    monkeypatch.setattr(feeds, "WORKLOADS", {"small": SMALL})
    monkeypatch.setattr(loading, "WORKLOADS", {"small": SMALL})
    monkeypatch.setattr(load, "SETTLING", 0.05)


def run(*arguments):
    return main(["load", "--workloads", "small", "--rounds", "1", *arguments])


@pytest.mark.parametrize("name", [name for name in feeds.FEEDS if name != "dataloader-2"])
def test_every_feed_goes_through_all_rows(name, monkeypatch):
    """Each row once, in batches of its own size, and at last a smaller one."""
    feed = feeds.FEEDS[name]
    if reason := feed.unavailable():
        pytest.skip(reason)
    seen = []
    monkeypatch.setattr(feeds, "drained", lambda batches, device: seen.extend(batches))
    data = [torch.arange(100.0).view(100, 1).repeat(1, 8), torch.arange(100)]
    epoch = feed.build("cpu", data, SMALL)
    if name in (feeds.CANDIDATE, feeds.FLOOR):
        epoch()  # its own loop, which keeps nothing
        return
    epoch()
    assert [len(rows) for rows, _ in seen] == [32, 32, 32, 4]
    assert torch.equal(torch.cat([labels for _, labels in seen]).sort().values, torch.arange(100))
    assert all(torch.equal(rows[:, 0].long(), labels) for rows, labels in seen)


def test_what_is_written_counts_rows_and_bytes(tmp_path, capsys):
    path = tmp_path / "load.json"
    assert run("--providers", "dataloader,index_select,fusedopt,floor", "--json", str(path)) == 0
    content = json.loads(path.read_text())
    (row,) = content["load"]["rows"]
    assert content["machine"]["torch"]
    assert set(row["epoch_seconds"]) == {"dataloader", "index_select", "fusedopt", "floor"}
    for name, seconds in row["epoch_seconds"].items():
        assert row["samples_per_second"][name] == pytest.approx(100 / seconds["median"])
        assert row["bytes_per_second"][name] == pytest.approx(100 * 40 / seconds["median"])
    assert row["over_fusedopt"]["fusedopt"]["median"] == 1
    assert row["over_fusedopt"]["dataloader"]["median"] > 1
    printed = capsys.readouterr().out
    assert "TensorLoader is" in printed
    assert "times as fast" in printed


def test_a_feed_that_lingers_races_apart_against_ours(monkeypatch):
    lingering = feeds.Feed("slow", "slow", feeds.FEEDS["dataloader"].build, lingers=True)
    monkeypatch.setitem(feeds.FEEDS, "slow", lingering)
    (row,) = load.measure(["small"], ["slow", "index_select", "fusedopt"], "cpu", 2, 1.0)
    assert set(row.race.seconds) == {"index_select", "fusedopt"}
    assert set(row.apart.seconds) == {"slow", "fusedopt"}
    assert set(row.seconds) == {"slow", "index_select", "fusedopt"}
    assert row.ratio("slow").median == row.apart.ratio("slow", "fusedopt").median


def test_a_feed_that_is_not_installed_is_named_with_the_reason(monkeypatch, capsys):
    absent = feeds.Feed("absent", "absent loader", lambda *a: None, needs="no_such_package")
    monkeypatch.setitem(feeds.FEEDS, "absent", absent)
    assert run("--providers", "absent,fusedopt") == 0
    assert "absent loader did not run: no_such_package is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workloads", "nope"], "unknown workload 'nope'"),
        (["--providers", "nope"], "unknown provider 'nope'"),
        (["--rounds", "0"], "got '0'; wanted: a whole number, at least 1"),
        (["--json", "/proc/no/where.json"], "cannot write to"),
    ],
)
def test_bad_arguments_stop_before_any_work(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["load", *arguments])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_rows_that_do_not_fit_stop_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr("fusedopt.bench.machine.available_memory", lambda device="cpu": 1000)
    with pytest.raises(SystemExit):
        run()
    assert "small needs 0.0 GB of memory, 0.0 GB are available" in capsys.readouterr().err


def test_the_ways_to_the_gpu_are_a_table():
    """From made-up figures: none were measured where the tests run."""
    row = {
        "batch_mib": 16,
        "bytes_per_second": {"memcpy": 50e9, "prefetcher": 49e9, "loader": 25e9},
        "prefetcher_over_memcpy": {"median": 0.98},
        "loader_over_memcpy": 0.5,
        "hidden": {"median": 0.97},
        "host_us": 40.2,
    }
    table = loading.transfer_table([row])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["16", "50.0", "49.0", "98%", "25.0", "50%", "97%", "40"]
