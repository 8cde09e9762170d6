"""Layers of the same shape, side by side: what a step does to one of them it does to all in one operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsub._pieces import pieces
from gradsub._rounding import drop_rounding
from gradsub.capture import Projected, mix
from gradsub.subspace import Layer


@dataclass
class Block:
    """Layers that share their shape, their axis, their options and the tasks that reached them; L of them.

    Layers of one kind fill several blocks where their coordinates take much memory.

    Attributes:
        group: the index of their parameter group.
        layers: in the order of the rows below.
        parts: each present task's gradients in the shared subspaces (L x m x r).
        outside: what came from no task, likewise, or None.
        own: each present task's gradients in its own subspaces.
        squared_norms: each present task's squared norms of the whole gradients (L,), where they are known.
    """

    group: int
    layers: list[Layer]
    parts: dict[int, Tensor]
    outside: Tensor | None
    own: dict[int, Tensor]
    squared_norms: dict[int, Tensor]

    def shared(self, weights: Mapping[int, float | Tensor]) -> Tensor:
        """The gradients in the shared subspaces (L x m x r)."""
        return mix(self.parts, weights, self.outside)


def make_blocks(projected: Mapping[Layer, Projected], groups: Mapping[Layer, int], rounding: float) -> list[Block]:
    """Group alike layers; their gradients move into the blocks, so that they exist once, and lose what is rounding.

    Args:
        projected: by layer.
        groups: the index of each layer's parameter group.
        rounding: epsilon of the coarsest format in which a gradient was computed.
    """
    alike: dict[Any, list[Layer]] = defaultdict(list)
    for layer, found in projected.items():
        weight = layer.parameter
        alike[
            groups[layer],
            layer.shape,
            layer.whole_shape,  # ranks whose rows differ have to form the same blocks
            layer.axis,
            layer.widths,
            layer.shards is None,
            weight.dtype,
            weight.device,
            tuple(found.parts),
            tuple(found.squared_norms),
            found.outside is None,
        ].append(layer)
    return [
        _block(key[0], layers, [projected[layer] for layer in layers], rounding)
        for key, members in alike.items()
        for layers in pieces(members, [_entries(layer) for layer in members])
    ]


def _entries(layer: Layer) -> int:
    """Coordinates of a layer in all its subspaces, on all ranks that have rows of it."""
    return layer.codimension * sum(layer.widths)


def _block(group: int, layers: list[Layer], found: Sequence[Projected], rounding: float) -> Block:
    first = found[0]
    tasks = list(first.parts)
    parts = _stack([each.parts.pop(task) for task in tasks for each in found])
    own = _stack([each.own.pop(task) for task in tasks for each in found])
    norms = _stack([each.squared_norms[task] for task in first.squared_norms for each in found])
    outside = _stack([] if first.outside is None else [each.outside for each in found])
    if tasks:
        drop_rounding([parts, own], layers[0], rounding, norms if len(norms) == len(parts) else None)
    if first.outside is not None:
        drop_rounding([outside], layers[0], rounding, None)
    size = len(layers)
    return Block(
        group=group,
        layers=layers,
        parts=dict(zip(tasks, torch.split(parts, size), strict=True)) if tasks else {},
        outside=None if first.outside is None else outside,
        own=dict(zip(tasks, torch.split(own, size), strict=True)) if tasks else {},
        squared_norms=dict(zip(first.squared_norms, torch.split(norms, size), strict=True)) if len(norms) else {},
    )


def _stack(tensors: list[Any]) -> Tensor:
    # Contiguous in any case: torch's fused optimizers read a gradient's memory as if it were, and say nothing.
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack(tensors) if tensors else torch.empty(0)
