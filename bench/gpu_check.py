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
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch.utils import collect_env

ROOT = Path(__file__).resolve().parent.parent
FILE = "gpu_check.jsonl"
Row = dict[str, Any]
# Tests that have a GPU's half.
SUITES = ("device", "cuda", "step_options", "accumulation", "in_backward", "in_backward_hooks",
          "in_backward_windows", "pin_batch", "prefetcher", "tensor_loader")  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "initcheck")
MOST_PROCESSES = 12  # of tests: each has a CUDA context of half a gigabyte on the device
GRACE = 10  # seconds for an interrupted command to tell what it found
# Seconds a part may take; all of them together are held to --minutes.
LIMITS = {"build": 300, "tests": 220, "figures": 200, "pipeline": 90, "graphs": 60, "bits": 100,
          "load": 60, "sanitizer": 90, "large": 60}  # fmt: skip
NEEDS_A_GPU = ("graphs", "load", "sanitizer")


class NotRunError(Exception):
    """A part cannot run here; says why."""


class FailedError(Exception):
    """A part went wrong; says how."""


class Check:
    """One run: the rows it found so far, and where they are written."""

    def __init__(self, out: Path, rehearse: bool, minutes: float, revision: str | None) -> None:
        self.out, self.rehearse = out, rehearse
        self.end = time.monotonic() + 60 * minutes
        told = machine()
        self.revision = told["revision"] = revision or told["revision"]
        self.rows: list[Row] = [{"job": "machine", "rehearsal": rehearse, **told}]
        self.found: list[Row] = []
        self.limit, self.log, self.output = 0.0, out / "check.log", ""

    def part(self, name: str, function: Callable[[], Row]) -> Row:
        """Runs a part within its limit and what is left of the whole; keeps what it found."""
        kind, start = name.partition(":")[0], time.monotonic()
        self.limit = min(LIMITS[kind], self.end - start)
        self.log = self.out / f"{re.sub('[^a-z0-9]+', '-', name)}.log"
        self.log.unlink(missing_ok=True)
        print(f"{name} ...", flush=True)
        told: Row = {"job": "part", "part": name, "status": "passed"}
        self.found = []
        try:
            if self.limit < 5:
                raise NotRunError("no time left")
            if self.rehearse and kind in NEEDS_A_GPU:
                raise NotRunError("needs a GPU")
            told |= function()
        except NotRunError as reason:
            told |= {"status": "not run", "reason": str(reason)}
        except Exception as error:  # a failing part must not take the others with it
            said = str(error) if isinstance(error, FailedError) else repr(error)
            told |= {"status": "failed", "reason": said}
        told["seconds"] = round(time.monotonic() - start, 1)
        more = {"revision": self.revision, **({"rehearsal": True} if self.rehearse else {})}
        self.rows += [told, *({**row, **more} for row in self.found)]
        lines = [json.dumps(row, separators=(",", ":")) for row in self.rows]
        (self.out / FILE).write_text("\n".join([*lines, ""]))
        said = f": {told['reason'].strip().splitlines()[-1]}" if told.get("reason") else ""
        print(f"  {told['status']} in {told['seconds']:.0f} s{said}", flush=True)
        return told

    def run(self, *command: str, **environment: str) -> int:
        """Runs a command in the checkout and adds what it prints to the log.

        One that takes too long is interrupted, as by Ctrl-C, so that pytest still tells what it
        found, and has not run.
        """
        limited = ["timeout", "--signal=INT", f"--kill-after={GRACE}", f"{self.limit:.0f}"]
        with self.log.open("a+") as file:
            begin = file.tell()
            code = subprocess.run(
                [*limited, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            ).returncode  # fmt: skip
            file.seek(begin)
            self.output = file.read()
        if code in (124, 137):
            raise NotRunError(f"cut off after {self.limit:.0f} s")
        return code

    def tail(self, lines: int = 30) -> str:
        """The end of what the last command printed."""
        return "\n".join(self.output.splitlines()[-lines:])

    def succeed(self, *command: str, **environment: str) -> None:
        """Runs a command that has to return 0."""
        if self.run(*command, **environment):
            raise FailedError(self.tail())

    # -- the parts --

    def build(self) -> Row:
        """Compiles for this GPU alone; in a rehearsal, for an H100 and into a folder beside."""
        command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q", "-e", "."]
        if self.rehearse:
            if shutil.which("nvcc") is None:
                raise NotRunError("there is no nvcc")
            command = ["setup.py", "build_ext", "--build-lib", str(self.out / "built")]
        capability = (9, 0) if self.rehearse else torch.cuda.get_device_capability()
        architecture = ".".join(map(str, capability))
        self.succeed(sys.executable, *command, FUSEDOPT_CUDA="1", TORCH_CUDA_ARCH_LIST=architecture)
        return {"architecture": architecture}

    def tests(self, *arguments: str) -> Row:
        """The tests that have a GPU's half, counted."""
        report = self.log.with_suffix(".xml")
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        if find_spec("xdist") is not None:  # most of the time goes to Triton's compiler
            command += ["-n", str(min(os.cpu_count() or 1, MOST_PROCESSES))]
        code = self.run(*command)
        if code == 5:  # pytest collected none
            raise NotRunError("none of them is for this machine")
        counts = {}
        if report.exists():
            told = ElementTree.parse(report).getroot()[0].attrib
            counts = {key: int(told[key]) for key in ("tests", "failures", "errors", "skipped")}
        if code == 0 and counts["tests"] == counts["skipped"]:
            raise NotRunError("all of them were skipped")
        return {"counts": counts, **({"status": "failed", "reason": self.tail()} if code else {})}

    def module(self, part: str, *before: str, **environment: str) -> Row:
        """A part of gpu_parts; what it found before it failed or was cut off is kept."""
        file = self.log.with_suffix(".rows")
        file.unlink(missing_ok=True)
        command = [*before, sys.executable, "-m", "fusedopt.bench.gpu_parts", part, str(file)]
        command += ["--rehearse"] * self.rehearse
        # What the sanitizer watches ends by itself in half of the time: the other half is for
        # starting, and for what is under way then.
        command += [f"--seconds={self.limit / 2:.0f}"] * (part == "drive")
        try:
            self.succeed(*command, **environment)
        except NotRunError as cut:
            raise FailedError(str(cut)) from None
        finally:
            if file.exists():
                self.found = [json.loads(line) for line in file.read_text().splitlines()]
        return {}

    def bits(self) -> Row:
        """Fails if a single element differs."""
        self.module("bits")
        if any(row["differing"] for row in self.found):
            raise FailedError("elements differ from the CPU's")
        return {}

    def sanitizer(self, tool: str) -> Row:
        """compute-sanitizer on a short run; one that cannot attach is not a failure."""
        if shutil.which("compute-sanitizer") is None:
            raise NotRunError("there is no compute-sanitizer")
        command = ["compute-sanitizer", "--tool", tool, "--show-backtrace", "device"]
        if tool != "initcheck":  # which has to see others' kernels write what ours read
            command += ["--kernel-name", "kns=fusedopt"]
        failed = ""
        try:
            self.module("drive", *command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        except FailedError as error:
            failed = str(error)
        rows, self.found = self.found, []
        told = sanitized(self.output)
        if told is None:
            raise NotRunError(f"it could not attach: {self.tail(3)}")
        if told["in_our_kernels"] or failed or not rows:
            told |= {"status": "failed", "reason": self.tail()}
        elif told["errors"]:
            told["reason"] = self.tail()
        return {**told, "counts": Counter(f"{row['backend']} rules" for row in rows)}


def sanitized(output: str) -> Row | None:
    """What compute-sanitizer found; None where it could not attach.

    A kernel of ours is `fusedopt::...` in CUDA, `fusedopt_...` in Triton.
    """
    summary = r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard"
    errors = re.search(summary, output)
    if errors is None or "not supported" in output:
        return None
    ours = re.findall(r"^=+ .*\bfusedopt(?:::|_).*$", output, re.MULTILINE)
    return {"errors": int(errors.group(1) or errors.group(2)), "in_our_kernels": len(ours)}


def machine() -> Row:
    """Device, driver, versions and revision."""

    def first_line(command: str, pattern: str = "(.*)") -> str | None:
        return collect_env.run_and_parse_first_match(collect_env.run, command, pattern)

    triton = find_spec("triton") and __import__("triton").__version__
    told: Row = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
        "revision": first_line(f"git -C {ROOT} describe --always --dirty --exclude '*'"),
        "nvcc": first_line("nvcc --version", r"release ([\d.]+)"), "triton": triton,
        "machine": None,
    }  # fmt: skip
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        told |= {
            "machine": gpu.name, "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count, "memory_bytes": gpu.total_memory,
            "driver": first_line("nvidia-smi --query-gpu=driver_version --format=csv,noheader"),
        }  # fmt: skip
    return told


def show(rows: Sequence[Row]) -> None:
    """Prints the tables, as far as the package was built."""
    with contextlib.suppress(ImportError):
        from fusedopt.bench import gpu_tables, job_tables
        from fusedopt.bench.console import Run

        Run().show([*job_tables.of(rows), gpu_tables.goals(rows)])


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
    # What runs on the host, other machines run.
    on_a_gpu = "(cuda or triton or on_a_gpu) and not rehearsal and not interpreted"
    suites = [f"tests/test_{name}.py" for name in SUITES]
    chosen = ["-k", "one_launch or replays" if options.rehearse else on_a_gpu, "-m", "not slow"]
    parts: dict[str, Callable[[], Row]] = {
        "build": check.build,
        "tests": lambda: check.tests(*suites, *chosen),
        "bits": check.bits,
        **{name: lambda name=name: check.module(name)
           for name in ("figures", "pipeline", "graphs", "load")},
        "large": lambda: check.tests("tests/test_cuda.py", "-m", "slow"),
        **{f"sanitizer: {tool}": lambda tool=tool: check.sanitizer(tool) for tool in SANITIZERS},
    }  # fmt: skip
    for name, part in parts.items():
        if name.partition(":")[0] in options.parts:
            told = check.part(name, part)
            if name == "build" and told["status"] != "passed" and not options.rehearse:
                break
    show(check.rows)
    return int(any(row.get("status") == "failed" for row in check.rows))


if __name__ == "__main__":
    sys.exit(main())
