"""The benchmark's own promises: exact workloads, fair rounds, clear errors, a complete result file.

No test asserts a time.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt
from fusedopt.bench import __main__ as cli
from fusedopt.bench import machine, optimizers, picture, pipeline, step, timing, train
from fusedopt.bench.workloads import WORKLOADS, Workload

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed, reason="fusedopt.bench needs it")

STATS_KEYS = {"median", "p20", "p80", "rounds"}


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does."""
    command = [sys.executable, "-m", "fusedopt.bench", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


# ---- workloads and optimizers ----


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("huge", 8, 8 * 4 * 2**20),
        ("gpt2", 148, 124_439_808),
        ("many", 1000, 1000 * 4096),
        ("tiny", 5000, 5000 * 64),
    ],
)
def test_workloads_have_exactly_the_shapes_they_name(name: str, tensors: int, elements: int):
    assert len(WORKLOADS[name].shapes) == tensors
    assert WORKLOADS[name].elements == elements


def test_gpt2_has_the_models_shapes_in_its_order():
    shapes = WORKLOADS["gpt2"].shapes
    assert shapes[:2] == ((50257, 768), (1024, 768))
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    for index in range(12):
        assert list(shapes[2 + 12 * index : 14 + 12 * index]) == block
    assert shapes[-2:] == ((768,), (768,))


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


def test_race_times_each_step_once_a_round():
    calls = {"a": 0, "b": 0}

    def count(name: str):
        calls[name] += 1

    race = timing.Race()
    timing.run_race(race, {name: lambda n=name: count(n) for name in calls}, rounds=7, budget=60.0)
    assert calls == {"a": 9, "b": 9}  # and twice to warm up
    assert race.stats("a").rounds == race.ratio("a", "b").rounds == 7


def test_race_puts_back_what_steps_change_and_times_stages_in_their_order():
    seen: list[str] = []
    stages = {stage: lambda stage=stage: seen.append(stage) for stage in ("first", "second")}
    steps = {"whole": lambda: seen.append("whole"), "parts": stages}
    before = {"parts": lambda: seen.append("before")}
    race = timing.Race()
    timing.run_race(race, steps, rounds=1, budget=60.0, before=before)
    part = ["before", "first", "second"]
    assert seen == ["whole", "whole", *part, *part, "whole", *part]
    assert list(race.seconds) == ["whole", "parts", "parts/first", "parts/second"]
    laps = [race.seconds[timing.stage_of("parts", stage)][0] for stage in stages]
    assert race.seconds["parts"] == [sum(laps)]


def test_stages_sit_out_with_their_step(monkeypatch):
    monkeypatch.setattr(timing, "rounds_to_run", lambda *_: [True, False])
    race = timing.Race()
    timing.run_race(race, {"parts": {"only": lambda: None}}, rounds=2, budget=0.0)
    assert [[math.isnan(value) for value in values] for values in race.seconds.values()] == [
        [False, True],
        [False, True],
    ]


def test_ratios_pair_the_rounds_both_ran_in():
    nan = math.nan
    race = timing.Race({"slow": [4.0, nan, 8.0, 30.0], "fast": [2.0, 1.0, 4.0, nan]})
    assert race.ratio("slow", "fast") == timing.Stats(2.0, 2.0, 2.0, 2)
    assert race.stats("slow") == timing.Stats(8.0, pytest.approx(5.6), pytest.approx(21.2), 3)


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["stepp"],
            "unknown subcommand 'stepp'; wanted: train, step, pipeline, load, parity, report",
        ),
        (["step", "--workloads", "gpt3"], "--workloads: unknown workload 'gpt3'; wanted: a comma"),
        (["step", "--optimizers", "AdamW,Lamb"], "--optimizers: unknown optimizer 'Lamb'"),
        (["step", "--providers", "adam++"], "--providers: unknown provider 'adam++'"),
        (["step", "--providers", "apex"], "--providers: apex: apex is not installed; its README"),
        (["step", "--baseline", "apex"], "--baseline: apex is not among the providers"),
        (["step", "--baseline", "adam++"], "--baseline: invalid choice: 'adam++'"),
        (["step", "--model", "json"], "--model: got 'json'; wanted: module:factory"),
        (["step", "--model", "json:loads"], "--model: 'json:loads': TypeError"),
        (["step", "--scale", "0"], "--scale: got '0'; wanted: a number above 0, at most 1"),
        (["step", "--csv", "{file}/result.csv"], "--csv: cannot write to"),
        (["parity", "no_such:Adam"], "cannot import 'no_such:Adam' (ModuleNotFoundError"),
        (["parity", "collections:OrderedDict"], "torch.optim has no OrderedDict"),
        (["report"], "the following arguments are required: FILE"),
        (["report", "{file}"], "wanted: a file of step --json"),
        (["report", "{file}", "--out", "{file}/plots"], "--out: cannot write to"),
        (["step", "--dtype", "int8"], "--dtype: unknown dtype 'int8'"),
        (["train", "--models", "resnet"], "--models: unknown model 'resnet'"),
        (["step", "--rounds", "0"], "--rounds: got '0'; wanted: a whole number, at least 1"),
        (["step", "--rounds", "many"], "--rounds: got 'many'; wanted: a whole number"),
        (["step", "--seconds", "nan"], "--seconds: got 'nan'; wanted: a number, at least 0"),
        (["train", "--rounds", "3"], "unrecognized arguments: --rounds"),
        (["pipeline", "--chains", "clip,lamb"], "--chains: unknown chain 'lamb'; wanted: a comma"),
        (["pipeline", "--workloads", "gpt3"], "--workloads: unknown workload 'gpt3'"),
        (["pipeline", "--dtype", "float32"], "unrecognized arguments: --dtype"),
        (["pipeline", "--rounds", "0"], "--rounds: got '0'; wanted: a whole number, at least 1"),
        (["pipeline", "--out", "{file}/plots"], "--out: cannot write to"),
        (["step", "--chains", "clip"], "unrecognized arguments: --chains"),
        (["--out", "{file}/plots"], "--out: cannot write to"),
        (["--json", "{file}/result.json"], "--json: cannot write to"),
        (["--json", "{directory}"], "is a directory; wanted: the name of a file"),
    ],
)
def test_wrong_arguments_stop_before_any_work(arguments: list[str], said: str, tmp_path, capsys):
    (tmp_path / "file").write_text("not a directory")
    places = {"file": tmp_path / "file", "directory": tmp_path}
    with pytest.raises(SystemExit) as stop:
        cli.main([argument.format(**places) for argument in arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(cli.NEEDS, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "python -m pip install no-such-package" in capsys.readouterr().err


def test_a_workload_that_does_not_fit_is_refused_or_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "available_memory", lambda device: 50_000_000)
    with pytest.raises(SystemExit) as stop:
        cli.main(["step", "--workloads", "gpt2"])
    assert stop.value.code == 2
    assert "workload gpt2 needs" in capsys.readouterr().err
    result = tmp_path / "result.json"
    options = ["--optimizers", "SGD", "--providers", "fusedopt,floor", "--rounds", "1"]
    options += ["--memory", "none", "--skip-parity"]
    assert cli.main(["step", *options, "--json", str(result)]) == 0  # nobody asked for it by name
    assert "Left out: workload huge needs" in capsys.readouterr().out
    assert [row["workload"] for row in json.loads(result.read_text())["step"]["rows"]] == ["tiny"]


def test_a_pipeline_that_cannot_run_here_stops_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(machine, "available_memory", lambda device: 50_000_000)
    with pytest.raises(SystemExit) as stop:
        cli.main(["pipeline", "--workloads", "many,one", "--chains", "ema"])
    assert stop.value.code == 2
    assert "workload many needs 0.3 GB of memory" in capsys.readouterr().err
    monkeypatch.setattr(cli, "backend_for", lambda device: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["pipeline"])
    assert stop.value.code == 2
    assert "--device: fusedopt has no kernels for cpu here" in capsys.readouterr().err


# ---- the jobs ----


def test_train_compares_draws_and_records(tmp_path):
    arguments = ["--epochs", "1", "--models", "mlp", "--optimizers", "AdamW,RMSprop"]
    done = bench("train", *arguments, "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The bound holds for all 2 rows" in done.stdout
    picture = tmp_path / "build" / "bench" / "loss_curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"]
    assert result["step"] == result["pipeline"] == {"rows": []}
    assert set(result["machine"]) >= {
        "date", "gpu", "cuda", "cpu", "cores", "threads", "tier", "python", "torch", "fusedopt",
        "git_revision",
    }  # fmt: skip
    assert [row["optimizer"] for row in result["train"]["rows"]] == ["AdamW", "RMSprop"]
    for row in result["train"]["rows"]:
        assert row["failures"] == []
        assert row["difference"]["first_epoch"] <= train.FIRST_EPOCH_BOUND
        assert len(row["curves"]["fusedopt"]) == row["batches_per_epoch"] == 19
        assert set(row["final_loss"]) == set(row["test_accuracy"]) == set(row["curves"])
        assert set(row["step_ms"]) == {"torch-default", "fusedopt"}
        assert set(row["torch_over_fusedopt"]) == STATS_KEYS
    drifts = [set(row["drifts"]) for row in result["train"]["rows"]]
    assert drifts == [
        {"torch-foreach", "torch-fused", "torch-nudged"},
        {"torch-foreach", "torch-nudged"},  # torch has no fused RMSprop
    ]


def test_train_fails_and_names_the_row_when_the_curves_differ(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "FIRST_EPOCH_BOUND", -1.0)  # even the same curve is too far away
    options = ["--epochs", "1", "--models", "mlp", "--optimizers", "SGD", "--out", str(tmp_path)]
    assert cli.main(["train", *options]) == 1
    said = capsys.readouterr().out
    assert "The bound does NOT hold" in said
    assert "SGD on mlp: first epoch's loss difference is" in said


@pytest.mark.parametrize(
    ("whole_run", "drift", "accuracy", "failures"),
    [
        (2.9e-3, 1e-3, 97.4, 0),  # within three times torch's drift, half a point away
        (3.1e-3, 1e-3, 97.0, 1),
        (9e-6, 1e-8, 97.0, 0),  # a drift of one rounding is no measure
        (math.nan, 1e-3, 97.0, 1),
        (0.0, 1e-3, 96.0, 1),
    ],
)
def test_bound_on_curves_and_accuracy(whole_run, drift, accuracy, failures):
    row = train.Row(
        model="mlp",
        optimizer="Adam",
        settings={},
        batches_per_epoch=1,
        curves={},
        accuracy={"torch-default": 97.0, "fusedopt": accuracy},
        difference=train.Difference(0.0, whole_run),
        drifts={
            "torch-fused": train.Difference(0.0, drift),
            "torch-nudged": train.Difference(0.0, 1.0),
        },
        times=timing.Race(),
    )
    assert row.drift_source == "torch-fused"
    assert len(row.failures()) == failures


def test_step_records_every_provider(tmp_path):
    arguments = ["--workloads", "tiny", "--rounds", "3", "--optimizers", "AdamW,RMSprop"]
    arguments += ["--providers", "torch-default,torch-foreach,torch-fused,fusedopt,floor"]
    arguments += ["--memory", "none"]
    done = bench("step", *arguments, "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch fused: torch.optim.RMSprop has no fused step" in done.stdout
    assert "fusedopt's AdamW step: on tiny" in done.stdout

    result = json.loads((tmp_path / "result.json").read_text())
    adamw, rmsprop = result["step"]["rows"]
    assert (adamw["workload"], adamw["tensors"], adamw["elements"]) == ("tiny", 5000, 320_000)
    usual = {"torch-default", "torch-foreach", "torch-fused", "fusedopt", "floor"}
    assert set(adamw["step_ms"]) == usual
    assert adamw["unavailable"] == {}
    assert adamw["bytes_per_parameter"] == 28
    assert set(adamw["baseline_over"]) == set(adamw["floor_over"]) == usual
    assert all(adamw["parity"][name]["same"] for name in usual - {"floor"})
    assert adamw["peak_bytes"] == rmsprop["peak_bytes"] == {}
    assert set(rmsprop["step_ms"]) == usual - {"torch-fused"}
    assert set(rmsprop["unavailable"]) == {"torch-fused"}
    assert set(adamw["ratios"]) == {
        "fusedopt_over_floor", "best_torch_over_fusedopt", "torch_fused_over_fusedopt",
    }  # fmt: skip
    for stats in (*adamw["step_ms"].values(), *adamw["ratios"].values()):
        assert set(stats) == STATS_KEYS
        assert stats["rounds"] == 3
        assert 0 < stats["p20"] <= stats["median"] <= stats["p80"]


def test_default_step_rows_include_bfloat16_where_bytes_decide():
    standard = [name for name, workload in WORKLOADS.items() if workload.standard]
    tasks = step.plan_tasks(standard, optimizers.names(), None)
    assert [task for task in tasks if task.dtype != "float32"] == [
        step.Task("huge", "AdamW", "bfloat16"),
        step.Task("many", "AdamW", "bfloat16"),
    ]
    assert len(tasks) == 4 * len(optimizers.names()) + 2


def test_interrupt_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    def interrupted(race, steps, rounds, budget, on_round):
        on_round(0)
        race.seconds.update({name: [1e-3] for name in steps})
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "run_race", interrupted)
    result = tmp_path / "result.json"
    arguments = ["step", "--workloads", "tiny", "--optimizers", "SGD", "--json", str(result)]
    arguments += ["--memory", "none", "--providers", "torch-fused,fusedopt,floor"]
    assert cli.main(arguments) == cli.EXIT_INTERRUPTED
    said = capsys.readouterr().out
    assert "tiny: 5,000 tensors" in said
    assert "Interrupted" in said
    content = json.loads(result.read_text())
    assert not content["complete"]
    assert len(content["step"]["rows"]) == 1


# ---- the pipeline job ----


@pytest.fixture
def small(monkeypatch):
    """A workload of a moment, of grouped parameters, some of them beyond a chunk."""
    shapes = ((300, 130), (1000,), (7,), (1, 70_001))
    workload = Workload("small", "a few tensors", shapes, grouped=True, standard=False)
    monkeypatch.setitem(WORKLOADS, "small", workload)
    return workload


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
@pytest.mark.parametrize("chain", pipeline.CHAINS)
def test_the_call_does_the_work_of_torchs_chain(small, chain, optimizer, monkeypatch):
    monkeypatch.setattr(optimizers, "STEP_LR", 0.1)  # so that parameters differ if anything does
    task = pipeline.Task("small", chain, optimizer)
    stand = pipeline.Stand(task, pipeline.scaled_gradients(task))
    before = stand.parameters()
    norms = torch.stack([gradient.norm() for gradient in stand.master])
    assert norms.norm() > 2 * pipeline.MAX_NORM * pipeline.SCALE  # there is something to clip
    torchs, ours = stand.torch_chain(), stand.fused_call()
    floor = stand.floor()
    calls = [torchs.call, lambda: [stage() for stage in torchs.stages.values()], torchs.call]
    for call in calls:
        for entrant, work in ((torchs, call), (ours, ours.call), (floor, floor.call)):
            entrant.restore()
            for parameter, gradient in zip(entrant.parameters, stand.master, strict=True):
                assert torch.equal(parameter.grad, gradient)
            work()
            for parameter in entrant.parameters:
                if chain == "clip-none":
                    assert (parameter.grad is None) == (entrant is not floor)
                elif entrant is not floor:
                    assert not parameter.grad.any()
    assert len(torchs.averages()) == (len(small.shapes) if chain == "ema" else 0)
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
            mine, its = ours.averages()[index], torchs.averages()[index]
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


def test_pipeline_records_every_stage(small, tmp_path, capsys):
    result, folder = tmp_path / "result.json", tmp_path / "pictures"
    arguments = ["--workloads", "small", "--optimizers", "AdamW,RMSprop", "--rounds", "3"]
    assert cli.main(["pipeline", *arguments, "--out", str(folder), "--json", str(result)]) == 0
    said = capsys.readouterr().out
    assert "small: a few tensors, 110,008 elements in all; ns a parameter, median of 3" in said
    assert "fusedopt's AdamW with ema: on small" in said
    assert "RMSprop: torch has no fused step, its default was timed" in said
    assert "\N{HORIZONTAL ELLIPSIS}" not in said  # no column was cut off
    for name in ("pipeline.png", "pipeline_bytes.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    content = json.loads(result.read_text())
    assert content["complete"]
    assert content["train"] == content["step"] == {"rows": []}
    rows = content["pipeline"]["rows"]
    assert content["pipeline"]["rounds"] == 3
    wanted = [(name, chain) for name in ("AdamW", "RMSprop") for chain in pipeline.CHAINS]
    assert [(row["optimizer"], row["chain"]) for row in rows] == wanted
    entrants = {"torch", "torch-stages", "fusedopt", "floor"}
    for row in rows:
        stages = {"unscale", "clip", "step", "zero"} | ({"average"} & {*row["stage_ms"]})
        assert ("average" in stages) == (row["chain"] == "ema")
        assert set(row["stage_ms"]) == set(row["bytes_per_parameter"]["torch"]) == stages
        assert set(row["chain_ms"]) == entrants
        assert set(row["ns_per_parameter"]) == entrants | stages
        assert set(row["ratios"]) == {"torch_over_fusedopt", "fusedopt_over_floor"}
        assert set(row["seconds"]) == entrants | {f"torch-stages/{stage}" for stage in stages}
        assert all(len(times) == 3 for times in row["seconds"].values())
        for stats in (*row["chain_ms"].values(), *row["stage_ms"].values()):
            assert set(stats) == STATS_KEYS
            assert 0 < stats["p20"] <= stats["median"] <= stats["p80"]
        milliseconds = row["chain_ms"]["torch"]["median"]
        assert row["ns_per_parameter"]["torch"] == pytest.approx(milliseconds * 1e6 / 110_008)
    assert [row["torch_step"] for row in rows] == ["torch fused"] * 3 + ["torch default"] * 3


def test_pipeline_runs_all_chains_of_adamw_where_nothing_is_named():
    options = cli.make_parser("pipeline").parse_args(["--workloads", "many"])
    assert (options.optimizers, options.chains) == (["AdamW"], ["clip", "clip-none", "ema"])
    tasks = pipeline.plan_tasks(pipeline.STANDARD, options.chains, options.optimizers)
    assert len(tasks) == 9
    assert [task.workload for task in tasks[::3]] == ["huge", "gpt2", "many"]


def test_an_interrupted_pipeline_shows_and_keeps_its_whole_rounds(
    small, monkeypatch, tmp_path, capsys
):
    def interrupted(race, steps, rounds, budget, on_round, before):
        def stop(index):
            on_round(index)
            if index == 1:
                raise KeyboardInterrupt

        timing.run_race(race, steps, rounds, budget, stop, before)

    monkeypatch.setattr(pipeline, "run_race", interrupted)
    drawn: list[int] = []
    monkeypatch.setattr(picture, "save_pipeline", lambda rows, path: drawn.append(len(rows)))
    result = tmp_path / "result.json"
    arguments = ["--workloads", "small", "--out", str(tmp_path), "--json", str(result)]
    assert cli.main(["pipeline", *arguments]) == cli.EXIT_INTERRUPTED
    said = capsys.readouterr().out
    assert "median of 1 rounds" in said
    assert "Interrupted" in said
    content = json.loads(result.read_text())
    assert not content["complete"]
    assert [len(row["seconds"]["torch"]) for row in content["pipeline"]["rows"]] == [1] == drawn
