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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fusedopt.backends import backend_for

from . import load, optimizers, parity, pipeline, providers, rows, step, timing, train, workloads
from .providers import PROVIDERS
from .rows import BEST, CANDIDATE, FLOOR

Task = TypeVar("Task", step.Task, pipeline.Task)
Options = argparse.Namespace

NEEDS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}
STANDARD = [name for name, workload in workloads.WORKLOADS.items() if workload.standard]
# The networks are below the size from which torch splits most of its loops, and a second thread
# that has to be waited for makes training on a busy machine many times slower.
TRAIN_THREADS = 1
EXIT_BOUND, EXIT_INTERRUPTED = 1, 130
LEGEND = (
    "arithmetic: of torch.optim in float64, within rounding; GB/s: of the bytes that have to be "
    "moved; % of floor: 100 is memory speed, the time of moving the same bytes without maths; "
    "times faster: than {}; memory: peak above parameters and gradients, in a fresh process. "
    "Ratios are medians over rounds, p20 and p80 their spread."
)


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


def checked(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same parser, its ValueError's words given to the user."""

    def parse(text: str) -> Any:
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def optimizer_class(text: str) -> tuple[str, Any]:
    """An import path, and the class."""
    try:
        with providers.quiet():
            return text, providers.imported(text)
    except Exception as error:  # somebody else's code: it may raise anything
        raise ValueError(
            f"cannot import {text!r} ({type(error).__name__}: {error}); wanted: module:Class"
        ) from None


def make_parser() -> argparse.ArgumentParser:
    """The jobs and their options."""
    parser = argparse.ArgumentParser(prog="python -m fusedopt.bench", description=__doc__)
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)

    def job(name: str, needs: str, run: Callable[..., int], text: str) -> Callable[..., Any]:
        made = jobs.add_parser(name, help=text, description=text)
        made.set_defaults(run=partial(run, made), needs=needs.split(), json=None, threads=None)
        return made.add_argument

    def names(add: Callable[..., Any], flag: str, known: Sequence[str], default: Any) -> None:
        # argparse tells what else there would have been.
        shown = "see `list`" if default is None else ", ".join(default)
        add(flag, nargs="+", choices=[*known], default=default, metavar="NAME",
            help=f"of {', '.join(known)} (default: {shown})")  # fmt: skip

    def common(add: Callable[..., Any], default: Sequence[str]) -> None:
        names(add, "--optimizers", optimizers.names(), default)
        add("--threads", type=positive, help=f"default: {TRAIN_THREADS} to train, as the networks "
            f"are small; torch's choice, {torch.get_num_threads()} here, to time")  # fmt: skip
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
        add("--model", type=checked(workloads.of_model), metavar="MODULE:FACTORY",
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
    add = job("all", " ".join(NEEDS), run_all, "Trains and times the step; what `make bench` does.")
    common(add, every)
    digits(add, 20)
    bare(add, 9, 1.2)
    add = job("train", "rich sklearn matplotlib", run_train,
              "Trains on digits through torch.optim and fusedopt, compares the two.")  # fmt: skip
    common(add, every)
    digits(add, 30)
    add = job("step", "rich", run_step,
              "Times the bare step against torch's, other libraries' and a floor.")  # fmt: skip
    common(add, every)
    bare(add, 15, 2.5)
    add = job("pipeline", "rich matplotlib", run_pipeline, "Times what a loop does around "
              "the step (unscale, clip, average, zero), torch's way and in one call.")  # fmt: skip
    common(add, ["AdamW"])
    race(add, 15, 2.5)
    names(add, "--chains", [*pipeline.CHAINS], [*pipeline.CHAINS])
    out(add)
    add = job("load", "rich", run_load,
              "Times what feeds a loop: DataLoader, torchdata, TensorLoader, memcpy.")  # fmt: skip
    names(add, "--workloads", [*load.WORKLOADS], ["mnist", "images", "table"])
    names(add, "--providers", [*load.FEEDS], [*load.FEEDS])
    add("--device", choices=rows.devices(), default="cpu", help="where batches go")
    add("--rounds", type=positive, default=9, help="how often a feed goes through an epoch")
    add("--seconds", type=float, default=5.0, help="who would take longer sits rounds out")
    add("--json", type=file, metavar="FILE", help="write everything measured, a line a row")
    add = job("parity", "rich", run_parity,
              "Compares steps with torch.optim's in float64, in ulps of the update.")  # fmt: skip
    add("classes", nargs="*", type=checked(optimizer_class), metavar="MODULE:CLASS",
        help="made as torch's are; without them, the providers that are installed")  # fmt: skip
    add("--as", dest="reference", choices=every, help="which of torch's the classes are to be")
    names(add, "--optimizers", every, every)
    names(add, "--providers", ["all", *PROVIDERS], None)
    names(add, "--dtype", [*step.DTYPES], ["float32"])
    add("--device", choices=rows.devices(), default="cpu")
    add("--json", type=file, metavar="FILE", help="write the rows to this file")
    add = job("report", "rich matplotlib jinja2", run_report,
              "Turns result files into a page, pictures and tables; compares two.")  # fmt: skip
    add("files", nargs="*", type=Path, metavar="FILE", help="of step --json, or of a GPU check")
    add("--against", type=Path, metavar="FILE", help="an older result to compare with")
    add("--fail-below", type=float, metavar="X", help="exit with 1 if fusedopt is less than X "
        "times as fast as it was, or without --against as the baseline")  # fmt: skip
    add("--csv", type=file, metavar="FILE", help="write all rows as a table")
    add("--update-docs", action="store_true", help="keep the files in bench/results, and write the "
        "tables of README.md and docs/ anew")  # fmt: skip
    out(add)
    add = job("list", "rich", run_list, "Lists workloads and providers, and why one cannot run.")
    add("--device", choices=rows.devices(), default="cpu")
    return parser


# ---- what can run here ----


def named_workloads(options: Options, standard: Sequence[str]) -> list[str]:
    """The workloads asked for, those of this command line alone added to the table."""
    asked = options.workloads or ([] if options.model else standard)
    own = [] if options.model is None else [options.model]
    for name in [member for family in asked for member in workloads.members(family)]:
        own.append(workloads.WORKLOADS[name].scaled(options.scale))
    workloads.WORKLOADS.update({workload.name: workload for workload in own})
    return [workload.name for workload in own]


def named_providers(parser: argparse.ArgumentParser, options: Options) -> list[str]:
    """The providers asked for; one without a step for any of the optimizers is an error."""
    if not options.providers:
        return providers.usual(options.device)
    if "all" in options.providers:
        return [*PROVIDERS]
    for name in options.providers:
        reasons = {
            PROVIDERS[name].unavailable(optimizer, step.DTYPES[dtype], options.device)
            for optimizer in options.optimizers
            for dtype in options.dtype or ["float32"]
        }
        if "" not in reasons and name != FLOOR:  # whose absence is told, and is no error
            parser.error(f"argument --providers: {name}: {sorted(reasons)[0]}")
    return list(options.providers)


def fitting(
    parser: argparse.ArgumentParser, options: Options, needed: Mapping[Task, int], say: Any
) -> list[Task]:
    """Those of the tasks whose workloads fit into memory; says which do not.

    A workload asked for by name that does not fit is an error instead; a sweep goes as far as
    memory does.
    """
    available = rows.available_memory(options.device)
    if available is None:
        return list(needed)
    short = {task.workload: size for task, size in needed.items() if size > 0.9 * available}
    for name, size in short.items():
        note = (
            f"workload {name} needs {size / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are "
            "available; ask for fewer providers or smaller workloads"
        )
        if (options.workloads or options.model) and not workloads.WORKLOADS[name].family:
            parser.error(f"argument --workloads: {note}")
        say(f"Left out: {note}")
    return [task for task in needed if task.workload not in short]


# ---- the jobs ----


def run_all(parser: argparse.ArgumentParser, options: Options, run: Any) -> int:
    """Trains, then times the step."""
    tasks = planned_steps(parser, options, run)
    return run_train(parser, options, run) | timed_steps(tasks, options, run)


def run_train(parser: argparse.ArgumentParser, options: Options, run: Any) -> int:
    """Trains on the digits; prints the table and saves the picture, as far as it got."""
    from . import plots, tables

    names = [name for name in options.optimizers if hasattr(torch.optim, name)]
    threads, found = options.threads or TRAIN_THREADS, list[rows.Row]()
    run.say(f"\nTraining {', '.join(options.models)}, {options.epochs} epochs, in lockstep through "
            f"torch.optim and fusedopt, on {threads} thread{'s' * (threads > 1)}")  # fmt: skip
    try:
        with run.working(len(options.models) * len(names) * options.epochs, threads) as advance:
            for measured in train.measure(
                options.models, names, options.epochs, options.seed, advance
            ):
                found += run.add(measured)
    finally:
        if found:
            run.show(tables.train_table(found))
            run.say("loss: mean of the last epoch; acc.: on the test images; ours: fusedopt; "
                    "diff.: largest |torch - ours| / torch of any batch's loss; torch's drift: the "
                    "same between torch's own steps (*: they are bit for bit the same, so of its "
                    "default step from weights one rounding away); us: median time of "
                    "optimizer.step() in training.")  # fmt: skip
            run.say(train.verdict(found))
            path = plots.loss_curves(found, options.out / "loss_curves.png")
            run.say(f"Loss curves: {path}")
    ours = [row for row in found if row["provider"] == CANDIDATE]
    return EXIT_BOUND if any(train.failures(row) for row in ours) else 0


def planned_steps(parser: argparse.ArgumentParser, options: Options, run: Any) -> list[step.Task]:
    """The tasks of the step job that fit into memory."""
    options.providers = named_providers(parser, options)
    if options.baseline not in (BEST, *options.providers):
        parser.error(f"argument --baseline: {options.baseline} is not among the providers")
    names = named_workloads(options, STANDARD)
    tasks = step.plan(names, options.optimizers, options.dtype, options.device)
    needed = {task: task.memory(options.providers) for task in tasks}
    return fitting(parser, options, needed, run.say)


def run_step(parser: argparse.ArgumentParser, options: Options, run: Any) -> int:
    """Checks arithmetic, measures memory, times the steps."""
    return timed_steps(planned_steps(parser, options, run), options, run)


def timed_steps(tasks: Sequence[step.Task], options: Options, run: Any) -> int:
    """The same of tasks; shows each workload once it is done."""
    from . import memory, tables

    one = optimizers.most_used([task.optimizer for task in tasks]) if tasks else ""
    weighed = [
        task
        for task in tasks  # a fresh process takes seconds, a sweep has many tasks
        if options.memory == "all" or (options.memory == "one" and task.optimizer == one)
        if not workloads.WORKLOADS[task.workload].family
    ]
    runs = [name for name in options.providers if name != FLOOR]
    before = len(runs) * ((not options.skip_parity) + bool(weighed))
    threads, found, shown = options.threads or torch.get_num_threads(), list[Any](), list[Any]()

    def show() -> None:
        if shown:
            family = workloads.WORKLOADS[shown[0]["workload"]].family
            run.show(tables.sweep_table(shown) if family else tables.step_table(shown))
            shown.clear()

    run.say(f"\nTiming the bare step, {options.rounds} rounds, round-robin in one process; before "
            "that, arithmetic and memory")  # fmt: skip
    try:
        with run.working(before + len(tasks) * options.rounds, threads) as advance:
            known = {}
            if not options.skip_parity:
                known = step.check_arithmetic(tasks, options.providers, advance)
            peaks = memory.measure(weighed, runs, advance) if weighed else {}
            for measured in step.measure(tasks, options.providers, options.rounds, options.seconds,
                                         advance, options.baseline, known, peaks):  # fmt: skip
                group = [workloads.WORKLOADS[row["workload"]].group for row in (*shown, *measured)]
                if len(set(group)) > 1:
                    show()
                shown += run.add(measured)
                found += shown[-len(measured) :] if measured else []
    finally:
        show()
        if found:
            for note in notes(found):
                run.say(note)
            run.say(LEGEND.format(tables.against(options.baseline)))
            run.say(step.summary(found))
        if options.csv and found:
            rows.write_csv(options.csv, found)
            run.say(f"The table: {options.csv}")
    return run.gate(rows.slower_than(found, options.fail_below or 0), options.fail_below)


def notes(found: Sequence[rows.Row]) -> list[str]:
    """Why cells are empty or rounds few, and parameters that did not take fusedopt's own step."""
    said, slow = dict[str, None](), dict[str, dict[str, None]]()
    for row in found:
        title = providers.title_of(row["provider"])
        if why := row.get("missing"):
            said[why if why.startswith(title) else f"{title}: {why}"] = None
        if row.get("of_rounds"):
            slow.setdefault(title, {})[row["workload"]] = None
        if row["provider"] == CANDIDATE and "torch" in row.get("backend", ""):
            said[f"fusedopt, {rows.label(row)}: tensors by {row['backend']}"] = None
    if slow:
        listed = "; ".join(f"{title} on {', '.join(where)}" for title, where in slow.items())
        said[f"slow, so timed in fewer rounds: {listed}"] = None
    return list(said)


def run_pipeline(parser: argparse.ArgumentParser, options: Options, run: Any) -> int:
    """Times chains and calls; prints a workload's table once it is complete, then draws."""
    from . import floor, plots, tables

    if backend_for(options.device) is None:
        parser.error(f"argument --device: fusedopt has no kernels for {options.device} here; "
                     "python -m fusedopt says why")  # fmt: skip
    names = named_workloads(options, pipeline.STANDARD)
    tasks = pipeline.plan(names, options.chains, options.optimizers, options.device)
    tasks = fitting(parser, options, {task: task.memory() for task in tasks}, run.say)
    threads, found = options.threads or torch.get_num_threads(), list[rows.Row]()
    if why := floor.unavailable(options.device):
        run.say(why)
    try:
        with run.working(len(tasks) * options.rounds, threads) as advance:
            for measured in pipeline.measure(tasks, options.rounds, options.seconds, advance):
                found += run.add(measured)
    finally:
        for shown in rows.grouped(found, "workload").values():
            run.show(tables.pipeline_table(shown))
        if found:
            chains = {name: pipeline.CHAINS[name].summary for name in options.chains}
            run.say(f"Chains: {'; '.join(f'{name}: {text}' for name, text in chains.items())}. "
                    "bytes: a parameter, what each stage has to read and write. ours: fusedopt; "
                    "ours / floor: 1.00x is the time of moving its bytes.")  # fmt: skip
            for row in found:
                if row.get("torch_step") == PROVIDERS["torch-default"].title:
                    run.say(f"{row['optimizer']}: torch has no fused step, its default was timed")
            for line in pipeline.summary(found):
                run.say(line)
            bars = plots.pipeline_bars(found, options.out / "pipeline.png")
            passes = plots.pipeline_passes(found, options.out / "pipeline_bytes.png")
            run.say(f"Bars: {bars}; passes and their bytes: {passes}")
    return 0


def run_load(parser: argparse.ArgumentParser, options: Options, run: Any) -> int:
    """Races the feeds, prints the tables."""
    from . import tables

    available = rows.available_memory()
    for name in options.workloads:
        work = load.WORKLOADS[name]
        needed = 2 * work.rows * work.row_bytes
        if available is not None and needed > available:
            parser.error(f"argument --workloads: {name} needs {needed / 1e9:.1f} GB of memory, "
                         f"{available / 1e9:.1f} GB are available; ask for another")  # fmt: skip
    found: list[rows.Row] = []
    sizes: list[rows.Row] = []
    races = 1 + any(load.FEEDS[name].lingers for name in options.providers)
    on_gpu = load.TRANSFERS if options.device == "cuda" else ()
    total = races * len(options.workloads) * options.rounds + len(on_gpu)
    try:
        with run.working(total, torch.get_num_threads()) as advance:
            for measured in load.measure(options.workloads, options.providers, options.device,
                                         options.rounds, options.seconds, advance):  # fmt: skip
                found += run.add(measured)
            for mib in on_gpu:
                advance(f"{mib} MiB")
                sizes += run.add([load.transfer(mib)])
    finally:  # what was measured before an interrupt, too
        for shown in rows.grouped(found, "workload").values():
            run.show(tables.load_table(shown))
        if sizes:
            run.show(tables.transfer_table(sizes))
        missing = {load.FEEDS[row["provider"]].title: row["missing"] for row in found
                   if "missing" in row}  # fmt: skip
        for title, why in missing.items():
            run.say(f"{title} did not run: {why}")
        run.say("Medians; samples/s and GB/s count what arrives, rows and labels; the last column "
                "is of epochs of the same round. memcpy floor: the same bytes, not gathered. What "
                "has threads or processes of its own slows down what comes next: it ran "
                "afterwards.")  # fmt: skip
    return 0


def run_parity(parser: argparse.ArgumentParser, options: Options, run: Any) -> int:
    """Compares with torch in float64, and tells by the exit code whether named classes agree.

    A provider that differs is shown and no failure: what it computes is its library's business.
    """
    from . import tables

    chosen: list[tuple[str, str, Any]] = []
    for path, cls in options.classes:
        name = options.reference or cls.__name__
        if name not in optimizers.names() or not hasattr(torch.optim, name):
            parser.error(f"argument --as: torch.optim has no {name}, of which {path} could be a "
                         f"copy; wanted: one of {', '.join(optimizers.names())}")  # fmt: skip
        chosen.append((path, name, partial(providers.make, cls, name)))
    if chosen and not options.providers:
        chosen.insert(0, ("torch default", chosen[0][1], getattr(torch.optim, chosen[0][1])))
    else:
        for who in [name for name in named_providers(parser, options) if name != FLOOR]:
            provider = PROVIDERS[who]
            able = [name for name in options.optimizers
                    if not provider.unavailable(name, torch.float32, options.device)]  # fmt: skip
            chosen += [(provider.title, name, partial(provider.optimizer, name)) for name in able]
    dtypes = [step.DTYPES[name] for name in options.dtype]
    found = run.add(list(parity.measure(chosen, dtypes, options.device)))
    run.show(tables.parity_table(found))
    most = ", ".join(f"{bound:.0f} in {str(dtype)[6:]}" for dtype, bound in parity.SAME.items())
    run.say("from zeros: without decay, in ulps of the update; with decay: from normal weights, "
            f"in ulps of both. The arithmetic is the same up to {most}.")  # fmt: skip
    for row in [row for row in found if row["error"]]:
        run.say(f"{row['provider']}, {row['optimizer']}: {row['error']}")
    named = {path for path, _ in options.classes}
    return int(any(row["provider"] in named and row["parity"] != "same" for row in found))


def run_report(parser: argparse.ArgumentParser, options: Options, run: Any) -> int:
    """Writes what was asked for; 1 if something is below --fail-below."""
    from . import report

    if not options.files and not options.update_docs:
        parser.error("the following arguments are required: FILE")
    try:
        found = [row for path in options.files for row in rows.read_steps(path)]
        before = rows.read_steps(options.against) if options.against else []
        changes = rows.compare(found, before)
        if before and not changes:
            parser.error(f"--against: {options.against} has no row in common with the others")
        for path in report.update(options.files) if options.update_docs else ():
            run.say(f"Written: {path}")
    except rows.ResultError as error:
        parser.error(str(error))
    if options.csv:
        rows.write_csv(options.csv, found)
    if found:
        page = report.write_page(found, changes, options.out)
        run.say(f"The page: {page}; its pictures beside it")
    bound = options.fail_below or 0
    slow = rows.slowed(changes, bound) if before else rows.slower_than(found, bound)
    return int(run.gate(slow, options.fail_below))


def run_list(parser: argparse.ArgumentParser, options: Options, run: Any) -> int:
    """Prints workloads, and providers with what they can step here or why they cannot."""
    from . import tables

    run.show(tables.workload_table(list(workloads.WORKLOADS.values())))
    table = tables.Table("Providers (*: only by name)", ["provider", "steps", "why not"])
    for name, provider in PROVIDERS.items():
        # Without the optimizer's name: one reason for all is said once.
        reasons = {
            optimizer: provider.unavailable(optimizer, torch.float32, options.device).replace(
                f".{optimizer}:", ":"
            )
            for optimizer in optimizers.names()
        }
        able = [optimizer for optimizer, reason in reasons.items() if not reason]
        why = dict.fromkeys(filter(None, reasons.values()))
        starred = name + ("" if provider.default else " *")
        table.add(starred, ", ".join(able) or "nothing", "; ".join(why))
    run.show(table)
    return 0


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
