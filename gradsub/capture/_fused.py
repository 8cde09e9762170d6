from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradsub.capture._captured import Captured
from gradsub.capture._generic import GenericCapture
from gradsub.capture._linear import Orientation, Rows, Segment, affine, deferring_linear, projecting_linear
from gradsub.subspace import SHARED, Layer, SubspaceBank

_PLAIN: Final = "plain"
_PROJECTING: Final = "projecting"
_DEFERRING: Final = "deferring"


@dataclass(eq=False)
class Slot:
    """What a layer's forward pass has to know of an optimizer.

    Attributes:
        parameter: the weight.
        orientation: of the weight and the bases.
        probes: by task, two leaves that take no memory: one of the projected gradient's shape; one of the sketch's, or
            of the weight's where the whole gradient may be asked for. Their gradients are what is captured.
        tasks: the open tasks, as indices.
        segments: their parts of the batch; None while no task is open, or where autograd's own gradient is wanted.
        whole: a task is open and wants autograd's own gradient.
        batch: how many rows the batch has; None where they need not be told apart.
        mode: how the last forward pass ran, so that a recomputation runs likewise.
    """

    parameter: Tensor
    orientation: Orientation
    probes: list[tuple[Tensor, Tensor]]
    tasks: tuple[int, ...] = ()
    segments: tuple[Segment, ...] | None = None
    whole: bool = False
    batch: int | None = None
    mode: str = _PLAIN

    @property
    def opened(self) -> bool:
        """Whether a task is open."""
        return self.whole or self.segments is not None

    def close(self) -> None:
        """No task is open any more."""
        self.tasks, self.segments, self.whole, self.batch = (), None, False, None

    def segments_of(self, x: Tensor) -> tuple[Segment, ...]:
        """The segments, with the rows of this input: a batch may arrive with its tokens flattened into rows."""
        assert self.segments is not None
        if self.batch is None or x.shape[0] == self.batch:
            return self.segments
        if x.ndim != 2 or x.shape[0] % self.batch:
            raise RuntimeError(
                f"optimizer.mixed was told of {self.batch} rows, but a layer's input has the shape {tuple(x.shape)}: "
                "its first axis must be that of the rows; use optimizer.task for each task, or leave the layer out of "
                "target_modules"
            )
        length = x.shape[0] // self.batch
        return tuple(segment._replace(rows=_spread(segment.rows, length)) for segment in self.segments)


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
        mode = self._mode(slots, opened)
        if not torch.is_grad_enabled():
            return affine(x, weight, bias, self.transposed)
        if mode == _PROJECTING and opened and opened[0].segments is not None and not weight._backward_hooks:
            return projecting_linear(x, weight, bias, opened[0].orientation, opened[0].segments_of(x))
        if mode == _PLAIN or weight._backward_hooks:
            # Somebody wants to see, or change, the weight's gradient.
            return affine(x, weight, bias, self.transposed)
        probes = tuple(probe for slot in slots for pair in slot.probes for probe in pair)
        return deferring_linear(x, weight, bias, slots[0].orientation, _Opened(slots), probes)

    def _mode(self, slots: list[Slot], opened: list[Slot]) -> str:
        if torch._C._current_graph_task_id() != -1:
            # Checkpointing runs the forward pass again inside the backward pass, where another task may be open; it
            # has to keep the same tensors as the first time.
            return slots[0].mode
        if not opened:
            mode = _DEFERRING
        else:
            mode = _PROJECTING if len(opened) == 1 and opened[0].segments is not None else _PLAIN
        slots[0].mode = mode
        return mode

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")


class _Opened:
    """Tells a deferring backward pass which task is open by then."""

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    def __call__(self, x: Tensor) -> list[tuple[Segment, int, int]] | None:
        start = 0
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
        rows: its rows.
        share: what its mean loss is multiplied by in the loss of the block; what is captured is divided by it.
    """

    task: int
    rows: Rows = None
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
            parameter=layer.parameter,
            orientation=Orientation(transposed, layer.axis),
            probes=[self._probes(layer, task) for task in range(len(layer.widths) - 1)],
        )
        self._members.append(_Member(layer, modules, slot))
        self._install(self._members[-1])

    def _probes(self, layer: Layer, task: int) -> tuple[Tensor, Tensor]:
        width = layer.widths[SHARED] + layer.widths[task + 1]
        rows, columns = layer.shape
        first = (rows, width) if layer.axis == 1 else (width, columns)
        second = (layer.dimension, layer.sketch_size) if layer.sketched else layer.shape
        pair = (_leaf(first, layer), _leaf(second, layer))
        for probe, kind in zip(pair, ("projected", "sketch" if layer.sketched else "full"), strict=True):
            probe.register_post_accumulate_grad_hook(_Hook(self, layer, task, kind))  # type: ignore[no-untyped-call]
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
        batch = sum(_count(part.rows) for part in parts)
        self._shares = {part.task: part.share for part in parts}
        for member in self._members:
            slot = member.slot
            segments = [self._segment(member, part) for part in parts]
            slot.tasks = tuple(part.task for part in parts)
            # The whole gradient of a single task is what autograd computes anyway.
            slot.whole = not batch and any(segment.basis is None for segment in segments)
            slot.segments = None if slot.whole else tuple(segments)
            slot.batch = batch or None

    def _segment(self, member: _Member, part: Part) -> Segment:
        layer = member.layer
        probe, second = member.slot.probes[part.task]
        full, sketch = self._bank.demand(layer, part.task)
        if full:
            return Segment(None, None, second, None, part.rows)
        # Of equal strides for all tasks: torch.compile then needs one graph for all.
        basis = layer.block.joint(part.task, layer.dtype)[layer.row]
        if not sketch:
            return Segment(basis, None, probe, None, part.rows)
        return Segment(basis, self._bank.directions(layer), probe, second, part.rows)

    def close(self) -> None:
        """Forward and backward passes belong to no task any more."""
        for member in self._members:
            member.slot.close()
        self._shares = {}

    def take(self, layer: Layer, task: int, kind: str, probe: Tensor) -> None:
        """The hook: a probe's gradient is complete for this backward pass."""
        gradient, probe.grad = probe.grad, None
        if gradient is None:
            return
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


def _count(rows: Rows) -> int:
    if isinstance(rows, tuple):
        return rows[1] - rows[0]
    return 0 if rows is None else len(rows)


def _spread(rows: Rows, length: int) -> Rows:
    """The same rows where each has become ``length`` rows."""
    if isinstance(rows, Tensor):
        return (rows[:, None] * length + torch.arange(length, device=rows.device)).flatten()
    return None if rows is None else (rows[0] * length, rows[1] * length)


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
        capture = self._capture()
        if capture is not None:
            capture.take(self._layer, self._task, self._kind, probe)
