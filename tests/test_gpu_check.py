"""The GPU check, as far as it goes without a GPU: its parts, what it writes, what it promises."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedopt.bench import documents, gpu_parts, gpu_report
from fusedopt.bench.gpu_check import FILE, Check, NotRunError, main, promises, sanitized, show

ROOT = Path(__file__).resolve().parent.parent


def written(folder):
    return json.loads((folder / FILE).read_text())


def test_every_part_is_written_at_once_and_a_failing_one_stops_no_other(tmp_path, capsys):
    check = Check(tmp_path, rehearse=True, minutes=1)

    def broken(limit):
        raise RuntimeError("no such kernel")

    def absent(limit):
        raise NotRunError("there is no tool")

    check.part("build", lambda limit: {"rows": [1]})
    assert list(written(tmp_path)["parts"]) == ["build"]
    check.part("bits", broken)
    check.part("sanitizer: memcheck", absent)
    parts = written(tmp_path)["parts"]
    assert [part["status"] for part in parts.values()] == ["passed", "failed", "not run"]
    assert parts["build"]["rows"] == [1]
    assert parts["bits"]["reason"] == "RuntimeError: no such kernel"
    assert "there is no tool" in capsys.readouterr().out


def test_no_part_begins_when_the_time_is_up(tmp_path):
    check = Check(tmp_path, rehearse=True, minutes=0)
    part = check.part("tests", lambda limit: pytest.fail("was begun"))
    assert (part["status"], part["reason"]) == ("not run", "no time left")


def figure(workload, optimizer, **times):
    medians = {name.replace("_", "-"): {"median": ms} for name, ms in times.items()}
    device = {name: {"kernels": 1.0, "copies": 1.0, "device_us": ms * 1000, "host_us": 50.0}
              for name, ms in times.items() if name in ("fusedopt", "floor")}  # fmt: skip
    return {"workload": workload, "optimizer": optimizer, "dtype": "float32", "device": device,
            "step_ms": medians}  # fmt: skip


def test_promises_come_from_the_figures_alone(tmp_path, capsys):
    check = Check(tmp_path, rehearse=False, minutes=1)
    rows = [figure("billion", "AdamW", fusedopt=7.0, torch_fused=7.7, floor=6.3)]
    check.part("figures", lambda limit: {"rows": rows})
    told = {what: measured for what, measured, *_ in promises(check.result)}
    assert told["AdamW, 1B elements: share of the floor's speed"] == pytest.approx(0.9)
    assert told["AdamW, 1B elements: times torch fused"] == pytest.approx(1.1)
    assert sum(measured is not None for measured in told.values()) == 2
    show(check.result)
    output = capsys.readouterr().out
    assert "NOT KEPT" in output
    assert "kept" in output.replace("NOT KEPT", "")
    assert "not measured" in output
    check.result["rehearsal"] = True  # times of a CPU keep no promise of a GPU
    assert not any(measured for _, measured, *_ in promises(check.result))


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
    file = tmp_path / "rows.json"
    assert gpu_parts.main(["drive", str(file), "--rehearse", "--seconds=0"]) == 0
    assert not file.exists()
    assert gpu_parts.main(["drive", str(file), "--rehearse"]) == 0
    rows = json.loads(file.read_text())
    assert {row["optimizer"] for row in rows} == set(gpu_parts.optimizers.names())
    assert {row["dtype"] for row in rows} == {"torch.float32", "torch.bfloat16"}


def test_the_pipelines_tables_have_a_gpus_columns(tmp_path, capsys):
    check = Check(tmp_path, rehearse=True, minutes=1)
    (row,) = gpu_parts.chains("cpu", rehearse=True)
    seen = {"kernels": 3.0, "copies": 1.0, "device_us": 12.5, "host_us": 41.5}
    row["device"] = {"torch": seen, "fusedopt": seen, "floor": seen}
    check.part("pipeline", lambda limit: {"rows": [row]})
    check.result["rehearsal"] = False
    show(check.result)
    output = capsys.readouterr().out
    assert "one of them on the device" in output
    assert output.count("41.5") == 3


def test_the_pages_figures_are_a_runs():
    result = json.loads(documents.newest_check().read_text())
    text = (ROOT / "docs/gpu-status.md").read_text()
    assert gpu_report.put(text, result) == text
    assert gpu_report.machine(result) in text


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
    parts = written(tmp_path)["parts"]
    passed = {name for name, part in parts.items() if part["status"] == "passed"}
    compiled = ["build"] if shutil.which("nvcc") else []
    assert passed == {"tests", "figures", "pipeline", "bits", *compiled}
    assert parts["tests"]["counts"]["tests"] > parts["tests"]["counts"]["skipped"] > 0
    assert all(row["compared"] > 1e6 and row["differing"] == 0 for row in parts["bits"]["rows"])
    assert {row["workload"] for row in parts["figures"]["rows"]} == {"groups", "one"}
    assert {row["workload"] for row in parts["pipeline"]["rows"]} == {"one"}
    assert all(part["reason"] for part in parts.values() if part["status"] == "not run")
