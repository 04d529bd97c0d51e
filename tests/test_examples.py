"""The examples run and log what they draw; their claims hold; a claim that fails is an error."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_registry import missing_pieces

import fusedopt
from fusedopt.bench import optimizers, train

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed, reason="the examples need it")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
PICTURES = {  # of each script
    "convergence": ("convergence", "convergence_scaled"),
    "surfaces": ("surfaces_rates", "surfaces_plateau", "surfaces_noise", "surfaces_range_test"),
    "digits_race": ("digits_race", "digits_micro_batches"),
    "schedules": ("schedules", "hyperparameters"),
    "sgd_parameters": ("sgd_parameters",),
    "custom_rule": ("custom_rule", "custom_rule_rolls"),
}
KILOBYTES = 150  # limit of a picture


def example(name):
    """A script, or common.py, imported."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def threads():
    """Undoes that examples set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=PICTURES)
def drawn(request, tmp_path_factory):
    """A script after its short run: its exit status, and the lines and texts of its figures."""
    name, common = request.param, example("common")
    folder = tmp_path_factory.mktemp(name)
    done = SimpleNamespace(out=folder / "out", logs=folder / "logs", pictures=PICTURES[name])
    done.lines, done.texts, save = {}, {}, common.Example.save

    def recording(self, figure, picture, **layout):
        for axes in figure.axes:
            tagged = [line for line in axes.lines if line.get_gid() is not None]
            done.lines.update((line.get_gid(), line.get_data()) for line in tagged)
        titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
        labels = [[getattr(axes, f"get_{a}label")() for axes in figure.axes] for a in "xy"]
        done.texts[picture] = (titles, *labels)
        save(self, figure, picture, **layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Example, "save", recording)
        arguments = ["--short", "--out", str(done.out), "--tensorboard", str(done.logs)]
        done.status = example(name).main(arguments)
    return done


def test_a_script_holds_its_claims_and_draws_its_pictures(drawn):
    from PIL import Image

    assert drawn.status == 0
    assert {path.name for path in drawn.out.iterdir()} == {f"{p}.png" for p in drawn.pictures}
    for picture in drawn.pictures:
        image = Image.open(drawn.out / f"{picture}.png")
        assert image.info.get("transparency") is None, "a dark page would shine through"
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        for texts in drawn.texts[picture]:  # titles, horizontal axes, vertical axes
            assert any(texts), picture


def test_tensorboard_reads_what_was_drawn(drawn):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(drawn.logs), {reader.SCALARS: 0, reader.IMAGES: 0})
    events.Reload()
    assert set(events.Tags()["images"]) == set(drawn.pictures)
    for picture in drawn.pictures:
        (image,) = events.Images(picture)
        assert image.encoded_image_string.startswith(b"\x89PNG")

    logged = {
        tag: ([e.step for e in events.Scalars(tag)], [e.value for e in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }
    assert len(drawn.lines) > 1
    for tag, (x, y) in drawn.lines.items():
        if tag in logged:
            steps, values = logged.pop(tag)
            assert steps == [*x]
        else:
            (_, across), (_, values) = logged.pop(f"{tag}/x"), logged.pop(f"{tag}/y")
            np.testing.assert_array_equal(across, np.float32(x))
        np.testing.assert_array_equal(values, np.float32(y))
    assert logged == {}  # nothing that is not in a picture


# ---- claims that fail ----


def nothing(*_):
    """Draws nothing, in place of a function that takes its time."""


def worse_sgd(params, *, lr, **settings):
    return fusedopt.SGD(params, lr=lr * 1.001, **settings)


def rate_outside_the_buffer(self, param, buffer, lr, momentum):
    buffer.mul_(momentum).add_(param.grad)
    param.sub_(lr * buffer)


def with_wrong_schedule(script):
    first, second, *_ = script.SCHEDULES
    return {"SCHEDULES": (script.Schedule("wrong", second.make, first.rate), *script.SCHEDULES[1:])}


# For each script, what is changed in it, and the claim that fails then.
PLANTED = {
    "convergence": (lambda _: {"ITERATIONS": 50}, "Adagrad, lr 50, raw axes: converged"),
    "surfaces": (
        lambda _: (
            {"lowest": lambda: -1.0}
            | dict.fromkeys(("show_plateau", "show_noise", "show_range_test"), nothing)
        ),
        "lr 0.5 gets within 0.1 of the minimum",
    ),
    "digits_race": (lambda _: {"SHORT_EPOCHS": 1}, "SGD: at least 85% of test images right"),
    "schedules": (
        lambda script: (
            with_wrong_schedule(script)
            | dict.fromkeys(("show_groups", "show_by_hand", "show_resumed"), nothing)
        ),
        "wrong: every step's learning rate is the schedule's",
    ),
    "sgd_parameters": (
        lambda script: (
            {"fusedopt": SimpleNamespace(SGD=worse_sgd), "STEPS": 20}
            | {"LOSSES": {name: script.LOSSES[name] for name in ("MSE", "L1")}}
        ),
        "All 12 paths cover torch.optim's",
    ),
    "custom_rule": (
        lambda script: {"HeavyBall.update": rate_outside_the_buffer},
        "fused rule: after 40 steps, bit for bit",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_claim_that_fails_is_an_error(name, tmp_path, capsys):
    changes, claim = PLANTED[name]
    with pytest.MonkeyPatch.context() as patch:
        for place, new in changes(example(name)).items():
            patch.setattr(f"{name}.{place}", new)
        if name == "custom_rule":
            patch.setitem(sys.modules, "triton", None)
        assert example(name).main(["--short", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "FAIL" in told.out
    assert re.search(r"[1-9]\d* of \d+ claims fail: ", told.err)
    assert claim in told.err
    assert name != "custom_rule" or "The Triton twin is left out" in told.out


def test_claiming_nothing_or_nan_is_an_error(tmp_path):
    run = example("common").Example("", ["--out", str(tmp_path)])
    assert run.finish() == 1
    run.claim("a comparison with NaN", float("nan") < 1, "nan")
    assert run.finish() == 1


# ---- the command line ----


@pytest.mark.parametrize("name", PICTURES)
def test_help_names_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        example(name).main(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for text in (
        "--out DIR",
        "--tensorboard DIR",
        "--short",
        example(name).__doc__.splitlines()[0],
    ):
        assert text in told


def test_options_that_cannot_be_honoured_say_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "file").write_text("not a folder")
    options = {
        ("--tensorboard", tmp_path): "needs tensorboard; run: pip install tensorboard",
        ("--out", tmp_path / "file/pictures"): "cannot write to",
    }
    for (option, value), message in options.items():
        with pytest.raises(SystemExit) as stop:
            example("common").Example("", [option, str(value)])
        assert stop.value.code == 2
        assert f"{option}: {message}" in capsys.readouterr().err


def test_progress_is_shown_in_a_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured output for a terminal
    run = example("common").Example("", ["--out", str(tmp_path)])
    assert list(run.track("ab", "two letters")) == ["a", "b"]
    told = capsys.readouterr().out
    for shown in ("two letters", "50%", "100%"):
        assert shown in told


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_script_runs_at_full_length_as_make_runs_it(name, tmp_path):
    command = [sys.executable, FOLDER / f"{name}.py", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for picture in PICTURES[name]:
        assert (tmp_path / f"{picture}.png").stat().st_size < KILOBYTES * 1000


# ---- details of single examples ----


def test_the_gradient_of_the_line_is_autograds():
    script = example("convergence")
    x, y = torch.tensor(script.AGES).float(), torch.tensor(script.DEATHS).float()
    runs = script.Runs("SGD", [0.1, 0.2], x, y)
    with torch.no_grad():
        runs.lines.copy_(torch.tensor([[-3.0, 200.0], [5.0, -70.0]]))
    runs.backward()
    for line, grad, state in zip(runs.lines, runs.grads, runs.state(), strict=True):
        free = line.double().requires_grad_()
        loss = (free[0] * x.double() + free[1] - y.double()).square().sum()
        loss.backward()
        torch.testing.assert_close(grad.double(), free.grad, rtol=1e-5, atol=0)
        torch.testing.assert_close(state[0].double(), loss.detach(), rtol=1e-5, atol=0)
        assert torch.equal(state[1:], line)
    before = runs.lines.clone()
    runs.optimizer.step()
    torch.testing.assert_close(runs.lines, before - torch.tensor([[0.1], [0.2]]) * runs.grads)


def test_the_best_line_is_least_squares():
    script = example("convergence")
    x, y = torch.tensor(script.AGES).double(), torch.tensor(script.DEATHS).double()
    best = script.Line.through(x, y)
    table = torch.stack([x, torch.ones_like(x)], 1)
    solution = torch.linalg.lstsq(table, y.unsqueeze(1)).solution.flatten()
    loss = (table @ solution - y).square().sum()
    assert [*best] == pytest.approx([loss.item(), *solution.tolist()], rel=1e-12)
    assert best.verdict([best.loss * 1.02, best.slope, best.intercept]) == script.CRAWLING
    assert best.verdict([best.loss, best.slope, best.intercept * 1.005]) == script.CONVERGED
    assert best.verdict([float("nan"), best.slope, best.intercept]) == script.DIVERGED


def test_the_race_trains_as_the_benchmark_does_with_every_exported_optimizer():
    script = example("digits_race")
    assert script.train_in_lockstep is train.train_in_lockstep
    assert script.Run is train.Run
    contestants = script.contestants()
    assert {name for name, _ in contestants.values()} == set(optimizers.names())
    assert [*contestants][:3] == ["SGD", "SGD, momentum", "SGD, Nesterov"]


def test_the_lowest_point_of_the_surface_is_its_minimum():
    script = example("surfaces")
    w1 = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    lowest = script.surface(torch.zeros(()).double(), w1).min().item()
    assert script.lowest() == pytest.approx(lowest, abs=1e-9)


def test_the_files_of_the_custom_rule_are_those_a_checkout_needs(tmp_path):
    for place in ("csrc/rules", "fusedopt", "triton_kernels", "docs/rules", "tests"):
        (tmp_path / place).mkdir(parents=True)
        for path in (ROOT / place).glob("*.*"):
            if path.suffix in {".h", ".py", ".md"}:
                shutil.copy(path, tmp_path / place)
    shutil.copy(ROOT / "docs/README.md", tmp_path / "docs")
    shutil.copytree(FOLDER / "custom_rule", tmp_path, dirs_exist_ok=True)
    lines = {
        "csrc/rules/all.h": (
            ('#include "rules/rmsprop.h"', '#include "rules/heavy_ball.h"\n\\g<0>'),
            (r'RULE\("sgd", Sgd\)', 'RULE("heavy_ball", HeavyBall) \\g<0>'),
        ),
        "fusedopt/__init__.py": (
            ("from fusedopt.sgd", "from fusedopt.heavy_ball import HeavyBall\n\\g<0>"),
            ('    "GradScaler",', '\\g<0>\n    "HeavyBall",'),
        ),
    }
    for file, changes in lines.items():
        text = (tmp_path / file).read_text()
        for old, new in changes:
            text, count = re.subn(old, new, text, count=1)
            assert count == 1
        (tmp_path / file).write_text(text)
    left = [sentence.partition(" lacks ")[2] for sentence in missing_pieces(tmp_path)]
    assert left == [  # see docs/custom-rules.md
        "a page docs/rules/heavy_ball.md.",
        "its page in the table of docs/README.md.",
        "a row in tests/cases.py.",
    ]


# ---- the gallery ----


def test_the_gallery_and_make_know_every_script():
    shown = re.findall(r"!\[[^\]]+\]\(gallery/(\w+)\.png\)", (ROOT / "docs/gallery.md").read_text())
    assert sorted(shown) == sorted(p for pictures in PICTURES.values() for p in pictures)
    assert {path.stem for path in (ROOT / "docs/gallery").iterdir()} == set(shown)
    for picture in shown:
        path = ROOT / f"docs/gallery/{picture}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < KILOBYTES * 1000
    made = re.search(r"EXAMPLES := .*?\\\n +(.*?)\)", (ROOT / "Makefile").read_text())
    assert made is not None
    assert made[1].split() == [*PICTURES]
