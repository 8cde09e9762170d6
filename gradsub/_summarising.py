"""From an optimizer's parts to a `Summary`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from gradsub._layout import Layout
from gradsub._said import Said
from gradsub.memory import layer_bytes
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
    state: MutableMapping[Tensor, Any],
) -> Summary:
    """The summary of an optimizer.

    Args:
        tasks: their names.
        layout: knows what is decomposed and protected.
        said: knows why something is not.
        groups: the parameter groups.
        layers: by weight.
        state: of the parameters.
    """
    found, shared = [], {}
    left_out, loose = said.left_out(), said.loose()
    for group in groups:
        for parameter in group["params"]:
            held, layer = state.get(parameter, {}), layers.get(parameter)
            # Of vectors they stay on the device, since every step needs them.
            kept = [held[key] for key in _PROTECTION if key in held] if layer is not None and layout.on_host else []
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
                        layout.protected_share(parameter),
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
    return Summary(tuple(tasks), layout.side, found, layout.protects, sum(shared.values()), tuple(notes))


def _capture(layout: Layout, parameter: Tensor) -> str:
    if not parameter.requires_grad:
        return "none"
    return "generic" if layout.fused(parameter) is None else "fused"


def _transient(layer: Layer) -> int:
    """What a step holds besides the state."""
    rows, columns = layer.whole_shape
    tasks = len(layer.widths) - 1
    said = layer_bytes(
        rows,
        columns,
        rank=layer.widths[0],
        task_rank=layer.widths[1] if tasks else None,
        tasks=tasks,
        side="input" if layer.axis == 1 else "output",
        sketched=layer.sketched,
        itemsize=layer.dtype.itemsize,
    )
    whole = 0 if layer.sketched else max(1, tasks) * rows * columns * layer.dtype.itemsize
    return said.joint + said.captured + said.sketches + whole


def _bytes(tensor: Tensor) -> int:
    here = local(tensor)
    return here.numel() * here.itemsize
