"""A linear layer whose backward pass computes projected weight gradients instead of the weight's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic
from torch.utils._device import DeviceContext

from gradsub.capture._products import Orientation, Rows, affine, project_rows, rows_of, whole
from gradsub.capture._tray import Tray
from gradsub.capture._wish import Wish, hand_over, wish_of


class Segment(NamedTuple):
    """One task's part of a batch, and what its gradient is projected on.

    Attributes:
        basis: the shared and the task's own basis side by side (d x r), or None for the whole gradient.
        directions: Omega (codimension x c) if a sketch is due, else None; the same for all segments of a batch.
        probe: a leaf of the projected gradient's shape, whose gradient the projected gradient is.
        sketch_probe: the same for the sketch (d x c); None without one.
        rows: of the batch.
    """

    basis: Tensor | None
    directions: Tensor | None
    probe: Tensor
    sketch_probe: Tensor | None
    rows: Rows = None


def projecting_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, orientation: Orientation, segments: tuple[Segment, ...]
) -> Tensor:
    """y = x W^T + b. In the backward pass the probes receive the gradients; the weight receives none.

    With bases of inputs, x V (N x r) is kept for the backward pass in place of x (N x n), unless a sketch is due.

    Args:
        x: (..., in_features).
        weight: W, stored as ``orientation`` says.
        bias: (out_features,) or None.
        orientation: of the weight and the bases.
        segments: by task; together they cover every row once.
    """
    layout = tuple(
        (
            segment.basis is not None,
            segment.directions is not None,
            True if isinstance(segment.rows, Tensor) else segment.rows,
        )
        for segment in segments
    )
    # Once for all segments: torch.compile refuses a function that is given one tensor twice.
    directions = next((segment.directions for segment in segments if segment.directions is not None), None)
    tensors = [
        tensor
        for basis, _, probe, sketch_probe, rows in segments
        for tensor in (basis, probe, sketch_probe, rows)
        if isinstance(tensor, Tensor)
    ]
    return _Projecting.apply(*cast(x, bias), weight, orientation, layout, directions, *tensors)  # type: ignore[no-any-return, no-untyped-call]


# By segment: whether there is a basis, whether there are directions, and the rows, or that a tensor of them follows.
Layout: TypeAlias = "tuple[tuple[bool, bool, bool | tuple[int, int] | None], ...]"


def cast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What autocast would make of them: inside a custom function nobody else does."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), None if bias is None else bias.to(dtype)
    return x, bias


# Looked up once: they are asked in every layer and pass.
_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._is_tracing


def needs_autograd(x: Tensor, weight: Tensor) -> bool:
    """Whether only operations that torch knows compute what is wanted: an ordinary linear layer does, captured or not.

    Function transforms (``torch.func``), forward-mode derivatives and ``torch.jit.trace`` want to see inside of an
    operation, and so does who overrides ``F.linear``; nested and sparse inputs have no rows to take; what is not
    floating is for torch to refuse.
    """
    return (
        _transforms_active()
        or forward_ad._current_level >= 0
        or _tracing()
        or x.is_nested
        or x.layout is not torch.strided
        or not x.is_floating_point()
        or F.linear is not torch._C._nn.linear
        or (has_torch_function_variadic(x, weight) and _overridden(x, weight))
    )


def _overridden(*tensors: Tensor) -> bool:
    """Whether a mode or a tensor's class changes what functions do; `torch.device` as a mode does not."""
    modes = [torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())]
    if not all(isinstance(mode, DeviceContext) for mode in modes):
        return True
    ordinary = (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
    return any(type(tensor).__torch_function__ not in ordinary for tensor in tensors)


def _unpack(layout: Layout, directions: Tensor | None, tensors: tuple[Tensor, ...]) -> list[Segment]:
    """The inverse of what `projecting_linear` does to its segments."""
    left = iter(tensors)
    segments = []
    for has_basis, has_directions, rows in layout:
        basis = next(left) if has_basis else None
        probe = next(left)
        sketch_probe = next(left) if has_directions else None
        own = directions if has_directions else None
        segments.append(Segment(basis, own, probe, sketch_probe, _rows(rows, left)))
    return segments


def _rows(described: bool | tuple[int, int] | None, tensors: Iterator[Tensor]) -> Rows:
    if isinstance(described, bool):
        return next(tensors)
    return described


def _no_view(output: Tensor) -> Tensor:
    """The same memory as a tensor of its own: with a bias torch views a matrix, and a view that a custom function gives
    back cannot be changed in place, as ``nn.ReLU(inplace=True)`` does.
    """
    if torch.compiler.is_compiling() or not output._is_view():
        return output
    found: Tensor = torch.ops.aten._unsafe_view.default(output, output.shape)
    return found


# Torch's own `Function.apply` looks through all arguments for tensors that a function transform has left behind;
# `needs_autograd` has said that there is no transform.
class _Ordinary(torch.autograd.function._SingleLevelFunction):
    """What nearly all calls are: one task, all rows, projections and nothing else.

    Every microsecond counts here: so nothing is called that a comparison spares.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, witness: Tensor, bias: Tensor | None, basis: Tensor, slot: Any, tray: Tray
    ) -> Tensor:
        ctx.to = slot, tray
        # With bases of outputs x itself is kept, and g U takes the place of x V.
        if slot.orientation.input_side:
            ctx.save_for_backward(weight, torch.mm(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), basis))
        else:
            ctx.save_for_backward(weight, x, basis)
        kernel = weight if weight.dtype is x.dtype else _compute_copy(weight, x)
        output = F.linear(x, kernel.mT if slot.orientation.transposed else kernel, bias)
        return _no_view(output) if output._is_view() else output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, *bases = ctx.saved_tensors
        slot, tray = ctx.to
        for_x = for_bias = None
        matrix = g.ndim == 2
        flat = g if matrix else g.reshape(-1, g.shape[-1])
        for_input, _, _, for_its_bias, *_ = ctx.needs_input_grad
        if for_input:
            kernel = weight if weight.dtype is g.dtype else weight.to(g.dtype)
            for_x = torch.mm(flat, kernel.mT if slot.orientation.transposed else kernel)
            for_x = for_x if matrix else for_x.view(*g.shape[:-1], for_x.shape[-1])
        if for_its_bias:
            for_bias = flat.sum(0)
        wish = wish_of(ctx, weight, 1, 2)
        if wish is Wish.WHOLE:
            raise RuntimeError(_WANTED_WHOLE)
        if wish is not Wish.NOTHING:
            if torch.is_grad_enabled():  # create_graph=True
                flat, kept = flat.detach(), kept.detach()
            if bases:
                thin, wide = torch.mm(flat, bases[0]), rows_of(kept, None)
            else:
                thin, wide = kept, flat
            left, right = (thin.mT, wide) if slot.orientation.axis == 0 else (wide.mT, thin)
            if tray.opened and tray.block is slot.layer.block:
                tray.add(slot.layer.row, left, right)
            else:
                slot.receive(tray.task, left, right)
        return for_x, None, None, for_bias, None, None, None


ordinary_linear = _Ordinary.apply  # type: ignore[attr-defined]


_WANTED_WHOLE = (
    "the gradient of a weight is wanted as a whole (by torch.autograd.grad or a hook) whose layer ran inside of a "
    "task, where it is only computed in the subspaces: run the forward pass outside of the task, register hooks before "
    'it, or pass capture="generic"'
)


class _Projecting(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        orientation: Orientation,
        layout: Layout,
        directions: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        segments = _unpack(layout, directions, tensors)
        output = _no_view(affine(x, _compute_copy(weight, x), bias, orientation.transposed))
        flat = rows_of(x, None)
        thin: list[Tensor] = []
        needed: list[Tensor] = []
        keep_x = False
        for segment in segments:
            if orientation.input_side and segment.basis is not None:
                own = flat if segment.rows is None else rows_of(x, segment.rows)
                thin.append(own @ segment.basis.to(x.dtype))
                keep_x = keep_x or segment.directions is not None
            else:
                keep_x = True
                needed += [] if segment.basis is None else [segment.basis]
            needed += [segment.rows] if isinstance(segment.rows, Tensor) else []
        ctx.orientation, ctx.layout = orientation, layout
        ctx.thin, ctx.keeps_x = len(thin), keep_x
        ctx.probes = tuple((segment.probe, segment.sketch_probe) for segment in segments)
        ctx.biased, ctx.sketched = bias is not None, directions is not None
        kept = [tensor for tensor in (x if keep_x else None, directions) if tensor is not None]
        ctx.save_for_backward(weight, *kept, *thin, *needed)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        orientation: Orientation = ctx.orientation
        weight, *saved = ctx.saved_tensors
        x = saved.pop(0) if ctx.keeps_x else None
        directions = saved.pop(0) if ctx.sketched else None
        thin, needed = iter(saved[: ctx.thin]), iter(saved[ctx.thin :])
        flat = rows_of(g, None)
        for_x, for_bias = _for_input(ctx, g, flat, weight)
        place = 2 if ctx.biased else 1
        wish = wish_of(ctx, weight, place, place + 1 + ctx.sketched + ctx.layout[0][0])
        if wish is Wish.WHOLE:
            raise RuntimeError(_WANTED_WHOLE)
        if wish is Wish.NOTHING:
            return for_x, for_bias, *[None] * (len(ctx.needs_input_grad) - 2)
        found: list[Tensor | None] = []
        with torch.no_grad():
            for (has_basis, has_directions, described), probes in zip(ctx.layout, ctx.probes, strict=True):
                basis = next(needed) if has_basis and not orientation.input_side else None
                rows = _rows(described, needed)
                projected, sketched = project_rows(
                    orientation,
                    None if x is None else rows_of(x, rows),
                    flat if rows is None else rows_of(g, rows),
                    basis,
                    directions if has_directions else None,
                    next(thin) if has_basis and orientation.input_side else None,
                )
                found += [None] * has_basis
                found.append(hand_over(wish, probes[0], projected))
                found += [] if sketched is None else [hand_over(wish, probes[1], sketched)]
                found += [None] * isinstance(described, bool)
        return for_x, for_bias, None, None, None, None, *found


def _compute_copy(weight: Tensor, x: Tensor) -> Tensor:
    """The weight as autocast would have it, detached: it would keep a cast, made without a graph, for later uses.

    Without autocast an input of another dtype is an error, as in any linear layer.
    """
    if weight.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
        return weight.detach().to(x.dtype)
    return weight


def _for_input(ctx: Any, g: Tensor, flat: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the bias, from that of the output, also as a matrix."""
    for_x = None
    if ctx.needs_input_grad[0]:
        weight = weight.to(g.dtype)
        for_x = flat @ (weight.mT if ctx.orientation.transposed else weight)
        for_x = for_x if g.ndim == 2 else for_x.view(*g.shape[:-1], for_x.shape[-1])
    return for_x, flat.sum(0) if ctx.needs_input_grad[1] else None


class _Deferring(torch.autograd.Function):
    """The same when the task is not known before the backward pass: x is kept, and the open task decides."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, orientation: Orientation, opened: Any, *probes: Tensor
    ) -> Tensor:
        ctx.orientation, ctx.opened, ctx.probes, ctx.biased = orientation, opened, probes, bias is not None
        ctx.save_for_backward(x, weight)
        return _no_view(affine(x, _compute_copy(weight, x), bias, orientation.transposed))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        orientation: Orientation = ctx.orientation
        x, weight = ctx.saved_tensors
        for_x, for_bias = _for_input(ctx, g, rows_of(g, None), weight)
        found: list[Tensor | None] = [None] * len(ctx.probes)
        place = 2 if ctx.biased else 1
        wish = wish_of(ctx, weight, place, place + 1)
        if wish is Wish.NOTHING:
            return for_x, for_bias, None, None, None, *found
        placed = None if wish is Wish.WHOLE else ctx.opened(x)
        if placed is None:
            for_weight = whole(rows_of(x, None), rows_of(g, None), orientation.transposed).to(weight.dtype)
            return for_x, for_bias, for_weight, None, None, *found
        with torch.no_grad():
            for segment, probe_place, sketch_place in placed:
                rows = segment.rows
                projected, sketched = project_rows(
                    orientation, rows_of(x, rows), rows_of(g, rows), segment.basis, segment.directions
                )
                # Where the model was converted since the forward pass, the graph ends in leaves that nobody reads.
                into = wish if ctx.probes[probe_place] is segment.probe else Wish.THIS_LEAF
                found[probe_place] = hand_over(into, segment.probe, projected)
                if sketched is not None:
                    assert segment.sketch_probe is not None
                    found[sketch_place] = hand_over(into, segment.sketch_probe, sketched)
        return for_x, for_bias, None, None, None, *found


def deferring_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, orientation: Orientation, opened: Any, probes: tuple[Tensor, ...]
) -> Tensor:
    """`projecting_linear` for a forward pass outside any task: which gradient is wanted shows in the backward pass.

    Args:
        opened: called in the backward pass with x; returns the open task's segments, each with the places of its probe
            and its sketch probe among ``probes``, or None: then the weight receives its ordinary gradient.
        probes: all that may receive a gradient.
    """
    return _Deferring.apply(*cast(x, bias), weight, orientation, opened, *probes)  # type: ignore[no-any-return, no-untyped-call]
