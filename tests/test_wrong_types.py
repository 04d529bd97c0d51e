"""Nothing that Python hands to the extension crashes it: it raises what was wrong, or succeeds.

Every function, method and property of `_C` is found by itself and called with objects that it does
not expect, in a child process, which a signal may take with it.
"""

import contextlib
import datetime
import os
import random
import signal
import traceback
from collections.abc import Callable

import pytest
import rehearsal
import torch
from cases import ADAMW

from fusedopt import _C

ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
DRAWS = 60  # of arguments at random, for each callable


def freed(tensor, bytes_left=0):
    tensor.untyped_storage().resize_(bytes_left)
    return tensor


class Subclass(torch.Tensor):
    """A tensor to `isinstance`, and to nobody else."""


def pool():
    """Objects of every kind that an argument may be mistaken for."""
    ones = torch.ones
    shrunk = torch.ones(8)[4:]
    return [
        *(
            None,
            0,
            -1,
            3,
            10**30,
            0.5,
            float("nan"),
            True,
            ADAMW.name,
            "none",
            b"cpu",
            object(),
            len,
        ),
        *([], [None], [0], [[ones(2)], [1]], [(0, ones(2))], (), {}, {"params": [1]}, {1: 2}),
        *(ones(2), ones(()), ones(0), ones(2, 3).t(), ones(2).half(), ones(2, dtype=torch.int64)),
        *(ones(2, dtype=torch.complex64), ones(2).to_sparse(), ones(1).expand(2)),
        *(ones(2, device="meta"), torch.nn.Parameter(ones(2)), ones(2, requires_grad=True) * 2),
        *(freed(ones(2)), freed(ones(())), freed(shrunk, 20), ones(2).as_subclass(Subclass)),
        *(torch.quantize_per_tensor(ones(2), 1.0, 0, torch.qint8), torch.Tensor, torch.float32),
        *(_C.StepOptions(), _C.StepMemory(len), _C.CapturedTables(), _C.Ring(2, False)),
        *({"cpu": datetime.datetime_CAPI}, {"cpu": _C.triton_launcher(None)}, {"cpu": 1}),
        *(_C.Purpose.FLUSH, _C.StepRequest(), Base().plan(), _C.StepRequest),
    ]


class Base:
    """A step's arguments that are right; each case then makes one of them wrong."""

    def __init__(self, launchers=None):
        self.rule, self.request, self.captured = ADAMW.name, _C.StepRequest(), _C.CapturedTables()
        self.param, idle = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
        self.param.grad = torch.ones(4, 3)
        self.entries = {"step": torch.tensor(1.0)}
        for name in ("exp_avg", "exp_avg_sq", "accumulated_grad", "ema"):
            self.entries[name] = torch.zeros(4, 3)
        self.group = torch.optim.AdamW([self.param, idle]).param_groups[0]
        self.groups, self.state = [self.group], {self.param: self.entries}
        self.memory = _C.StepMemory(lambda specs, sums: None)
        self.memory.options = _C.StepOptions(
            max_norm=1.0, measures=True, check=True, ema_decay=0.5, accumulates=True
        )
        self.rows, self.idle, self.launchers = [(0, self.param)], [idle], launchers or {}

    def plan(self):
        return _C.StepPlan(*self.arguments()["StepPlan.__init__"])

    def arguments(self):
        """Right arguments, by the name of what takes them."""
        param, grad, state = self.param, self.param.grad, self.entries["exp_avg"]
        init = [self.rule, self.groups, self.state, self.rows, self.idle, self.launchers]
        index = torch.tensor([1, 0])
        return {
            "StepPlan.__init__": [*init, self.captured, self.memory, False],
            "StepPlan.step": [self.groups, self.state, self.request],
            "StepPlan.why_not": [self.groups, self.state, self.request],
            "StepRequest.__init__": [_C.Purpose.UPDATE, 1.0, torch.ones(1), torch.ones(()), False],
            "StepMemory.__init__": [len],
            "StepMemory.options": [_C.StepOptions()],
            "StepMemory.window_weight": [1.0],
            "StepRequest.rows": [[0]],
            "StepRequest.before": [list],
            "CapturedTables.refresh": [self.rule, self.groups],
            "Ring.__init__": [2, False],
            "Ring.gather": [[torch.ones(2, 3)], index, 0, 2],
            "Ring.copy": [[torch.ones(2, 3)]],
            "state_names": [self.rule, self.group],
            "scalar_states": [self.rule, self.group],
            "has_reducer": [param],
            "why_not_fused": [param, grad],
            "why_state_unfit": [param, state],
            "has_kernel": [param, grad, state],
            "overlapping": [[[param], [state]]],
        }


def callables(base):
    """Every function, method and property of `_C`: name, what to call, number of arguments."""
    instances = {
        "StepOptions": _C.StepOptions(),
        "StepMemory": base.memory,
        "StepRequest": base.request,
        "StepPlan": base.plan(),
        "CapturedTables": base.captured,
        "Ring": _C.Ring(2, False),
        "Purpose": _C.Purpose.UPDATE,
    }
    for name, member in vars(_C).items():
        if name.startswith("__") or not callable(member):
            continue
        if not isinstance(member, type):
            yield name, member
            continue
        yield f"{name}.__init__", member
        itself = instances[name]
        for part, attribute in vars(member).items():
            if isinstance(attribute, property):
                yield f"{name}.{part}", lambda *, s=itself, p=part: getattr(s, p)
                yield f"{name}.{part}", lambda value, s=itself, p=part: setattr(s, p, value)
            elif callable(attribute) and part not in ("__new__", "__getstate__"):
                yield f"{name}.{part}", lambda *a, f=attribute, s=itself: f(s, *a)


def described(value, **_):
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def in_a_child(work: Callable[[Callable[[str], None]], None]) -> None:
    """Runs `work(tell)`, which tells what it is about to do, where a signal does no harm."""
    read, write = os.pipe()
    told = os.memfd_create("told")
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # reading what is no tensor may also go on for ever
        torch.set_num_threads(1)  # the pool's threads are not here
        # torch's own reads memory that was freed, and pybind11 shows the arguments in its errors.
        torch.Tensor.__repr__ = described
        try:
            work(lambda text: os.pwrite(told, text.encode().ljust(1000), 0))
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        error = pipe.read()
    status = os.waitpid(child, 0)[1]
    last = os.pread(told, 1000, 0).decode().strip()
    os.close(told)
    assert not os.WIFSIGNALED(status), f"signal {os.WTERMSIG(status)} in {last}"
    assert not error, f"{last}\n{error}"


def call_with_anything(tell):
    chance = random.Random(0)
    objects = pool()
    reached = set()
    for name, call in callables(Base()):
        base = Base()
        right = base.arguments().get(name)
        tell(f"{name} with what is right")
        if right is not None:
            try:
                call(*right)
                reached.add(name)
            except TypeError:
                pass  # of a property its getter, of a method one that was given no object
        draws = [chance.choices(objects, k=k % 10) for k in range(DRAWS)]
        for place in range(len(right or ())):
            draws += [[*right[:place], wrong, *right[place + 1 :]] for wrong in objects]
        for arguments in draws:
            tell(f"{name}({', '.join(map(described, arguments))})"[:900])
            with contextlib.suppress(ERRORS):
                call(*arguments)
    missed = Base().arguments().keys() - reached
    assert not missed, f"right arguments no longer are: {missed}"


def test_nothing_that_python_hands_over_crashes_the_extension():
    in_a_child(call_with_anything)


def replaced(name, value):
    def harm(base):
        base.entries[name] = value

    return harm


# What happens to a step's tensors and dicts after the plan was made.
HARMS = {
    "parameter freed": lambda base: freed(base.param),
    "parameter shrunk": lambda base: freed(base.param, 20),
    "gradient freed": lambda base: freed(base.param.grad),
    "state freed": lambda base: freed(base.entries["exp_avg_sq"]),
    "average shrunk": lambda base: freed(base.entries["ema"], 44),
    "accumulator freed": lambda base: freed(base.entries["accumulated_grad"]),
    "step count freed": lambda base: freed(base.entries["step"]),
    "decision freed": lambda base: [freed(decision) for decision in base.memory.decisions],
    "lr freed": lambda base: base.group.update(lr=freed(torch.ones(()))),
    "lr on no device": lambda base: base.group.update(lr=torch.ones((), device="meta")),
    "a state None": replaced("exp_avg", None),
    "a state a str": replaced("exp_avg", "0"),
    "a state meta": replaced("exp_avg", torch.zeros(4, 3, device="meta")),
    "a state narrow": replaced("exp_avg_sq", torch.zeros(4, 3, dtype=torch.bfloat16)),
    "an average narrow": replaced("ema", torch.zeros(4, 3, dtype=torch.bfloat16)),
    "a step count of int": replaced("step", 1),
    "no state": lambda base: base.state.update({base.param: None}),
    "no group": lambda base: base.groups.__setitem__(0, None),
    "no list of parameters": lambda base: base.group.update(params=base.param),
    "no tensor among them": lambda base: base.group.update(params=[1, 2]),
}


def step_after(harm, launchers, tell):
    for purpose in _C.Purpose.__members__.values():
        base = Base(launchers)
        plan = base.plan()
        assert plan.step(base.groups, base.state, _C.StepRequest(_C.Purpose.ACCUMULATE)) is True
        base.param.grad = None if purpose is _C.Purpose.FLUSH else torch.ones(4, 3)
        if harm == "gradient freed" and base.param.grad is None:
            continue
        HARMS[harm](base)
        for make in (lambda plan=plan: plan, base.plan):  # the plan that was, and a new one
            tell(f"{purpose} after: {harm}, with {launchers}")
            try:
                outcome = make().step(base.groups, base.state, _C.StepRequest(purpose))
            except ERRORS:
                continue
            unread = harm == "accumulator freed" and purpose is _C.Purpose.UPDATE
            unread = (
                unread or harm == "no tensor among them"
            )  # a new plan's rows name the parameter
            unread = unread or (harm.startswith("lr") and purpose is _C.Purpose.ACCUMULATE)
            assert isinstance(outcome, str) or unread, "a step with what is not there"


@pytest.mark.parametrize("launcher", [None, rehearsal.launcher], ids=["cpu", "rehearsal"])
def test_a_step_refuses_what_became_of_its_tensors(launcher):
    launchers = {"cpu": launcher()} if launcher else {}

    def work(tell):
        for harm in HARMS:
            step_after(harm, launchers, tell)

    in_a_child(work)
