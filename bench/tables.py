"""Every table, as columns of functions over rows; and the three ways to write one.

A `Table` is printed with rich, written as Markdown, or handed to the page's template. `of` makes
those of a list of rows, whatever jobs these are from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import load, optimizers, parity, pipeline, train
from . import rows as results
from .providers import PROVIDERS, title_of
from .rows import BEST, CANDIDATE, FLOOR, Row, label
from .workloads import SWEEP, WORKLOADS, Workload, binary

ABSENT = "-"
# Styles of a line, as rich has them.
RICH = {"ours": "bold", "bad": "red", "good": "blue", "dim": "dim", "": ""}

# A column's head, and what its cell says of an item; None is a cell without a figure.
Column = tuple[str, Callable[[Any], str | None]]


@dataclass
class Table:
    """Heads of columns of words and of numbers, and lines of as many cells, with a style each."""

    title: str
    words: Sequence[str]
    numbers: Sequence[str] = ()
    lines: list[tuple[list[str], str]] = field(default_factory=list)

    @property
    def heads(self) -> list[str]:
        """Of all columns."""
        return [*self.words, *self.numbers]

    def to_rich(self) -> Any:
        """For a console."""
        from rich import box
        from rich.table import Table as RichTable

        made = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for head in self.words:
            made.add_column(head, vertical="bottom", no_wrap=bool(self.numbers))
        for head in self.numbers:
            head = head.replace(" ", "\n")
            made.add_column(head, justify="right", vertical="bottom", no_wrap=True)
        for cells, style in self.lines:
            made.add_row(*cells, style=RICH[style])
        return made

    def to_markdown(self) -> str:
        """For a page of the documentation, without the title."""
        rule = "|" + "---|" * len(self.words) + "---:|" * len(self.numbers)
        lines = [f"| {' | '.join(cells)} |" for cells, _ in [(self.heads, ""), *self.lines]]
        return "\n".join([lines[0], rule, *lines[1:]])


def table(
    title: str, items: Iterable[Any], words: Sequence[Column], numbers: Sequence[Column] = (),
    style: Callable[[Any], str] = lambda item: "",
) -> Table:  # fmt: skip
    """A line an item, of what each column says of it."""
    made = Table(title, [head for head, _ in words], [head for head, _ in numbers])
    for item in items:
        cells = [cell(item) for _, cell in (*words, *numbers)]
        made.lines.append(([ABSENT if cell is None else cell for cell in cells], style(item)))
    return made


# ---- cells ----


def number(value: float | None, digits: int = 3) -> str | None:
    """So many significant digits, all before the point."""
    if value is None:
        return None
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def times(value: float | None, digits: int = 2) -> str | None:
    """A ratio."""
    return None if value is None else f"{value:.{digits}f}x"


def column(head: str, key: str, form: str | Callable[[Any], Any] = number) -> Column:
    """What a row has under a key, if anything, by a function or a format."""
    write = form.format if isinstance(form, str) else form
    return head, lambda row: None if row.get(key) is None else write(row[key])


def of_group(key: Any, cell: Callable[[Row], str | None], head: str) -> Column:
    """A cell of one row of a group, whose rows are found by what makes them differ."""
    return head, lambda told: cell(told[key]) if key in told else None


def percent_of_floor(row: Row) -> str | None:
    """100 is memory speed."""
    share = row.get("floor_share")
    return None if share is None else f"{100 * share:.0f}"


def milliseconds(row: Row) -> str | None:
    """Of a step."""
    return number(row["ms"])


def nanoseconds(row: Row) -> str | None:
    """Of a step, a parameter."""
    return number(results.nanoseconds(row))


def bandwidth(row: Row) -> str | None:
    """GB/s."""
    return number(results.bandwidth(row))


def is_ours(row: Row) -> str:
    """The style of fusedopt's lines."""
    return "ours" if row["provider"] == CANDIDATE else ""


def against(baseline: str) -> str:
    """A baseline in words."""
    return "torch's fastest step" if baseline == BEST else title_of(baseline)


def compared(ratio: float) -> str:
    """A ratio of times in words, such as ``7.9x faster than``."""
    if 0.95 < ratio < 1.05:
        return "as fast as"
    return f"{ratio:.1f}x faster than" if ratio >= 1 else f"{1 / ratio:.1f}x slower than"


OPTIMIZER: Column = ("optimizer", label)
PROVIDER: Column = ("provider", lambda row: title_of(row["provider"]))
WORKLOAD: Column = ("workload", lambda row: row["workload"])


def by_provider(rows: Iterable[Row], *more: str) -> list[dict[str, Row]]:
    """The rows of each workload and optimizer by their providers; "" is any of them."""
    groups = results.grouped(rows, *more, "workload", "optimizer", "dtype").values()
    return [{"": found[0], **results.by(found, "provider")} for found in groups]


KIND: list[Column] = [
    ("workload", lambda told: told[""]["workload"]),
    ("optimizer", lambda told: label(told[""])),
]


# ---- the step job ----

STEP = [
    ("ms", milliseconds),
    column("p20", "p20"),
    column("p80", "p80"),
    ("ns/ param.", nanoseconds),
    ("GB/s", bandwidth),
    ("% of floor", percent_of_floor),
    *(
        (head, lambda row, key=key: None if row["provider"] == FLOOR else times(row.get(key)))
        for head, key in (("times faster", "faster"), ("p20", "faster_p20"), ("p80", "faster_p80"))
    ),
    column("memory MB", "peak_bytes", lambda value: f"{value / 1e6:,.1f}"),
]
ON_A_GPU = [
    ("launches", lambda row: f"{row['kernels'] + row['copies']:.0f}" if "kernels" in row else None),
    column("host us", "host_us"),
    column("device us", "device_us"),
]  # fmt: skip


def step_table(rows: Sequence[Row]) -> Table:
    """All figures of one workload: a line a provider, by optimizer."""
    shown, first = [row for row in rows if "ms" in row], rows[0]
    known = WORKLOADS[first["workload"]].summary if first["workload"] in WORKLOADS else "a model"
    rounds = max((row["rounds"] for row in shown), default=0)
    title = f"{first['workload']}: {known}, {first['elements']:,} elements in all; a step, medians"
    seen = any(row.get("device_us") is not None for row in shown)

    def style(row: Row) -> str:
        return is_ours(row) if row.get("parity", "same") == "same" else "bad"

    return table(f"{title} of up to {rounds} rounds", shown,
                 [OPTIMIZER, PROVIDER, column("arithmetic", "parity", str)],
                 STEP + ON_A_GPU * seen, style)  # fmt: skip


def in_sweep(row: Row) -> bool:
    """Whether it is a point of a sweep."""
    return str(row["workload"]).startswith(f"{SWEEP}-")


def sweep_table(rows: Sequence[Row]) -> Table:
    """Bandwidth of a sweep, a column a size."""
    rows = [row for row in rows if "ms" in row]
    sizes = dict.fromkeys(row["elements"] for row in rows)
    lines = results.grouped(rows, "optimizer", "dtype", "provider").values()
    return table(
        f"{SWEEP}: one tensor of so many elements; GB/s, medians",
        [{"": found[0], **results.by(found, "elements")} for found in lines],
        [KIND[1], ("provider", lambda told: title_of(told[""]["provider"]))],
        [of_group(size, bandwidth, binary(size)) for size in sizes],
        lambda told: is_ours(told[""]),
    )  # fmt: skip


def verdict_table(rows: Sequence[Row]) -> Table:
    """How many times faster fusedopt is: a line an optimizer, a column a workload."""
    ours = [row for row in rows if row["provider"] == CANDIDATE and not in_sweep(row)]
    compared_with = against(ours[0]["baseline"]) if ours else ""
    lines = results.grouped(ours, "optimizer", "dtype").values()
    return table(
        f"fusedopt's step: how many times as fast as {compared_with}",
        [{"": found[0], **results.by(found, "workload")} for found in lines],
        [("", lambda told: label(told[""]))],
        [of_group(name, lambda row: times(row.get("faster")), name)
         for name in dict.fromkeys(row["workload"] for row in ours)],
    )  # fmt: skip


def change_table(changes: Sequence[Row]) -> Table:
    """What two runs have in common, and how it changed."""
    return table(
        "Speed now over speed before. Against each run's own floor where both have one: the "
        "machine's own speed then cancels.",
        changes,
        [WORKLOAD, OPTIMIZER, PROVIDER],
        [column("ms before", "ms_before"), ("ms now", milliseconds),
         column("speed", "faster", times),
         ("in units of", lambda row: "floor" if row["by_floor"] else "time")],
        lambda row: "good" if row["faster"] >= 1.05 else "bad" if row["faster"] <= 0.95 else "",
    )  # fmt: skip


FRONT = ("huge", "gpt2", "many", "tiny", "billion", "swarm", "thousand")
FRONT_PROVIDERS = ("torch-default", "torch-foreach", "torch-fused", CANDIDATE, FLOOR)


def front_table(rows: Sequence[Row]) -> Table:
    """README's table: milliseconds of torch's steps, fusedopt's and the floor."""
    shown = [
        told
        for told in by_provider(rows, "machine")
        if CANDIDATE in told
        and told[""]["workload"] in FRONT
        and told[CANDIDATE]["baseline"] == BEST
    ]
    return table(
        "", shown, KIND,
        [*(of_group(name, milliseconds, title_of(name)) for name in FRONT_PROVIDERS),
         of_group(CANDIDATE, percent_of_floor, "% of floor"),
         of_group(CANDIDATE, column("", "faster", "{:.1f}")[1], "best torch / fusedopt"),
         of_group(CANDIDATE, results.source, "machine, versions, date")],
    )  # fmt: skip


# ---- the other jobs ----


def train_table(rows: Sequence[Row]) -> Table:
    """The digits job: a line a network and optimizer, torch's default step beside fusedopt's."""
    return table(
        "Handwritten digits: torch.optim (default step) and fusedopt (ours) side by side",
        [row for row in rows if row["provider"] == CANDIDATE],
        [("network", lambda row: row["workload"]), OPTIMIZER],
        [column("loss torch", "loss_of_torch", "{:.4f}"), column("loss ours", "loss", "{:.4f}"),
         column("acc.% torch", "accuracy_of_torch", "{:.2f}"),
         column("acc.% ours", "accuracy", "{:.2f}"),
         column("diff. epoch1", "difference_first_epoch", "{:.1e}"),
         column("diff. all", "difference", "{:.1e}"),
         ("torch's drift",
          lambda row: f"{row['drift']:.1e}" + ("*" if row["drift_of"] == train.NUDGED else " ")),
         column("us torch", "ms_of_torch", lambda ms: f"{ms * 1e3:.1f}"),
         column("us ours", "ms", lambda ms: f"{ms * 1e3:.1f}"),
         column("ratio", "faster", lambda ratio: times(ratio, 1)),
         ("bound holds", lambda row: "no" if train.failures(row) else "yes")],
        lambda row: "bad" if train.failures(row) else "",
    )  # fmt: skip


def pipeline_table(rows: Sequence[Row]) -> Table:
    """One workload: nanoseconds a parameter of torch's stages, of both, and bytes beneath."""
    first, lines = rows[0], list[dict[str, str | None]]()
    for found in results.grouped(rows, "optimizer", "chain").values():
        told = {row.get("stage") or row["provider"]: row for row in found}
        ours, theirs = told[CANDIDATE], told[pipeline.TORCH]
        share = ours.get("floor_share")
        lines.append(
            {
                "": label(ours),
                "torch / ours": times(ours.get("faster"), 1),
                "ours / floor": times(1 / share if share else None),
                **{name: nanoseconds(row) for name, row in told.items()},
            }
        )
        lines.append(
            {
                "": "  bytes",
                "torch / ours": f"{theirs['bytes'] / ours['bytes']:.1f}x",
                "ours / floor": "",
                **{name: str(row["bytes"]) for name, row in told.items()},
            }
        )
    stages = max((line.keys() for line in lines), key=len)
    stages = [name for name in stages if any(row.get("stage") == name for row in rows)]
    columns = {
        **{f"torch {stage}": stage for stage in stages},
        "torch all": pipeline.TORCH,
        "ours one call": CANDIDATE,
        "floor": FLOOR,
    }
    columns |= {name: name for name in ("torch / ours", "ours / floor")}
    return table(
        f"{first['workload']}: {first['elements']:,} elements; ns a parameter, medians of up to "
        f"{max(row['rounds'] for row in rows)} rounds",
        lines, [column("optimizer, chain", "", str)],
        [column(head, key, str) for head, key in columns.items()],
        lambda line: "dim" if line[""] == "  bytes" else "",
    )  # fmt: skip


def device_table(rows: Sequence[Row]) -> Table:
    """What a step, or a chain, does on a GPU, and what it costs the host."""
    keys = ("kernels", "copies", "device_us", "host_us")
    return table("one of them on the device", rows, [WORKLOAD, OPTIMIZER, PROVIDER],
                 [column(key, key, "{:.1f}") for key in keys])  # fmt: skip


def load_table(rows: Sequence[Row]) -> Table:
    """Samples and bytes a second of one set of rows, and the factor by which ours is faster."""
    work, first = load.WORKLOADS[rows[0]["workload"]], rows[0]
    batch = f"{work.batch_size} a batch ({work.batch_size * work.row_bytes / 1e6:.2g} MB)"
    return table(
        f"{first['workload']}: {work.summary}, {batch}, to {first['device']}",
        [row for row in rows if "ms" in row],
        [("feed", lambda row: load.FEEDS[row["provider"]].title)],
        [column("ms an epoch", "ms", "{:.1f}"),
         ("samples/s", lambda row: f"{row['rows'] / row['ms'] * 1e3:,.0f}"),
         ("GB/s", lambda row: f"{row['bytes'] / row['ms'] / 1e6:.2f}"),
         ("TensorLoader is", lambda row: "" if is_ours(row) or "faster" not in row
          else f"{1 / row['faster']:.2f} times as fast")],
        is_ours,
    )  # fmt: skip


def transfer_table(rows: Sequence[Row]) -> Table:
    """The way to the GPU, by size of a batch."""

    def rate(head: str, name: str) -> Column:
        return head, lambda row: f"{row['bytes_per_second'][name] / 1e9:.1f}"

    return table(
        "batches on their way to the GPU, medians", rows,
        [column("MiB a batch", "batch_mib", "{}")],
        [rate("memcpy GB/s", "memcpy"), rate("DevicePrefetcher GB/s", "prefetcher"),
         column("of memcpy", "prefetcher_share", "{:.0%}"),
         rate("TensorLoader GB/s", "loader"), column("of memcpy", "loader_share", "{:.0%}"),
         column("hidden behind a kernel", "hidden", "{:.0%}"),
         column("host us", "host_us", "{:.0f}")],
    )  # fmt: skip


def parity_table(rows: Sequence[Row]) -> Table:
    """Errors of the parity job, a line an optimizer and dtype."""
    return table(
        f"Largest error of {parity.STEPS} steps against torch.optim in float64, in ulps", rows,
        [("who", lambda row: row["provider"]), OPTIMIZER, column("dtype", "dtype", str)],
        [*((name, lambda row, name=name: column("", name, "{:.3g}")[1](row["ulps"]))
           for name in parity.DECAYS), column("arithmetic", "parity", str)],
        lambda row: "" if row["parity"] == "same" else "bad",
    )  # fmt: skip


def workload_table(workloads: Iterable[Workload]) -> Table:
    """Every workload and its size."""
    return table(
        f"Workloads (*: only by name; {SWEEP}: all of its sizes that fit)", workloads,
        [("workload", lambda work: work.name + ("" if work.standard else " *")),
         ("what", lambda work: work.summary)],
        [("tensors", lambda work: f"{len(work.shapes):,}"),
         ("elements", lambda work: f"{work.elements:,}"),
         ("fp32 MB", lambda work: f"{work.elements * 4 / 1e6:,.1f}")],
    )  # fmt: skip


def provider_table(device: str) -> Table:
    """Every provider, with what it can step here, or why it cannot."""

    def why_not(name: str) -> dict[str, str]:
        # Without the optimizer's name: one reason for all is said once.
        reasons = {
            one: PROVIDERS[name].unavailable(one, device=device) for one in optimizers.names()
        }
        return {one: reason.replace(f".{one}:", ":") for one, reason in reasons.items()}

    return table(
        "Providers (*: only by name)", [(name, why_not(name)) for name in PROVIDERS],
        [("provider", lambda item: item[0] + ("" if PROVIDERS[item[0]].default else " *")),
         ("steps", lambda item: ", ".join(n for n, why in item[1].items() if not why) or "nothing"),
         ("why not", lambda item: "; ".join(dict.fromkeys(filter(None, item[1].values()))))],
    )  # fmt: skip


# ---- a GPU check ----


def part_table(rows: Sequence[Row]) -> Table:
    """How each part of the check ended."""

    def said(part: Row) -> str:
        counts = ", ".join(f"{count} {key}" for key, count in part.get("counts", {}).items())
        return ((part.get("reason") or counts).strip().splitlines() or [""])[-1][:70]

    return table("parts of the check", rows, [("part", lambda row: row["part"]),
                 ("status", lambda row: row["status"])],
                 [column("seconds", "seconds", "{:.0f}"), ("what", said)],
                 lambda row: "bad" if row["status"] == "failed" else "")  # fmt: skip


# ---- all of them ----


def _steps(rows: Sequence[Row]) -> list[Table]:
    swept = [row for row in rows if in_sweep(row)]
    whole = results.grouped([row for row in rows if not in_sweep(row)], "workload").values()
    made = [step_table(found) for found in whole]
    return made + ([sweep_table(swept)] if swept else [])


def _each_workload(make: Callable[[Sequence[Row]], Table]) -> Callable[[Any], list[Table]]:
    return lambda rows: [make(found) for found in results.grouped(rows, "workload").values()]


TABLES: dict[str, Callable[[Sequence[Row]], list[Table]]] = {
    "train": lambda rows: [train_table(rows)],
    "step": _steps,
    "pipeline": _each_workload(pipeline_table),
    "load": _each_workload(load_table),
    "transfer": lambda rows: [transfer_table(rows)],
    "parity": lambda rows: [parity_table(rows)],
    "part": lambda rows: [part_table(rows)],
}


def of(rows: Sequence[Row]) -> list[Table]:
    """The tables of rows of any jobs."""
    made = []
    for job, make in TABLES.items():
        if found := [row for row in rows if row["job"] == job]:
            made += make(found)
    if seen := [row for row in rows if row.get("device_us") is not None]:
        made.append(device_table(seen))
    return made


# ---- sentences ----

LEGENDS = {
    "train": (
        "loss: mean of the last epoch; acc.: on the test images; ours: fusedopt; diff.: largest "
        "|torch - ours| / torch of any batch's loss; torch's drift: the same between torch's own "
        "steps (*: they are bit for bit the same, so of its default step from weights one rounding "
        "away); us: median time of optimizer.step() in training."
    ),
    "step": (
        "arithmetic: of torch.optim in float64, within rounding; GB/s: of the bytes that have to "
        "be moved; % of floor: 100 is memory speed, the time of moving the same bytes without "
        "maths; times faster: than {baseline}; memory: peak above parameters and gradients, in a "
        "fresh process. Ratios are medians over rounds, p20 and p80 their spread."
    ),
    "pipeline": (
        f"Chains: {'; '.join(f'{n}: {chain.summary}' for n, chain in pipeline.CHAINS.items())}. "
        "bytes: a parameter, what each stage has to read and write. ours: fusedopt; ours / floor: "
        "1.00x is the time of moving its bytes."
    ),
    "load": (
        "Medians; samples/s and GB/s count what arrives, rows and labels; the last column is of "
        "epochs of the same round. memcpy floor: the same bytes, not gathered. What has threads or "
        "processes of its own slows down what comes next: it ran apart."
    ),
    "parity": (
        "from zeros: without decay, in ulps of the update; with decay: from normal weights, in "
        "ulps of both. The arithmetic is the same up to "
        f"{', '.join(f'{bound:.0f} in {str(dtype)[6:]}' for dtype, bound in parity.SAME.items())}."
    ),
}  # fmt: skip


def sentences(rows: Sequence[Row]) -> list[str]:
    """Why cells are empty or rounds few, what columns mean, and how fast fusedopt is."""
    said, slow, fast = dict[str, None](), dict[str, dict[str, None]](), dict[str, list[str]]()
    for row in rows:
        feed = load.FEEDS[row["provider"]].title if row["job"] == "load" else ""
        title = feed or title_of(row["provider"])
        if why := row.get("missing"):
            said[why if why.startswith(title) else f"{title}: {why}"] = None
        if row.get("of_rounds"):
            slow.setdefault(title, {})[row["workload"]] = None
        if row["provider"] == CANDIDATE and "torch" in row.get("backend", ""):
            said[f"fusedopt, {label(row)}: tensors by {row['backend']}"] = None
        if row.get("torch_step") == title_of("torch-default"):
            said[f"{row['optimizer']}: torch has no fused step, its default was timed"] = None
        if (
            row["provider"] == CANDIDATE
            and row["job"] in ("step", "pipeline")
            and not in_sweep(row)
        ):
            shares = [f"{1 / row['floor_share']:.2f}x the floor"] if row.get("floor_share") else []
            if row.get("faster"):
                shares.append(f"{compared(row['faster'])} {against(row['baseline'])}")
            if shares:
                fast.setdefault(label(row), []).append(
                    f"on {row['workload']} {' and '.join(shares)}"
                )
    if slow:
        listed = "; ".join(f"{title} on {', '.join(where)}" for title, where in slow.items())
        said[f"slow, so timed in fewer rounds: {listed}"] = None
    baseline = against(rows[0].get("baseline", ""))
    legends = dict.fromkeys(LEGENDS.get(row["job"], "").format(baseline=baseline) for row in rows)
    found = [f"fusedopt's {kind} step: {'; '.join(parts)}." for kind, parts in fast.items()]
    return [*said, *filter(None, legends), *found]
