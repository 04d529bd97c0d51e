"""An optimizer of fusedopt and torch's, to which the same things happen, and what must hold then.

A step must be within the float64 oracle's bound of every parameter and state; fp32 and fp64 must
agree with torch's step too (torch rounds bf16 at every operation, which is no yardstick). Then
torch's side takes over our values, so that roundings do not add up over a story, and after every
action both must be equal: bits, keys, dtypes, strides, groups.
"""

import inspect

import torch
from cases import CASES
from harness import set_grads, states_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from tolerances import assert_step_close

SHAPES = [(), (0,), (1,), (5,), (3, 5), (17,), (1, 4, 3), (6, 4), (70,)]
STORY_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.bfloat16: {"rtol": 0.0, "atol": float("inf")},
}
# Samples without hyperparameters in fp32 tensors, from which torch computes in fp32; the stories
# put fp64 ones in.
BEGINNINGS = {
    f"{case.name}: {sample.desc}": (case, sample)
    for case in CASES
    for sample in case.samples
    if not any("tensor" in repr(value) for value in sample.kwargs.values())
}
OURS_ALONE = ("fused", "capturable", "params")  # keys of groups that the sides need not share


def strided(value):
    """The same values in every second element of twice the memory."""
    room = torch.zeros(*value.shape, 2, dtype=value.dtype)
    room[..., 1] = value
    return room[..., 1]


def transposed(value):
    return value if value.dim() < 2 else value.transpose(-1, -2).contiguous().transpose(-1, -2)


def misaligned(value):
    room = torch.zeros(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
    return room.copy_(value)


def expanded(value):
    """One of the values, everywhere (stride 0), as the gradient of a sum."""
    if value.numel() == 0:
        return value
    return value.reshape(-1)[:1].reshape([1] * value.dim()).expand(value.shape)


MOVES = {"clone": torch.clone, "strided": strided, "transposed": transposed, "off": misaligned}
LAYOUTS = st.sampled_from([torch.clone, torch.clone, strided, transposed, misaligned, expanded])


class SideBySide(RuleBasedStateMachine):
    """An optimizer of fusedopt and torch's, to which the same things happen."""

    own_flags = ("fused",)

    @initialize(
        beginning=st.sampled_from(sorted(BEGINNINGS)),
        dtypes=st.lists(st.sampled_from(STORY_DTYPES), min_size=1, max_size=4),
        flag=st.booleans(),
        steps=st.integers(0, 2),
    )
    def begin(self, beginning, dtypes, flag, steps):
        self.case, sample = BEGINNINGS[beginning]
        self.seed = 0
        self.layouts = {}
        ours = [self.new_param(dtype) for dtype in dtypes]
        self.params = [ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]]
        self.kwargs = [self.case.kwargs(sample), {**self.case.kwargs(sample), "foreach": False}]
        signature = inspect.signature(self.case.torch_class).parameters
        if flag:
            self.kwargs[0] |= {name: True for name in self.own_flags if name in signature}
        self.kwargs[0]["foreach"] = None if self.kwargs[0].get("fused") else False
        self.classes = (self.case.fused(), self.case.torch_class)
        self.optimizers = [
            cls(params, **kwargs)
            for cls, params, kwargs in zip(self.classes, self.params, self.kwargs, strict=True)
        ]
        self.scalers = [
            torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)
        ]
        for _ in range(steps):
            self.step_plainly()

    def new_param(self, dtype):
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        shape = SHAPES[self.seed * 7 % len(SHAPES)]
        return torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

    def each(self, change):
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            change(params, optimizer)

    def each_of(self, index, change, then_step=False):
        """Does it to one parameter."""
        self.each(lambda params, optimizer: change(params[index % len(params)], optimizer))
        if then_step:
            self.step_plainly()

    def each_group(self, index, change, then_step=False):
        self.each(
            lambda _, optimizer: change(optimizer.param_groups[index % len(optimizer.param_groups)])
        )
        if then_step:
            self.step_plainly()

    def stepped(self, step):
        """Steps both sides by a function of (params, optimizer), and compares what they did."""
        before = [(p.detach().clone(), states_of(self.optimizers[0], p)) for p in self.params[0]]
        ends = [step(*side) for side in zip(self.params, self.optimizers, strict=True)]
        assert ends[0] == ends[1]
        ours, theirs = self.optimizers
        for group in ours.param_groups:
            hyper = self.case.hyper(group)
            for param in group["params"]:
                index = next(i for i, p in enumerate(self.params[0]) if p is param)
                if param.grad is not None and not param.grad.is_sparse and ends[0] != "skipped":
                    self.check_with_oracle(before[index], param, hyper)
        for a, b in zip(*self.params, strict=True):
            pairs = [(a, b)]
            mine, other = states_of(ours, a), states_of(theirs, b)
            assert list(mine) == list(other)
            pairs += [(ours.state[a][name], theirs.state[b][name]) for name in mine]
            for ours_value, value in pairs:
                torch.testing.assert_close(
                    ours_value.detach(), value.detach(), **CLOSE[value.dtype]
                )
                value.data.copy_(ours_value.detach())

    def check_with_oracle(self, before, param, hyper):
        old, states = before
        new_states = states_of(self.optimizers[0], param)
        count = float(states.pop("step", torch.zeros(())))
        if self.case.has_step:
            assert float(new_states["step"]) == count + 1
            if not states:  # created by this step
                first = self.optimizers[0].defaults.get("initial_accumulator_value", 0.0)
                states = {name: torch.full_like(v, first) for name, v in new_states.items()}
        after = (param, new_states)
        before = (old, param.grad, states)
        assert_step_close(self.case, param.dtype, before, after, int(count) + 1, hyper)

    def give_gradients(self, params, missing=()):
        """New ones, in each parameter's present layout.

        Were it another one at every step, plans would be rebuilt so often that nothing they miss
        could show.
        """
        set_grads(params, self.seed)
        for index, param in enumerate(params):
            layout = self.layouts.get(index, torch.clone)
            param.grad = None if index in missing else layout(param.grad)

    def step_plainly(self):
        self.seed += 1

        def step(params, optimizer):
            self.give_gradients(params)
            optimizer.step()

        self.stepped(step)

    @invariant()
    def both_are_equal(self):
        if not hasattr(self, "scalers"):
            return
        ours, theirs = self.optimizers
        for a, b in zip(*self.params, strict=True):
            assert_equal(a, b, "parameter")
            states = ours.state.get(a, {}), theirs.state.get(b, {})
            # What begins with "_" is left out of `state_dict()`.
            assert [name for name in states[0] if not name.startswith("_")] == list(states[1])
            for name, value in states[1].items():
                if isinstance(value, torch.Tensor):
                    # A state that is torch's clone of its first gradient has that one's layout.
                    assert_equal(states[0][name], value, name, strides=not self.case.lazy_state)
                else:
                    assert states[0][name] == value, name
        assert len(ours.state) == len(theirs.state)
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {*OURS_ALONE, "foreach"}:
                assert a[key] == b[key], key


def assert_equal(actual, expected, what, strides=True):
    """Bit for bit; dtype, shape and strides as well."""
    assert actual.dtype == expected.dtype, what
    assert actual.stride() == expected.stride() or not strides, what
    assert torch.equal(actual, expected), what
