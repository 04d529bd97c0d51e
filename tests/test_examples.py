"""The examples run, hold their claims and log what they draw; a claim that fails is an error."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
# By script, its pictures.
PICTURES = {
    "convergence": ("convergence", "convergence_scaled"),
    "surfaces": (
        "surfaces_rates",
        "surfaces_plateau",
        "surfaces_noise",
        "surfaces_range_test",
    ),
    "digits_race": ("digits_race", "digits_micro_batches"),
    "schedules": ("schedules", "hyperparameters"),
    "sgd_parameters": ("sgd_parameters",),
    "custom_rule": ("custom_rule", "custom_rule_rolls"),
}
KILOBYTES = 150  # a picture may have


def example(name: str) -> ModuleType:
    """A script, or what scripts share, imported."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def threads():
    """The examples set how many threads torch uses."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Drawn:
    """What a script left behind.

    Attributes:
        status: its exit status.
        out: folder of the pictures.
        logs: folder of TensorBoard's.
        lines: by tag, the coordinates of a line in a picture.
        figures: by picture, the titles and the names of axes in it.
    """

    status: int
    out: Path
    logs: Path
    lines: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    figures: dict[str, tuple[set[str], set[str], set[str]]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A function that runs a script in its short mode, once, and says what it drew."""
    common, runs = example("common"), {}

    def run(name: str) -> Drawn:
        if name in runs:
            return runs[name]
        folder = tmp_path_factory.mktemp(name)
        done = Drawn(-1, folder / "out", folder / "logs")
        save = common.Example.save

        def recording(self, figure, picture):
            for axes in figure.axes:
                for line in axes.lines:
                    if line.get_gid() is not None:
                        done.lines[line.get_gid()] = line.get_data()
            titles = {figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)}
            names = ({getattr(axes, f"get_{a}label")() for axes in figure.axes} for a in "xy")
            done.figures[picture] = (titles - {""}, *(found - {""} for found in names))
            save(self, figure, picture)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common.Example, "save", recording)
            arguments = ["--short", "--out", str(done.out), "--tensorboard", str(done.logs)]
            done.status = example(name).main(arguments)
        runs[name] = done
        return done

    return run


@pytest.mark.parametrize("name", PICTURES)
def test_a_script_holds_its_claims_and_draws_its_pictures(name, drawn):
    from PIL import Image

    pytest.importorskip("tensorboard")
    done = drawn(name)
    assert done.status == 0
    assert {path.name for path in done.out.iterdir()} == {f"{p}.png" for p in PICTURES[name]}
    for picture in PICTURES[name]:
        image = Image.open(done.out / f"{picture}.png")
        assert image.info.get("transparency") is None, "a dark page would shine through"
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        for named in done.figures[picture]:  # titles, horizontal axes, vertical axes
            assert named, picture


@pytest.mark.parametrize("name", PICTURES)
def test_tensorboard_reads_what_was_drawn(name, drawn):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = drawn(name)
    events = reader.EventAccumulator(str(done.logs), {reader.SCALARS: 0, reader.IMAGES: 0})
    events.Reload()
    assert set(events.Tags()["images"]) == set(PICTURES[name])
    for picture in PICTURES[name]:
        (image,) = events.Images(picture)
        assert image.encoded_image_string.startswith(b"\x89PNG")

    logged = {
        tag: ([e.step for e in events.Scalars(tag)], [e.value for e in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }
    assert len(done.lines) > 1
    for tag, (x, y) in done.lines.items():
        if tag in logged:
            steps, values = logged.pop(tag)
            assert steps == [*x]
        else:
            (_, across), (_, values) = logged.pop(f"{tag}/x"), logged.pop(f"{tag}/y")
            np.testing.assert_array_equal(across, np.float32(x))
        np.testing.assert_array_equal(values, np.float32(y))
    assert logged == {}  # nothing that is not in a picture


# ---- claims that fail ----


def no_iterations(script, patch):
    patch.setattr(script, "ITERATIONS", 50)


def a_lower_minimum(script, patch):
    patch.setattr(script, "lowest", lambda: -1.0)
    for name in ("show_plateau", "show_noise", "show_range_test"):
        patch.setattr(script, name, lambda example: None)


def one_epoch(script, patch):
    patch.setattr(script, "SHORT_EPOCHS", 1)


def another_schedule(script, patch):
    wrong = script.Schedule("wrong", script.SCHEDULES[1].make, script.SCHEDULES[0].rate)
    patch.setattr(script, "SCHEDULES", (wrong, *script.SCHEDULES[1:]))
    for name in ("show_groups", "show_by_hand", "show_resumed"):
        patch.setattr(script, name, lambda example, axes, steps: None)


def a_worse_sgd(script, patch):
    def worse(params, *, lr, **settings):
        return fusedopt.SGD(params, lr=lr * 1.001, **settings)

    patch.setattr(script, "fusedopt", SimpleNamespace(SGD=worse))
    patch.setattr(script, "LOSSES", {name: script.LOSSES[name] for name in ("MSE", "L1")})
    patch.setattr(script, "STEPS", 20)


def rate_outside_the_buffer(script, patch):
    def update(self, param, buffer, lr, momentum):
        buffer.mul_(momentum).add_(param.grad)
        param.sub_(lr * buffer)

    patch.setattr(script.HeavyBall, "update", update)
    patch.setitem(sys.modules, "triton", None)  # and the twin is left out, which is said


PLANTED = {
    "convergence": (no_iterations, "Adagrad, lr 50, raw axes: converged"),
    "surfaces": (a_lower_minimum, "lr 0.5 gets within 0.1 of the minimum"),
    "digits_race": (one_epoch, "SGD: at least 85% of test images right"),
    "schedules": (another_schedule, "wrong: every step's learning rate is the schedule's"),
    "sgd_parameters": (a_worse_sgd, "All 12 paths cover torch.optim's"),
    "custom_rule": (rate_outside_the_buffer, "fused rule: after 40 steps, bit for bit"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_claim_that_fails_is_an_error(name, tmp_path, capsys):
    plant, claim = PLANTED[name]
    with pytest.MonkeyPatch.context() as patch:
        plant(example(name), patch)
        assert example(name).main(["--short", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "FAIL" in told.out
    assert re.search(r"[1-9]\d* of \d+ claims fail: ", told.err)
    assert claim in told.err
    assert name != "custom_rule" or "The Triton twin is left out" in told.out


def test_claiming_nothing_or_nan_is_an_error(tmp_path):
    common = example("common")
    assert common.Example("", ["--out", str(tmp_path)]).finish() == 1
    run = common.Example("", ["--out", str(tmp_path)])
    run.claim("a comparison with NaN", float("nan") < 1, "nan")
    assert run.finish() == 1


# ---- the command line ----


@pytest.mark.parametrize("name", PICTURES)
def test_help_names_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        example(name).main(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for option in ("--out DIR", "--tensorboard DIR", "--short"):
        assert option in told
    assert example(name).__doc__.splitlines()[0] in told


def test_without_tensorboard_its_option_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        example("common").Example("", ["--tensorboard", str(tmp_path)])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "--tensorboard: needs tensorboard; run: python -m pip install tensorboard" in told


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit) as stop:
        example("common").Example("", ["--out", str(tmp_path / "file/pictures")])
    assert stop.value.code == 2
    assert "--out: cannot write to" in capsys.readouterr().err


def test_progress_is_shown_in_a_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured output for a terminal
    run = example("common").Example("", ["--out", str(tmp_path)])
    assert list(run.track("ab", "two letters")) == ["a", "b"]
    told = capsys.readouterr().out
    assert "two letters" in told
    assert "1/2" in told
    assert "2/2" in told


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_script_runs_at_full_length_as_make_runs_it(name, tmp_path):
    command = [sys.executable, FOLDER / f"{name}.py", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for picture in PICTURES[name]:
        assert (tmp_path / f"{picture}.png").stat().st_size < KILOBYTES * 1000


# ---- what single examples are built on ----


def test_the_gradient_of_the_line_is_autograds():
    script = example("convergence")
    x, y = torch.tensor(script.AGES).float(), torch.tensor(script.DEATHS).float()
    runs = script.Runs(fusedopt.SGD, [0.1, 0.2], x, y)
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
    rates = torch.tensor([[0.1], [0.2]])
    torch.testing.assert_close(runs.lines, before - rates * runs.grads)


def test_the_best_line_is_least_squares():
    script = example("convergence")
    x, y = torch.tensor(script.AGES).double(), torch.tensor(script.DEATHS).double()
    best = script.Line.through(x, y)
    table = torch.stack([x, torch.ones_like(x)], 1)
    solution = torch.linalg.lstsq(table, y.unsqueeze(1)).solution.flatten()
    assert [best.slope, best.intercept] == pytest.approx(solution.tolist(), rel=1e-12)
    assert best.loss == pytest.approx((table @ solution - y).square().sum().item(), rel=1e-12)
    assert best.verdict([best.loss * 1.02, best.slope, best.intercept]) == script.CRAWLING
    assert best.verdict([best.loss, best.slope, best.intercept * 1.005]) == script.CONVERGED
    assert best.verdict([float("nan"), best.slope, best.intercept]) == script.DIVERGED


def test_the_race_and_the_benchmark_share_their_training(monkeypatch):
    def noticed(runs, batches):
        raise RuntimeError(f"{len(runs)} runs")

    script = example("digits_race")
    assert script.train_in_lockstep is train.train_in_lockstep
    assert script.Run is train.Run
    monkeypatch.setattr(train, "train_in_lockstep", noticed)
    with pytest.raises(RuntimeError, match="5 runs"):
        next(train.measure(["mlp"], ["SGD"], epochs=1, seed=0))


def test_every_exported_optimizer_races():
    contestants = example("digits_race").contestants()
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
    assert left == [  # of users' and tests' concern, as docs/custom-rules.md says
        "a page docs/rules/heavy_ball.md.",
        "its page in the table of docs/README.md.",
        "a row in tests/cases.py.",
        "its entry in RULES of tests/oracle.py.",
        "its entry in PARAM_ULPS of tests/tolerances.py.",
        "its entry in STATE_ULPS of tests/tolerances.py.",
    ]


# ---- the gallery ----


def test_the_gallery_shows_every_picture():
    page = (ROOT / "docs/gallery.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(gallery/(\w+)\.png\)", page)
    assert sorted(shown) == sorted(p for pictures in PICTURES.values() for p in pictures)
    assert {path.stem for path in (ROOT / "docs/gallery").iterdir()} == set(shown)
    for picture in shown:
        path = ROOT / f"docs/gallery/{picture}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < KILOBYTES * 1000


def test_make_runs_every_script():
    made = re.search(r"EXAMPLES := .*?\\\n +(.*?)\)", (ROOT / "Makefile").read_text())
    assert made is not None
    assert made[1].split() == [*PICTURES]
