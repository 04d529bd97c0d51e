"""Command line of the benchmark: ``python -m fusedopt.bench [JOB] [options]``.

Without a job, training and the bare step run; that is the project's main job, ``make bench``. Every
argument is checked before any work starts. Exit codes: 0, all is well; 1, fusedopt did not train as
torch.optim does, or is slower than ``--fail-below`` allows; 2, an argument is wrong; 130,
interrupted (what was measured is printed).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import jobs, load, optimizers, pipeline, rows, step, timing, train, workloads
from .providers import PROVIDERS
from .rows import BEST

NEEDS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}
EXIT_INTERRUPTED = 130


def positive(text: str) -> int:
    """A whole number above 0; argparse says "invalid positive value" of any other."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def names(known: Iterable[str], default: Any = None, **more: Any) -> dict[str, Any]:
    """An option of names out of those known, without regard to case."""
    known = [*known]
    of = {name.lower(): name for name in known}
    return {"type": lambda text: of.get(text.lower(), text), "choices": known, "default": default,
            "metavar": "NAME", "help": f"of {', '.join(known)}", **more}  # fmt: skip


MANY: dict[str, Any] = {"nargs": "+"}
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}


def make_options() -> dict[str, dict[str, Any]]:
    """Every option once; one after an @ is another job's of the same name."""
    return {
        "--optimizers": names(optimizers.names(), optimizers.names(), **MANY),
        "--threads": {"type": positive, "help": f"default: {jobs.TRAIN_THREADS} to train, as the "
                      f"networks are small; {torch.get_num_threads()}, torch's choice, to time"},
        "--json": {**FILE, "help": "write everything measured, a line a row"},
        "--out": {"type": Path, "default": Path("build/bench"), "help": "where pictures go"},
        "--models": names(train.MODELS, [*train.MODELS], **MANY),
        "--epochs": {"type": positive, "help": "passes over the training images (%(default)s)"},
        "--seed": {"type": int, "default": 0, "help": "of first weights and the order of batches"},
        "--workloads": names(workloads.choices(), **MANY),
        "--model": {"type": workloads.of_model, "metavar": "MODULE:FACTORY",
                    "help": "a workload of your own: the parameters of the model this makes"},
        "--scale": {"type": float, "default": 1.0, "metavar": "X",
                    "help": "times the depth of networks, such as 0.1 of a large one"},
        "--device": {"choices": ["cpu"] + ["cuda"] * torch.cuda.is_available(), "default": "cpu",
                     "help": "where the tensors are"},
        "--rounds": {"type": positive, "help": "of a race (%(default)s)"},
        "--seconds": {"type": float, "metavar": "S", "help": "who would take longer than this over "
                      f"all rounds sits some out, not below {timing.MIN_ROUNDS} (%(default)s)"},
        "--providers": names(["all", *PROVIDERS], **MANY),
        "--baseline": names([BEST, *PROVIDERS], BEST),
        "--memory": {"choices": ("one", "all", "none"), "default": "one",
                     "help": "whose peak memory is measured: one optimizer's, all, or none"},
        "--skip-parity": {"action": "store_true", "help": "do not check arithmetic first"},
        "--fail-below": {"type": float, "metavar": "X", "help": "exit with 1 if fusedopt is less "
                         "than X times as fast as the baseline, or with --against as it was"},
        "--dtype": names(step.DTYPES, **MANY),
        "--chains": names(pipeline.CHAINS, [*pipeline.CHAINS], **MANY),
        "--providers@load": names(load.FEEDS, [*load.FEEDS], **MANY),
        "--workloads@load": names(load.WORKLOADS, load.STANDARD, **MANY),
        "classes": {"nargs": "*", "type": lambda text: (text, workloads.named_object(text)),
                    "metavar": "MODULE:CLASS",
                    "help": "made as torch's are; without them, the providers that are installed"},
        "--as": names(optimizers.names(), dest="reference", help="what the classes are to be"),
        "files": {**FILE, "nargs": "*", "help": "of step --json, or of a GPU check"},
        "--against": {**FILE, "help": "an older result to compare with"},
        "--update-docs": {"action": "store_true", "help": "keep the files in bench/results, and "
                          "write the tables of README.md and docs/ anew"},
    }  # fmt: skip


COMMON, DIGITS = "--optimizers --threads --json", "--models --epochs --seed --out"
RACE = "--workloads --model --scale --device --rounds --seconds"
BARE = f"{RACE} --providers --baseline --memory --skip-parity --fail-below --dtype"
# By job: what runs it, what it needs, its options and their defaults, and what it does.
JOBS: dict[str, tuple[Callable[..., int], str, str, dict[str, Any], str]] = {
    "all": (jobs.run_all, "rich sklearn matplotlib", f"{COMMON} {DIGITS} {BARE}",
            {"epochs": 15, "rounds": 7, "seconds": 1.0},
            "Trains and times the step; what `make bench` does."),
    "train": (jobs.run_train, "rich sklearn matplotlib", f"{COMMON} {DIGITS}", {"epochs": 30},
              "Trains on digits through torch.optim and fusedopt, compares the two."),
    "step": (jobs.run_step, "rich", f"{COMMON} {BARE}", {"rounds": 15, "seconds": 2.5},
             "Times the bare step against torch's, other libraries' and a floor."),
    "pipeline": (jobs.run_pipeline, "rich matplotlib", f"{COMMON} {RACE} --chains --out",
                 {"rounds": 15, "seconds": 2.5, "optimizers": ["AdamW"]},
                 "Times what a loop does around the step (unscale, clip, average, zero), torch's "
                 "way and in one call."),
    "load": (jobs.run_load, "rich",
             "--workloads@load --providers@load --device --rounds --seconds --json",
             {"rounds": 9, "seconds": 5.0},
             "Times what feeds a loop: DataLoader, torchdata, TensorLoader, memcpy."),
    "parity": (jobs.run_parity, "rich",
               "classes --as --optimizers --providers --dtype --device --json",
               {"dtype": ["float32"]},
               "Compares steps with torch.optim's in float64, in ulps of the update."),
    "report": (jobs.run_report, "rich matplotlib jinja2",
               "files --against --fail-below --update-docs --out", {},
               "Turns result files into a page, pictures and tables; compares two."),
    "list": (jobs.run_list, "rich", "--device", {},
             "Lists workloads and providers, and why one cannot run."),
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The jobs and their options."""
    parser = argparse.ArgumentParser(prog="python -m fusedopt.bench", description=__doc__)
    known = make_options()
    commands = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name, (_, _, options, defaults, text) in JOBS.items():
        made = commands.add_parser(name, help=text, description=text)
        for option in options.split():
            made.add_argument(option.partition("@")[0], **known[option])
        without = {"json": None, "out": None, "model": None, "device": "cpu"}
        made.set_defaults(**{**without, **vars(made.parse_args([])), **defaults, "parser": made})
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    # Libraries compile themselves with the environment's ninja, which need not be on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["all", *arguments]
    options = make_parser().parse_args(arguments)
    run_job, needs, *_ = JOBS[options.job]
    missing = [NEEDS[name] for name in needs.split() if importlib.util.find_spec(name) is None]
    if missing:  # they are no dependencies of fusedopt itself
        wanted = " ".join(missing)
        options.parser.error(f"missing: {wanted}; run: python -m pip install {wanted}")
    try:
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()
    except OSError as error:
        options.parser.error(f"cannot write to {error.filename} ({error.strerror})")
    from .console import Run  # needs rich

    run = Run(options.device)
    try:
        code = run_job(options.parser, options, run)
    except KeyboardInterrupt:
        run.say("Interrupted.")
        code = EXIT_INTERRUPTED
    if options.json:
        rows.write(options.json, run.rows)
        run.say(f"Everything measured: {options.json}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
