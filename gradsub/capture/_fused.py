from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsub.capture._captured import Captured
from gradsub.capture._forward import FusedForward, Opening, Slot, can_fuse, uninstall
from gradsub.capture._generic import GenericCapture
from gradsub.capture._linear import Segment
from gradsub.capture._products import Orientation, Rows
from gradsub.capture._tray import Rack, Tray
from gradsub.capture._wish import Arrivals
from gradsub.subspace import SHARED, Block, Layer, SubspaceBank


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


@dataclass(eq=False)
class _Group:
    block: Block
    layers: Sequence[Layer]
    slots: list[Slot]
    opening: Opening = field(default_factory=Opening)

    @property
    def current(self) -> bool:
        """Whether the block still has these layers, and they this block."""
        return self.block.layers is self.layers and self.layers[0].block is self.block


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
        self._arrivals = Arrivals()
        self._groups: list[_Group] = []
        self._opened: list[Opening] = []
        self._apart: list[tuple[Slot, Opening]] = []  # with the opening that is theirs otherwise
        self._racks: dict[Block, Rack] = {}
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
        self._groups.clear()
        self._members.append(_Member(layer, modules, slot))
        self._probes += _probes_of(slot)
        self._install(self._members[-1])

    def convert(self, layer: Layer) -> None:
        """Follow a layer whose weight has another dtype, or is elsewhere, by now."""
        self._groups.clear()
        self._racks.clear()
        self._trays.clear()
        for member in self._members:
            if member.layer is layer:
                self._probe(member.slot)
        self._list_probes()

    def _list_probes(self) -> None:
        self._probes = [each for member in self._members for each in _probes_of(member.slot)]

    def _probe(self, slot: Slot) -> None:
        layer = slot.layer
        rows, columns = layer.shape
        slot.probes = []
        for task, own in enumerate(layer.widths[1:]):
            width = layer.widths[SHARED] + own
            first = (rows, width) if layer.axis == 1 else (width, columns)
            second = (layer.dimension, layer.sketch_size) if layer.sketched else layer.shape
            slot.probes.append((self._leaf(first, slot, task), self._leaf(second, slot, task)))

    def _leaf(self, shape: tuple[int, int], slot: Slot, task: int) -> Tensor:
        """A leaf of this shape that takes one number's memory, knows whose it is, and says when something arrives."""
        zero = torch.zeros(1, dtype=slot.layer.dtype, device=slot.layer.parameter.device)
        leaf = zero.expand(shape).detach().requires_grad_()
        leaf.owner, leaf.arrivals = (weakref.ref(slot), task), self._arrivals  # type: ignore[attr-defined]
        leaf.register_post_accumulate_grad_hook(self._arrivals)  # type: ignore[no-untyped-call]
        return leaf

    def _install(self, member: _Member) -> None:
        for module in member.modules:
            forward = module.__dict__.get("forward")
            if not isinstance(forward, FusedForward):
                forward = FusedForward(module, member.slot.orientation.transposed)
                module.forward = forward
            forward.slots.append(member.slot)
            self._forwards.append(forward)
            # Once the optimizer is gone, the module is what it was.
            weakref.finalize(self, uninstall, forward, member.slot).atexit = False

    def open(self, parts: Iterable[Part]) -> None:
        """From now on forward and backward passes belong to these tasks."""
        self.check_strays()
        parts = list(parts)
        self._parts = parts
        layouts = tuple((length, tuple(part.rows[length] for part in parts)) for length in parts[0].rows)
        tasks = tuple(part.task for part in parts)
        alone = len(parts) == 1 and not layouts
        for group in self._by_block():
            dues, tray = self._open_block(group.block, tasks, alone)
            opening, ordinary = group.opening, all(due is None for due in dues)
            self._opened.append(opening)  # first: it is closed again if there is no memory for the rest
            opening.tasks, opening.tray, opening.projects, opening.layouts = tasks, tray, True, layouts
            if tray is not None and ordinary:
                for slot, segments in zip(group.slots, self._ready(tray, group), strict=True):
                    slot.segments = segments
                continue
            for slot in group.slots:
                slot.segments = tuple(self._segment(slot, task, due) for task, due in zip(tasks, dues, strict=True))
                if not ordinary and (tray is None or dues[0][slot.layer.row]):
                    # The whole gradient of a single task is what autograd computes anyway.
                    whole = not layouts and any(segment.basis is None for segment in slot.segments)
                    self._apart.append((slot, slot.opening))
                    slot.opening = Opening(tasks, None, not whole, whole, layouts)

    def _by_block(self) -> list[_Group]:
        if not all(group.current for group in self._groups):
            self._groups.clear()
        if not self._groups:
            slots: dict[Block, list[Slot]] = {}
            for member in self._members:
                slots.setdefault(member.layer.block, []).append(member.slot)
            self._groups = [_Group(block, block.layers, its) for block, its in slots.items()]
            for group in self._groups:
                for slot in group.slots:
                    slot.opening = group.opening
        return self._groups

    def _ready(self, tray: Tray, group: _Group) -> Sequence[tuple[Segment, ...]]:
        """The segments where nothing but projections is wanted; made once after each change of the bases."""
        joint = tray.block.joint(tray.task, tray.block.first.dtype)
        if tray.ready is None or tray.ready[0] is not joint or tray.ready[1] is not group:
            tray.ready = joint, group, [(self._segment(slot, tray.task, None),) for slot in group.slots]
        return tray.ready[2]

    def _open_block(self, block: Block, tasks: Sequence[int], alone: bool) -> tuple[list[Any], Tray | None]:
        """By task which rows are due, and where the others leave their gradients."""
        tray = None
        if alone:
            key = block, tasks[0]
            if key not in self._trays:
                rack = self._racks.setdefault(block, Rack(block))
                self._trays[key] = Tray(rack, tasks[0])
            tray = self._trays[key]
            tray.opened = True
        return [self._bank.due_for(block, task) for task in tasks], tray

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
        try:
            self._collect()
        finally:
            for tray in self._trays.values():
                tray.opened = False
                tray.take()  # what could not be delivered is of no later task
            for slot, usual in self._apart:
                slot.opening, slot.segments = usual, ()
            for opening in self._opened:
                opening.close()
            self._parts, self._apart, self._opened = [], [], []

    def _collect(self) -> None:
        """Deliver what backward passes have left."""
        shares = {part.task: part.share for part in self._parts}
        left = self._left_in_probes()
        # Of whole gradients, which the generic capture takes, the format of the forward pass is known here alone.
        formats = {slot.computed_in for slot, _ in left}
        formats |= {slot.computed_in for slot, _ in self._apart if slot.opening.whole}
        for tray in self._trays.values():
            formats |= tray.formats
            stack, arrived = tray.take()
            if stack is not None:
                (stack,) = _in_own_scale([stack], shares[tray.task])
                self._generic.deliver_stack(tray.task, tray.block, stack)
            elif arrived:
                layers = tray.block.layers
                gradients = _in_own_scale(list(arrived.values()), shares[tray.task])
                found = {
                    layers[row].parameter: Captured(None, each) for row, each in zip(arrived, gradients, strict=True)
                }
                self._generic.deliver(tray.task, found)
        for task, share in shares.items():  # without what strayed
            slots = [slot for slot, whose in left if whose == task]
            self._generic.deliver(task, _captured(slots, task, share))
        known = [torch.finfo(dtype).eps for dtype in formats if dtype is not None]
        self._generic.rounding = max(self._generic.rounding, *known, 0.0)

    def _left_in_probes(self) -> list[tuple[Slot, int]]:
        """The layers and tasks of the probes that have a gradient."""
        if not self._arrivals.any:
            return []
        found = [
            (slot, task)
            for slot, task, first, second in self._probes
            if first.grad is not None or second.grad is not None
        ]
        self._arrivals.any = bool(found)
        return found

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
        for rack in self._racks.values():
            rack.clear()
        for member in self._members:
            if not self._parts:  # or a backward pass may follow whose forward pass was before
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
                    uninstall(forward, member.slot)
        for forward in self._forwards:
            # Where another library has wrapped the forward pass in the meantime, it stays and is an ordinary one.
            forward.slots = [slot for slot in forward.slots if all(slot is not m.slot for m in self._members)]
        self._members.clear()
        self._forwards.clear()
        self._list_probes()
        self._groups.clear()
        self._racks.clear()
        self._trays.clear()

    def __getstate__(self) -> dict[str, Any]:
        # Slots and forward passes belong to these modules, not to their copies: a copy takes over its own.
        members = [(m.layer, m.modules, m.slot.orientation.transposed) for m in self._members]
        return {"_bank": self._bank, "_generic": self._generic, "members": members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bank, self._generic = state["_bank"], state["_generic"]
        self._parts, self._forwards, self._members, self._probes = [], [], [], []
        self._groups, self._racks, self._trays, self._opened, self._apart = [], {}, {}, [], []
        self._arrivals = Arrivals()
        self._waiting = state["members"]

    def reinstall(self) -> None:
        """In a copy, once it is complete: take over the copied modules."""
        for layer, modules, transposed in self.__dict__.pop("_waiting", []):
            # Where another library has wrapped a forward pass, or changed a class, autograd's gradient is taken.
            if all(map(can_fuse, modules)):
                self.adopt(layer, modules, transposed)


def _probes_of(slot: Slot) -> list[tuple[Slot, int, Tensor, Tensor]]:
    return [(slot, task, first, second) for task, (first, second) in enumerate(slot.probes)]


def _captured(slots: Sequence[Slot], task: int, share: float) -> dict[Tensor, Captured]:
    """What the probes' gradients are, by parameter; they have none any more."""
    probes = [probe for slot in slots for probe in slot.probes[task]]
    arrived = [probe.grad for probe in probes]
    for probe in probes:
        probe.grad = None
    there = [each.detach() if each.requires_grad else each for each in arrived if each is not None]
    own = iter(_in_own_scale(there, share))
    pairs = iter([None if each is None else next(own) for each in arrived])
    return {
        slot.parameter: Captured(projected=first, sketch=second)
        if slot.layer.sketched
        else Captured(projected=first, full=second)
        for slot, first, second in zip(slots, pairs, pairs, strict=True)
    }


def _in_own_scale(gradients: list[Tensor], share: float) -> list[Tensor]:
    """Those of a task's own mean loss, which is ``share`` of the loss on which backward was called."""
    return gradients if share == 1.0 or not gradients else list(torch._foreach_div(gradients, share))
