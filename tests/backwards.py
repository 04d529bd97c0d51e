"""What tests of steps in the backward share: losses, models, and loops with and without."""

import pytest
import torch
from harness import make_params

import fusedopt

# Every gradient by itself, some together, all at the end.
BUCKETS = (1, 200, 2**20)
EACH_BUCKET = pytest.mark.parametrize("bucket", BUCKETS, ids=["each", "some", "all"])
# Vectors with a tail, a scalar and a matrix: 4 bytes, 20, 148, 240.
SHAPES = ((37,), (), (5,), (3, 20))


def loss_of(params, seed, leave_out=()):
    """A loss whose gradients are another random tensor for every parameter and seed."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), device=params[0].device)
    for index, param in enumerate(params):
        factor = torch.randn(param.shape, generator=generator)
        if index not in leave_out:
            total = total + (param * factor.to(param.device, param.dtype)).float().sum()
    return total


def step_after(optimizer, loss):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def ordinary_loop(optimizer, params, backwards, leave_out=lambda step: ()):
    for step in range(backwards):
        step_after(optimizer, loss_of(params, step, leave_out(step)))


def loop(optimizer, params, backwards, bucket, leave_out=lambda step: ()):
    with fusedopt.step_in_backward(optimizer, bucket_bytes=bucket):
        for step in range(backwards):
            loss_of(params, step, leave_out(step)).backward()
            assert all(param.grad is None for param in params)


def adamw_pair(shapes=SHAPES, **kwargs):
    """Two runs that should be the same: parameters and optimizers."""
    runs = []
    for _ in range(2):
        params = make_params(shapes)
        runs.append((params, fusedopt.AdamW(params, lr=0.1, **kwargs)))
    return runs


def sgd_in_backward(**kwargs):
    """Parameters, their optimizer, and what steps it in the backward."""
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, lr=1.0, **kwargs)
    return params, optimizer, fusedopt.step_in_backward(optimizer)


def layers(count=20, width=10):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(count)))


def steps_of(optimizer, params):
    return [int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in params]


def micro_batches(optimizer):
    """How many the present window has, by the state."""
    states = optimizer.state_dict()["state"].values()
    return int(max((state["window"][0] for state in states), default=0))


def unchanged(params):
    """Which parameters of `make_params` have their first values."""
    olds = make_params([param.shape for param in params])
    return [torch.equal(param, old) for param, old in zip(params, olds, strict=True)]


def assert_ordinary(params):
    """Fails where a backward does anything but make gradients."""
    before = [param.detach().clone() for param in params]
    loss_of(params, 0).backward()
    assert all(map(torch.equal, params, before))
    for param in params:
        assert param.grad is not None
        param.grad = None


class Failing(torch.autograd.Function):
    """Fails in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("no")


def in_order(params, seed, fails=False):
    """A backward in which parameters get gradients from the last to the first, which may fail."""
    x = params[0].sum()
    if fails:
        x = Failing.apply(x)
    for param in params[1:]:
        x = x * 0.5 + (x.detach() + seed) * param.sum()
    x.backward()


class Backward(torch.autograd.Function):
    """What reentrant checkpointing does, around any function; runs `after` after its backward."""

    @staticmethod
    def forward(ctx, function, after, x):
        ctx.function, ctx.after = function, after
        ctx.save_for_backward(x)
        return function(x.detach()).detach()

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        x = saved.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, grad)
        ctx.after()
        return None, None, x.grad
