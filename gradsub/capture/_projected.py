from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradsub.capture._captured import Captured, squared_norm
from gradsub.subspace import SHARED, BasisChanged, Layer, SubspaceBank


@dataclass
class Projected:
    """A layer's gradients in the coordinates of its subspaces.

    Attributes:
        parts: each present task's gradient in the shared subspace.
        outside: what came from no task, in the shared subspace.
        own: R_k in each present task's own subspace.
        squared_norms: each present task's squared norm of the whole gradient, where it is known.
        sketches: by subspace, what its basis is to be renewed from after the step.
    """

    parts: dict[int, Tensor]
    outside: Tensor | None
    own: dict[int, Tensor]
    squared_norms: dict[int, Tensor]
    sketches: dict[int, Tensor] = field(default_factory=dict)


def gather(
    layer: Layer,
    bank: SubspaceBank,
    captured: Mapping[int, Captured],
    outside: Tensor | None,
    weights: Mapping[int, float | Tensor],
    update_proj_gap: int,
    changed: BasisChanged,
) -> Projected:
    """Refresh the bases that are due, and project what still has to be projected.

    Args:
        layer: the layer.
        bank: its bases.
        captured: by task, what the capture left; full gradients are freed on the way.
        outside: the gradient of backward passes outside any task, which belongs to the shared subspace alone.
        weights: w_k, each task's share of the samples.
        update_proj_gap: steps between refreshes.
        changed: told about every basis that changed.
    """
    outside = None if outside is None else layer.matrix(outside).to(layer.dtype)
    sketches = _sketches(layer, bank, captured, outside, weights)
    full = {task + 1: held.full.to(layer.dtype) for task, held in captured.items() if held.full is not None}
    if len(full) == len(captured) and bank.due(layer, SHARED):
        full[SHARED] = mix({task: full[task + 1] for task in captured}, weights, outside)
    if not layer.sketched:
        bank.refresh(layer, full, update_proj_gap, changed)
    parts, own, squared_norms = {}, {}, {}
    for task, held in captured.items():
        if held.full is not None:
            parts[task] = layer.project(held.full, bank.basis(layer, SHARED))
            own[task] = layer.project(held.full, bank.basis(layer, task + 1))
            if held.squared_norm is None:
                held.squared_norm = squared_norm(held.full)
            held.full = None
        else:
            assert held.shared is not None
            assert held.own is not None
            parts[task], own[task] = held.shared, held.own
            held.shared = held.own = held.sketch = None
        if held.squared_norm is not None:
            squared_norms[task] = held.squared_norm
    aside = None if outside is None else layer.total(layer.project(outside, bank.basis(layer, SHARED)))
    return Projected(parts, aside, own, squared_norms, sketches)


def _sketches(
    layer: Layer,
    bank: SubspaceBank,
    captured: Mapping[int, Captured],
    outside: Tensor | None,
    weights: Mapping[int, float | Tensor],
) -> dict[int, Tensor]:
    """The sketch of the shared gradient is that of its parts, mixed; only what is due is there."""
    if not layer.sketched:
        return {}
    found = {task + 1: held.sketch for task, held in captured.items() if held.sketch is not None}
    if not bank.due(layer, SHARED) or len(found) < len(captured):
        return found
    aside = None if outside is None else layer.sketch(outside, bank.directions(layer))
    if aside is not None and layer.shards is not None:
        layer.shards.sum_([aside])
    found[SHARED] = mix({task: found[task + 1] for task in captured}, weights, aside)
    return found


def mix(parts: Mapping[int, Tensor], weights: Mapping[int, float | Tensor], outside: Tensor | None) -> Tensor:
    """The shared gradient: sum_k w_k G_k, and what came from no task."""
    total: Tensor | None = None
    for task, part in parts.items():
        weight = weights[task]
        if total is None:
            total = part * (weight.to(part) if isinstance(weight, Tensor) else weight)
        elif isinstance(weight, Tensor):
            total.addcmul_(part, weight.to(part))
        else:
            total.add_(part, alpha=weight)
    if total is None or outside is None:
        found = outside if total is None else total
        assert found is not None
        return found
    return total + outside
