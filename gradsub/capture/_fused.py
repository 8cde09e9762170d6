from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gradsub.capture._captured import Captured
from gradsub.capture._generic import GenericCapture, seen_by_others
from gradsub.capture._linear import (
    Orientation,
    Rows,
    Segment,
    Wish,
    accumulates_into,
    affine,
    cast,
    deferring_linear,
    hand_over,
    needs_autograd,
    ordinary_linear,
    projecting_linear,
)
from gradsub.capture._tray import Tray
from gradsub.subspace import SHARED, Block, Layer, SubspaceBank


@dataclass(eq=False)
class Slot:
    """What a layer's forward pass has to know of an optimizer.

    Attributes:
        layer: the layer.
        orientation: of its weight and the bases.
        probes: by task, two leaves that take no memory: one of the projected gradient's shape; one of the sketch's, or
            of the weight's where the whole gradient may be asked for. Their gradients are what is captured.
        tasks: the open tasks, as indices.
        tray: of the task, if one is open to which all rows belong and nothing but projections is wanted.
        segments: the tasks' parts of the batch; None while no task is open, or where autograd's own gradient is wanted.
        whole: a task is open and wants autograd's own gradient.
        layouts: of a batch of several tasks: by the length of an input's first axis, the rows of each segment.
        computed_in: the format of the last forward pass, if there was one in this step.
    """

    layer: Layer
    orientation: Orientation
    probes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tasks: tuple[int, ...] = ()
    tray: Tray | None = None
    segments: tuple[Segment, ...] | None = None
    whole: bool = False
    layouts: tuple[tuple[int, tuple[Rows, ...]], ...] = ()
    computed_in: torch.dtype | None = None
    ready: dict[int, tuple[Tensor | None, tuple[Segment, ...]]] = field(default_factory=dict)

    @property
    def parameter(self) -> Tensor:
        """The weight."""
        return self.layer.parameter

    @property
    def opened(self) -> bool:
        """Whether a task is open."""
        return self.whole or self.segments is not None

    def check_open(self, task: int) -> None:
        """Raise if a backward pass arrives whose forward pass ran in a task that is not open."""
        if task not in self.tasks:
            raise RuntimeError(
                f"the forward pass of {self.layer.name} ran inside optimizer.task or optimizer.mixed, its backward "
                "pass outside of it or in another task: call backward() in the same block, or run the forward pass "
                "before it"
            )

    def receive(self, tray: Tray, left: Tensor, right: Tensor) -> None:
        """Take the projected gradient that a backward pass leaves whose forward pass was an ordinary one: a product.

        Args:
            tray: of the forward pass.
            left: a factor.
            right: the other.
        """
        if tray.opened and tray.block is self.layer.block:
            row = tray.row(self.layer.row)
            if left.dtype is row.dtype:
                row.addmm_(left, right)
            else:
                row.add_(torch.mm(left, right))  # rounded before it is added, as without a stack
        else:
            hand_over(Wish.THIS_LEAF, self.probes[tray.task][0], torch.mm(left, right))

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
            f"optimizer.mixed was told of {told} rows, but the input of {self.layer.name or 'the model'} has the shape "
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
        self.own = type(module).forward
        self.slots: list[Slot] = []

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The layer's output."""
        (x,) = args or kwargs.values()
        module = self.module
        if type(module).forward is not self.own:
            return type(module).forward(module, x)  # type: ignore[no-any-return]  # it has been replaced since
        weight: Tensor | None = module._parameters.get("weight")
        bias: Tensor | None = module._parameters.get("bias")
        slots = self.slots
        if weight is None or len(slots) != 1 or slots[0].layer.parameter is not weight:
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            slots = [slot for slot in slots if slot.layer.parameter is weight]
        assert weight is not None
        if not slots or not weight.requires_grad:
            return affine(x, weight, bias, self.transposed)
        compiling = is_compiling()
        if compiling or not torch.is_grad_enabled() or needs_autograd(x) or seen_by_others(weight):
            opened = [slot for slot in slots if slot.opened]
            if compiling and torch.is_grad_enabled() and len(opened) == 1 and opened[0].segments is not None:
                return projecting_linear(x, weight, bias, opened[0].orientation, opened[0].segments_of(x))
            return affine(x, weight, bias, self.transposed)
        if _any_autocast():
            x, bias = cast(x, bias)
        # Checkpointing runs the forward pass again when saved tensors are needed, by when another task may be open, or
        # none: what is saved must not depend on that, so the backward pass decides.
        later = _checkpointed()
        if len(slots) == 1 and (tray := slots[0].tray) is not None and not later:
            return ordinary_linear(x, weight, bias, slots[0], tray)
        for slot in slots:
            slot.computed_in = x.dtype
        opened = [slot for slot in slots if slot.opened]
        if not opened or later:
            probes = tuple(probe for slot in slots for pair in slot.probes for probe in pair)
            return deferring_linear(x, weight, bias, slots[0].orientation, _Opened(slots), probes)
        if len(opened) > 1 or opened[0].segments is None:
            # Autograd's own gradient is taken, which would arrive as one of no task if the block were closed by then.
            y = affine(x, weight, bias, self.transposed)
            for slot in opened:
                y.register_hook(_Belongs(slot, weight))  # type: ignore[no-untyped-call]
            return y
        if (tray := opened[0].tray) is not None:
            return ordinary_linear(x, weight, bias, opened[0], tray)
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


class _Belongs:
    """A hook on a layer's output that lets its weight's gradient come while the task of its forward pass is open alone.

    Of a backward pass that leaves nothing in the weight, as one for inputs alone, it says nothing.
    """

    def __init__(self, slot: Slot, weight: Tensor) -> None:
        self._slot, self._tasks, self._weight = slot, slot.tasks, weight

    def __call__(self, gradient: Tensor) -> None:
        if accumulates_into(self._weight):
            for task in self._tasks:
                self._slot.check_open(task)


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
        self._parts: list[Part] = []
        self._forwards: list[FusedForward] = []
        self._probes: list[tuple[Slot, int, Tensor, Tensor]] = []
        self._trays: dict[tuple[Block, int], Tray] = {}

    def __bool__(self) -> bool:
        return bool(self._members)

    @property
    def device(self) -> torch.device:
        """Where the first layer is."""
        return self._members[0].layer.parameter.device

    def adopt(self, layer: Layer, modules: list[nn.Module], transposed: bool) -> None:
        """Take over the forward pass of a layer's modules."""
        slot = Slot(layer, Orientation(transposed, layer.axis))
        self._probe(slot)
        self._members.append(_Member(layer, modules, slot))
        self._probes += _probes_of(slot)
        self._install(self._members[-1])

    def convert(self, layer: Layer) -> None:
        """Follow a layer whose weight has another dtype, or is elsewhere, by now."""
        self._trays.clear()
        for member in self._members:
            if member.layer is layer:
                self._probe(member.slot)
        self._probes = [each for member in self._members for each in _probes_of(member.slot)]

    def _probe(self, slot: Slot) -> None:
        layer = slot.layer
        rows, columns = layer.shape
        slot.ready.clear()
        slot.probes = []
        for task, own in enumerate(layer.widths[1:]):
            width = layer.widths[SHARED] + own
            first = (rows, width) if layer.axis == 1 else (width, columns)
            second = (layer.dimension, layer.sketch_size) if layer.sketched else layer.shape
            slot.probes.append((_leaf(first, slot, task), _leaf(second, slot, task)))

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
        self.check_strays()
        parts = list(parts)
        self._parts = parts
        layouts = tuple((length, tuple(part.rows[length] for part in parts)) for length in parts[0].rows)
        tasks = tuple(part.task for part in parts)
        alone = len(parts) == 1 and not layouts
        blocks: dict[Block, tuple[list[Any], Tray | None, Tensor]] = {}
        for member in self._members:
            slot, layer = member.slot, member.layer
            block = layer.block
            if block not in blocks:
                blocks[block] = self._open_block(block, tasks, alone)
            dues, tray, joint = blocks[block]
            slot.tasks = tasks
            if tray is not None and (dues[0] is None or not dues[0][layer.row]):
                slot.tray = tray
                ready = slot.ready.get(tray.task)
                if ready is None or ready[0] is not joint:
                    ready = slot.ready[tray.task] = (joint, (self._segment(slot, tray.task, None),))
                slot.segments = ready[1]
                continue
            segments = [self._segment(slot, task, due) for task, due in zip(tasks, dues, strict=True)]
            # The whole gradient of a single task is what autograd computes anyway.
            slot.whole = not layouts and any(segment.basis is None for segment in segments)
            slot.segments = None if slot.whole else tuple(segments)
            slot.layouts = layouts

    def _open_block(self, block: Block, tasks: Sequence[int], alone: bool) -> tuple[list[Any], Tray | None, Tensor]:
        """By task which rows are due, where the others leave their gradients, and what those are projected on."""
        tray = None
        if alone:
            key = block, tasks[0]
            tray = self._trays[key] = self._trays.get(key) or Tray(*key)
            tray.opened = True
        dues = [self._bank.due_for(block, task) for task in tasks]
        return dues, tray, block.joint(tasks[0], block.first.dtype)

    def _segment(self, slot: Slot, task: int, due: Any) -> Segment:
        layer = slot.layer
        probe, second = slot.probes[task]
        full, sketch = self._bank.demand_if(layer, due)
        if full:
            return Segment(None, None, second, None)
        # Of equal strides for all tasks: torch.compile then needs one graph for all.
        basis = layer.block.joint_rows(task, layer.dtype)[layer.row]
        if not sketch:
            return Segment(basis, None, probe, None)
        return Segment(basis, self._bank.directions(layer), probe, second)

    def close(self) -> None:
        """Forward and backward passes belong to no task any more; what they left is delivered."""
        self._collect()
        for member in self._members:
            slot = member.slot
            slot.tasks, slot.tray, slot.segments, slot.whole, slot.layouts = (), None, None, False, ()
        self._parts = []

    def _collect(self) -> None:
        """Deliver what backward passes have left."""
        shares = {part.task: part.share for part in self._parts}
        formats = {member.slot.computed_in for member in self._members}
        for tray in self._trays.values():
            tray.opened = False
            formats |= tray.formats
            if arrived := tray.take():
                layers, share = tray.block.layers, shares[tray.task]
                arrived = arrived if share == 1.0 else {row: each / share for row, each in arrived.items()}
                found = {layers[row].parameter: Captured(None, each) for row, each in arrived.items()}
                self._generic.deliver(tray.task, found)
        for slot, task in self._left_in_probes():
            if task in shares:  # or it strayed
                mine = _captured(slot.probes[task], slot.layer.sketched, shares[task])
                self._generic.deliver(task, {slot.parameter: mine})
        known = [torch.finfo(dtype).eps for dtype in formats if dtype is not None]
        self._generic.rounding = max(self._generic.rounding, *known, 0.0)

    def _left_in_probes(self) -> list[tuple[Slot, int]]:
        """The layers and tasks of the probes that have a gradient."""
        return [
            (slot, task)
            for slot, task, first, second in self._probes
            if first.grad is not None or second.grad is not None
        ]

    def check_strays(self) -> None:
        """Raise if a backward pass has left something after its task was closed (one that torch has compiled)."""
        for slot, task in self._left_in_probes():
            self.clear()
            slot.check_open(task)

    def clear(self) -> None:
        """The step is over."""
        for tray in self._trays.values():
            tray.formats.clear()
            tray.take()
        for member in self._members:
            member.slot.computed_in = None
        for slot, task in self._left_in_probes():
            for probe in slot.probes[task]:
                probe.grad = None

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
        self._probes.clear()
        self._trays.clear()

    def __getstate__(self) -> dict[str, Any]:
        # Slots and forward passes belong to these modules, not to their copies: a copy takes over its own.
        members = [(m.layer, m.modules, m.slot.orientation.transposed) for m in self._members]
        return {"_bank": self._bank, "_generic": self._generic, "members": members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bank, self._generic = state["_bank"], state["_generic"]
        self._parts, self._forwards, self._members, self._probes, self._trays = [], [], [], [], {}
        self._waiting = state["members"]

    def reinstall(self) -> None:
        """In a copy, once it is complete: take over the copied modules."""
        for layer, modules, transposed in self.__dict__.pop("_waiting", []):
            self.adopt(layer, modules, transposed)


# Looked up once: it is asked in every layer and pass.
_any_autocast = torch._C._is_any_autocast_enabled

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


def _leaf(shape: tuple[int, int], slot: Slot, task: int) -> Tensor:
    """A leaf of this shape that takes one number's memory, and knows whose it is."""
    zero = torch.zeros(1, dtype=slot.layer.dtype, device=slot.layer.parameter.device)
    leaf = zero.expand(shape).detach().requires_grad_()
    leaf.owner = (weakref.ref(slot), task)  # type: ignore[attr-defined]
    return leaf


def _probes_of(slot: Slot) -> list[tuple[Slot, int, Tensor, Tensor]]:
    return [(slot, task, first, second) for task, (first, second) in enumerate(slot.probes)]


def _captured(probes: tuple[Tensor, Tensor], sketched: bool, share: float) -> Captured:
    """What the probes' gradients are; they have none any more."""
    found: list[Tensor | None] = []
    for probe in probes:
        gradient, probe.grad = probe.grad, None
        if gradient is not None:
            gradient = gradient.detach() if gradient.requires_grad else gradient
            gradient = gradient if share == 1.0 else gradient / share
        found.append(gradient)
    projected, other = found
    return Captured(projected=projected, sketch=other) if sketched else Captured(projected=projected, full=other)


def _uninstall(forward: FusedForward, slot: Slot) -> None:
    forward.slots = [other for other in forward.slots if other is not slot]
    if not forward.slots and forward.module.__dict__.get("forward") is forward:
        del forward.module.forward
