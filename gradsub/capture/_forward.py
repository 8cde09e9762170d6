"""A linear layer's forward pass while an optimizer captures it, and what it has to know of that."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gradsub.capture._generic import seen_by_others
from gradsub.capture._linear import Segment, cast, deferring_linear, needs_autograd, ordinary_linear, projecting_linear
from gradsub.capture._products import Orientation, Rows, affine
from gradsub.capture._tray import Tray
from gradsub.capture._wish import Wish, accumulates_into, hand_over
from gradsub.subspace import Layer

Layouts: TypeAlias = "tuple[tuple[int, tuple[Rows, ...]], ...]"


@dataclass(eq=False)
class Opening:
    """What is open at the layers of a block, or at one of them that wants something else in this step.

    Attributes:
        tasks: as indices.
        tray: of the task, if one is open to which all rows belong and nothing but projections is wanted.
        projects: a task is open and wants projections; ``tasks`` says so too, but torch.compile would make a graph for
            each of them.
        whole: a task is open and wants autograd's own gradient.
        layouts: of a batch of several tasks: by the length of an input's first axis, the rows of each segment.
    """

    tasks: tuple[int, ...] = ()
    tray: Tray | None = None
    projects: bool = False
    whole: bool = False
    layouts: Layouts = ()

    def close(self) -> None:
        """No task is open any more."""
        self.tasks, self.tray, self.projects, self.whole, self.layouts = (), None, False, False, ()


@dataclass(eq=False)
class Slot:
    """What a layer's forward pass has to know of an optimizer.

    Attributes:
        layer: the layer.
        orientation: of its weight and the bases.
        probes: by task, two leaves that take no memory: one of the projected gradient's shape; one of the sketch's, or
            of the weight's where the whole gradient may be asked for. Their gradients are what is captured.
        opening: what is open.
        segments: the tasks' parts of the batch, where projections are wanted while a task is open.
        computed_in: the format of the last forward pass, for what is left in the probes.
    """

    layer: Layer
    orientation: Orientation
    probes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    opening: Opening = field(default_factory=Opening)
    segments: tuple[Segment, ...] = ()
    computed_in: torch.dtype | None = None

    @property
    def parameter(self) -> Tensor:
        """The weight."""
        return self.layer.parameter

    @property
    def opened(self) -> bool:
        """Whether a task is open."""
        return self.opening.projects or self.opening.whole

    def check_open(self, *tasks: int) -> None:
        """Raise if a backward pass arrives whose forward pass ran in tasks of which one is not open."""
        if not set(tasks) <= set(self.opening.tasks):
            raise RuntimeError(
                f"the forward pass of {self.layer.name} ran inside optimizer.task or optimizer.mixed, its backward "
                "pass outside of it or in another task: call backward() in the same block, or run the forward pass "
                "before it"
            )

    def receive(self, task: int, left: Tensor, right: Tensor) -> None:
        """Take the projected gradient, a product, whose tray is closed or has no place for it any more.

        Args:
            task: of the forward pass.
            left: a factor.
            right: the other.
        """
        self.computed_in = left.dtype
        hand_over(Wish.THIS_LEAF, self.probes[task][0], torch.mm(left, right))

    def segments_of(self, x: Tensor) -> tuple[Segment, ...]:
        """The segments, with the rows of this input; raise if nobody has said whose its rows are."""
        segments = self.segments_if(x)
        if segments is None:
            self.refuse(x.shape, self.opening.layouts)
        return segments

    def segments_if(self, x: Tensor) -> tuple[Segment, ...] | None:
        """The same; None if nobody has said whose its rows are."""
        segments, layouts = self.segments, self.opening.layouts
        if not layouts:
            return segments
        for length, rows in layouts:
            if x.ndim > 1 and x.shape[0] == length:
                return tuple(segment._replace(rows=its) for segment, its in zip(segments, rows, strict=True))
        return None

    def refuse(self, shape: torch.Size, layouts: Layouts) -> NoReturn:
        """Raise: an input of this shape had rows of nobody, by these layouts."""
        told = " or ".join(str(length) for length, _ in layouts)
        raise RuntimeError(
            f"optimizer.mixed was told of {told} rows, but the input of {self.layer.name or 'the model'} has the shape "
            f"{tuple(shape)}; which of its rows are whose is not to be found out by counting: name their tasks in "
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

    # Without a dictionary, which `functools.update_wrapper` would hand on to whoever wraps it.
    __slots__ = ("__weakref__", "kind", "module", "own", "plain", "slots", "transposed")

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        self.module = module
        self.transposed = transposed
        self.kind = type(module)
        self.own = self.kind.forward
        # Properties of the class, as parametrizations make them, come before the module's parameters.
        self.plain = not (hasattr(self.kind, "weight") or hasattr(self.kind, "bias"))
        self.slots: list[Slot] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        if type(self.module).forward is not self.own:  # it has been replaced since
            return type(self.module).forward(self.module, *args, **kwargs)  # type: ignore[no-any-return]
        if kwargs or len(args) != 1:
            args = inspect.signature(self.own).bind(self.module, *args, **kwargs).args[1:]
        (x,) = args
        # What nearly all calls are, and where every microsecond counts: `_compute` would find the same.
        # Autocast, with which most train on a GPU, is one of them.
        if (
            len(slots := self.slots) == 1
            and (tray := (slot := slots[0]).opening.tray) is not None
            and not is_compiling()
        ):
            module, weight = self.module, slot.layer.parameter
            parameters = module._parameters
            if (
                parameters.get("weight") is weight
                and "bias" in parameters
                and self.plain
                and type(module) is self.kind
                and weight.requires_grad
                and torch.is_grad_enabled()
                and isinstance(x, Tensor)
                and not (_saving_hooks(False) or seen_by_others(weight) or needs_autograd(x, weight))
            ):
                bias = parameters["bias"]
                if _any_autocast():
                    x, bias = cast(x, bias)
                basis = tray.bases(x.dtype)[slot.layer.row]
                return ordinary_linear(x, weight, tray.witness, bias, basis, slot, tray)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        module = self.module
        # Not from its parameters: where they are pruned or parametrized, another library computes them.
        weight, bias = module.weight, getattr(module, "bias", None)
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):  # a tracer's
            return self.own(module, x)  # type: ignore[no-any-return]
        slots = [slot for slot in self.slots if slot.layer.parameter is weight]
        if not slots or not weight.requires_grad:
            return affine(x, weight, bias, self.transposed)
        compiling = is_compiling()
        if compiling or not torch.is_grad_enabled() or needs_autograd(x, weight) or seen_by_others(weight):
            opened = [slot for slot in slots if slot.opened]
            if compiling and torch.is_grad_enabled() and len(opened) == 1 and not opened[0].opening.whole:
                return projecting_linear(x, weight, bias, opened[0].orientation, opened[0].segments_of(x))
            return affine(x, weight, bias, self.transposed)
        if _any_autocast():
            x, bias = cast(x, bias)
        # Checkpointing runs the forward pass again when saved tensors are needed, by when another task may be open, or
        # none: what is saved must not depend on that, so the backward pass decides.
        for slot in slots:
            slot.computed_in = x.dtype
        opened = [slot for slot in slots if slot.opened]
        if not opened or _checkpointed():
            probes = tuple(probe for slot in slots for pair in slot.probes for probe in pair)
            return deferring_linear(x, weight, bias, slots[0].orientation, _Opened(slots), probes)
        if len(opened) > 1 or opened[0].opening.whole:
            # Autograd's own gradient is taken, which would arrive as one of no task if the block were closed by then.
            y = affine(x, weight, bias, self.transposed)
            for slot in opened:
                y.register_hook(_Arriving(weight, partial(slot.check_open, *slot.opening.tasks)))  # type: ignore[no-untyped-call]
            return y
        (slot,) = opened
        if (tray := slot.opening.tray) is not None:
            basis = tray.bases(x.dtype)[slot.layer.row]
            return ordinary_linear(x, weight, tray.witness, bias, basis, slot, tray)  # type: ignore[no-any-return]
        segments = slot.segments_if(x)
        if segments is None:
            # Whether anything arrives in the weight is not known yet: of a norm that DoRA computes nothing does.
            y = affine(x, weight, bias, self.transposed)
            y.register_hook(_Arriving(weight, partial(slot.refuse, x.shape, slot.opening.layouts)))  # type: ignore[no-untyped-call]
            return y
        return projecting_linear(x, weight, bias, slot.orientation, segments)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")

    @property
    def __globals__(self) -> Any:
        # Where `torch.jit.script` begins to read a forward pass, whose source it needs.
        raise AttributeError(
            "torch.jit.script cannot read the forward pass of a layer that an optimizer captures: script a "
            "copy.deepcopy of the model, or the model after optimizer.close()"
        )


class _Arriving:
    """A hook on a layer's output: before a gradient accumulates in the layer's weight, something is checked.

    Of a backward pass that leaves nothing in the weight, as one for inputs alone, it says nothing.
    """

    def __init__(self, weight: Tensor, check: Callable[[], None]) -> None:
        self._weight, self._check = weight, check

    def __call__(self, gradient: Tensor) -> None:
        if accumulates_into(self._weight):
            self._check()


class _Opened:
    """Tells a deferring backward pass which task is open by then."""

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    def __call__(self, x: Tensor) -> list[tuple[Segment, int, int]] | None:
        start = 0
        if sum(slot.opened for slot in self._slots) > 1:
            return None
        for slot in self._slots:
            if slot.opening.projects:
                return [
                    (segment, start + 2 * task + (segment.basis is None), start + 2 * task + 1)
                    for task, segment in zip(slot.opening.tasks, slot.segments_of(x), strict=True)
                ]
            start += 2 * len(slot.probes)
        return None


# Looked up once: it is asked in every layer and pass.
_any_autocast = torch._C._is_any_autocast_enabled

_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _checkpointed() -> bool:
    """Whether what the forward pass saves goes to a non-reentrant checkpoint, and not to hooks that only move it."""
    hooks = _saving_hooks(False)
    return hooks is not None and "checkpoint" in (getattr(hooks[0], "__module__", None) or "")


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
    if any(_defined(type(module).forward, *place) for place in _FUSED):
        return True
    return type(module).__name__ == "Conv1D" and _multiplies(module)


# Where the forward passes are defined that are replaced. By name, for transformers need not be there.
_FUSED = (("torch.nn.modules.linear", "Linear.forward"), ("transformers.pytorch_utils", "Conv1D.forward"))


def _multiplies(module: nn.Module) -> bool:
    """Whether a class that is named like transformers' does on a trial what that one does: x W + b."""
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    try:
        with torch.no_grad():
            x = torch.linspace(-1, 1, 2 * weight.shape[0], dtype=weight.dtype, device=weight.device).view(2, -1)
            expected = affine(x, weight, bias, True)
            off = (type(module).forward(module, x) - expected).abs().amax()
            return bool(off <= 16 * torch.finfo(weight.dtype).eps * expected.abs().amax())
    except Exception:
        return False


def _defined(function: Any, module: str, name: str) -> bool:
    """Whether this is the function of that name, and not another one that stands, or passes, for it."""
    code, home = getattr(function, "__code__", None), sys.modules.get(module)
    return home is not None and code is not None and (code.co_filename, code.co_qualname) == (home.__file__, name)


def uninstall(forward: FusedForward, slot: Slot) -> None:
    """Take a layer out of a forward pass, and that out of its module if it was the last."""
    forward.slots = [other for other in forward.slots if other is not slot]
    if not forward.slots and forward.module.__dict__.get("forward") is forward:
        del forward.module.forward
