from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradsub.capture._captured import Captured
from gradsub.capture._generic import GenericCapture, seen_by_others
from gradsub.capture._linear import (
    Orientation,
    Rows,
    Segment,
    affine,
    compute_format,
    deferring_linear,
    projecting_linear,
)
from gradsub.subspace import SHARED, Layer, SubspaceBank


@dataclass(eq=False)
class Slot:
    """What a layer's forward pass has to know of an optimizer.

    Attributes:
        name: of the layer.
        parameter: the weight.
        orientation: of the weight and the bases.
        probes: by task, two leaves that take no memory: one of the projected gradient's shape; one of the sketch's, or
            of the weight's where the whole gradient may be asked for. Their gradients are what is captured.
        tasks: the open tasks, as indices.
        segments: their parts of the batch; None while no task is open, or where autograd's own gradient is wanted.
        whole: a task is open and wants autograd's own gradient.
        layouts: of a batch of several tasks: by the length of an input's first axis, the rows of each segment.
        rounding: epsilon of the format that the last forward pass computed in; 0 before one.
    """

    name: str
    parameter: Tensor
    orientation: Orientation
    probes: list[tuple[Tensor, Tensor]]
    tasks: tuple[int, ...] = ()
    segments: tuple[Segment, ...] | None = None
    whole: bool = False
    layouts: tuple[tuple[int, tuple[Rows, ...]], ...] = ()
    rounding: float = 0.0

    @property
    def opened(self) -> bool:
        """Whether a task is open."""
        return self.whole or self.segments is not None

    def close(self) -> None:
        """No task is open any more."""
        self.tasks, self.segments, self.whole, self.layouts = (), None, False, ()

    def segments_of(self, x: Tensor) -> tuple[Segment, ...]:
        """The segments, with the rows of this input."""
        assert self.segments is not None
        if not self.layouts:
            return self.segments
        for length, rows in self.layouts:
            if x.ndim > 1 and x.shape[0] == length:
                return tuple(segment._replace(rows=its) for segment, its in zip(self.segments, rows, strict=True))
        told = " or ".join(str(length) for length, _ in self.layouts)
        raise RuntimeError(
            f"optimizer.mixed was told of {told} rows, but the input of {self.name or 'the model'} has the shape "
            f"{tuple(x.shape)}; which of its rows are whose is not to be found out by counting: name their tasks in "
            "mixed(task_ids, other_rows=[...]), such as task_ids.repeat_interleave(T) where (B, T, d) is flattened to "
            "(B * T, d), or task_ids.repeat(2) where two batches are concatenated; or use optimizer.task for each "
            "task; or leave the layer out of target_modules"
        )


class FusedForward:
    """A linear module's ``forward`` while an optimizer captures its projected gradients.

    It is an attribute of the module, so that names, hooks and `state_dict` stay what they were. A copy or a pickle of
    the module has its class's forward.

    Args:
        module: the layer.
        transposed: whether its weight is ``in_features x out_features``.
    """

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        self.module = module
        self.transposed = transposed
        self.slots: list[Slot] = []

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The layer's output."""
        (x,) = args or kwargs.values()
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        slots = [slot for slot in self.slots if slot.parameter is weight]
        if not slots or not weight.requires_grad:
            return affine(x, weight, bias, self.transposed)
        opened = [slot for slot in slots if slot.opened]
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and len(opened) == 1 and opened[0].segments is not None:
                return projecting_linear(x, weight, bias, opened[0].orientation, opened[0].segments_of(x))
            return affine(x, weight, bias, self.transposed)
        if not torch.is_grad_enabled() or _needs_autograd(x) or seen_by_others(weight):
            return affine(x, weight, bias, self.transposed)
        for slot in slots:
            slot.rounding = torch.finfo(compute_format(x)).eps
        # Checkpointing runs the forward pass again when saved tensors are needed, by when another task may be open, or
        # none: what is saved must not depend on that, so the backward pass decides.
        if not opened or _checkpointed():
            probes = tuple(probe for slot in slots for pair in slot.probes for probe in pair)
            return deferring_linear(x, weight, bias, slots[0].orientation, _Opened(slots), probes)
        if len(opened) > 1 or opened[0].segments is None:
            return affine(x, weight, bias, self.transposed)
        return projecting_linear(x, weight, bias, opened[0].orientation, opened[0].segments_of(x))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")

    @property
    def __globals__(self) -> Any:
        # Where `torch.jit.script` begins to read a forward pass, whose source it needs.
        raise AttributeError(
            "torch.jit.script cannot read the forward pass of a layer that an optimizer captures: script a "
            "copy.deepcopy of the model, or the model after optimizer.close()"
        )


class _Opened:
    """Tells a deferring backward pass which task is open by then."""

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    def __call__(self, x: Tensor) -> list[tuple[Segment, int, int]] | None:
        start = 0
        if sum(slot.opened for slot in self._slots) > 1:
            return None
        for slot in self._slots:
            if slot.segments is not None:
                return [
                    (segment, start + 2 * task + (segment.basis is None), start + 2 * task + 1)
                    for task, segment in zip(slot.tasks, slot.segments_of(x), strict=True)
                ]
            start += 2 * len(slot.probes)
        return None


@dataclass
class Part:
    """A task's part of the batches of an open block.

    Attributes:
        task: its index.
        rows: its rows, by the length of an input's first axis; empty where the whole batch is its own.
        share: what its mean loss is multiplied by in the loss of the block; what is captured is divided by it.
    """

    task: int
    rows: Mapping[int, Rows] = field(default_factory=dict)
    share: float = 1.0


@dataclass
class _Member:
    layer: Layer
    modules: list[nn.Module]
    slot: Slot = field(repr=False)


class FusedCapture:
    """Has linear layers compute their projected gradients themselves, so that the weight's gradient never exists.

    While a task is open, a layer's forward pass keeps x V for the backward pass, which returns g^T (x V); for bases of
    outputs the backward pass returns (g U)^T x. A forward pass outside any task keeps x, and projects if a task is open
    in the backward pass. What a layer's weight does elsewhere (tied to another module, used by a function) still ends
    in the generic capture, and both add up.

    Args:
        bank: the bases.
        generic: receives what was captured, and takes whatever does not pass through these layers.
    """

    def __init__(self, bank: SubspaceBank, generic: GenericCapture) -> None:
        self._bank = bank
        self._generic = generic
        self._members: list[_Member] = []
        self._shares: Mapping[int, float] = {}
        self._forwards: list[FusedForward] = []

    def __bool__(self) -> bool:
        return bool(self._members)

    @property
    def device(self) -> torch.device:
        """Where the first layer is."""
        return self._members[0].layer.parameter.device

    def adopt(self, layer: Layer, modules: list[nn.Module], transposed: bool) -> None:
        """Take over the forward pass of a layer's modules."""
        slot = Slot(
            name=layer.name,
            parameter=layer.parameter,
            orientation=Orientation(transposed, layer.axis),
            probes=[self._probes(layer, task) for task in range(len(layer.widths) - 1)],
        )
        self._members.append(_Member(layer, modules, slot))
        self._install(self._members[-1])

    def convert(self, layer: Layer) -> None:
        """Follow a layer whose weight has another dtype, or is elsewhere, by now."""
        for member in self._members:
            if member.layer is layer:
                member.slot.probes = [self._probes(layer, task) for task in range(len(layer.widths) - 1)]

    def _probes(self, layer: Layer, task: int) -> tuple[Tensor, Tensor]:
        width = layer.widths[SHARED] + layer.widths[task + 1]
        rows, columns = layer.shape
        first = (rows, width) if layer.axis == 1 else (width, columns)
        second = (layer.dimension, layer.sketch_size) if layer.sketched else layer.shape
        pair = (_leaf(first, layer), _leaf(second, layer))
        for probe, kind in zip(pair, ("projected", "sketch" if layer.sketched else "full"), strict=True):
            hook = _Hook(self, layer, task, kind)
            probe.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            # For backward passes that accumulate into chosen leaves, of which no user names this one.
            probe.receive = hook.receive  # type: ignore[attr-defined]
        return pair

    def _install(self, member: _Member) -> None:
        for module in member.modules:
            forward = module.__dict__.get("forward")
            if not isinstance(forward, FusedForward):
                forward = FusedForward(module, member.slot.orientation.transposed)
                module.forward = forward
            forward.slots.append(member.slot)
            self._forwards.append(forward)
            # Once the optimizer is gone, the module is what it was.
            weakref.finalize(self, _uninstall, forward, member.slot).atexit = False

    def open(self, parts: Iterable[Part]) -> None:
        """From now on forward and backward passes belong to these tasks."""
        parts = list(parts)
        layouts = tuple((length, tuple(part.rows[length] for part in parts)) for length in parts[0].rows)
        self._shares = {part.task: part.share for part in parts}
        for member in self._members:
            slot = member.slot
            segments = [self._segment(member, part) for part in parts]
            slot.tasks = tuple(part.task for part in parts)
            # The whole gradient of a single task is what autograd computes anyway.
            slot.whole = not layouts and any(segment.basis is None for segment in segments)
            slot.segments = None if slot.whole else tuple(segments)
            slot.layouts = layouts

    def _segment(self, member: _Member, part: Part) -> Segment:
        layer = member.layer
        probe, second = member.slot.probes[part.task]
        full, sketch = self._bank.demand(layer, part.task)
        if full:
            return Segment(None, None, second, None)
        # Of equal strides for all tasks: torch.compile then needs one graph for all.
        basis = layer.block.joint(part.task, layer.dtype)[layer.row]
        if not sketch:
            return Segment(basis, None, probe, None)
        return Segment(basis, self._bank.directions(layer), probe, second)

    def close(self) -> None:
        """Forward and backward passes belong to no task any more."""
        for member in self._members:
            member.slot.close()
            self._generic.rounding = max(self._generic.rounding, member.slot.rounding)
        self._shares = {}

    def clear(self) -> None:
        """The step is over."""
        for member in self._members:
            member.slot.rounding = 0.0

    def take(self, layer: Layer, task: int, kind: str, gradient: Tensor) -> None:
        """The hook: a probe's gradient is there."""
        if task not in self._shares:
            raise RuntimeError(
                f"the forward pass of {layer.name} ran inside optimizer.task or optimizer.mixed, its backward pass "
                "outside of it or in another task: call backward() in the same block, or run the forward pass before it"
            )
        gradient = gradient.detach()
        share = self._shares[task]
        if share != 1.0:
            gradient = gradient / share
        if kind == "full":
            captured = Captured(full=gradient)
        elif kind == "sketch":
            captured = Captured(sketch=gradient)
        else:
            captured = Captured(projected=gradient)
        self._generic.deliver(layer.parameter, task, captured)

    def remove(self) -> None:
        """Give the modules their own forward pass back."""
        for member in self._members:
            for module in member.modules:
                forward = module.__dict__.get("forward")
                if isinstance(forward, FusedForward):
                    _uninstall(forward, member.slot)
        for forward in self._forwards:
            # Where another library has wrapped the forward pass in the meantime, it stays and is an ordinary one.
            forward.slots = [slot for slot in forward.slots if all(slot is not m.slot for m in self._members)]
        self._members.clear()
        self._forwards.clear()

    def __getstate__(self) -> dict[str, Any]:
        # Slots and forward passes belong to these modules, not to their copies: a copy takes over its own.
        members = [(m.layer, m.modules, m.slot.orientation.transposed) for m in self._members]
        return {"_bank": self._bank, "_generic": self._generic, "members": members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bank, self._generic = state["_bank"], state["_generic"]
        self._shares, self._forwards, self._members = {}, [], []
        self._waiting = state["members"]

    def reinstall(self) -> None:
        """In a copy, once it is complete: take over the copied modules."""
        for layer, modules, transposed in self.__dict__.pop("_waiting", []):
            self.adopt(layer, modules, transposed)


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _checkpointed() -> bool:
    """Whether what the forward pass saves goes to a non-reentrant checkpoint, and not to hooks that only move it."""
    if _top_hooks is not None:
        hooks = _top_hooks(False)
        return hooks is not None and "checkpoint" in (getattr(hooks[0], "__module__", None) or "")
    # torch before 2.8
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None


def _needs_autograd(x: Tensor) -> bool:
    """Whether only operations that torch knows compute what is wanted: an ordinary linear layer does, captured or not.

    Function transforms (``torch.func``), forward-mode derivatives and ``torch.jit.trace`` want to see inside of an
    operation; nested and sparse inputs have no rows to take.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or x.is_nested
        or x.layout is not torch.strided
    )


def can_fuse(module: nn.Module) -> bool:
    """Whether the module's forward pass is a linear layer's and nothing else."""
    if "weight" not in module._parameters:
        return False  # parametrized: what the forward pass uses is computed from the parameter
    own = module.__dict__.get("forward")
    if (
        own is not None
        and not isinstance(own, FusedForward)
        and getattr(own, "__func__", None) is not type(module).forward
    ):
        return False  # another library's
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"


def _leaf(shape: tuple[int, int], layer: Layer) -> Tensor:
    """A leaf of this shape that takes one number's memory."""
    zero = torch.zeros(1, dtype=layer.dtype, device=layer.parameter.device)
    return zero.expand(shape).detach().requires_grad_()


def _uninstall(forward: FusedForward, slot: Slot) -> None:
    forward.slots = [other for other in forward.slots if other is not slot]
    if not forward.slots and forward.module.__dict__.get("forward") is forward:
        del forward.module.forward


class _Hook:
    """A hook that does not keep the optimizer alive."""

    def __init__(self, capture: FusedCapture, layer: Layer, task: int, kind: str) -> None:
        self._capture = weakref.ref(capture)
        self._layer, self._task, self._kind = layer, task, kind

    def __call__(self, probe: Tensor) -> None:
        gradient, probe.grad = probe.grad, None
        if gradient is not None:
            self.receive(gradient)

    def receive(self, gradient: Tensor) -> None:
        """The gradient of the probe."""
        capture = self._capture()
        if capture is not None:
            capture.take(self._layer, self._task, self._kind, gradient)
