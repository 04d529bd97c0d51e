"""Programs that users hand an optimizer to, run for real on tiny models, beside torch.optim's run.

They wrap an optimizer, patch its step, save it and load it in ways of their own. Nothing here needs
a network or a GPU: models are made from configurations, and a connection fails the test.
"""

import functools
import inspect
import math
import socket
import sys
import warnings

import pytest
import torch

import fusedopt

pytestmark = pytest.mark.slow

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

# Two correct optimizers differ in the last bits of a step. By the end of a run that has grown to
# less than this, and the parameters went more than a thousand times as far.
ATOL = 2e-6


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(_, address):
        raise AssertionError(f"a connection to {address}, where nothing should need one")

    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are far too small to share
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks, about each other
        yield
    torch.set_num_threads(threads)
    if "accelerate" in sys.modules:  # a loop that was left by an error stays its present one
        sys.modules["accelerate"].state.GradientState._reset_state()


def assert_kernels_did_it(optimizer):
    assert isinstance(optimizer, fusedopt.optimizer.FusedOptimizer)
    assert {route.backend for route in optimizer.routes()} == {"cpu"}


def assert_close_runs(ours, theirs, start, atol=ATOL):
    """Two runs, as (parameters, losses), that moved away from the start and stayed together."""
    assert len(ours[1]) == len(theirs[1]) > 0
    assert all(map(math.isfinite, ours[1]))
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(theirs[1]), rtol=1e-5, atol=atol)
    for p, q in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=atol)
    moved = [(p - before).abs().max() for p, before in zip(theirs[0], start, strict=True)]
    assert max(moved) > 1000 * atol


def assert_equal_params(ours, theirs):
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def values(model):
    return [param.detach().clone() for param in model.parameters()]


# --- Hugging Face's Trainer ---


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=48,
        n_positions=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def sentences():
    """Rows of tokens that count upwards, and start over every 2 to 8 of them."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 40, (24, 1), generator=generator)
    tokens = starts + torch.arange(12) % torch.randint(2, 9, (24, 1), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


ADAMW = ("AdamW", {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1})
# Under autocast, a last bit of a weight decides how its bf16 image is rounded: a difference of 1e-3
# in a gradient, which Adam's quotient makes a difference in sign where gradients are small.
SGD = ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01})


class TrainerRun:
    """A run of transformers.Trainer over `sentences`: 8 steps, checkpoints at 4 and 8."""

    def __init__(
        self,
        optim,
        folder,
        how,
        resume=None,
        options=(),
        constant=False,
        callback=None,
        **arguments,
    ):
        transformers = pytest.importorskip("transformers")
        self.model = tiny_gpt2()
        self.start = values(self.model)
        name, hyper = SGD if arguments.get("bf16") else ADAMW
        hyper = {**hyper, **dict(options)}
        if how == "optimizers":
            optimizer = getattr(optim, name)(self.model.parameters(), **hyper)
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 1.0 if constant else 1 - step / 16
            )
            given = {"optimizers": (optimizer, scheduler)}
        else:
            given = {"optimizer_cls_and_kwargs": (getattr(optim, name), hyper)}
        self.trainer = transformers.Trainer(
            self.model,
            transformers.TrainingArguments(
                str(folder),
                use_cpu=True,
                per_device_train_batch_size=3,
                weight_decay=hyper["weight_decay"],  # of groups that the Trainer makes itself
                save_strategy="steps",
                save_steps=4,
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                seed=3,
                **{
                    "max_steps": 8,
                    "gradient_accumulation_steps": 2,
                    "max_grad_norm": 0.5,
                    **arguments,
                },
            ),
            train_dataset=sentences(),
            callbacks=[callback] if callback is not None else None,
            **given,
        )
        self.trainer.train(resume_from_checkpoint=resume and str(resume))
        self.params = values(self.model)
        self.losses = [log["loss"] for log in self.trainer.state.log_history if "loss" in log]

    @property
    def optimizer(self):
        return self.trainer.optimizer.optimizer  # the Trainer's is Accelerate's wrapper

    @property
    def outcome(self):
        return self.params, self.losses


WAYS = ("optimizers", "optimizer_cls_and_kwargs")


@pytest.mark.parametrize("how", WAYS)
def test_the_trainer_trains_as_with_torch_and_resumes(how, tmp_path):
    def run(optim, name, first=None):
        checkpoint = first and tmp_path / first / "checkpoint-4"
        return TrainerRun(optim, tmp_path / name, how, checkpoint)

    ours, theirs = run(fusedopt, "ours"), run(torch.optim, "theirs")
    assert_kernels_did_it(ours.optimizer)
    assert len(ours.losses) == 8
    assert_close_runs(ours.outcome, theirs.outcome, ours.start)
    resumed = run(fusedopt, "resumed", "ours")
    assert_kernels_did_it(resumed.optimizer)
    assert_equal_params(resumed.params, ours.params)
    assert resumed.losses == ours.losses  # the first four come out of the checkpoint
    if how == WAYS[1]:  # the other one's checkpoint
        for optim, name, whole in ((fusedopt, "theirs", theirs), (torch.optim, "ours", ours)):
            resumed = run(optim, f"{name}, resumed", name)
            assert_close_runs(resumed.outcome, whole.outcome, whole.start)


def test_the_trainer_trains_under_autocast_as_with_torch(tmp_path):
    ours, theirs = (
        TrainerRun(optim, tmp_path / optim.__name__, WAYS[0], bf16=True)
        for optim in (fusedopt, torch.optim)
    )
    assert_kernels_did_it(ours.optimizer)
    assert_close_runs(ours.outcome, theirs.outcome, ours.start, 10 * ATOL)


def test_windows_of_the_trainer_and_the_optimizer_multiply(tmp_path):
    """The Trainer says nowhere that it accumulates: it calls step() where its window ends."""
    plain = {"max_grad_norm": 0.0, "constant": True}
    options = {"accumulation_steps": 2}
    ours = TrainerRun(fusedopt, tmp_path / "ours", WAYS[0], options=options, **plain)
    four = {"gradient_accumulation_steps": 4, "max_steps": 4, **plain}
    theirs = TrainerRun(torch.optim, tmp_path / "theirs", WAYS[0], **four)
    assert_close_runs((ours.params, [0.0]), (theirs.params, [0.0]), ours.start)


def test_accumulating_in_the_middle_of_the_trainers_window_raises(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Callback(transformers.TrainerCallback):
        def on_substep_end(self, *_, optimizer, **__):
            optimizer.optimizer.accumulate()

    with pytest.raises(RuntimeError, match="twice: by transformers' Trainer"):
        TrainerRun(fusedopt, tmp_path, WAYS[0], callback=Callback())


def test_the_optimizer_accumulates_and_clips_in_the_trainers_place(tmp_path):
    options = {"accumulation_steps": 2, "max_grad_norm": 0.5}
    arguments = {"max_steps": 16, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    ours = TrainerRun(
        fusedopt, tmp_path / "ours", WAYS[0], options=options, constant=True, **arguments
    )
    theirs = TrainerRun(torch.optim, tmp_path / "theirs", WAYS[0], constant=True)
    assert_kernels_did_it(ours.optimizer)
    assert_close_runs((ours.params, [0.0]), (theirs.params, [0.0]), ours.start)


def test_another_optimizer_may_accumulate_under_the_trainer(tmp_path):
    """One that the Trainer does not step, such as that of a part with a loss of its own."""
    transformers = pytest.importorskip("transformers")
    param = torch.nn.Parameter(torch.zeros(3))
    other = fusedopt.SGD([param], lr=1.0, accumulation_steps=2)

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            param.grad = torch.ones(3)
            other.step()

    TrainerRun(torch.optim, tmp_path, WAYS[0], callback=Callback())
    assert (param == -4).all()


# --- Accelerate ---


def classifier():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def examples(count=48):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 8, generator=generator)
    return torch.utils.data.TensorDataset(inputs, inputs[:, :4].argmax(1))


OPTIMIZERS = {
    "AdamW": lambda optim, params: optim.AdamW(params, lr=2e-3, weight_decay=0.1),
    "AdamW, fused": lambda optim, params: optim.AdamW(params, lr=2e-3, fused=True),
    "SGD, momentum": lambda optim, params: optim.SGD(params, lr=0.1, momentum=0.9),
}


class AccelerateRun:
    """The loop of Accelerate's documentation: accumulation, clipping, a scheduler, a scaler."""

    def __init__(self, optim, make, scaler=None, steps=3, clips=True):
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
        self.clips = clips
        if scaler is not None:  # what Accelerator(mixed_precision="fp16") does, but for GPUs only
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True
            self.accelerator.state._mixed_precision = "fp16"
        model = classifier()
        self.start = values(model)
        optimizer = make(optim, model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
        loader = torch.utils.data.DataLoader(examples(), batch_size=4)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        self.losses, self.skipped = [], []

    def epoch(self, overflow_at=()):
        for number, (inputs, labels) in enumerate(self.loader):
            with self.accelerator.accumulate(self.model):
                loss = torch.nn.functional.cross_entropy(self.model(inputs).float(), labels)
                self.losses.append(loss.item())
                factor = math.inf if number in overflow_at else 1.0
                self.accelerator.backward(loss * factor)
                if self.accelerator.sync_gradients and self.clips:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                updates = getattr(self.optimizer.optimizer, "will_step", True)
                self.optimizer.step()
                if self.accelerator.sync_gradients:
                    self.skipped.append(self.optimizer.step_was_skipped)
                if updates:
                    self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    @property
    def outcome(self):
        return values(self.model), self.losses


def with_options(make, **options):
    """The same optimizer with options of ours."""

    def made(optim, params):
        plain = make(optim, list(params))
        group = {k: v for k, v in plain.param_groups[0].items() if k in keywords_of(plain)}
        return type(plain)(plain.param_groups[0]["params"], **group, **options)

    return made


def keywords_of(optimizer):
    return inspect.signature(type(optimizer).__init__).parameters.keys() - {"params"}


TORCHS, OURS = torch.amp.GradScaler, fusedopt.GradScaler
CLIPS = {"max_grad_norm": 0.5}
CHECKS = {"skip_nonfinite": True, "ema_decay": 0.9, **CLIPS}  # whose state is one of accumulation
ACCUMULATES = {"accumulation_steps": 3, **CLIPS}


@pytest.mark.parametrize(
    ("name", "scaler", "options"),
    [
        ("AdamW", None, {}),
        ("SGD, momentum", None, {}),
        ("AdamW", None, CHECKS),
        ("AdamW, fused", None, ACCUMULATES),
        ("SGD, momentum", None, ACCUMULATES),
        ("AdamW", TORCHS, {}),
        ("AdamW, fused", TORCHS, {}),
        ("SGD, momentum", TORCHS, CLIPS),
        ("AdamW, fused", TORCHS, CLIPS),
        ("AdamW", OURS, CLIPS),
        ("AdamW, fused", OURS, CLIPS),
    ],
)
def test_accelerate_accumulates_clips_and_skips_as_with_torch(name, scaler, options):
    """Or our optimizer does that in its place, as far as its options say."""

    def run(optim, make, kind, **kwargs):
        made = kind and kind("cpu", init_scale=256.0, growth_interval=2)
        run = AccelerateRun(optim, make, made, **kwargs)
        return run.epoch(overflow_at=(1, 7) if scaler else ()).epoch()

    make = OPTIMIZERS[name]
    steps = 1 if options is ACCUMULATES else 3
    made = with_options(make, **options)
    ours = run(fusedopt, made, scaler, steps=steps, clips=not options)
    theirs = run(torch.optim, make, scaler and TORCHS)
    assert_kernels_did_it(ours.optimizer.optimizer)
    assert_close_runs(ours.outcome, theirs.outcome, ours.start)
    assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]
    if scaler:
        # Of an optimizer that is asked to step, and skips by itself, Accelerate does not learn it.
        skips = [0, 2] if name != "AdamW, fused" else []
        assert ours.skipped == theirs.skipped == [window in skips for window in range(8)]
        scales = [run.accelerator.scaler.get_scale() for run in (ours, theirs)]
        assert scales == [256.0, 256.0]


def test_accelerate_and_the_optimizer_do_not_both_accumulate():
    make = OPTIMIZERS["AdamW"]
    run = AccelerateRun(fusedopt, with_options(make, accumulation_steps=2), steps=2)
    with pytest.raises(RuntimeError, match=r"twice: by Accelerate .*_accumulation_steps=2"):
        run.epoch()
    assert_equal_params(values(run.model), run.start)
    run = AccelerateRun(fusedopt, make, steps=2)
    optimizer = run.optimizer.optimizer
    for inputs, _ in run.loader:
        run.accelerator.backward(run.model(inputs).sum())
        with pytest.raises(RuntimeError, match="twice: by Accelerate"):
            optimizer.accumulate()
    # Its state is there when its loop has ended, or was another model's.
    optimizer.accumulate()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_accelerates_saved_state_goes_on_bitwise(make, tmp_path):
    whole = AccelerateRun(fusedopt, make).epoch()
    whole.accelerator.save_state(tmp_path)
    whole.epoch()
    resumed = AccelerateRun(fusedopt, make)
    resumed.accelerator.load_state(tmp_path)
    resumed.epoch()
    assert_kernels_did_it(resumed.optimizer.optimizer)
    assert_equal_params(values(resumed.model), values(whole.model))
    assert resumed.losses == whole.losses[len(resumed.losses) :]


# --- Lightning ---


def lightning_module(optim, fused, scheduled=True, **options):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = classifier()
            self.losses, self.norms = [], []

        def training_step(self, batch, _):
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]).float(), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_gradient_clipping(self, optimizer, **kwargs):
            super().configure_gradient_clipping(optimizer, **kwargs)
            norms = [p.grad.norm() for p in self.parameters()]
            self.norms.append(torch.stack(norms).norm().item())

        def configure_optimizers(self):
            optimizer = optim.AdamW(
                self.parameters(), lr=2e-3, weight_decay=0.1, fused=fused, **options
            )
            if not scheduled:
                return optimizer
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Module()


def fp16_scaling():
    """What precision="16-mixed" is on a GPU; asked for by that name on a CPU, it becomes bf16."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


PRECISIONS = {
    "32": lambda: {"precision": "32-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": fp16_scaling,
}


def lightning_fit(
    optim,
    folder,
    precision,
    epochs=2,
    resume=None,
    fused=None,
    clip=0.5,
    batches=2,
    **options,
):
    lightning = pytest.importorskip("lightning")
    module = lightning_module(optim, fused, **options)
    module.start = values(module)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=batches,
        gradient_clip_val=clip,
        default_root_dir=folder,
        callbacks=[
            lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **PRECISIONS[precision](),
    )
    loader = torch.utils.data.DataLoader(examples(), batch_size=4)
    trainer.fit(module, loader, ckpt_path=resume)
    return module


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lightning_clips_and_steps_as_with_torch_and_resumes(precision, tmp_path):
    def fit(optim, name, first=None):
        checkpoint = first and tmp_path / first / "epoch=0.ckpt"
        return lightning_fit(optim, tmp_path / name, precision, resume=checkpoint)

    ours, theirs = fit(fusedopt, "ours"), fit(torch.optim, "theirs")
    assert_kernels_did_it(ours.optimizers().optimizer)
    assert any(norm == pytest.approx(0.5, rel=1e-4) for norm in ours.norms), "some were clipped"
    if precision == "16-mixed":
        assert any(not math.isfinite(norm) for norm in ours.norms), "a step overflowed"
    assert_close_runs((values(ours), ours.losses), (values(theirs), theirs.losses), ours.start)
    resumed = fit(fusedopt, "resumed", "ours")
    assert_kernels_did_it(resumed.optimizers().optimizer)
    assert_equal_params(values(resumed), values(ours))
    assert resumed.losses == ours.losses[len(resumed.losses) :]
    if precision == "32":  # the other one's checkpoint
        for optim, name, whole in ((fusedopt, "theirs", theirs), (torch.optim, "ours", ours)):
            resumed = fit(optim, f"{name}, resumed", name)
            losses = whole.losses[len(resumed.losses) :]
            outcomes = (values(resumed), resumed.losses), (values(whole), losses)
            assert_close_runs(*outcomes, whole.start)


def test_lightning_leaves_unscaling_to_a_fused_optimizer(tmp_path):
    """And then refuses to clip, which needs unscaled gradients: its rule, and torch's the same."""
    runs = {}
    for optim in (fusedopt, torch.optim):
        fit = functools.partial(lightning_fit, optim, tmp_path, "16-mixed", fused=True)
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit()
        runs[optim] = fit(clip=None)
    ours, theirs = runs.values()
    assert_kernels_did_it(ours.optimizers().optimizer)
    assert_close_runs((values(ours), ours.losses), (values(theirs), theirs.losses), ours.start)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_lightning_and_the_optimizer_do_not_both_accumulate(precision, tmp_path):
    """A GradScaler calls step() without the closure that knows the trainer: not for 16-mixed."""
    with pytest.raises(RuntimeError, match=r"twice: by Lightning .*_grad_batches=2"):
        lightning_fit(fusedopt, tmp_path, precision, clip=None, accumulation_steps=2)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_the_optimizer_accumulates_and_clips_in_lightnings_place(precision, tmp_path):
    options = {"accumulation_steps": 2, "max_grad_norm": 0.5, "batches": 1, "clip": None}
    ours, theirs = (
        lightning_fit(optim, tmp_path / optim.__name__, precision, scheduled=False, **given)
        for optim, given in ((fusedopt, options), (torch.optim, {}))
    )
    assert_kernels_did_it(ours.optimizers().optimizer)
    assert_close_runs((values(ours), ours.losses), (values(theirs), theirs.losses), ours.start)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lightnings_clipping_and_the_optimizers_come_one_after_the_other(precision, tmp_path):
    """The lower limit counts."""
    for first, second in ((0.5, 0.2), (0.2, 0.5)):
        ours = lightning_fit(
            fusedopt, tmp_path / "ours", precision, clip=first, max_grad_norm=second
        )
        theirs = lightning_fit(torch.optim, tmp_path / "theirs", precision, clip=0.2)
        assert_kernels_did_it(ours.optimizers().optimizer)
        assert_close_runs((values(ours), ours.losses), (values(theirs), theirs.losses), ours.start)


class Adversaries:
    """Two optimizers that take turns, under manual optimization: each step freezes the other's."""

    def __init__(self, optim, trainer_settings):
        lightning = pytest.importorskip("lightning")

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False
                torch.manual_seed(0)
                self.faker, self.judge = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
                self.losses, self.noise = [], torch.Generator().manual_seed(2)

            def training_step(self, batch, _):
                fakes = self.faker(torch.randn(4, 4, generator=self.noise))
                faking, judging = self.optimizers()
                for optimizer, scores in (
                    (faking, [self.judge(fakes)]),
                    (judging, [self.judge(batch[0]), -self.judge(fakes.detach())]),
                ):
                    self.toggle_optimizer(optimizer)
                    loss = torch.nn.functional.softplus(-torch.cat(scores)).mean()
                    self.manual_backward(loss)
                    self.clip_gradients(optimizer, 0.5, "norm")
                    optimizer.step()
                    optimizer.zero_grad()
                    self.untoggle_optimizer(optimizer)
                    self.losses.append(loss.item())

            def configure_optimizers(self):
                return (
                    optim.Adam(self.faker.parameters(), lr=2e-3),
                    optim.SGD(self.judge.parameters(), lr=0.1, momentum=0.9),
                )

        self.module = Module()
        self.start = values(self.module)
        loader = torch.utils.data.DataLoader(examples(), batch_size=4)
        lightning.Trainer(max_epochs=2, **trainer_settings).fit(self.module, loader)

    @property
    def outcome(self):
        return values(self.module), self.module.losses


def test_lightning_takes_turns_between_optimizers_as_with_torch(tmp_path):
    settings = {"accelerator": "cpu", "default_root_dir": tmp_path, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_checkpointing": False}
    ours, theirs = (Adversaries(optim, settings) for optim in (fusedopt, torch.optim))
    for optimizer in ours.module.optimizers():
        assert_kernels_did_it(optimizer.optimizer)
    assert_close_runs(ours.outcome, theirs.outcome, ours.start)


class FabricRun:
    """Lightning Fabric's loop. It makes a subclass of the optimizer's class for its wrapper."""

    def __init__(self, optim):
        lightning = pytest.importorskip("lightning")
        self.fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = classifier()
        self.start, self.losses = values(model), []
        self.given = optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        self.model, self.optimizer = self.fabric.setup(model, self.given)

    def epoch(self):
        loader = torch.utils.data.DataLoader(examples(), batch_size=4)
        for inputs, labels in self.fabric.setup_dataloaders(loader):
            self.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.model(inputs), labels)
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=0.5)
            self.optimizer.step()
            self.losses.append(loss.item())
        return self

    @property
    def checkpoint(self):
        return {"model": self.model, "optimizer": self.optimizer}


def test_fabric_trains_as_with_torch_and_resumes_bitwise(tmp_path):
    ours, theirs = FabricRun(fusedopt).epoch(), FabricRun(torch.optim).epoch().epoch()
    ours.fabric.save(tmp_path / "state.ckpt", ours.checkpoint)
    ours.epoch()
    assert_kernels_did_it(ours.given)
    assert_kernels_did_it(ours.optimizer)
    outcomes = [(values(run.model), run.losses) for run in (ours, theirs)]
    assert_close_runs(*outcomes, ours.start)
    resumed = FabricRun(fusedopt)
    resumed.fabric.load(tmp_path / "state.ckpt", resumed.checkpoint)
    assert_equal_params(values(resumed.epoch().model), values(ours.model))
