"""From an optimizer's parts to a `Summary`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradsub._layout import Layout
from gradsub._said import Said
from gradsub.memory import bytes_of
from gradsub.subspace import Layer, local
from gradsub.summary import ParameterSummary, Summary
from gradsub.update import ANCHOR, FREE, PROTECTED

_PROTECTION = (PROTECTED, FREE, ANCHOR)


def summarise(
    tasks: Sequence[str],
    layout: Layout,
    said: Said,
    groups: Sequence[Mapping[str, Any]],
    layers: Mapping[Tensor, Layer],
    state: Mapping[Tensor, Any],
) -> Summary:
    """The summary of an optimizer with these groups."""
    found, shared = [], {}
    left_out, loose = said.left_out(), said.loose()
    for group in groups:
        for parameter in group["params"]:
            held, layer = state.get(parameter, {}), layers.get(parameter)
            # Of vectors they stay on the device, since every step needs them.
            kept = (
                [held[key] for key in _PROTECTION if key in held] if layer is not None and layout.guard.on_host else []
            )
            shared.update({tensor.untyped_storage().data_ptr(): _bytes(tensor) for tensor in kept})
            host = sum(map(_bytes, kept))
            total = sum(_bytes(value) for value in held.values() if isinstance(value, Tensor))
            name = layout.name(parameter) if layer is None else layer.name
            free = loose.pop(name, said.why_not_protected(parameter))
            frozen = not parameter.requires_grad
            shape: tuple[int, ...]
            ranks: tuple[int, ...]
            if layer is None:
                shape, ranks, refresh = tuple(parameter.shape), (), ""
                share, transient = layout.guard.protected_share(parameter), max(1, len(tasks)) * _bytes(parameter)
                why = "it is frozen" if frozen else said.why_not_decomposed(parameter, group, left_out)
                capture = "generic"
            else:
                shape, ranks, refresh = layer.whole_shape, layer.widths, "sketch" if layer.sketched else "svd"
                share, transient, why = 1 - layer.free / layer.dimension, _transient(layer), None
                capture = "generic" if layout.fused(parameter) is None else "fused"
            if frozen:
                capture, transient, free = "none", 0, None
            found.append(
                ParameterSummary(name, shape, ranks, capture, refresh, share, total - host, host, transient, why, free)
            )
    notes = [
        f"{name}: {reason}" for name, reason in {**left_out, **loose}.items() if name not in {p.name for p in found}
    ]
    return Summary(tuple(tasks), layout.side, found, layout.guard.protects, sum(shared.values()), tuple(notes))


def _transient(layer: Layer) -> int:
    """What a step holds besides the state."""
    rows, columns = layer.whole_shape
    found = bytes_of(layer)
    whole = 0 if layer.sketched else max(1, len(layer.widths) - 1) * rows * columns * layer.dtype.itemsize
    return found.joint + found.captured + found.sketches + whole


def _bytes(tensor: Tensor) -> int:
    here = local(tensor)
    return here.numel() * here.itemsize
