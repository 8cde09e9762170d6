from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradsub.capture._captured import MIXED, Captured, squared_norm
from gradsub.capture._held import Held
from gradsub.linalg._arithmetic import without_autocast
from gradsub.subspace import Block, Layer, SubspaceBank


class GenericCapture:
    """Takes each parameter's gradient from autograd while a task is open, whatever operation produced it.

    A post-accumulate hook projects the gradient on the shared and on the task's own basis and frees it, so at most one
    full weight gradient exists at a time; where a basis is due for a refresh, and for parameters without subspaces,
    the full gradient is kept. Outside a task nothing is touched: gradients stay in ``p.grad``, as everywhere in torch.

    Args:
        bank: the bases.
        names: what errors call a parameter.
        outside: told of every parameter that received a gradient of no task.
        watched: where to put the parameters that are watched.
    """

    def __init__(
        self,
        bank: SubspaceBank,
        names: Callable[[Tensor], str],
        outside: Callable[[Tensor], None],
        watched: list[Tensor],
    ) -> None:
        self._bank = bank
        self._names = names
        self._outside = outside
        self.layers: dict[Tensor, Layer] = {}
        self.watched = watched
        self._unhooked: list[Tensor] = []
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._open: int | None = None
        self._alone: tuple[int, float] | None = None
        self.arrived = False
        self._warned = False
        self.held = Held()
        # Epsilon of the coarsest format in which a gradient was computed since the last step.
        self.rounding = 0.0
        self._remove_at_end()

    def _remove_at_end(self) -> None:
        # Models outlive optimizers: hooks of those that are gone would pile up on their parameters.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    def watch(self, parameters: Iterable[Tensor], layers: Iterable[Layer]) -> None:
        """Hook the parameters; those that are frozen now are hooked once they train."""
        self.layers.update({layer.parameter: layer for layer in layers})
        added = list(parameters)
        self.watched.extend(added)
        self._unhooked.extend(added)
        self.hook()

    def hook(self) -> None:
        """Hook every watched parameter that trains and has no hook yet."""
        waiting = []
        hook = _Hook(self)
        for parameter in self._unhooked:
            if parameter.requires_grad:
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            else:
                waiting.append(parameter)
        self._unhooked = waiting

    def open(self, task: int, alone: tuple[int, float] | None = None) -> None:
        """From now on every gradient belongs to ``task``, or `MIXED`; what ``p.grad`` held before is set aside.

        Args:
            task: whose they are.
            alone: of a mixed batch whose rows are all of one task: the task, and what its mean loss is multiplied by.
        """
        self._open, self._alone, self.arrived = task, alone, False
        for parameter in self.watched:
            if not self._last(parameter):
                # Hooks that others have registered since want to see the gradient too, and it is taken here.
                self._handles.pop(parameter).remove()
                self._unhooked.append(parameter)
            if parameter.grad is not None:
                # A view may lie in a reducer's bucket, which the backward passes in here would overwrite.
                kept = parameter.grad.clone() if parameter.grad._is_view() else parameter.grad
                self._set_aside.append((parameter, kept))
                parameter.grad = None
        self.hook()

    def _last(self, parameter: Tensor) -> bool:
        """Whether no other hook follows on the one of this capture, if there is one."""
        hooks = parameter._post_accumulate_grad_hooks
        if not hooks or len(hooks) == 1:
            return True
        handle = self._handles.get(parameter)
        return handle is None or next(reversed(hooks)) == handle.id

    def close(self) -> bool:
        """Back to gradients of no task; whether any gradient arrived since `open`."""
        task, self._open = self._open, None
        self._drop_foreign()
        written = self._written()
        for parameter, gradient in self._set_aside:
            parameter.grad = gradient
        self._set_aside.clear()
        assert task is not None
        for parameter, gradient in written:
            self._take(parameter, gradient, task)
        return self.arrived

    def _written(self) -> list[tuple[Tensor, Tensor]]:
        """Take out of ``p.grad`` what no hook took: written by hand, or of a parameter that was unfrozen since `open`.

        A data-parallel reducer's own were dropped, except of parameters that were frozen, of which it knows nothing.
        """
        if not self._handles and not self._unhooked:
            return []  # the parameters were given back
        written = []
        for parameter in self.watched:
            if parameter.grad is not None and parameter.requires_grad:
                written.append((parameter, parameter.grad.detach()))
                parameter.grad = None
        return written

    def _drop_foreign(self) -> None:
        """Clear what is in ``p.grad`` though all that autograd brought was taken: a data-parallel reducer's zeros."""
        reducer = dist.is_available() and dist.is_initialized()
        if not reducer or not self._handles:
            return  # somebody wants it there, or the parameters were given back
        waiting = {id(parameter) for parameter in self._unhooked}
        foreign = [p for p in self.watched if p.grad is not None and id(p) not in waiting]
        for parameter in foreign:
            parameter.grad = None
        if foreign and not self._warned:
            self._warned = True
            warnings.warn(
                "something other than autograd wrote p.grad during a task, as DistributedDataParallel's reducer does: "
                "what was captured is right, but gradients of the weights' size travel for nothing; pass the wrapped "
                "model as model= and run the forward pass inside of optimizer.task, or both under its no_sync()",
                stacklevel=7,
            )

    def clear(self) -> None:
        """Forget what was captured, also in the block that is open."""
        self.held.clear()
        self.arrived = False
        self.rounding = 0.0

    def zero_set_aside(self, set_to_none: bool) -> None:
        """Clear gradients of no task that are set aside while a task is open, as ``zero_grad`` does the others."""
        if set_to_none:
            self._set_aside.clear()
        for _, gradient in self._set_aside:
            gradient.zero_()

    def remove(self) -> None:
        """Remove the hooks for good."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._unhooked.clear()

    def take(self, parameter: Tensor) -> None:
        """The hook: ``p.grad`` of the open task is complete for this backward pass."""
        assert parameter.grad is not None
        if self._open is None:
            self._outside(parameter)
            return
        if not self._last(parameter):
            raise RuntimeError(
                f"a hook was registered on {self._names(parameter)} inside of a task, after the one that takes its "
                "gradient: register it before the task is opened"
            )
        gradient, parameter.grad = parameter.grad.detach(), None
        self._take(parameter, gradient, self._open)

    def _take(self, parameter: Tensor, gradient: Tensor, task: int) -> None:
        self.check_dense(parameter, gradient)
        if task == MIXED and parameter in self.layers:
            if self._alone is None:
                raise RuntimeError(
                    f"the rows of a mixed batch cannot be told apart in {self._names(parameter)}, whose gradient does "
                    "not come from the fused capture of one linear layer: where it is a small one's under "
                    'capture="auto", pass "fused"; where the weight is used otherwise, leave it out of target_modules, '
                    "or use optimizer.task() for each task"
                )
            task, gradient = self._alone[0], gradient / self._alone[1]
        self.deliver(task, {parameter: self._captured(parameter, gradient, task)})

    def deliver(self, task: int, found: Mapping[Tensor, Captured]) -> None:
        """Add to what the task's backward passes have left so far, by parameter."""
        if not found:
            return
        self.arrived = True
        self.held.add(task, found, self.layers)

    def deliver_stack(self, task: int, block: Block, stack: Tensor) -> None:
        """The same of all layers of a block at once (L x r x m, along the basis first)."""
        self.arrived = True
        self.held.add_stack(task, block, stack)

    def check_dense(self, parameter: Tensor, gradient: Tensor) -> None:
        """Raise a ValueError if a gradient is sparse."""
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"the gradient of {self._names(parameter)} is sparse ({gradient.layout}): subspaces need dense "
                "gradients, so build the embedding with sparse=False"
            )

    def _captured(self, parameter: Tensor, gradient: Tensor, task: int) -> Captured:
        layer = self.layers.get(parameter)
        if layer is None:
            return Captured(full=gradient)
        # Of a backward pass inside of autocast, which would round what is exact.
        with torch.no_grad(), without_autocast(gradient.device):
            gradient = layer.matrix(gradient)
            self.rounding = max(self.rounding, torch.finfo(gradient.dtype).eps)
            full, sketch = self._bank.demand(layer, task)
            # Of a whole gradient it can be computed at any time, as that of a block is in the step; of a part of its
            # rows it has to be summed over the ranks before.
            squared = squared_norm(gradient) if not full or layer.shards is not None else None
            if full:
                return Captured(full=gradient, squared_norm=squared)
            return Captured(
                projected=layer.project(gradient, layer.block.joint(task, layer.dtype)[layer.row]),
                sketch=layer.sketch(gradient, self._bank.directions(layer)) if sketch else None,
                squared_norm=squared,
            )

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to these parameters, not to their copies: a copy hooks its own.
        return {**self.__dict__, "_handles": {}, "_unhooked": list(self.watched)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remove_at_end()


def seen_by_others(parameter: Tensor) -> bool:
    """Whether hooks that are not a capture's want to see, or change, the parameter's gradient."""
    if parameter._backward_hooks:
        return True
    after = parameter._post_accumulate_grad_hooks
    if after:
        # Not any(...): this is asked twice in every layer and pass.
        for hook in after.values():
            if type(hook) is not _Hook:
                return True
    return False


def _remove_all(handles: dict[Tensor, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()


class _Hook:
    """A hook that does not keep the optimizer alive: once that is gone, gradients stay in ``p.grad`` again."""

    def __init__(self, capture: GenericCapture) -> None:
        self._capture = weakref.ref(capture)

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return  # it is called where no gradient arrived, too
        capture = self._capture()
        if capture is not None:
            capture.take(parameter)
