"""Everything a machine with a GPU is asked, in one command under ten minutes.

::

    python bench/gpu_check.py DIR

builds the extension for this GPU's architecture, runs the tests that need a GPU, times the step
beside torch's own and beside a kernel of the same traffic, alone and with the passes that torch
needs around it, compares every rule with the CPU backend bit by bit, and runs compute-sanitizer. It
needs torch, nvcc and what the tests need (pytest, numpy, rich), and fetches nothing; with
pytest-xdist the tests run in several processes. DIR/gpu_check.jsonl, a row a line as all results,
is written after every part, and DIR/<part>.log has all that its commands printed; a part that fails
or cannot run is named and does not stop the others. The tables come last.

``--parts tests bits`` runs some of the parts, on what is built already unless ``build`` is among
them. ``--rehearse`` does without a GPU what can be done without one: it compiles the CUDA part,
and runs the other parts briefly on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
FILE = "gpu_check.jsonl"
Part = dict[str, Any]
# Tests that have a GPU's half.
SUITES = ("device", "cuda", "step_options", "accumulation", "in_backward", "in_backward_hooks",
          "in_backward_windows", "pin_batch", "prefetcher", "tensor_loader")  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "initcheck")
MOST_PROCESSES = 12  # of tests: each has a CUDA context of half a gigabyte on the device
GRACE = 10  # seconds for an interrupted command to tell what it found
# Seconds a part may take; all of them together are held to --minutes.
LIMITS = {"build": 300, "tests": 220, "figures": 200, "pipeline": 90, "graphs": 60, "bits": 100,
          "load": 60, "sanitizer": 90, "large": 60}  # fmt: skip


class NotRunError(Exception):
    """A part cannot run here; says why."""


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: what it returned.
        output: what it printed.
    """

    code: int
    output: str

    @property
    def failed(self) -> bool:
        """Whether it returned something else than 0."""
        return self.code != 0

    def tail(self, lines: int = 30) -> str:
        """The end of what it printed."""
        return "\n".join(self.output.splitlines()[-lines:])


def run(command: list[str], limit: float, log: Path, **environment: str) -> Done:
    """Runs a command in the checkout and adds what it prints to `log`.

    One that takes too long is interrupted, as by Ctrl-C, so that pytest still tells what it found,
    and raises `NotRunError`.
    """
    with log.open("a+") as file:
        begin = file.tell()
        environment = {**os.environ, **environment}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            process.wait()
            raise NotRunError(f"cut off after {limit:.0f} s") from None
        file.seek(begin)
        return Done(process.returncode, file.read())


class Check:
    """One run: the rows it found so far, and where they are written."""

    def __init__(self, out: Path, rehearse: bool, minutes: float, revision: str | None) -> None:
        self.out = out
        self.rehearse = rehearse
        self.end = time.monotonic() + 60 * minutes
        told = machine()
        self.revision = told["revision"] = revision or told["revision"]
        self.rows: list[Part] = [{"job": "machine", "rehearsal": rehearse, **told}]
        self.log = out / "check.log"

    def part(self, name: str, function: Callable[[float], Part]) -> Part:
        """Runs a part within its limit and what is left of the whole; keeps what it found."""
        limit = min(LIMITS[name.partition(":")[0]], self.end - time.monotonic())
        start = time.monotonic()
        self.log = self.out / f"{re.sub('[^a-z0-9]+', '-', name)}.log"
        self.log.unlink(missing_ok=True)
        print(f"{name} ...", flush=True)
        found: Part = {"job": "part", "part": name, "status": "passed"}
        try:
            if limit < 5:
                raise NotRunError("no time left")
            found |= function(limit)
        except NotRunError as reason:
            found |= {"status": "not run", "reason": str(reason)}
        except Exception as error:  # a failing part must not take the others with it
            found |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        found["seconds"] = round(time.monotonic() - start, 1)
        rows = [{**row, "revision": self.revision} for row in found.pop("rows", [])]
        if self.rehearse:
            rows = [{**row, "rehearsal": True} for row in rows]
        self.rows += [found, *rows]
        lines = [json.dumps(row, separators=(",", ":")) for row in self.rows]
        (self.out / FILE).write_text("".join(f"{line}\n" for line in lines))
        said = f": {found['reason'].strip().splitlines()[-1]}" if found.get("reason") else ""
        print(f"  {found['status']} in {found['seconds']:.0f} s{said}", flush=True)
        return found

    # -- the parts --

    def build(self, limit: float) -> Part:
        """Compiles for this GPU alone; in a rehearsal, for an H100 and into a folder beside."""
        command = [sys.executable, "setup.py", "build_ext"]
        if self.rehearse:
            if shutil.which("nvcc") is None:
                raise NotRunError("there is no nvcc")
            architecture = "9.0"
            command += ["--build-lib", str(self.out / "built")]
        else:
            architecture = ".".join(map(str, torch.cuda.get_device_capability()))
            command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
            command += ["-q", "-e", "."]
        start = time.monotonic()
        done = run(
            command, limit, self.log, FUSEDOPT_CUDA="1", TORCH_CUDA_ARCH_LIST=architecture
        )  # fmt: skip
        return {
            "architecture": architecture,
            "build_seconds": round(time.monotonic() - start, 1),
            **({"status": "failed", "reason": done.tail()} if done.failed else {}),
        }

    def tests(self, limit: float, *arguments: str) -> Part:
        """The tests that have a GPU's half, counted."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
            if find_spec("xdist") is not None:  # most of the time goes to Triton's compiler
                command += ["-n", str(min(os.cpu_count() or 1, MOST_PROCESSES))]
            done = run(command, limit, self.log)
            text = report.read_text() if report.exists() else ""
        counts = {
            key: int(found.group(1)) if (found := re.search(rf'\b{key}="(\d+)"', text)) else None
            for key in ("tests", "failures", "errors", "skipped")
        }
        if done.code == 5:  # pytest collected none
            raise NotRunError("none of them is for this machine")
        if not done.failed and counts["tests"] == counts["skipped"]:
            raise NotRunError("all of them were skipped")
        failure = {"status": "failed", "reason": done.tail()} if done.failed else {}
        return {"counts": counts, **failure}

    def module(self, part: str, limit: float) -> Part:
        """A part of gpu_parts; what it found before it failed or was cut off is kept."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.json")
            command = [sys.executable, "-m", "fusedopt.bench.gpu_parts", part, str(file)]
            reason = ""
            try:
                done = run(command + ["--rehearse"] * self.rehearse, limit, self.log)
                reason = done.tail() if done.failed else ""
            except NotRunError as cut:
                reason = str(cut)
            rows = rows_in(file)
        return {"rows": rows, **({"status": "failed", "reason": reason} if reason else {})}

    def graphs(self, limit: float) -> Part:
        """Replays, where there is a device to capture on."""
        if self.rehearse:
            raise NotRunError("needs a GPU")
        return self.module("graphs", limit)

    def load(self, limit: float) -> Part:
        """The way of batches to the device."""
        if self.rehearse:
            raise NotRunError("needs a GPU")
        return self.module("load", limit)

    def bits(self, limit: float) -> Part:
        """Fails if a single element differs."""
        found = self.module("bits", limit)
        if any(row["differing"] for row in found["rows"]):
            found["status"], found["reason"] = "failed", "elements differ from the CPU's"
        return found

    def sanitizer(self, tool: str, limit: float) -> Part:
        """compute-sanitizer on a short run; one that cannot attach is not a failure.

        The run ends by itself in half of the time: the other half is for starting, and for what is
        under way then.
        """
        if shutil.which("compute-sanitizer") is None:
            raise NotRunError("there is no compute-sanitizer")
        if self.rehearse:
            raise NotRunError("needs a GPU")
        command = ["compute-sanitizer", "--tool", tool, "--show-backtrace", "device"]
        if tool != "initcheck":  # which has to see others' kernels write what ours read
            command += ["--kernel-name", "kns=fusedopt"]
        command += [sys.executable, "-m", "fusedopt.bench.gpu_parts", "drive"]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.json")
            done = run([*command, str(file), f"--seconds={limit / 2:.0f}"], limit, self.log,
                       PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # fmt: skip
            rows = rows_in(file)
        found = sanitized(done.output)
        if found is None:
            raise NotRunError(f"it could not attach: {done.tail(3)}")
        failed = found["in_our_kernels"] > 0 or done.failed or not rows
        return {
            **found,
            "counts": Counter(f"{row['backend']} rules" for row in rows),
            **({"status": "failed"} if failed else {}),
            **({"reason": done.tail()} if failed or found["errors"] else {}),
        }


def rows_in(file: Path) -> list[Part]:
    """The rows of a file that may not be there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def sanitized(output: str) -> Part | None:
    """What compute-sanitizer found; None where it could not attach.

    A kernel of ours is `fusedopt::...` in CUDA, `fusedopt_...` in Triton.
    """
    summary = r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard"
    errors = re.search(summary, output)
    if errors is None or "not supported" in output:
        return None
    ours = re.findall(r"^=+ .*\bfusedopt(?:::|_).*$", output, re.MULTILINE)
    return {"errors": int(errors.group(1) or errors.group(2)), "in_our_kernels": len(ours)}


def machine() -> dict[str, Any]:
    """Device, driver, versions and revision."""
    told: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "revision": first_line("git", "describe", "--always", "--dirty", "--exclude", "*"),
        "nvcc": first_line("nvcc", "--version", pattern=r"release ([\d.]+)"),
        "triton": None,
        "machine": None,
    }
    try:
        import triton

        told["triton"] = triton.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        told |= {
            "machine": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": first_line(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
        }
    return told


def first_line(*command: str, pattern: str = "(.*)") -> str | None:
    """What a pattern finds in a command's output; None without the command."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, done.stdout)
    return found.group(1).strip() if found else None


def show(rows: Sequence[Part]) -> None:
    """Prints the tables; without a built package, that of the parts alone."""
    console = Console(width=150)
    with contextlib.suppress(ImportError):
        from fusedopt.bench import report, tables
        from fusedopt.bench.rows import grouped, steps

        def of(job: str) -> list[Part]:
            return [row for row in rows if row["job"] == job and "missing" not in row]

        made = [tables.step_table(found) for found in grouped(of("step"), "workload").values()]
        made += [tables.pipeline_table(found)
                 for found in grouped(of("pipeline"), "workload").values()]  # fmt: skip
        if steps(rows):
            words = ["workload", "optimizer", "dtype", "provider"]
            made.append(tables.device_table(of("step"), words))
            made.append(tables.device_table(of("pipeline"), ["workload", "chain", "provider"]))
        if of("transfer"):
            made.append(tables.transfer_table(of("transfer")))
        for table in [*made, report.goals(rows)]:
            console.print(table.to_rich())
    table = Table("part", "status", "seconds", "what", title=rows[0]["machine"] or "a rehearsal")
    for part in [row for row in rows if row["job"] == "part"]:
        counts = part.get("counts", {})
        said = part.get("reason") or ", ".join(f"{count} {key}" for key, count in counts.items())
        last = (said.strip().splitlines() or [""])[-1]
        table.add_row(part["part"], part["status"], f"{part['seconds']:.0f}", last[:70])
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts asked for; 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help=f"folder that {FILE} and the logs go to")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, what can be done")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts (default: 9.5)")
    parser.add_argument("--parts", nargs="+", choices=[*LIMITS], default=[*LIMITS], metavar="PART",
                        help=f"some of {', '.join(LIMITS)} (default: all)")  # fmt: skip
    parser.add_argument("--revision", help="of the sources, where there is no git to ask")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "torch sees no CUDA device; --rehearse does what can be done without", file=sys.stderr
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.out.resolve(), options.rehearse, options.minutes, options.revision)
    print(json.dumps(check.rows[0], indent=1), flush=True)
    wanted = options.parts
    if "build" in wanted:
        built = check.part("build", check.build)
        if built["status"] != "passed" and not options.rehearse:
            wanted = []
    # What runs on the host, other machines run.
    on_a_gpu = "(cuda or triton or on_a_gpu) and not rehearsal and not interpreted"
    suites = [f"tests/test_{name}.py" for name in SUITES]
    chosen = ["-k", "one_launch or replays" if options.rehearse else on_a_gpu, "-m", "not slow"]
    parts: dict[str, Callable[[float], Part]] = {
        "tests": lambda limit: check.tests(limit, *suites, *chosen),
        "bits": check.bits,
        "figures": lambda limit: check.module("figures", limit),
        "pipeline": lambda limit: check.module("pipeline", limit),
        "graphs": check.graphs,
        "load": check.load,
        "large": lambda limit: check.tests(limit, "tests/test_cuda.py", "-m", "slow"),
        **{
            f"sanitizer: {tool}": lambda limit, tool=tool: check.sanitizer(tool, limit)
            for tool in SANITIZERS
        },
    }
    for name, part in parts.items():
        if name.partition(":")[0] in wanted:
            check.part(name, part)
    show(check.rows)
    return int(any(row.get("status") == "failed" for row in check.rows))


if __name__ == "__main__":
    sys.exit(main())
