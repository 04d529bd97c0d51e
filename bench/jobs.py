"""The jobs, each of which takes its checked options and the `Run` that it reports to.

They return the exit code: `EXIT_BOUND` where fusedopt did not do what was asked of it. What needs
rich or matplotlib is imported when a job begins, after the command line has looked for them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from fusedopt.backends import backend_for

from . import load, optimizers, parity, pipeline, providers, rows, step, train, workloads
from .providers import PROVIDERS
from .rows import BEST, CANDIDATE, FLOOR

Task = TypeVar("Task", step.Task, pipeline.Task)
Options = argparse.Namespace

STANDARD = [name for name, workload in workloads.WORKLOADS.items() if workload.standard]
# The networks are below the size from which torch splits most of its loops, and a second thread
# that has to be waited for makes training on a busy machine many times slower.
TRAIN_THREADS = 1
EXIT_BOUND = 1
LEGEND = (
    "arithmetic: of torch.optim in float64, within rounding; GB/s: of the bytes that have to be "
    "moved; % of floor: 100 is memory speed, the time of moving the same bytes without maths; "
    "times faster: than {}; memory: peak above parameters and gradients, in a fresh process. "
    "Ratios are medians over rounds, p20 and p80 their spread."
)


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
    """Trains, then times the step; of the large model, that of one optimizer, to be done soon."""
    tasks = planned_steps(parser, options, run)
    if not options.workloads and tasks:
        one = optimizers.most_used(options.optimizers)
        tasks = [task for task in tasks if task.workload != "gpt2" or task.optimizer == one]
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
