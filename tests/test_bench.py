"""The benchmark's own promises: exact workloads, fair rounds, clear errors, complete rows.

No test asserts a time.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fusedopt
from fusedopt.bench import __main__ as cli
from fusedopt.bench import (
    floor,
    load,
    memory,
    optimizers,
    parity,
    pipeline,
    providers,
    rows,
    timing,
    train,
    workloads,
)  # fmt: skip
from fusedopt.bench.workloads import WORKLOADS, Workload

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed, reason="fusedopt.bench needs it")


# ---- workloads and optimizers ----


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("huge", 8, 8 * 4 * 2**20),
        ("gpt2", 148, 124_439_808),
        ("many", 1000, 1000 * 4096),
        ("tiny", 5000, 5000 * 64),
        ("resnet50", 161, 25_557_032),
        ("bert-base", 199, 109_482_240),
        ("vit-l16", 296, 304_326_632),
        ("llama-3-8b", 291, 8_030_261_248),
    ],
)
def test_workloads_have_the_published_numbers_of_parameters(name, tensors, elements):
    assert len(WORKLOADS[name].shapes) == tensors
    assert WORKLOADS[name].elements == elements


@pytest.mark.parametrize("name", ["gpt2", "bert-base", "llama-3-8b"])
def test_shapes_are_those_of_the_models_own_code(name):
    transformers = pytest.importorskip("transformers")
    llama = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "tie_word_embeddings": False}  # fmt: skip
    with torch.device("meta"):
        model = {
            "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config()),
            "bert-base": lambda: transformers.BertModel(transformers.BertConfig()),
            "llama-3-8b": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        }[name]()
    assert WORKLOADS[name].shapes == tuple(tuple(p.shape) for p in model.parameters())


def test_scale_takes_away_blocks_and_changes_the_name():
    whole = WORKLOADS["llama-3-8b"]
    quarter = whole.scaled(0.25)
    assert quarter.name == "llama-3-8b-8-blocks"
    assert len(quarter.shapes) == 3 + 8 * 9
    assert whole.scaled(1.0) is whole
    assert len(whole.scaled(0.001).shapes) == 3 + 9  # one block stays
    assert WORKLOADS["many"].scaled(0.5) is WORKLOADS["many"]


def test_the_sweep_is_geometric_and_asked_for_by_one_name():
    sizes = [WORKLOADS[name].elements for name in workloads.members("sweep")]
    assert (sizes[0], sizes[-1]) == (2**10, 2**30)
    assert {b // a for a, b in pairwise(sizes)} == {4}
    assert "sweep" in workloads.choices()
    assert "sweep-1K" not in workloads.choices()


def test_every_exported_optimizer_is_benchmarked():
    exported = {
        name
        for name in fusedopt.__all__
        if hasattr(getattr(fusedopt, name), "step") and name != "GradScaler"
    }
    assert set(optimizers.names()) == exported
    assert optimizers.names()[:5] == ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"]


def test_the_floor_moves_as_many_states_as_the_optimizer_keeps():
    counted = {name: optimizers.count_states(name) for name in optimizers.SETTINGS}
    assert counted == {"SGD": 1, "Adagrad": 1, "RMSprop": 1, "Adam": 2, "AdamW": 2}


def test_an_optimizers_formulas_are_read_from_the_registry():
    told = {name: len(list(optimizers.variants(name))) for name in optimizers.SETTINGS}
    assert told == {"SGD": 3, "Adagrad": 1, "RMSprop": 4, "Adam": 4, "AdamW": 2}


# ---- the floor ----


def check_every_word(move):
    for states, zero_grads in itertools.product((0, 2, 6), (False, True)):
        generator = torch.Generator().manual_seed(0)
        made = [[torch.randint(0, 2**30, (n,), dtype=torch.int32, generator=generator)
                 for _ in range(2 + states)] for n in (1, 2, 0, 1030, 5000, 70_001)]  # fmt: skip
        before = [[array.clone() for array in row] for row in made]
        move(made, True, zero_grads)()
        for row, old in zip(made, before, strict=True):
            for a, array in enumerate(row):
                grad = torch.zeros_like(array) if zero_grads else old[1]
                assert torch.equal(array, grad if a == 1 else old[a] + old[1])


def test_the_floor_reads_and_writes_every_word():
    check_every_word(floor.on_cpu)


def test_a_gpus_floor_reads_and_writes_every_word():
    pytest.importorskip("triton")
    code = "import test_bench as t; t.check_every_word(t.floor.on_gpu)"  # by the interpreter
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_without_a_compiler_the_floor_is_not_measured(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    floor.library.cache_clear()
    try:
        why = providers.PROVIDERS["floor"].unavailable("AdamW")
        assert why.startswith("the floor was not measured: it needs a C compiler, no-such-compiler")
    finally:
        floor.library.cache_clear()


# ---- timing ----


@pytest.mark.parametrize(
    ("estimate", "rounds", "budget", "expected"),
    [
        (0.01, 15, 2.5, 15),  # fast: every round
        (0.25, 15, 2.5, 10),  # what the budget pays for
        (9.0, 15, 2.5, timing.MIN_ROUNDS),
        (9.0, 3, 2.5, 3),  # never more than were asked for
        (0.0, 15, 2.5, 15),  # below the clock's resolution
    ],
)
def test_slow_steps_sit_rounds_out(estimate: float, rounds: int, budget: float, expected: int):
    chosen = timing.rounds_to_run(estimate, rounds, budget)
    assert len(chosen) == rounds
    assert sum(chosen) == expected
    assert chosen[0]


def test_every_round_runs_every_step_once_in_another_order():
    orders = [timing.order_of_round("abcde", index) for index in range(10)]
    assert all(sorted(order) == list("abcde") for order in orders)
    assert {order[0] for order in orders} == set("abcde") == {order[-1] for order in orders}
    assert len({tuple(order) for order in orders}) == 10


def test_a_race_times_each_entrant_once_a_round_and_puts_back_what_it_changes():
    seen: list[str] = []
    stages = {stage: lambda stage=stage: seen.append(stage) for stage in ("first", "second")}
    entrants = {
        "whole": timing.Entrant(lambda: seen.append("whole")),
        "parts": timing.Entrant(print, before=lambda: seen.append("before"), stages=stages),
    }
    race = timing.run_race(entrants, rounds=2, budget=60.0)
    part = ["before", "first", "second"]
    warm_up, rounds = ["whole", "whole", *part, *part], ["whole", *part, "whole", *part]
    assert seen == warm_up + rounds
    assert list(race.seconds) == ["whole", "parts", "parts/first", "parts/second"]
    laps = [race.seconds[timing.stage_of("parts", stage)] for stage in stages]
    assert race.seconds["parts"] == [a + b for a, b in zip(*laps, strict=True)]
    assert race.stats("whole").rounds == race.ratio("whole", "parts").rounds == 2


def test_stages_sit_out_with_their_step(monkeypatch):
    monkeypatch.setattr(timing, "rounds_to_run", lambda *_: [True, False])
    entrants = {"parts": timing.Entrant(lambda: None, stages={"only": lambda: None})}
    race = timing.run_race(entrants, rounds=2, budget=0.0)
    assert [[math.isnan(value) for value in values] for values in race.seconds.values()] == [
        [False, True],
        [False, True],
    ]


def test_ratios_pair_the_rounds_both_ran_in():
    nan = math.nan
    race = timing.Race({"slow": [4.0, nan, 8.0, 30.0], "fast": [2.0, 1.0, 4.0, nan]})
    assert race.ratio("slow", "fast") == timing.Stats(2.0, 2.0, 2.0, 2)
    assert race.stats("slow") == timing.Stats(8.0, pytest.approx(5.6), pytest.approx(21.2), 3)
    assert race.ratio("slow", "absent") is None


@pytest.fixture
def small(monkeypatch):
    """A workload of a moment, of grouped parameters, some of them beyond a chunk."""
    shapes = ((300, 130), (1000,), (7,), (1, 70_001))
    workload = Workload("small", "a few tensors", shapes, grouped=True)
    monkeypatch.setitem(WORKLOADS, "small", workload)
    return workload


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
@pytest.mark.parametrize("chain", pipeline.CHAINS)
def test_the_call_does_the_work_of_torchs_chain(small, chain, optimizer, monkeypatch):
    monkeypatch.setattr(optimizers, "STEP_LR", 0.1)  # so that parameters differ if anything does
    stand = pipeline.Chained(small, pipeline.CHAINS[chain], optimizer, "cpu")
    before = providers.parameters_with(stand.master, pipeline.SCALE)
    norms = torch.stack([gradient.norm() for gradient in stand.master])
    assert norms.norm() > 2 * pipeline.MAX_NORM * pipeline.SCALE  # there is something to clip
    torchs, ours = stand.torch_chain(), stand.fused_call()
    floor = stand.floor()
    calls = [torchs.call, lambda: [stage() for stage in torchs.stages.values()], torchs.call]
    for call in calls:
        for entrant, work in ((torchs, call), (ours, ours.call), (floor, floor.call)):
            entrant.before()
            for parameter, gradient in zip(entrant.parameters, stand.gradients, strict=False):
                assert parameter.grad is gradient
            assert all(map(torch.equal, stand.gradients, stand.master))
            work()
            if entrant is floor:
                assert chain == "clip-none" or not any(map(torch.any, stand.gradients))
            for parameter in entrant.parameters:
                if chain == "clip-none":
                    assert parameter.grad is None
                else:
                    assert not parameter.grad.any()
    states = optimizers.count_states(optimizer)
    for index, start in enumerate(before):
        mine, its = ours.parameters[index], torchs.parameters[index]
        assert (its - start).abs().max() > 1e-4
        torch.testing.assert_close(mine - start, its - start, rtol=1e-3, atol=1e-7)
        found, wanted = ours.optimizer.state[mine], torchs.optimizer.state[its]
        shared = [name for name in wanted if name in found and torch.is_tensor(wanted[name])]
        assert sum(wanted[name].shape == start.shape for name in shared) == states
        for name in shared:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-9)
        if chain == "ema":
            mine, its = found["ema"], [*stand.average.parameters()][index]
            assert (its - start).abs().max() > 1e-6
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=2e-8)


def test_bytes_are_what_each_stage_has_to_move():
    clip, none, ema = (pipeline.CHAINS[name] for name in ("clip", "clip-none", "ema"))
    assert ema.torch_bytes(2) == {"unscale": 8, "clip": 12, "step": 28, "average": 12, "zero": 4}
    assert ema.fused_bytes(2) == {"norm": 4, "update": 28, "average": 8, "zero": 4}
    totals = [(sum(c.torch_bytes(2).values()), sum(c.fused_bytes(2).values()))
              for c in (clip, none, ema)]  # fmt: skip
    assert totals == [(52, 36), (48, 32), (64, 44)]
    assert (sum(clip.torch_bytes(1).values()), sum(clip.fused_bytes(0).values())) == (44, 20)


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("stepp", "invalid choice: 'stepp'"),
        ("step --workloads gpt3", "--workloads: invalid choice: 'gpt3'"),
        ("step --optimizers AdamW Lamb", "--optimizers: invalid choice: 'Lamb'"),
        ("step --providers apex", "--providers: apex: apex is not installed; its README"),
        ("step --baseline apex", "--baseline: apex is not among the providers"),
        ("step --model json", "--model: cannot import 'json' (ValueError"),
        ("step --model json:loads", "--model: 'json:loads': TypeError"),
        ("step --rounds 0", "--rounds: invalid positive value: '0'"),
        ("step --chains clip", "unrecognized arguments: --chains"),
        ("parity no_such:Adam", "cannot import 'no_such:Adam' (ModuleNotFoundError"),
        ("parity collections:OrderedDict", "torch.optim has no OrderedDict"),
        ("report", "the following arguments are required: FILE"),
        ("report {file}", "wanted: a file that --json has written"),
        ("train --models resnet", "--models: invalid choice: 'resnet'"),
        ("pipeline --dtype float32", "unrecognized arguments: --dtype"),
        ("load --workloads images2", "--workloads: invalid choice: 'images2'"),
        ("--out {file}/plots", "cannot write to"),
        ("--json {directory}", "(Is a directory)"),
    ],
)
def test_wrong_arguments_stop_before_any_work(arguments, said, tmp_path, capsys):
    (tmp_path / "file").write_text("not a directory")
    places = {"file": tmp_path / "file", "directory": tmp_path}
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments.format(**places).split())
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert "python -m pip install rich scikit-learn matplotlib" in capsys.readouterr().err


def run(job, path, code=0):
    """A job's rows."""
    assert cli.main([*job.split(), "--json", str(path / "rows.jsonl")]) == code
    return rows.read(path / "rows.jsonl")


def test_a_workload_that_does_not_fit_is_refused_or_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "available_memory", lambda device="cpu": 500_000)
    with pytest.raises(SystemExit):
        cli.main(["step", "--workloads", "huge"])
    assert "--workloads: workload huge needs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["load", "--workloads", "table"])
    assert "table needs" in capsys.readouterr().err
    job = "step --workloads sweep --optimizers SGD --providers fusedopt --rounds 1 --memory none"
    found = run(job, tmp_path)
    assert [row["workload"] for row in found][:2] == ["sweep-1K", "sweep-4K"]
    said = capsys.readouterr().out
    assert "Left out: workload sweep-" in said
    assert "sweep: one tensor of so many elements" in said


# ---- the jobs ----


def test_train_compares_draws_and_records_whatever_the_case_of_names(tmp_path, capsys, monkeypatch):
    job = f"train --epochs 1 --models MLP --optimizers sgd --out {tmp_path}"
    found = run(job, tmp_path)
    assert (tmp_path / "loss_curves.png").stat().st_size > 10_000
    told = {row["provider"]: row for row in found}
    assert set(told) == {"torch-default", "torch-foreach", "torch-fused", "fusedopt",
                         "torch-nudged"}  # fmt: skip
    assert all(len(row["curve"]) == 19 and row["ms"] > 0 for row in found)
    assert told["fusedopt"]["difference"] <= 1e-5
    assert "The bound holds for all 1 rows" in capsys.readouterr().out
    monkeypatch.setattr(train, "FIRST_EPOCH_BOUND", -1.0)
    run(job, tmp_path, code=1)
    assert "SGD on mlp: first epoch's loss difference is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("whole_run", "drift", "accuracy", "failures"),
    [
        (9e-6, 0.0, 97.0, 0),
        (2e-5, 1e-6, 97.0, 1),
        (2e-5, 1e-5, 97.0, 0),
        (0.0, 0.0, 96.0, 1),
        (math.nan, 1.0, math.nan, 2),
    ],
)
def test_bound_on_curves_and_accuracy(whole_run, drift, accuracy, failures):
    row = {"optimizer": "SGD", "workload": "mlp", "difference_first_epoch": 0.0, "drift": drift,
           "difference": whole_run, "accuracy": accuracy, "accuracy_of_torch": 97.0}  # fmt: skip
    assert len(train.failures(row)) == failures


def test_step_records_every_provider(small, tmp_path, capsys):
    job = "step --workloads small --optimizers AdamW RMSprop --rounds 3 --dtype bfloat16"
    found = run(job, tmp_path)
    usual = {"torch-default", "torch-foreach", "torch-fused", "fusedopt", "floor"}
    adamw = {row["provider"]: row for row in found
             if row["optimizer"] == "AdamW" and "ms" in row}  # fmt: skip
    assert set(adamw) == usual
    for name, row in adamw.items():
        assert row["rounds"] == 3
        assert row["bytes"] == 14
        assert row["floor_share"] > 0
        assert row["faster_p20"] <= row["faster"] <= row["faster_p80"]
        assert (row.get("parity"), "peak_bytes" in row) == (
            (None, False) if name == "floor" else ("same", True)
        )
        assert {row["device"], row["dtype"], row["date"] != ""} == {"cpu", "bfloat16", True}
    assert adamw["fusedopt"]["backend"] == "cpu: 4"
    (missing,) = [row for row in found if "missing" in row]
    assert missing["missing"] == "torch.optim.RMSprop has no fused step"
    said = capsys.readouterr().out
    assert "small: a few tensors" in said
    assert "fusedopt's AdamW bfloat16 step: on small" in said


def test_the_step_job_has_a_gate(small, tmp_path, capsys):
    job = "step --workloads Small --optimizers sgd --providers Torch-Fused FusedOpt --rounds 2"
    run(f"{job} --memory none --skip-parity --fail-below 1e9", tmp_path, code=1)
    assert "Below 1000000000.0: small, SGD float32 on" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_measured(small, monkeypatch, tmp_path, capsys):
    steps = iter(range(100))

    def interrupted(*arguments):
        if next(steps) == 1:
            raise KeyboardInterrupt
        return run_race(*arguments)

    run_race = timing.run_race
    monkeypatch.setattr(timing, "run_race", interrupted)
    job = "step --workloads small --optimizers SGD AdamW --rounds 2 --memory none"
    found = run(f"{job} --providers fusedopt floor", tmp_path, code=130)
    assert {row["optimizer"] for row in found} == {"SGD"}
    assert "Interrupted." in capsys.readouterr().out


def test_pipeline_records_every_stage(small, tmp_path, capsys):
    job = f"pipeline --workloads small --optimizers RMSprop --rounds 3 --out {tmp_path}"
    found = run(job, tmp_path)
    for name in ("pipeline.png", "pipeline_bytes.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    for chain in pipeline.CHAINS:
        told = [row for row in found if row["chain"] == chain]
        whole = rows.by([row for row in told if "stage" not in row], "provider")
        assert set(whole) == {"torch", "torch-stages", "fusedopt", "floor"}
        stages = {row["stage"]: row["bytes"] for row in told if "stage" in row}
        assert stages == pipeline.CHAINS[chain].torch_bytes(1) == whole["torch"]["stages"]
        assert whole["fusedopt"]["bytes"] == whole["floor"]["bytes"]
        assert whole["fusedopt"]["faster"] > 0 < whole["fusedopt"]["floor_share"]
    said = capsys.readouterr().out
    assert "fusedopt's RMSprop ema step: on small" in said
    assert "RMSprop: torch has no fused step" in said


def test_a_model_of_ones_own_is_a_workload(tmp_path, monkeypatch):
    code = "import torch\ndef net():\n    return torch.nn.Linear(30, 7, bias=False)\n"
    (tmp_path / "my_net.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    job = "step --model my_net:net --optimizers SGD --providers fusedopt floor --rounds 2"
    ours, moved = run(job, tmp_path)
    assert (ours["workload"], ours["tensors"], ours["elements"]) == ("model", 1, 210)
    # In a process that has never seen the model.
    assert "peak_bytes" in ours
    assert "peak_bytes" not in moved
    del WORKLOADS["model"]


def test_parity_compares_classes_by_import_path(tmp_path, capsys):
    found = run("parity torch.optim:AdamW fusedopt.Adam", tmp_path)
    assert [(row["provider"], row["optimizer"]) for row in found] == [
        ("torch default", "AdamW"), ("torch.optim:AdamW", "AdamW"), ("fusedopt.Adam", "Adam"),
    ]  # fmt: skip
    assert cli.main(["parity", "torch.optim:AdamW", "--as", "Adam"]) == 1
    assert "decay differs" in capsys.readouterr().out


def test_list_names_everybody(capsys, monkeypatch):
    monkeypatch.setattr(providers, "_trial", lambda *_: "not tried")  # some compile for minutes
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    for name in (*providers.PROVIDERS, *WORKLOADS):
        assert name in said


# ---- loading ----

FEW = load.Rows("100 x 8", 100, (8,), torch.float32, 32)


@pytest.mark.parametrize("name", [name for name in load.FEEDS if name != "dataloader-2"])
def test_every_feed_goes_through_all_rows(name, monkeypatch):
    feed, seen = load.FEEDS[name], []
    if reason := feed.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(load, "_drain", lambda batches, device: seen.extend(batches))
    data = [torch.arange(100.0).view(100, 1).repeat(1, 8), torch.arange(100)]
    feed.build("cpu", data, FEW)()
    if name in (rows.CANDIDATE, rows.FLOOR):
        return  # its own loop, which keeps nothing
    assert [len(batch) for batch, _ in seen] == [32, 32, 32, 4]
    assert torch.equal(torch.cat([labels for _, labels in seen]).sort().values, torch.arange(100))
    assert all(torch.equal(batch[:, 0].long(), labels) for batch, labels in seen)


def test_feeds_race_those_that_linger_apart(monkeypatch, capsys):
    monkeypatch.setitem(load.WORKLOADS, "few", FEW)
    absent = load.Feed("Absent", lambda *_: pytest.fail("built"), "no_such_package", True)
    monkeypatch.setitem(load.FEEDS, "torchdata", absent)
    wanted = ["index_select", "dataloader-batched", "torchdata", "fusedopt", "floor"]
    advance = [].append
    races = [load.race(task, 2, 1.0, advance) for task in load.plan("few", wanted, "cpu")]
    assert [[row["provider"] for row in found] for found in races] == [
        ["torchdata"], [name for name in wanted if name != "torchdata"],
    ]  # fmt: skip
    told = rows.by([row for found in races for row in found], "provider")
    assert told["torchdata"]["missing"] == "no_such_package is not installed"
    assert told["floor"]["bytes"] == 100 * (8 * 4 + 8)
    assert told["index_select"]["faster"] > 0


# ---- arithmetic and memory ----


class Wrong(torch.optim.Adam):
    """Adam with one thing wrong, chosen by the class attribute."""

    wrong = ""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state, grad = self.state[p], p.grad
                m = state.setdefault("m", torch.zeros_like(p))
                v = state.setdefault("v", torch.zeros_like(p))
                t = state["t"] = state.get("t", 0) + 1
                lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
                b1, b2 = group["betas"]
                if self.wrong == "decoupled":
                    p.mul_(1 - lr * decay)
                else:
                    grad = grad + decay * p
                m.mul_(b1).add_(grad, alpha=1 - b1)
                v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
                c1, c2 = 1 - b1**t, 1 - b2**t
                if self.wrong == "uncorrected":
                    c2 = 1.0
                root = (v / c2).sqrt() + eps
                if self.wrong == "eps":
                    root = (v / c2 + eps**2).sqrt()
                p.sub_(lr / c1 * m / root)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [("", "same"), ("decoupled", "decay differs"), ("uncorrected", "differs"), ("eps", "differs")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_arithmetic_shows(wrong, found, dtype):
    cls = type("Mutant", (Wrong,), {"wrong": wrong})
    told = parity.check(cls, "Adam", dtype)
    assert told["parity"] == found, told


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
@pytest.mark.parametrize("name", ["torch-default", "fusedopt", "fusedopt-generic"])
def test_torch_and_fusedopt_do_the_same_arithmetic(name, optimizer):
    provider = providers.PROVIDERS[name]
    for dtype in (torch.float32, torch.float64):
        told = parity.check(partial(provider.optimizer, optimizer), optimizer, dtype)
        assert told["parity"] == "same"
        assert set(told["ulps"]) == {"from zeros", "with decay"}
        assert max(told["ulps"].values()) < 8


def test_a_nan_is_never_the_same():
    found = torch.tensor([1.0, float("nan")])
    assert parity.ulps_of_update(torch.zeros(2), found, torch.ones(2)) == float("inf")


def test_an_absent_or_broken_library_is_a_reason_and_no_error(tmp_path, monkeypatch):
    broken = {"AdamW": ("broken_library.AdamW", {})}
    absent = providers.Provider("absent", "Absent", "no_such_library", broken)
    assert absent.unavailable("AdamW").startswith("no_such_library is not installed; make bench")
    (tmp_path / "broken_library.py").write_text("raise OSError('libcuda.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    peer = providers.Provider("broken", "Broken", "broken_library", broken)
    monkeypatch.setitem(providers.PROVIDERS, "broken", peer)
    assert peer.unavailable("AdamW") == "libcuda.so is missing"
    assert peer.unavailable("SGD") == "Broken has no SGD"


@pytest.mark.parametrize("name", providers.PEERS)
def test_an_installed_peer_does_its_share_or_says_why(name):
    peer = providers.PROVIDERS[name]
    if not peer.installed() or "cpu" not in peer.devices:
        pytest.skip(f"{peer.library} is not installed here, or runs on a GPU")
    if peer.library in ("deepspeed", "torchao"):
        pytest.skip("it compiles for minutes; `fusedopt.bench list` tries it")
    for optimizer in peer.classes:
        assert peer.unavailable(optimizer) == ""
        told = parity.check(partial(peer.optimizer, optimizer), optimizer)
        assert told["ulps"]["from zeros"] < parity.SAME[torch.float32]


def test_a_peer_is_told_torchs_defaults(tmp_path, monkeypatch):
    (tmp_path / "eager_library.py").write_text(
        "class Adam:\n    def __init__(self, params, lr, eps=1, betas=2, flag=True):\n"
        "        self.told = (lr, eps, betas, flag)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    classes = {"Adam": ("eager_library.Adam", {})}
    peer = providers.Provider("eager", "Eager", "eager_library", classes)
    assert peer.optimizer("Adam", [], lr=0.1).told == (0.1, 1e-8, (0.9, 0.999), True)


def test_quiet_silences_file_descriptors_and_gives_them_back(capfd):
    with providers.quiet():
        os.system("echo chatter of a child; echo chatter >&2")
    os.system("echo after")
    assert tuple(capfd.readouterr()) == ("after\n", "")


def test_every_tier_is_a_provider_and_leaves_the_one_in_use_alone():
    before = fusedopt.cpu_tier()
    for tier in fusedopt.cpu_tiers():
        providers.PROVIDERS[f"fusedopt-{tier}"].entrant("SGD", [torch.ones(100)]).call()
    assert fusedopt.cpu_tier() == before


def test_memory_is_what_the_states_take():
    shared = {"workload": "weighed", "dtype": "float32", "device": "cpu",
              "shapes": ((2**22,),) * 4, "grouped": False}  # fmt: skip
    kinds = [{**shared, "optimizer": name} for name in ("AdamW", "SGD")]
    found = memory.measure(kinds, ["fusedopt"], lambda label: None)
    ours, sgd = (row["peak_bytes"] for row in found.values())
    states = 4 * 2**22 * 4
    assert 2 * states <= ours < 2.2 * states
    assert states <= sgd < 1.2 * states
