"""The GPU check, as far as it goes without a GPU: its parts, what it writes, what it promises."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedopt.bench import gpu_parts, gpu_tables, rows
from fusedopt.bench.gpu_check import FILE, Check, NotRunError, main, sanitized, show

ROOT = Path(__file__).resolve().parent.parent


def parts(folder):
    return {row["part"]: row for row in rows.read(folder / FILE) if row["job"] == "part"}


def test_every_part_is_written_at_once_and_a_failing_one_stops_no_other(tmp_path, capsys):
    check = Check(tmp_path, rehearse=True, minutes=1, revision="abc")

    def broken():
        raise RuntimeError("no such kernel")

    def absent():
        raise NotRunError("there is no tool")

    def told():
        check.found = [{"job": "bits"}]
        return {}

    check.part("build", told)
    assert list(parts(tmp_path)) == ["build"]
    assert rows.read(tmp_path / FILE)[-1] == {"job": "bits", "revision": "abc", "rehearsal": True}
    check.part("bits", broken)
    check.part("tests", absent)
    found = parts(tmp_path)
    assert [part["status"] for part in found.values()] == ["passed", "failed", "not run"]
    assert found["bits"]["reason"] == "RuntimeError('no such kernel')"
    assert "there is no tool" in capsys.readouterr().out


def test_no_part_begins_when_the_time_is_up(tmp_path):
    check = Check(tmp_path, rehearse=True, minutes=0, revision=None)
    part = check.part("tests", lambda: pytest.fail("was begun"))
    assert (part["status"], part["reason"]) == ("not run", "no time left")


def figure(provider, ms, **more):
    return {"job": "step", "workload": "billion", "optimizer": "AdamW", "dtype": "float32",
            "device": "cuda", "provider": provider, "ms": ms, "p20": ms, "p80": ms, "rounds": 3,
            "elements": 2**30, "tensors": 8, "bytes": 28, "baseline": "torch-best", "kernels": 1.0,
            "copies": 1.0, "device_us": ms * 1000, "host_us": 50.0, **more}  # fmt: skip


def test_promises_come_from_the_figures_alone(tmp_path, capsys):
    check = Check(tmp_path, rehearse=False, minutes=1, revision=None)
    figures = [figure("fusedopt", 7.0), figure("torch-fused", 7.7), figure("floor", 6.3)]
    check.rows += figures
    told = {cells[0]: cells[2:] for cells, _ in gpu_tables.goals(check.rows).lines}
    assert told["AdamW, 1B elements: share of the floor's speed"] == ["0.900", "**not kept**"]
    assert told["AdamW, 1B elements: times torch fused"] == ["1.10", "kept"]
    assert sum(cells == ["-", "not measured"] for cells in told.values()) == len(told) - 2
    show(check.rows)
    output = capsys.readouterr().out
    assert "one of them on the device" in output
    assert "not kept" in output
    # Times of a CPU keep no promise of a GPU, nor do those of a rehearsal.
    for other in ({"device": "cpu"}, {"rehearsal": True}):
        goals = gpu_tables.goals([{**row, **other} for row in figures])
        assert {cells[3] for cells, _ in goals.lines} == {"not measured"}


def test_what_compute_sanitizer_says_is_read():
    frame = "=========     at void fusedopt::cuda::update<fusedopt::AdamW>(DeviceTable)+0x70"
    triton = "=========     at fusedopt_update+0x1f0 in multi_tensor.py:401"
    others = "=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x10"
    path = "=========     in fusedopt/_C.cpython-312-x86_64-linux-gnu.so"
    end = "========= ERROR SUMMARY: 3 errors"
    assert sanitized("\n".join([frame, triton, others, path, end])) == {
        "errors": 3, "in_our_kernels": 2,
    }  # fmt: skip
    races = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert sanitized(races) == {"errors": 0, "in_our_kernels": 0}
    assert sanitized("Error: could not attach") is None
    assert sanitized(f"Device not supported\n{end}") is None


def test_what_it_watches_ends_by_itself(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert gpu_parts.main(["drive", str(file), "--rehearse", "--seconds=0"]) == 0
    assert not file.exists()
    assert gpu_parts.main(["drive", str(file), "--rehearse"]) == 0
    found = rows.read(file)
    assert {row["optimizer"] for row in found} == set(gpu_parts.optimizers.names())
    assert {row["dtype"] for row in found} == {"torch.float32", "torch.bfloat16"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path, capsys):
    assert main([str(tmp_path / "out")]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_rehearsal_goes_through_all_parts(tmp_path):
    command = [sys.executable, "bench/gpu_check.py", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = parts(tmp_path)
    passed = {name for name, part in told.items() if part["status"] == "passed"}
    compiled = ["build"] if shutil.which("nvcc") else []
    assert passed == {"tests", "figures", "pipeline", "bits", *compiled}
    assert told["tests"]["counts"]["tests"] > told["tests"]["counts"]["skipped"] >= 0
    found = rows.grouped(rows.read(tmp_path / FILE), "job")
    assert all(row["compared"] > 1e6 and row["differing"] == 0 for row in found[("bits",)])
    assert {row["workload"] for row in found[("step",)]} == {"groups", "one"}
    assert {row["workload"] for row in found[("pipeline",)]} == {"one"}
    assert all(part["reason"] for part in told.values() if part["status"] == "not run")
