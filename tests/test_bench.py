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

import fusedopt
from fusedopt.bench import __main__ as cli
from fusedopt.bench import machine, optimizers, step, timing, train
from fusedopt.bench.providers import PROVIDERS
from fusedopt.bench.workloads import WORKLOADS

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
    exported = {name for name in fusedopt.__all__ if hasattr(getattr(fusedopt, name), "step")}
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


def test_ratios_pair_the_rounds_both_ran_in():
    nan = math.nan
    race = timing.Race({"slow": [4.0, nan, 8.0, 30.0], "fast": [2.0, 1.0, 4.0, nan]})
    assert race.ratio("slow", "fast") == timing.Stats(2.0, 2.0, 2.0, 2)
    assert race.stats("slow") == timing.Stats(8.0, pytest.approx(5.6), pytest.approx(21.2), 3)


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stepp"], "unknown subcommand 'stepp'; wanted: train, step"),
        (["step", "--workloads", "gpt3"], "--workloads: unknown workload 'gpt3'; wanted: a comma"),
        (["step", "--optimizers", "AdamW,Lamb"], "--optimizers: unknown optimizer 'Lamb'"),
        (["step", "--providers", "apex"], "--providers: unknown provider 'apex'"),
        (["step", "--dtype", "int8"], "--dtype: unknown dtype 'int8'"),
        (["train", "--models", "resnet"], "--models: unknown model 'resnet'"),
        (["step", "--rounds", "0"], "--rounds: got '0'; wanted: a whole number, at least 1"),
        (["step", "--rounds", "many"], "--rounds: got 'many'; wanted: a whole number"),
        (["step", "--seconds", "nan"], "--seconds: got 'nan'; wanted: a number, at least 0"),
        (["train", "--rounds", "3"], "unrecognized arguments: --rounds"),
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
        cli.main(["train"])
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
    assert cli.main(["step", *options, "--json", str(result)]) == 0  # nobody asked for it by name
    assert "Left out: workload huge needs" in capsys.readouterr().out
    assert [row["workload"] for row in json.loads(result.read_text())["step"]["rows"]] == ["tiny"]


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
    assert result["step"] == {"rows": []}
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
    done = bench("step", *arguments, "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch fused: torch.optim.RMSprop has no fused step" in done.stdout
    assert "fusedopt's AdamW step: on tiny" in done.stdout

    result = json.loads((tmp_path / "result.json").read_text())
    adamw, rmsprop = result["step"]["rows"]
    assert (adamw["workload"], adamw["tensors"], adamw["elements"]) == ("tiny", 5000, 320_000)
    usual = {name for name, provider in PROVIDERS.items() if provider.default}
    assert set(adamw["step_ms"]) == usual
    assert adamw["unavailable"] == {}
    assert adamw["details"] == {"fusedopt": "cpu: 5000"}
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
    assert cli.main(arguments) == cli.EXIT_INTERRUPTED
    said = capsys.readouterr().out
    assert "tiny: 5,000 tensors" in said
    assert "Interrupted" in said
    content = json.loads(result.read_text())
    assert not content["complete"]
    assert len(content["step"]["rows"]) == 1
