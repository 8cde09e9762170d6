"""From an optimizer's parts to a `Summary`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradsub._blocks import Blocks
from gradsub._layout import Layout
from gradsub._said import Said
from gradsub.memory import bytes_of
from gradsub.subspace import Layer, local
from gradsub.summary import ParameterSummary, Summary
from gradsub.update import ANCHOR, FREE, PROTECTED

_PROTECTION = (PROTECTED, FREE, ANCHOR)


def summarise(
    tasks: Sequence[str], layout: Layout, said: Said, groups: Sequence[Mapping[str, Any]], blocks: Blocks
) -> Summary:
    """The summary of an optimizer with these groups."""
    found, shared = [], {}
    left_out, loose = said.left_out(), said.loose()
    for group in groups:
        for parameter in group["params"]:
            held, layer = blocks.state.get(parameter, {}), blocks.layers.get(parameter)
            # Of vectors they stay on the device, since every step needs them.
            kept = (
                [held[key] for key in _PROTECTION if key in held] if layer is not None and layout.guard.on_host else []
            )
            shared.update({tensor.untyped_storage().data_ptr(): _bytes(tensor) for tensor in kept})
            host = sum(map(_bytes, kept))
            total = sum(_bytes(value) for value in held.values() if isinstance(value, Tensor))
            free = said.why_not_protected(parameter)
            name = layout.name(parameter) if layer is None else layer.name
            free = loose.pop(name, free)
            if layer is None:
                why = said.why_not_decomposed(parameter, group, left_out)
                frozen = not parameter.requires_grad
                found.append(
                    ParameterSummary(
                        name,
                        tuple(parameter.shape),
                        (),
                        "none" if frozen else "generic",
                        "",
                        layout.guard.protected_share(parameter),
                        total,
                        0,
                        0 if frozen else max(1, len(tasks)) * _bytes(parameter),
                        "it is frozen" if frozen else why,
                        None if frozen else free,
                    )
                )
                continue
            found.append(
                ParameterSummary(
                    name,
                    layer.whole_shape,
                    layer.widths,
                    _capture(layout, parameter),
                    "sketch" if layer.sketched else "svd",
                    1 - layer.free / layer.dimension,
                    total - host,
                    host,
                    _transient(layer) if parameter.requires_grad else 0,
                    None,
                    free if parameter.requires_grad else None,
                )
            )
    notes = [
        f"{name}: {reason}" for name, reason in {**left_out, **loose}.items() if name not in {p.name for p in found}
    ]
    return Summary(tuple(tasks), layout.side, found, layout.guard.protects, sum(shared.values()), tuple(notes))


def _capture(layout: Layout, parameter: Tensor) -> str:
    if not parameter.requires_grad:
        return "none"
    return "generic" if layout.fused(parameter) is None else "fused"


def _transient(layer: Layer) -> int:
    """What a step holds besides the state."""
    rows, columns = layer.whole_shape
    found = bytes_of(layer)
    whole = 0 if layer.sketched else max(1, len(layer.widths) - 1) * rows * columns * layer.dtype.itemsize
    return found.joint + found.captured + found.sketches + whole


def _bytes(tensor: Tensor) -> int:
    here = local(tensor)
    return here.numel() * here.itemsize
