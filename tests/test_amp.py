"""GradScaler: with ``fused=True`` by torch's protocol, without it on the host, as with torch."""

import pytest
import torch
from cases import CASES
from harness import assert_same, make_params, run, set_grads, states_of

import fusedopt

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# torch.optim.RMSprop takes no `fused`: GradScaler unscales and skips for it on the host.
PROTOCOLS = [
    pytest.param(case, fused, id=f"{case.name}-{'fused' if fused else 'host'}")
    for case in CASES
    for fused in (True, False)
    if not fused or "fused" in case.takes
]
EACH_PROTOCOL = pytest.mark.parametrize(("case", "fused"), PROTOCOLS)


@pytest.mark.parametrize("case", [c for c in CASES if "fused" in c.takes], ids=lambda c: c.name)
def test_grad_scaler_with_fused_is_torchs(case):
    outcomes = []
    for optimizer_class in (case.fused(), case.torch_class):
        params = make_params([(6,), (3, 3)])
        optimizer = optimizer_class(params, lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2)
        assert optimizer._step_supports_amp_scaling
        scales = []
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((p * p).sum() * (step + 1) for p in params)
            if step in (0, 3):  # overflow on the first step and on a later one
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            before = [p.detach().clone() for p in params]
            steps = [
                optimizer.state[p]["step"].clone() for p in params if "step" in optimizer.state[p]
            ]
            scaler.step(optimizer)
            if step in (0, 3):
                assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
                now = [optimizer.state[p]["step"] for p in params if steps]
                assert all(torch.equal(a, b) for a, b in zip(now, steps, strict=True))
            else:
                torch.testing.assert_close(params[0].grad, before[0] * 2 * (step + 1))
            scaler.update()
            scales.append(scaler.get_scale())
        outcomes.append(([p.detach() for p in params], scales))
    assert outcomes[0][1] == outcomes[1][1]
    for ours, theirs in zip(outcomes[0][0], outcomes[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_overflow_on_the_first_step_creates_no_state():
    params = make_params([(6,)])
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(params[0].sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not optimizer.state_dict()["state"]
    optimizer.zero_grad()
    scaler.scale(params[0].sum()).backward()
    scaler.step(optimizer)
    # The first step that took place counts as the first: no dampening.
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], torch.ones(6))


@EACH_PROTOCOL
def test_who_supports_amp_scaling_is_torchs(case, fused):
    flags = {"fused": True} if fused else {}
    ours, theirs = case.fused()(make_params(), **flags), case.torch_class(make_params(), **flags)
    protocol = "_step_supports_amp_scaling"
    assert hasattr(ours, protocol) == hasattr(theirs, protocol) == fused
    assert getattr(ours, protocol, None) == getattr(theirs, protocol, None)


def scaled_gradients(params, scaler, step, overflow):
    """What a backward of the scaled loss leaves; one gradient not finite for an overflow."""
    set_grads(params, step)
    factor = scaler.scale(torch.ones((), device=params[0].device))
    for param in params:
        param.grad.mul_(factor.to(param.dtype))
    if overflow:
        params[-1].grad.view(-1)[-1] = float("inf") if step % 2 else float("nan")


class Recorded:
    """A life under GradScaler: the scale after each step, and everything the step may change."""

    def __init__(self, cls, case, place, fused, overflows, clip=None, dtype=torch.float32):
        params = make_params([(), (3, 5), (40,)], dtype, device=place.device)
        own = {"backend": place.backend} if cls is case.fused() else {}
        # torch's fused SGD keeps memory that nobody has written as the momentum of a skipped
        # first step, so there it has none.
        kwargs = {"lr": 0.1} if fused and 0 in overflows else case.stateful
        kwargs |= {"fused": True} if fused else {}
        self.params, self.optimizer = params, cls(params, **kwargs, **own)
        self.scaler = torch.amp.GradScaler(place.device, init_scale=1024.0, growth_interval=2)
        self.scales, self.norms = [], []
        for step in range(7):
            scaled_gradients(params, self.scaler, step, step in overflows)
            before = self.everything()
            if clip is not None:
                self.scaler.unscale_(self.optimizer)
                self.norms.append(torch.nn.utils.clip_grad_norm_(params, clip))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scales.append(self.scaler.get_scale())
            if step in overflows:
                self.assert_unchanged(before)
            else:
                assert not torch.equal(params[-1].detach(), before[-1][0]), "nothing moved"

    def everything(self):
        return [(p.detach().clone(), states_of(self.optimizer, p)) for p in self.params]

    def assert_unchanged(self, before):
        for (param, states), (now, now_states) in zip(before, self.everything(), strict=True):
            assert torch.equal(param, now)
            for name, value in states.items():
                assert torch.equal(now_states[name], value), name
            for name in now_states.keys() - states.keys():  # made by a skipped first step
                assert not now_states[name].any(), name


@EACH_PROTOCOL
@pytest.mark.parametrize(
    "overflows",
    [(), (0, 1, 4, 5), *(pytest.param(one, marks=pytest.mark.slow) for one in ((0,), (3,)))],
    ids=str,
)
def test_overflows_change_nothing_and_scales_and_steps_are_torchs(anywhere, case, fused, overflows):
    ours = Recorded(case.fused(), case, anywhere, fused, overflows)
    theirs = Recorded(case.torch_class, case, anywhere, fused, overflows)
    assert ours.scales == theirs.scales
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0, equal_nan=True)
        our_states, their_states = states_of(ours.optimizer, a), states_of(theirs.optimizer, b)
        torch.testing.assert_close(our_states, their_states, rtol=1e-5, atol=1e-6)
        if case.has_step:
            assert int(our_states["step"]) == 7 - len(overflows)


@EACH_PROTOCOL
@pytest.mark.parametrize("overflows", [(), (0, 3)], ids=str)
def test_unscaled_and_clipped_gradients_are_not_unscaled_again(anywhere, case, fused, overflows):
    """unscale_, clip_grad_norm_, step: torch then hands over no scale, only the overflow."""
    ours = Recorded(case.fused(), case, anywhere, fused, overflows, clip=0.5)
    theirs = Recorded(case.torch_class, case, anywhere, fused, overflows, clip=0.5)
    assert ours.scales == theirs.scales
    torch.testing.assert_close(ours.norms, theirs.norms, equal_nan=True)
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-5, atol=1e-6)


@EACH_PROTOCOL
def test_a_skipped_step_is_as_if_it_had_not_been(anywhere, case, fused):
    """Bit for bit: a run with overflows ends as the run of its other steps."""
    for overflows in ((0,), (2, 3)):
        run = Recorded(case.fused(), case, anywhere, fused, overflows)
        params = make_params([(), (3, 5), (40,)], device=anywhere.device)
        kwargs = {"lr": 0.1} if fused and 0 in overflows else case.stateful
        optimizer = case.fused()(params, backend=anywhere.backend, **kwargs)
        for step in range(7):
            if step not in overflows:
                set_grads(params, step)
                optimizer.step()
        for a, b in zip(run.params, params, strict=True):
            assert torch.equal(a, b)
            wanted, found = states_of(optimizer, b), states_of(run.optimizer, a)
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(found[name].to(value.device, value.dtype), value), name


@EACH_PROTOCOL
def test_half_precision_and_mixed_gradients_scale_alike(case, fused):
    """GradScaler refuses fp16 gradients to unscale and takes bf16 ones: here as there."""
    for dtype in (torch.bfloat16, torch.float16):
        ends = []
        for cls in (case.fused(), case.torch_class):
            params = make_params([(6,)], dtype)
            optimizer = cls(params, lr=0.1, **({"fused": True} if fused else {}))
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            scaled_gradients(params, scaler, 0, overflow=False)
            try:
                scaler.step(optimizer)
                ends.append(params[0].grad.clone())
            except ValueError as error:
                ends.append(str(error))
        if isinstance(ends[1], str):
            assert ends[0] == ends[1]
        else:
            torch.testing.assert_close(*ends)


@EACH_CASE
def test_a_checkpoint_between_overflows_goes_on(case):
    """The scaler's state, the optimizer's and a skipped first step, all through state_dict."""
    fused = {"fused": True} if "fused" in case.takes else {}
    params = make_params([(6,)])
    optimizer = run(case.fused(), params, {**case.stateful, **fused}, steps=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step, overflow in enumerate((True, False, True)):
        scaled_gradients(params, scaler, step, overflow)
        scaler.step(optimizer)
        scaler.update()
        other, twin = [torch.nn.Parameter(params[0].detach().clone())], None
        twin = run(case.fused(), other, {**case.stateful, **fused}, steps=0)
        twin.load_state_dict(optimizer.state_dict())
        twin_scaler = torch.amp.GradScaler("cpu")
        twin_scaler.load_state_dict(scaler.state_dict())
        assert twin_scaler.get_scale() == scaler.get_scale()
        assert states_of(twin, other[0]).keys() == states_of(optimizer, params[0]).keys()
        optimizer, params, scaler = twin, other, twin_scaler
    if case.has_step:
        assert optimizer.state[params[0]]["step"] == 1


@EACH_PROTOCOL
def test_saving_a_state_neither_drops_nor_changes_it(anywhere, case, fused):
    """Between steps, under a scaler and without one: the run goes on bit for bit."""
    runs = []
    for saved in (True, False):
        params = make_params([(6,), (3, 4)], device=anywhere.device)
        kwargs = {**case.stateful, **({"fused": True} if fused else {})}
        optimizer = case.fused()(params, backend=anywhere.backend, **kwargs)
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            if saved:
                entries = optimizer.state_dict()["state"]
                assert [list(state) for state in entries.values()] == [
                    list(states_of(optimizer, param)) for param in params
                ]
                assert all(entries.values())
        runs.append((params, optimizer))
    assert_same(*runs)
