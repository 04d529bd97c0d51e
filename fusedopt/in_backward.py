"""Steps inside of the backward: gradients are used as they are produced, and freed."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt.backward_parts import Backwards, Streams, skip_tracing
from fusedopt.framework_checks import check_no_framework_accumulates
from fusedopt.optimizer import FusedOptimizer, fused_optimizer
from fusedopt.routing import describe
from fusedopt.step_extras import initializes, plain

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_BUCKET_BYTES = 32 * 2**20


def step_in_backward(optimizer: FusedOptimizer, *, bucket_bytes: int = _BUCKET_BYTES) -> InBackward:
    """Has every ``backward()`` update the parameters, and free each gradient once it was used.

    Parameters are collected as their gradients become complete. When these have come to
    ``bucket_bytes``, and when the backward ends, one launch updates them, and their ``.grad``
    becomes None. So gradients never take more memory than

        ``bucket_bytes`` + the largest gradient

    instead of the sum of all, and the results are those of ``backward(); step(); zero_grad()``, bit
    for bit. ``step()`` has nothing left to do: calling it does no harm, and step hooks fire around
    it alone. With ``accumulation_steps=n`` every backward is a micro-batch, whose gradients go to
    the accumulators in the same way, and every n-th one updates; one that reaches none of the
    parameters is not noticed. ``ema_decay`` works.

    A parameter is updated while the backward still runs. What the graph has saved of it for other
    purposes is out of date then, and torch raises where it is needed, as in a second backward
    through a retained graph. ``torch.utils.checkpoint(use_reentrant=True)`` runs backwards inside
    of the backward; together they are one step. A parameter of several of them raises, if it was
    updated before its last gradient came; ``use_reentrant=False`` has no such limit.

    An exception inside of a backward leaves updated what was updated, and drops the gradients that
    were collected. Of a window of accumulation it drops all, if gradients of that backward had been
    added to it.

    FSDP2 (``fully_shard``) works: it calls hooks with gradients that are reduced already.

    Args:
        optimizer: A fusedopt optimizer. Keep a reference to it: a backward after it is gone raises.
        bucket_bytes: Smaller ones take less memory and more launches.

    Returns:
        An `InBackward`, whose ``remove()`` makes steps ordinary again, as does the end of a
        ``with`` block over it.

    Raises:
        TypeError: ``optimizer`` is something else.
        ValueError: ``bucket_bytes`` is not a whole number above 0; the optimizer has
            ``max_grad_norm`` or ``skip_nonfinite``, which need all gradients before the first
            update, or ``zero_grads``, which keeps the memory that this frees.
        RuntimeError: the optimizer or one of its parameters steps in a backward already;
            `accumulate` has begun a window; DistributedDataParallel or FSDP1 hold a parameter, and
            reduce its gradient after this has used it - found here, or in the first backward. A
            GradScaler's step, as updates cannot know the scale, and ``accumulate()`` raise later.

    Example:
        >>> import torch, fusedopt
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = fusedopt.SGD(model.parameters(), lr=0.5)
        >>> with fusedopt.step_in_backward(optimizer):
        ...     for _ in range(3):
        ...         model(torch.ones(1)).sum().backward()
        >>> model.weight.item(), model.weight.grad
        (-0.5, None)
    """
    optimizer = fused_optimizer(optimizer, "step_in_backward()")
    bucket_bytes = plain(bucket_bytes)
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
        raise ValueError(
            f"bucket_bytes={bucket_bytes!r} must be a whole number, 1 or larger: the bytes of "
            "gradients that are collected before they are used, such as 32 * 2**20"
        )
    if optimizer._in_backward is not None:
        raise RuntimeError(
            "this optimizer steps in the backward already; call remove() on what the first "
            "step_in_backward() returned before another one"
        )
    return InBackward(optimizer, bucket_bytes)


class InBackward(Backwards):
    """What `step_in_backward` returns: an optimizer's hooks on its parameters.

    The optimizer owns it, and hooks know it by weak references, so that a dropped model is freed
    without waiting for a garbage collection.
    """

    def __init__(self, optimizer: FusedOptimizer, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes
        self._reference = weakref.ref(optimizer)
        self._hook = _Hook(self)
        self._hooked: dict[int, tuple[Tensor, RemovableHandle]] = {}
        super().__init__()
        self._start_over()
        optimizer._check_parts()
        _check_wrappers(optimizer)
        self.adopt()
        optimizer._in_backward = self
        # torch's GradScaler then leaves scaling to step(), which can say what is wrong with it.
        self._supports_amp = optimizer.__dict__.get("_step_supports_amp_scaling")
        optimizer.__dict__["_step_supports_amp_scaling"] = True

    def __enter__(self) -> InBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Makes steps ordinary again. Once is enough.

        Raises:
            RuntimeError: a backward is running.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError("remove() inside of a backward, whose step it would cut in two")
        with self.lock:
            self.abandon()
            for _, handle in self._hooked.values():
                handle.remove()
            self._hooked.clear()
            optimizer = self._reference()
            if optimizer is None or optimizer._in_backward is not self:
                return
            optimizer._in_backward = None
            del optimizer.__dict__["_step_supports_amp_scaling"]
            if self._supports_amp is not None:
                optimizer.__dict__["_step_supports_amp_scaling"] = self._supports_amp

    @property
    def optimizer(self) -> FusedOptimizer:
        """The optimizer."""
        optimizer = self._reference()
        if optimizer is None:
            raise _gone()
        return optimizer

    # ---- What the optimizer asks -----------------------------------------------------------------

    def adopt(self) -> None:
        """Puts hooks on the parameters that the optimizer has now, or raises and puts none."""
        params = {id(param): param for param in self.optimizer._params()}
        new = [param for key, param in params.items() if key not in self._hooked]
        new = [param for param in new if param.is_floating_point() or param.is_complex()]
        for param in new:
            for number, hook in list((param._post_accumulate_grad_hooks or {}).items()):
                if isinstance(hook, _Hook):
                    if hook.alive:
                        raise RuntimeError(
                            f"a parameter of shape {tuple(param.shape)} is updated in the backward "
                            "by another optimizer, which frees its gradient; call remove() there"
                        )
                    del param._post_accumulate_grad_hooks[number]
        try:
            for param in new:
                frozen = not param.requires_grad
                if frozen:  # torch wants one that is not; the hook stays for the day it is trained
                    param.requires_grad_(True)
                handle = param.register_post_accumulate_grad_hook(self._hook)
                self._hooked[id(param)] = (param, handle)
                if frozen:
                    param.requires_grad_(False)
        except BaseException:  # of an inference tensor
            for param in new:
                if id(param) in self._hooked:
                    self._hooked.pop(id(param))[1].remove()
            raise
        for key in self._hooked.keys() - params.keys():
            self._hooked.pop(key)[1].remove()

    def took_step(self) -> bool:
        """Whether ``step()`` has nothing to do; otherwise gradients were set by hand.

        Raises:
            RuntimeError: a GradScaler calls it; there is no telling what micro-batch these are of.
        """
        optimizer = self.optimizer
        if hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf"):
            optimizer.__dict__.pop("grad_scale", None)  # torch's would leave them there
            optimizer.__dict__.pop("found_inf", None)
            self.refuse_scaler()
        if all(param.grad is None for param in optimizer._params()):
            return True
        if optimizer.accumulation_steps > 1 and not initializes(
            optimizer.param_groups, optimizer.state
        ):
            raise RuntimeError(
                "step() found gradients that no backward made, with accumulation_steps="
                f"{optimizer.accumulation_steps}: under step_in_backward() it is a backward that "
                "counts as a micro-batch; call zero_grad(), or remove() first. Nothing was changed"
            )
        return False

    def refuse_scaler(self) -> None:
        """Raises for a GradScaler."""
        raise RuntimeError(
            "GradScaler cannot serve an optimizer under step_in_backward(): its updates have been "
            "made in the backward, from gradients that were still scaled. Train in bfloat16, which "
            "needs no scaler, or construct the scaler with enabled=False"
        )

    def refuse_accumulate(self) -> None:
        """Raises for ``accumulate()``."""
        raise RuntimeError(
            "accumulate() under step_in_backward(), which has used the gradients already; set "
            "accumulation_steps, and every backward is a micro-batch. Nothing was counted"
        )

    # ---- What the backward calls -----------------------------------------------------------------

    def collect(self, param: Tensor) -> None:
        """Takes note of a complete gradient, and steps when there are enough."""
        with self.lock, self.or_abandon():
            self.enter()
            grad = param.grad
            if grad is None or id(param) not in self._hooked:
                return
            if id(param) in self._done:
                raise self._came_twice(param)
            self._streams.change(param, self._step)
            if id(param) not in self._pending:
                self._pending[id(param)] = param
                self._bytes += _bytes_of(grad)
            if self._bytes >= self.bucket_bytes:
                self._step()

    # ---- The step --------------------------------------------------------------------------------

    def _start_over(self) -> None:
        self._pending: dict[int, Tensor] = {}
        self._done: set[int] = set()
        self._bytes = 0
        self._began = self._closes = False
        self._streams = Streams()
        self.forget()

    def begin(self) -> None:  # noqa: D102 - `Backwards` has it
        optimizer = self.optimizer
        self._start_over()
        optimizer._check_parts()
        _check_wrappers(optimizer)  # DistributedDataParallel may have come after us
        self.adopt()
        if optimizer.accumulation_steps > 1:
            check_no_framework_accumulates()
            self._closes = optimizer.will_step

    def finish(self) -> None:  # noqa: D102
        optimizer = self.optimizer
        self._step(last=True)
        # Learning rate schedulers warn where nobody has stepped. What was done was a step.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        self._start_over()

    def abandon(self) -> None:
        """Drops what a backward has left that did not end."""
        for param in self._pending.values():
            param.grad = None
        began = self._began
        self._start_over()
        if began:
            optimizer = self._reference()
            if optimizer is not None:
                optimizer._drop_window()

    def _step(self, *, last: bool = False) -> None:
        """Updates the collected parameters; the last time, all that have a gradient."""
        optimizer = self.optimizer
        params = list(self._pending.values())
        if last:  # gradients from before the backward, too
            params = [param for param in optimizer._params() if param.grad is not None]
        with self._streams.joined([param.grad for param in params], last=last):
            self._began = optimizer._step_part(
                params, closes=self._closes, began=self._began, last=last
            )
        self._done.update(id(param) for param in params)
        self._pending, self._bytes = {}, 0

    # ---- Errors ----------------------------------------------------------------------------------

    def _came_twice(self, param: Tensor) -> RuntimeError:
        for number, group in enumerate(self.optimizer.param_groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    name = f"{describe(group, index)} of param group {number}"
        return RuntimeError(
            f"{name} got another gradient after it was updated in the same backward: several "
            "torch.utils.checkpoint(use_reentrant=True) use it, each with a backward of its own. "
            "Checkpoint with use_reentrant=False, where gradients are complete before they are "
            "used, or take ordinary steps"
        )


class _Hook:
    """The hook on an optimizer's parameters."""

    def __init__(self, owner: InBackward) -> None:
        self._owner = weakref.ref(owner)

    @property
    def alive(self) -> bool:
        owner = self._owner()
        return owner is not None and owner._reference() is not None

    def __call__(self, param: Tensor) -> None:
        owner = self._owner()
        if owner is None:
            raise _gone()
        owner.collect(param)


skip_tracing(_Hook.__call__)


def _gone() -> RuntimeError:
    return RuntimeError(
        "the optimizer that step_in_backward() was called for is gone, and nobody would update "
        "this parameter; keep a reference to the optimizer, or call remove() before dropping it"
    )


def _bytes_of(grad: Tensor) -> int:
    local = getattr(grad, "_local_tensor", grad)
    if local.is_sparse:
        return local._values().nbytes + local._indices().nbytes
    return local.nbytes


def _check_wrappers(optimizer: FusedOptimizer) -> None:
    """Raises if a gradient is added up over the ranks after our hooks."""
    params = optimizer._params()
    if any(map(_C.has_reducer, params)):  # perhaps one that is garbage
        gc.collect()
    for param in params:
        wrapper = "DistributedDataParallel" if _C.has_reducer(param) else ""
        if getattr(param, "_fsdp_flattened", False):
            wrapper = "FullyShardedDataParallel"
        if wrapper:
            raise RuntimeError(
                f"step_in_backward() cannot serve the parameters of a {wrapper}: it "
                "adds up gradients over the ranks after hooks on parameters have run, and every "
                "rank would update from its own alone. Use fully_shard (FSDP2), which reduces "
                "before, or take ordinary steps"
            )
