"""Command line of the benchmark: ``python -m fusedopt.bench [JOB] [options]``.

Without a job, training and the bare step run; that is the project's main job, ``make bench``. Every
argument is checked before any work starts. Exit codes: 0, all is well; 1, fusedopt did not train as
torch.optim does, or is slower than ``--fail-below`` allows; 2, an argument is wrong; 130,
interrupted (what was measured is printed).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import jobs, load, optimizers, pipeline, providers, rows, step, timing, train, workloads
from .providers import PROVIDERS
from .rows import BEST

NEEDS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}
EXIT_INTERRUPTED = 130


# ---- options ----


def positive(text: str) -> int:
    """A whole number above 0; argparse says "invalid positive value" of any other."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def fraction(text: str) -> float:
    """A number above 0, at most 1."""
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


def folder(text: str) -> Path:
    """A folder, made if it is not there."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot write to {text!r} ({error.strerror}); wanted: a folder"
        ) from None
    return Path(text)


def file(text: str) -> Path:
    """A file that can be written."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; wanted: the name of a file")
    return folder(str(Path(text).parent)) / Path(text).name


def optimizer_class(text: str) -> tuple[str, Any]:
    """An import path, and the class."""
    try:
        with providers.quiet():
            return text, providers.imported(text)
    except Exception as error:  # somebody else's code: it may raise anything
        raise argparse.ArgumentTypeError(
            f"cannot import {text!r} ({type(error).__name__}: {error}); wanted: module:Class"
        ) from None


def make_parser() -> argparse.ArgumentParser:
    """The jobs and their options."""
    parser = argparse.ArgumentParser(prog="python -m fusedopt.bench", description=__doc__)
    commands = parser.add_subparsers(dest="job", metavar="JOB", required=True)

    def job(name: str, needs: str, run: Callable[..., int], text: str) -> Callable[..., Any]:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=partial(run, made), needs=needs.split(), json=None, threads=None)
        return made.add_argument

    def names(add: Callable[..., Any], flag: str, known: Sequence[str], default: Any) -> None:
        # argparse tells what else there would have been.
        shown = "see `list`" if default is None else ", ".join(default)
        add(flag, nargs="+", choices=[*known], default=default, metavar="NAME",
            help=f"of {', '.join(known)} (default: {shown})")  # fmt: skip

    def common(add: Callable[..., Any], default: Sequence[str]) -> None:
        names(add, "--optimizers", optimizers.names(), default)
        add("--threads", type=positive, help=f"default: {jobs.TRAIN_THREADS} to train, as the "
            f"networks are small; {torch.get_num_threads()}, torch's choice, to time")  # fmt: skip
        add("--json", type=file, metavar="FILE", help="write everything measured, a line a row")

    def out(add: Callable[..., Any]) -> None:
        add("--out", type=folder, default="build/bench", help="where pictures go (build/bench)")

    def digits(add: Callable[..., Any], epochs: int) -> None:
        names(add, "--models", [*train.MODELS], [*train.MODELS])
        add("--epochs", type=positive, default=epochs, help="passes over the training images")
        add("--seed", type=int, default=0, help="of initial weights and the order of batches")
        out(add)

    def race(add: Callable[..., Any], rounds: int, seconds: float) -> None:
        names(add, "--workloads", workloads.choices(), None)
        add("--model", type=workloads.of_model, metavar="MODULE:FACTORY",
            help="a workload of your own: the parameters of the model this makes")  # fmt: skip
        add("--scale", type=fraction, default=1.0, metavar="X",
            help="shrink the depth of networks to this part")  # fmt: skip
        add("--device", choices=rows.devices(), default="cpu", help="where the tensors are")
        add("--rounds", type=positive, default=rounds, help=f"of a race (default: {rounds})")
        add("--seconds", type=float, default=seconds, metavar="S",
            help="who would take longer than this over all rounds of a race sits some out, but not "
            f"below {timing.MIN_ROUNDS} (default: {seconds})")  # fmt: skip

    def bare(add: Callable[..., Any], rounds: int, seconds: float) -> None:
        race(add, rounds, seconds)
        names(add, "--providers", ["all", *PROVIDERS], None)
        add("--baseline", choices=[BEST, *PROVIDERS], default=BEST, metavar="NAME",
            help=f"whom speed is compared with; {BEST}: the fastest of torch's")  # fmt: skip
        add("--memory", choices=("one", "all", "none"), default="one",
            help="whose peak memory is measured: one optimizer's, all, or none")  # fmt: skip
        add("--skip-parity", action="store_true", help="do not check arithmetic first")
        add("--csv", type=file, metavar="FILE", help="write the rows as a table")
        add("--fail-below", type=float, metavar="X", help="exit with 1 if fusedopt is less than X "
            "times as fast as the baseline")  # fmt: skip
        names(add, "--dtype", [*step.DTYPES], None)

    every = optimizers.names()
    add = job(
        "all", " ".join(NEEDS), jobs.run_all, "Trains and times the step; what `make bench` does."
    )
    common(add, every)
    digits(add, 15)
    bare(add, 7, 1.0)
    add = job("train", "rich sklearn matplotlib", jobs.run_train,
              "Trains on digits through torch.optim and fusedopt, compares the two.")  # fmt: skip
    common(add, every)
    digits(add, 30)
    add = job("step", "rich", jobs.run_step,
              "Times the bare step against torch's, other libraries' and a floor.")  # fmt: skip
    common(add, every)
    bare(add, 15, 2.5)
    add = job("pipeline", "rich matplotlib", jobs.run_pipeline, "Times what a loop does around "
              "the step (unscale, clip, average, zero), torch's way and in one call.")  # fmt: skip
    common(add, ["AdamW"])
    race(add, 15, 2.5)
    names(add, "--chains", [*pipeline.CHAINS], [*pipeline.CHAINS])
    out(add)
    add = job("load", "rich", jobs.run_load,
              "Times what feeds a loop: DataLoader, torchdata, TensorLoader, memcpy.")  # fmt: skip
    names(add, "--workloads", [*load.WORKLOADS], ["mnist", "images", "table"])
    names(add, "--providers", [*load.FEEDS], [*load.FEEDS])
    add("--device", choices=rows.devices(), default="cpu", help="where batches go")
    add("--rounds", type=positive, default=9, help="how often a feed goes through an epoch")
    add("--seconds", type=float, default=5.0, help="who would take longer sits rounds out")
    add("--json", type=file, metavar="FILE", help="write everything measured, a line a row")
    add = job("parity", "rich", jobs.run_parity,
              "Compares steps with torch.optim's in float64, in ulps of the update.")  # fmt: skip
    add("classes", nargs="*", type=optimizer_class, metavar="MODULE:CLASS",
        help="made as torch's are; without them, the providers that are installed")  # fmt: skip
    add("--as", dest="reference", choices=every, help="which of torch's the classes are to be")
    names(add, "--optimizers", every, every)
    names(add, "--providers", ["all", *PROVIDERS], None)
    names(add, "--dtype", [*step.DTYPES], ["float32"])
    add("--device", choices=rows.devices(), default="cpu")
    add("--json", type=file, metavar="FILE", help="write the rows to this file")
    add = job("report", "rich matplotlib jinja2", jobs.run_report,
              "Turns result files into a page, pictures and tables; compares two.")  # fmt: skip
    add("files", nargs="*", type=Path, metavar="FILE", help="of step --json, or of a GPU check")
    add("--against", type=Path, metavar="FILE", help="an older result to compare with")
    add("--fail-below", type=float, metavar="X", help="exit with 1 if fusedopt is less than X "
        "times as fast as it was, or without --against as the baseline")  # fmt: skip
    add("--csv", type=file, metavar="FILE", help="write all rows as a table")
    add("--update-docs", action="store_true", help="keep the files in bench/results, and write the "
        "tables of README.md and docs/ anew")  # fmt: skip
    out(add)
    add = job(
        "list", "rich", jobs.run_list, "Lists workloads and providers, and why one cannot run."
    )
    add("--device", choices=rows.devices(), default="cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["all", *arguments]
    parser = make_parser()
    options = parser.parse_args(arguments)
    missing = [NEEDS[name] for name in options.needs if importlib.util.find_spec(name) is None]
    if missing:  # they are no dependencies of fusedopt itself
        wanted = " ".join(missing)
        parser.error(f"missing: {', '.join(missing)}; run: python -m pip install {wanted}")
    from .console import Run  # needs rich

    run = Run(getattr(options, "device", "cpu"), options.threads)
    try:
        code = options.run(options, run)
    except KeyboardInterrupt:
        run.say("Interrupted.")
        code = EXIT_INTERRUPTED
    if options.json:
        rows.write(options.json, run.rows)
        run.say(f"Everything measured: {options.json}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
