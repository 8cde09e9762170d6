"""The step in the subspaces, lifted to the weight: the only place where a decomposed weight changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradsub.subspace import Layer, SubspaceBank, lift

__all__ = ["apply_update", "decay"]


def apply_update(
    layer: Layer, bank: SubspaceBank, steps: Mapping[int, Tensor], gates: Tensor, scale: float, shrink: float | Tensor
) -> None:
    r"""W <- W - shrink P W + scale (lift(d_sh) + sum_k g_k lift(d_k)).

    Args:
        layer: the layer; W is its parameter.
        bank: its bases, which lie in the null space, so every lifted step does.
        steps: d by subspace, what the inner optimizer moved.
        gates: g (K,), one a task.
        scale: multiplies the lifted step.
        shrink: lr times weight decay, or 0. P = I - K K^T keeps the decay off the protected directions as well.
    """
    weight = layer.parameter
    update = decay(layer, shrink)
    blocks = [step if subspace == 0 else step * gates[subspace - 1].to(step) for subspace, step in steps.items()]
    bases = [bank.basis(layer, subspace) for subspace in steps]
    lifted = lift(torch.cat(blocks, dim=layer.axis), torch.cat(bases, dim=1), layer.axis)
    lifted = lifted * scale if update is None else update.add_(lifted, alpha=scale)
    weight.copy_(weight.to(layer.dtype) + lifted) if weight.dtype != layer.dtype else weight.add_(lifted)


def decay(layer: Layer, shrink: float | Tensor) -> Tensor | None:
    """-shrink (I - K K^T) W, or None if there is nothing to shrink."""
    if isinstance(shrink, float) and shrink == 0.0:
        return None
    weight = layer.parameter.to(layer.dtype)
    if layer.protected is not None:
        inside = weight @ layer.protected if layer.axis == 1 else layer.protected.mT @ weight
        weight = weight - lift(inside, layer.protected, layer.axis)
    return weight * -shrink
