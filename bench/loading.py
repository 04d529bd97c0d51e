"""The command of the load job: its options, its tables, and the way through it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import machine
from .feeds import CANDIDATE, FEEDS, WORKLOADS
from .load import TRANSFERS, Row, measure, transfer
from .options import add_names, add_number, at_least, file

if TYPE_CHECKING:
    from rich.table import Table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``load``."""
    add_names(parser, "--workloads", "workload", WORKLOADS, ["mnist", "images", "table"])
    add_names(parser, "--providers", "provider", FEEDS)
    devices = [name for name in machine.devices() if name in ("cpu", "cuda")]
    parser.add_argument(
        "--device", choices=devices, default="cpu", help="where batches go (default: cpu)"
    )
    add_number(parser, "--rounds", 1, 9, "how often a feed goes through an epoch")
    parser.add_argument(
        "--seconds",
        type=at_least(0, float),
        default=5.0,
        metavar="S",
        help="a feed that would take longer than this over all rounds sits some out (default: 5)",
    )
    parser.add_argument("--json", type=file, metavar="FILE", help="write the rows to this file")


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Races the feeds, prints the tables, writes the file."""
    from . import report, session  # need rich, which the command line has just found

    available = machine.available_memory()
    for name in options.workloads:
        needed = 2 * WORKLOADS[name].epoch_bytes
        if available is not None and needed > available:
            parser.error(
                f"argument --workloads: {name} needs {needed / 1e9:.1f} GB of memory, "
                f"{available / 1e9:.1f} GB are available; ask for another"
            )
    console = report.make_console()
    described = machine.describe()
    report.print_machine(console, described)
    rows: list[Row] = []
    sizes: list[dict[str, Any]] = []
    races = 1 + any(FEEDS[name].lingers for name in options.providers)
    total = races * len(options.workloads) * options.rounds
    total += len(TRANSFERS) * (options.device == "cuda")
    try:
        with session.progress_bar(console, total) as advance:
            for row in measure(options.workloads, options.providers, options.device,
                               options.rounds, options.seconds, advance):  # fmt: skip
                rows.append(row)
            if options.device == "cuda":
                for mib in TRANSFERS:
                    advance(f"{mib} MiB")
                    sizes.append(transfer(mib))
    finally:  # what was measured before an interrupt, too
        for row in rows:
            console.print(table(row))
        if sizes:
            console.print(transfer_table(sizes))
        for line in notes(rows):
            console.print(line, soft_wrap=True, markup=False)
        if options.json:
            found = {"rows": [row.to_json() for row in rows], "transfers": sizes}
            report.write_json(options.json, {"machine": described, "load": found})
    return 0


def table(row: Row) -> Table:
    """Samples and bytes a second, and the factor by which ours is faster."""
    from rich.table import Table

    work = row.work
    batch = f"{work.batch_size} a batch ({work.batch_bytes / 1e6:.2g} MB)"
    told = Table("feed", title=f"{work.name}: {work.summary}, {batch}, to {row.device}")
    for head in ("ms an epoch", "samples/s", "GB/s", "TensorLoader is"):
        told.add_column(head, justify="right")
    for name, stats in row.seconds.items():
        seconds, ratio = stats.median, row.ratio(name)
        faster = "" if name == CANDIDATE or ratio is None else f"{ratio.median:.2f} times as fast"
        told.add_row(
            FEEDS[name].title, f"{seconds * 1e3:.1f}", f"{work.rows / seconds:,.0f}",
            f"{work.epoch_bytes / seconds / 1e9:.2f}", faster,
            style="bold" if name == CANDIDATE else None,
        )  # fmt: skip
    return told


def transfer_table(rows: list[dict[str, Any]]) -> Table:
    """The way to the GPU, by size of a batch."""
    from rich.table import Table

    told = Table("MiB a batch", title="batches on their way to the GPU, medians")
    for head in ("memcpy GB/s", "DevicePrefetcher GB/s", "of memcpy", "TensorLoader GB/s",
                 "of memcpy", "hidden behind a kernel", "host us a batch"):  # fmt: skip
        told.add_column(head, justify="right")
    for row in rows:
        rate = row["bytes_per_second"]
        told.add_row(
            str(row["batch_mib"]), f"{rate['memcpy'] / 1e9:.1f}", f"{rate['prefetcher'] / 1e9:.1f}",
            f"{row['prefetcher_over_memcpy']['median']:.0%}", f"{rate['loader'] / 1e9:.1f}",
            f"{row['loader_over_memcpy']:.0%}", f"{row['hidden']['median']:.0%}",
            f"{row['host_us']:.0f}",
        )  # fmt: skip
    return told


def notes(rows: list[Row]) -> list[str]:
    """What did not run, and why; what the columns mean."""
    missing = {FEEDS[n].title: why for row in rows for n, why in row.unavailable.items()}
    return [
        *(f"{title} did not run: {why}" for title, why in missing.items()),
        "Medians; samples/s and GB/s count what arrives, rows and labels; the last column is of "
        "epochs of the same round. memcpy floor: the same bytes, not gathered, into one buffer. "
        "What has threads or processes of its own slows down what comes next: it ran afterwards.",
    ]
