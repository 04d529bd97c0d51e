"""LR schedulers and torch.optim.swa_utils drive fusedopt as they drive torch.optim."""

import copy

import pytest
import torch
from cases import CASES
from devices import ANYWHERE, Host
from harness import make_params, set_grads
from pairs import pairwise
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def sequence(optimizer):
    """A warm-up, then restarts of a cosine."""
    warm_up = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    restarts = schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=2, T_mult=2)
    return schedulers.SequentialLR(optimizer, [warm_up, restarts], milestones=[3])


def one_cycle(optimizer):
    """Cycles momentum, or beta1, where the optimizer has one."""
    group = optimizer.param_groups[0]
    cycles = "betas" in group or bool(group.get("momentum"))
    return schedulers.OneCycleLR(optimizer, max_lr=0.5, total_steps=13, cycle_momentum=cycles)


def cyclic(optimizer):
    group = optimizer.param_groups[0]
    cycles = "betas" in group or bool(group.get("momentum"))
    return schedulers.CyclicLR(
        optimizer, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=cycles
    )


SCHEDULERS = {
    "OneCycleLR": one_cycle,
    "CyclicLR": cyclic,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda n: 0.9**n] * len(o.param_groups)),
    "SequentialLR": sequence,
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, step_size=3)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=4),
}


def scheduled(cls, case, name, place, own_kwargs, reload_at=None):
    """Group values and parameters after each of 12 steps; two groups of their own lr."""
    params = make_params([(5,), (3, 4)], device=place.device)
    groups = [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.02}]
    kwargs = {"momentum": 0.9} if case.momentum_key == "momentum" else {}
    optimizer = cls(groups, weight_decay=0.1, **kwargs, **own_kwargs)
    scheduler = SCHEDULERS[name](optimizer)
    track = []
    for step in range(12):
        if step == reload_at:
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        set_grads(params, step)
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        values = [{**group, "params": 0} for group in optimizer.param_groups]
        track.append((values, [param.detach().clone() for param in params]))
    return track


@pairwise(anywhere=ANYWHERE, case=CASES, name=SCHEDULERS)
def test_every_scheduler_drives_it_as_it_drives_torch(anywhere, case, name):
    """lr, momentum and betas of every step are equal, so are the trajectories; no warning."""
    own = {"backend": anywhere.backend}
    ours = scheduled(case.fused(), case, name, anywhere, own)
    theirs = scheduled(case.torch_class, case, name, anywhere, {})
    assert len({values[0]["lr"] for values, _ in ours}) > 1, "the scheduler moved nothing"
    for (our_values, our_params), (their_values, their_params) in zip(ours, theirs, strict=True):
        assert our_values == their_values
        torch.testing.assert_close(our_params, their_params, rtol=1e-5, atol=1e-6)


@EACH_CASE
@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR", "LambdaLR"])
def test_a_reloaded_schedule_goes_on(case, name):
    whole = scheduled(case.fused(), case, name, Host, {})
    resumed = scheduled(case.fused(), case, name, Host, {}, reload_at=6)
    for (values, params), (others, other_params) in zip(whole, resumed, strict=True):
        assert values == others
        assert all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.momentum_key], ids=lambda case: case.name
)
def test_one_cycle_moves_the_momentum(case):
    track = scheduled(case.fused(), case, "OneCycleLR", Host, {})
    assert len({values[0][case.momentum_key] for values, _ in track}) > 5


@EACH_CASE
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models_follow_it_as_they_follow_torch(case, average):
    """AveragedModel, SWALR, EMA and update_bn over a network with batch normalisation."""
    ends = []
    for cls in (case.fused(), case.torch_class):
        torch.manual_seed(0)
        # No bias before the normalisation: its gradient is rounding, which Adam would magnify.
        layers = torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.Tanh()
        model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 1))
        data = torch.randn(24, 4).split(8)
        optimizer = cls(model.parameters(), lr=0.01)
        averaged = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if average == "ema" else None
        )
        scheduler = SWALR(optimizer, swa_lr=0.005, anneal_epochs=2)
        for _ in range(4):
            for batch in data:
                optimizer.zero_grad()
                (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
                optimizer.step()
                averaged.update_parameters(model)
            scheduler.step()
        update_bn(data, averaged)
        ends.append([*averaged.state_dict().values(), *model.state_dict().values()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
