"""Life stories: what programs do to an optimizer between steps, in any order, beside torch.optim.

Hypothesis makes up stories out of the rules of `Story`. Each happens to fusedopt's optimizer and to
torch.optim's for-loop, over parameters of several dtypes; `SideBySide` says what must hold.
"""

import copy
import pickle

import torch
from harness import assert_states_equal, states_of, through_a_file
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from side_by_side import LAYOUTS, MOVES, STORY_DTYPES, SideBySide

from fusedopt import _C

SETTINGS = {
    "deadline": None,  # the machine decides how long a step takes
    "derandomize": True,  # the same stories on every run: a failure is the change's
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
INDEX = st.integers(0, 10)


class Story(SideBySide):
    """What may happen."""

    # ---- Steps ----------------------------------------------------------------------------------

    @rule(missing=st.sets(INDEX, max_size=3), with_closure=st.booleans())
    def step(self, missing, with_closure):
        self.seed += 1

        def step(params, optimizer):
            def closure():
                assert torch.is_grad_enabled()
                self.give_gradients(params, missing)
                return 0.5

            if with_closure:
                return optimizer.step(closure)
            self.give_gradients(params, missing)
            return optimizer.step()

        self.stepped(step)

    @rule()
    def step_over_the_same_gradients(self):
        self.stepped(lambda params, optimizer: optimizer.step())

    @rule(
        overflow=st.booleans(), missing=st.sets(st.integers(1, 10), max_size=3), clip=st.booleans()
    )
    def step_through_a_scaler(self, overflow, missing, clip):
        self.seed += 1

        def step(params, optimizer):
            scaler = self.scalers[optimizer is self.optimizers[1]]
            factor = scaler.scale(torch.ones(()))
            self.give_gradients(params, missing)
            for param in params:
                if param.grad is not None:  # in memory of its own, where it was expanded
                    param.grad = param.grad * factor.to(param.dtype)
            if overflow:
                largest = max((p.grad for p in params if p.grad is not None), key=torch.numel)
                if largest.numel() == 0:
                    return self.unscaled_by_hand(params, factor)
                largest[(0,) * largest.dim()] = float("nan")
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 2.0)
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                optimizer.zero_grad()
            return "skipped" if overflow else None

        self.stepped(step)
        assert self.scalers[0].state_dict() == self.scalers[1].state_dict()

    def unscaled_by_hand(self, params, factor):
        """Nothing can overflow in parameters without elements."""
        for param in params:
            param.grad = None
        return None

    @rule()
    def step_over_sparse_gradients(self):
        """Values where torch accepts them; torch's own error and nothing changed where not."""
        group_values = [
            [group.get(key) for key in ("momentum", "weight_decay", "fused")]  # torch's fused: none
            for group in self.optimizers[0].param_groups
        ]
        if self.case.sparse and any(map(any, group_values)):
            return
        self.seed += 1

        def step(params, optimizer):
            self.give_gradients(params)
            for param in params:
                if param.dim() == 2:
                    param.grad = param.grad.to_sparse()
            before = [(p, p.detach().clone(), states_of(optimizer, p)) for p in params]
            try:
                end = optimizer.step()
            except RuntimeError as error:
                end = str(error)
                self.refused(optimizer, before)
            optimizer.zero_grad()
            return end

        self.stepped(step)

    def refused(self, optimizer, before):
        """Ours is as it was; torch's, which steps the groups before the refused one, is made so."""
        for param, value, states in before:
            if optimizer is self.optimizers[0]:
                assert torch.equal(param, value)
                assert_states_equal(states_of(optimizer, param), states)
                continue
            param.data.copy_(value)
            if not states:
                optimizer.state.pop(param, None)
            for name, state in states.items():
                optimizer.state[param][name].copy_(state)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.each(lambda _, optimizer: optimizer.zero_grad(set_to_none=set_to_none))

    @rule(index=INDEX, layout=LAYOUTS)
    def change_a_layout(self, index, layout):
        self.layouts[index % len(self.params[0])] = layout

    @rule(index=INDEX, layout=LAYOUTS, how=st.sampled_from(["replaced", "scaled", "none"]))
    def change_a_gradient(self, index, layout, how):
        def change(param, optimizer):
            if how == "none" or param.grad is None:
                param.grad = None
            elif how == "replaced":
                param.grad = layout(param.grad)
            elif not (param.grad.stride() and 0 in param.grad.stride()):
                param.grad.mul_(0.5)

        self.each_of(index, change)

    # ---- Groups ---------------------------------------------------------------------------------

    @precondition(lambda self: len(self.params[0]) < 7)
    @rule(dtype=st.sampled_from(STORY_DTYPES), lr=st.sampled_from([1e-3, 0.1]))
    def add_group(self, dtype, lr):
        new = self.new_param(dtype)
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            params.append(torch.nn.Parameter(new.detach().clone()))
            optimizer.add_param_group({"params": [params[-1]], "lr": lr})

    @rule(
        index=INDEX,
        lr=st.floats(0, 0.5),
        kind=st.sampled_from(["number", "tensor", "fill"]),
        then_step=st.booleans(),
    )
    def change_lr(self, index, lr, kind, then_step):
        def change(group):
            if kind == "fill" and isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr if kind == "number" else torch.tensor(lr, dtype=torch.float64)

        self.each_group(index, change, then_step)

    @rule(
        index=INDEX,
        weight_decay=st.sampled_from([0.0, 0.1]),
        momentum=st.sampled_from([0.0, 0.5, 0.9]),
        betas=st.sampled_from([(0.9, 0.999), (0.5, 0.75)]),
        eps=st.sampled_from([1e-8, 1e-3]),
        then_step=st.booleans(),
    )
    def change_numbers(self, index, weight_decay, momentum, betas, eps, then_step):
        def change(group):
            values = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
            # torch's RMSprop misses the buffer that it made no room for.
            if self.case.lazy_state or (momentum and group.get("momentum")):
                values["momentum"] = momentum
            group.update({key: value for key, value in values.items() if key in group})

        self.each_group(index, change, then_step)

    @rule(
        index=INDEX,
        flag=st.sampled_from(["maximize", "nesterov", "amsgrad", "centered"]),
        then_step=st.booleans(),
    )
    def change_a_flag(self, index, flag, then_step):
        def change(group):
            if flag in {"maximize", "nesterov"} or group.get(flag):  # the others need a state
                group.update({flag: not group[flag]} if flag in group else {})

        self.each_group(index, change, then_step)

    @rule(index=INDEX, then_step=st.booleans())
    def reorder_a_group(self, index, then_step):
        self.each_group(index, lambda group: group["params"].reverse(), then_step)

    @rule(index=INDEX, then_step=st.booleans())
    def exchange_members_of_groups(self, index, then_step):
        """The first of a group for the last of another, of the same or another lr."""

        def change(params, optimizer):
            groups = [optimizer.param_groups[i] for i in (index % len(optimizer.param_groups), 0)]
            wanted = [_C.state_names(self.case.name, group) for group in groups]
            if wanted[0] == wanted[1]:  # parameters take their states along
                some, others = (group["params"] for group in groups)
                some[0], others[-1] = others[-1], some[0]

        self.each(change)
        if then_step:
            self.step_plainly()

    @rule(index=INDEX, drop=st.booleans())
    def freeze_or_thaw(self, index, drop):
        def change(param, optimizer):
            param.requires_grad_(not param.requires_grad)
            if drop and not param.requires_grad:
                param.grad = None

        self.each_of(index, change)

    # ---- Memory ---------------------------------------------------------------------------------

    @rule(index=INDEX, move=st.sampled_from(sorted(MOVES)), then_step=st.booleans())
    def move_a_parameter(self, index, move, then_step):
        def change(param, optimizer):
            param.data = MOVES[move](param.data * 0.5)

        self.each_of(index, change, then_step)

    @rule(index=INDEX, dtype=st.sampled_from(STORY_DTYPES), then_step=st.booleans())
    def cast_a_parameter(self, index, dtype, then_step):
        def change(param, optimizer):
            param.grad = None
            param.data = param.data.to(dtype)
            state = optimizer.state.get(param, {})
            for name, value in state.items():
                if name != "step" and value is not None:
                    state[name] = value.to(dtype)

        self.each_of(index, change, then_step)

    @rule(index=INDEX, then_step=st.booleans())
    def swap_a_parameter(self, index, then_step):
        def change(param, optimizer):
            param.grad = None
            torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach() * 0.5))

        self.each_of(index, change, then_step)

    @rule(
        index=INDEX,
        how=st.sampled_from(["zeros", "halves", "in place", "data", "entry", *sorted(MOVES)]),
        then_step=st.booleans(),
    )
    def change_states(self, index, how, then_step):
        def change(param, optimizer):
            state = optimizer.state.get(param, {})
            if how == "entry" and state:
                optimizer.state[param] = {name: copy.deepcopy(v) for name, v in state.items()}
                return
            for name, value in state.items():
                if name == "step" or value is None:
                    continue
                if how == "in place":
                    value.mul_(0.5)
                elif how == "data":
                    value.data = value.data * 0.5
                elif how == "zeros":
                    state[name] = torch.zeros_like(value)
                else:
                    state[name] = MOVES.get(how, torch.clone)(value * 0.5)

        self.each_of(index, change, then_step)

    @rule(index=INDEX, count=st.integers(0, 50), in_place=st.booleans(), then_step=st.booleans())
    def change_a_step_count(self, index, count, in_place, then_step):
        def change(param, optimizer):
            state = optimizer.state.get(param, {})
            if "step" in state:
                if in_place:
                    state["step"].fill_(count)
                else:
                    state["step"] = torch.tensor(float(count))

        self.each_of(index, change, then_step)

    @rule(index=INDEX, then_step=st.booleans())
    def forget_a_state(self, index, then_step):
        if self.case.torch_class([torch.nn.Parameter(torch.ones(1))]).state:
            return  # made by the constructor, and missed by torch's step
        self.each_of(index, lambda param, optimizer: optimizer.state.pop(param, None), then_step)

    @rule(index=INDEX, then_step=st.booleans())
    def reinsert_a_state(self, index, then_step):
        """The same entry, at another place among the states."""

        def change(param, optimizer):
            if param in optimizer.state:
                optimizer.state[param] = optimizer.state.pop(param)

        self.each_of(index, change, then_step)

    # ---- Checkpoints and copies -----------------------------------------------------------------

    def load(self, side, state_dict):
        """Into the optimizer, but for the flags that the sides need not share."""
        optimizer = self.optimizers[side]
        for group, loaded in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for flag in ("fused", "capturable", "foreach"):
                if flag in group:
                    loaded[flag] = group[flag]
        optimizer.load_state_dict(state_dict)

    @rule(exchanged=st.booleans(), into_new_ones=st.booleans())
    def save_and_load(self, exchanged, into_new_ones):
        saved = [through_a_file(optimizer.state_dict()) for optimizer in self.optimizers]
        if into_new_ones:
            self.optimizers = [
                cls([{"params": list(group["params"])} for group in old.param_groups], **kwargs)
                for cls, old, kwargs in zip(self.classes, self.optimizers, self.kwargs, strict=True)
            ]
        for side in range(2):
            self.load(side, saved[1 - side if exchanged else side])

    @rule(by_pickle=st.booleans())
    def copy_everything(self, by_pickle):
        self.zero_grad(set_to_none=True)  # copied by neither way
        for side, both in enumerate(zip(self.params, self.optimizers, strict=True)):
            copied = pickle.loads(pickle.dumps(both)) if by_pickle else copy.deepcopy(both)
            self.params[side], self.optimizers[side] = copied


class StoryOnADevice(Story):
    """The same, with the device's part rehearsed on the host, and steps counted there too."""

    own_flags = ("capturable",)


def live(machine, stories, actions=20, **overrides):
    """Runs that many stories of at most so many actions."""
    budget = settings(
        **{**SETTINGS, **overrides}, max_examples=stories, stateful_step_count=actions
    )
    run_state_machine_as_test(machine, settings=budget)
