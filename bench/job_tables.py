"""Tables of all jobs, and the sentences below them; `of` makes those of a list of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import load, optimizers, parity, pipeline, train
from . import rows as results
from .providers import PROVIDERS, title_of
from .rows import CANDIDATE, FLOOR, Row, label
from .step_tables import in_sweep, step_table, sweep_table
from .tables import (
    OPTIMIZER,
    PROVIDER,
    WORKLOAD,
    Column,
    Table,
    against,
    column,
    compared,
    is_ours,
    nanoseconds,
    table,
    times,
)
from .workloads import SWEEP, Workload


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
