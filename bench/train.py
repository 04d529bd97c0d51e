"""The digits job: is fusedopt's optimizer the same optimizer, and how long is its step in training?

Two small networks learn scikit-learn's handwritten digits (1,797 real images of 8 x 8 pixels; 1,200
to train on, 597 to test on). For each optimizer one network is copied several times and the copies
are trained in lockstep, on the same batches in the same order: by torch.optim's default step (the
reference), by fusedopt, and by whatever shows how far torch drifts from *itself*.

Two correct implementations round differently, and training amplifies that: a difference between
curves means nothing until it is compared with torch's own drift, the largest difference between
torch's default step and its foreach and fused steps. Where those compute bit for bit the same
(RMSprop has no fused step, and foreach is the same arithmetic on a CPU), the drift is that of
torch's default step started from weights that are one rounding (1 ulp) away.

The networks are smooth (GELU, average pooling). With ReLU and max pooling one rounding decides now
and then which unit gets a gradient: torch's own curves then part by 1e-2 and more, at random, and
nothing can be concluded from any curve.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fusedopt.data import DevicePrefetcher, TensorLoader

from . import optimizers
from .providers import PROVIDERS
from .rows import CANDIDATE, Row
from .timing import Advance, Race, time_once

TEST_IMAGES = 597  # one image is 0.17 points of accuracy
BATCH = 64

FIRST_EPOCH_BOUND = 1e-5
DRIFT_FACTOR = 3.0
ACCURACY_POINTS = 0.5

REFERENCE, NUDGED = "torch-default", "torch-nudged"
TWINS = ("torch-foreach", "torch-fused")


@dataclass(frozen=True)
class Digits:
    """The data, split once and for all: images scaled to [0, 1] and their classes."""

    train_images: torch.Tensor
    train_classes: torch.Tensor
    test_images: torch.Tensor
    test_classes: torch.Tensor

    @staticmethod
    def load() -> Digits:
        """Reads the images from scikit-learn's wheel and splits them, stratified, seed 0."""
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

        images, classes = load_digits(return_X_y=True)
        images = (images / 16).astype("float32")
        parts = train_test_split(
            images, classes, test_size=TEST_IMAGES, random_state=0, stratify=classes
        )
        train_images, test_images, train_classes, test_classes = map(torch.from_numpy, parts)
        return Digits(train_images, train_classes, test_images, test_classes)

    def batches(self, epochs: int, seed: int) -> Iterator[list[list[torch.Tensor]]]:
        """One list of shuffled [images, classes] batches for each epoch."""
        generator = torch.Generator().manual_seed(seed)
        loader = TensorLoader(
            self.train_images, self.train_classes, batch_size=BATCH, shuffle=True,
            generator=generator,
        )  # fmt: skip
        prefetcher = DevicePrefetcher(loader, self.train_images.device)
        for _ in range(epochs):
            yield list(prefetcher)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(64, 100), nn.GELU(), nn.Linear(100, 100), nn.GELU(), nn.Linear(100, 10)
    ),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GELU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    ),
}
MODEL_TITLES = {"mlp": "multilayer perceptron 64-100-100-10", "conv": "convolutional network"}


@dataclass
class Run:
    """One copy of a network under one optimizer; losses and times of its steps, batch by batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def train_on(self, images: torch.Tensor, classes: torch.Tensor) -> None:
        """One step on one batch."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), classes)
        loss.backward()
        self.step_seconds.append(time_once(self.optimizer.step))
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, classes: torch.Tensor) -> float:
        """Percentage of images given their right class."""
        return 100 * (self.model(images).argmax(1) == classes).double().mean().item()


def difference(reference: Run, other: Run, batches: int | None = None) -> float:
    """Largest relative difference of a loss, batch by batch, over the first `batches` or all."""
    a = torch.tensor(reference.losses[:batches], dtype=torch.float64)
    b = torch.tensor(other.losses[:batches], dtype=torch.float64)
    return float(((a - b).abs() / a.abs()).amax())  # hands a nan through: a broken run shows


def failures(row: Row) -> list[str]:
    """What does not hold of fusedopt's row, one sentence each; empty if all does."""
    # Below the bound of the first epoch curves count as the same: a drift of a single rounding,
    # as a very short run has it, is not a measure to hold anything against.
    bound = max(FIRST_EPOCH_BOUND, DRIFT_FACTOR * row["drift"])
    points = abs(row["accuracy"] - row["accuracy_of_torch"])
    checks = (
        ("first epoch's loss difference", row["difference_first_epoch"], FIRST_EPOCH_BOUND),
        ("whole run's loss difference", row["difference"], bound),
        ("difference in accuracy points", points, ACCURACY_POINTS),
    )
    where = f"{row['optimizer']} on {row['workload']}"
    # Written as "not <=" so that nan fails.
    return [
        f"{where}: {what} is {value:.1e}, at most {limit:.1e} is allowed"
        for what, value, limit in checks
        if not value <= limit
    ]


def verdict(rows: Sequence[Row]) -> str:
    """Whether fusedopt trained as torch.optim does, and where it did not."""
    bound = (
        f"loss curves within {FIRST_EPOCH_BOUND:.0e} relative over the first epoch and afterwards "
        f"within that or {DRIFT_FACTOR:.0f} times torch's own drift; accuracies within "
        f"{ACCURACY_POINTS} points"
    )
    ours = [row for row in rows if row["provider"] == CANDIDATE]
    found = [failure for row in ours for failure in failures(row)]
    if not found:
        return f"The bound holds for all {len(ours)} rows: {bound}."
    return "\n".join([f"The bound does NOT hold ({bound}):", *(f"  {line}" for line in found)])


def measure(
    models: Sequence[str], names: Sequence[str], epochs: int, seed: int, advance: Advance
) -> Iterator[list[Row]]:
    """Trains every model with every optimizer, `advance` before each epoch, and yields the rows."""
    digits = Digits.load()
    for model, optimizer in itertools.product(models, names):
        torch.manual_seed(seed)
        runs = make_runs(MODELS[model](), optimizer)
        for batches in digits.batches(epochs, seed):
            advance(f"{model} / {optimizer}")
            train_in_lockstep(list(runs.values()), batches)
        yield rows_of(model, optimizer, runs, digits, len(batches))


def train_in_lockstep(
    runs: list[Run], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Every run on every batch, and none always first: step times then compare within a batch."""
    for index, batch in enumerate(batches):
        shift = index % len(runs)
        for run in runs[shift:] + runs[:shift]:
            run.train_on(*batch)


def make_runs(model: nn.Module, optimizer: str) -> dict[str, Run]:
    """Copies of `model`, each under another implementation of `optimizer`."""
    settings, runs = optimizers.settings(optimizer).train, {}
    for name in (REFERENCE, *TWINS, CANDIDATE, NUDGED):
        if name in TWINS and PROVIDERS[name].unavailable(optimizer):
            continue
        twin = copy.deepcopy(model)
        if name == NUDGED:
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.copy_(torch.nextafter(parameter, 2 * parameter))
        provider = PROVIDERS[REFERENCE if name == NUDGED else name]
        runs[name] = Run(twin, provider.optimizer(optimizer, list(twin.parameters()), **settings))
    return runs


def rows_of(
    model: str, optimizer: str, runs: dict[str, Run], digits: Digits, batches_per_epoch: int
) -> list[Row]:
    """A row a run: its losses, its accuracy, and how far it is from torch's default step."""
    total = len(runs[REFERENCE].losses)
    warm_up = batches_per_epoch if total > batches_per_epoch else 0
    race = Race({name: run.step_seconds[warm_up:] for name, run in runs.items()})
    found = {}
    for name, run in runs.items():
        means = torch.tensor(run.losses, dtype=torch.float64).view(-1, batches_per_epoch).mean(1)
        found[name] = {
            "job": "train", "workload": model, "optimizer": optimizer, "dtype": "float32",
            "provider": name, "loss": float(means[-1]),
            "accuracy": run.accuracy(digits.test_images, digits.test_classes),
            "difference_first_epoch": difference(runs[REFERENCE], run, batches_per_epoch),
            "difference": difference(runs[REFERENCE], run),
            "baseline": REFERENCE, **race.columns(name, REFERENCE),
            # Epochs enough to draw their means; otherwise every batch.
            "per_epoch": 1 if len(means) >= 5 else batches_per_epoch,
            "curve": means.tolist() if len(means) >= 5 else run.losses,
        }  # fmt: skip
    twins = [name for name in TWINS if name in found]
    drift = max(twins, key=lambda name: found[name]["difference"], default=NUDGED)
    drift = drift if found[drift]["difference"] > 0 else NUDGED
    found[CANDIDATE] |= {"drift": found[drift]["difference"], "drift_of": drift}
    found[CANDIDATE] |= {f"{key}_of_torch": found[REFERENCE][key]
                         for key in ("accuracy", "loss", "ms")}  # fmt: skip
    return [*found.values()]
