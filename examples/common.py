"""What the examples share: the command line, a progress bar, pictures, TensorBoard, and claims.

An example says in so many words what its pictures show, and checks it: a picture looks convincing
whatever happened. A claim that does not hold makes the exit status 1.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")  # files are wanted, wherever this runs

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

T = TypeVar("T")

OUT = Path("build/examples")

# Okabe and Ito's colours, apart for colour-blind readers; yellow, which white swallows, left out.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000", "#8c8c8c",
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY)
# Lines are told apart without colour, too.
DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), "-", "--", "-.")

# Opaque white behind everything: on a dark page a picture is a white sheet, in print it is paper.
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 8,
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.5,
}
DPI = 110


class Example:
    """One run of an example.

    Args:
        description: what ``--help`` says: the script's docstring.
        arguments: of the command line; None takes the process's own.
    """

    def __init__(self, description: str | None, arguments: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--out", type=Path, default=OUT, metavar="DIR",
            help="folder for the pictures (default: %(default)s)",
        )  # fmt: skip
        parser.add_argument(
            "--tensorboard", type=Path, metavar="DIR",
            help="folder for TensorBoard's logs of what is drawn (default: none are written)",
        )  # fmt: skip
        parser.add_argument(
            "--short", action="store_true", help="less work, for tests: the same claims"
        )
        options = parser.parse_args(arguments)
        self.short: bool = options.short
        self.out: Path = options.out
        self.console = Console(highlight=False)
        self.console.width = max(self.console.width, 116)  # a narrower table loses its figures
        self._writer = _open_tensorboard(parser, options.tensorboard)
        self._claims: list[tuple[str, bool, str]] = []
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out: cannot write to {self.out}: {error}; wanted: a folder")
        pyplot.rcParams.update(STYLE)

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """The items, with a progress bar that moves as they are taken.

        It draws itself only then: a thread that redraws by the clock would wake up inside steps.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        shown = {"console": self.console, "disable": not self.console.is_terminal}
        with Progress(*columns, **shown, auto_refresh=False, transient=True) as progress:
            task = progress.add_task(label, total=len(items))
            for item in items:
                yield item
                progress.update(task, advance=1, refresh=True)

    def curve(
        self, axes: Axes, tag: str, steps: Sequence[int], values: Iterable[float], **style: Any
    ) -> None:
        """Draws a line over steps, and logs it.

        Args:
            axes: where it is drawn.
            tag: its name in TensorBoard: words, digits, ``.``, ``-`` and ``/`` for folders.
            steps: whole numbers.
            values: one a step.
            **style: matplotlib's.
        """
        values = [float(value) for value in values]
        axes.plot(steps, values, gid=tag, **style)
        self._log(tag, steps, values)

    def path(self, axes: Axes, tag: str, points: Sequence[Sequence[float]], **style: Any) -> None:
        """Draws a way through the plane from point to point, and logs its two coordinates.

        Args: as of `curve`; a point is taken at every step from 0 on.
        """
        first, second = ([float(point[i]) for point in points] for i in range(2))
        axes.plot(first, second, gid=tag, **style)
        self._log(f"{tag}/x", range(len(first)), first)
        self._log(f"{tag}/y", range(len(second)), second)

    def _log(self, tag: str, steps: Iterable[int], values: Iterable[float]) -> None:
        if self._writer is None:
            return
        for step, value in zip(steps, values, strict=True):
            self._writer.add_scalar(tag, value, int(step))

    def save(self, figure: Figure, name: str) -> None:
        """Writes a picture ``<name>.png``, logs it, and closes it."""
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=DPI)
        if self._writer is not None:
            self._writer.add_figure(name, figure, close=False)
        pyplot.close(figure)
        path = self.out / f"{name}.png"
        # A palette makes the file a third; refined twice, it moves no colour by what one can see.
        picture = Image.open(drawn).convert("RGB")
        picture = picture.quantize(kmeans=2, dither=Image.Dither.NONE)
        picture.save(path, optimize=True)
        self.console.print(f"Picture: {path}", soft_wrap=True)

    def table(self, title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table, its first column to the left."""
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for index, header in enumerate(headers):
            table.add_column(header, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def claim(self, what: str, holds: bool, found: str) -> None:
        """Notes whether what the pictures are said to show is so.

        Args:
            what: the claim, a sentence.
            holds: whether it does. Write comparisons so that NaN makes them False.
            found: what was measured, in a few words.
        """
        self._claims.append((what, bool(holds), found))

    def finish(self) -> int:
        """Prints the claims; 0, or 1 where one does not hold: the exit status."""
        if self._writer is not None:
            self._writer.close()
        table = Table(title="Claims", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        table.add_column("claim", overflow="fold")
        table.add_column("found", overflow="fold")
        for what, holds, found in self._claims:
            mark = "[green]PASS[/]" if holds else "[bold red]FAIL[/]"
            table.add_row(mark, what, found)
        self.console.print(table)
        failed = [what for what, holds, _ in self._claims if not holds]
        if not self._claims or failed:
            said = "; ".join(failed) or "nothing was claimed"
            print(f"{len(failed)} of {len(self._claims)} claims fail: {said}", file=sys.stderr)
            return 1
        return 0


def plain_numbers(axes: Axes) -> None:
    """Numbers instead of powers along a logarithmic vertical axis of few decades."""
    shown = LogFormatter(minor_thresholds=(2, 0.6))  # not at every minor tick
    shown.set_axis(axes.yaxis)

    def minor(value: float, place: int | None) -> str:
        shown.set_locs(axes.yaxis.get_minorticklocs())
        return f"{value:g}" if shown(value, place) else ""

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(minor))


def _open_tensorboard(parser: argparse.ArgumentParser, folder: Path | None) -> Any:
    """A writer of TensorBoard's logs, or None where nobody asked for one."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        parser.error("--tensorboard: needs tensorboard; run: python -m pip install tensorboard")
    return SummaryWriter(str(folder))
