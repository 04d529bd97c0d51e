"""The ``report`` job: result files as a page, pictures and documentation; two runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_out, at_least, file
from .results import Figure, ResultError, compare, load, slowed, slower_than, write_csv

EXIT_BELOW = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``report``."""
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="of step --json, or of a GPU check"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="an older result to compare the others with"
    )
    parser.add_argument(
        "--fail-below",
        type=at_least(0, float),
        metavar="X",
        help="exit with 1, and name the rows, if fusedopt is less than X times as fast as it was, "
        "or without --against as the baseline",
    )
    parser.add_argument("--csv", type=file, metavar="FILE", help="write all figures to this file")
    parser.add_argument(
        "--update-docs",
        action="store_true",
        help="keep the files in bench/results of this checkout, and write the tables of README.md "
        "and docs/benchmarks.md anew from all that are there",
    )
    add_out(parser, "report.html and its pictures")


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Writes what was asked for; 1 if something is below --fail-below."""
    from . import documents, page, report  # rich and matplotlib, which the command line has found

    console = report.make_console()
    if not options.files and not options.update_docs:
        parser.error("the following arguments are required: FILE")
    try:
        figures = [figure for path in options.files for figure in load(path)]
        before: list[Figure] = load(options.against) if options.against else []
        changes = compare(figures, before)
        if before and not changes:
            raise ResultError(f"--against: {options.against} has no row in common with the others")
        if options.update_docs:
            for path in documents.update(options.files):
                console.print(f"Written: {path}", soft_wrap=True, markup=False)
    except ResultError as error:
        parser.error(str(error))
    if options.csv:
        write_csv(options.csv, figures)
    if figures:
        runs = list(page.runs_of(figures).values())
        prefixes = ["" if len(runs) == 1 else f"{number}-" for number in range(1, len(runs) + 1)]
        pictures = [page.draw(found, at) for found, at in zip(runs, prefixes, strict=True)]
        for picture in [picture for drawn in pictures for picture in drawn]:
            (options.out / f"{picture.name}.png").write_bytes(picture.light)
        whole = options.out / "report.html"
        whole.write_text(page.make(figures, pictures, changes))
        console.print(f"The page: {whole}; its pictures beside it", soft_wrap=True, markup=False)
    below: list[str] = []
    if options.fail_below is not None:
        below = (
            slowed(changes, options.fail_below)
            if before
            else slower_than(figures, options.fail_below)
        )
    for row in below:
        console.print(f"Below {options.fail_below}: {row}", soft_wrap=True, markup=False)
    return EXIT_BELOW if below else 0
