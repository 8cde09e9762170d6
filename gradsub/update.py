"""The step in the subspaces, lifted to the weight: the only place where a decomposed weight changes."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gradsub.subspace import Block, Layer, lift, local, pieces

__all__ = ["ANCHOR", "MASTER", "PROTECTED", "apply_updates", "hold_protected", "initialise_update"]

ANCHOR: Final = "anchor"
MASTER: Final = "master"
PROTECTED: Final = "protected"

State = MutableMapping[str, Any]


def initialise_update(layer: Layer, state: State, master_weights: bool) -> None:
    """The state that updates need: what is protected, where it stood, and the precise weight.

    ``"protected"`` is K (d x k), so that a resumed run protects the same. ``"anchor"`` is W K (m x k) for axis 1,
    K^T W (k x n) for axis 0. ``"master"`` (m x n) exists for weights below float32, on demand.
    """
    weight = layer.parameter
    if layer.protected is None:
        state.pop(PROTECTED, None)
        state.pop(ANCHOR, None)
    else:
        found = layer.total(layer.project(layer.matrix(weight.detach()), layer.protected))
        held = state.get(ANCHOR)
        if held is None or held.shape != found.shape:
            state[ANCHOR] = found
        state[PROTECTED] = layer.protected
    if master_weights and weight.dtype != layer.dtype and MASTER not in state:
        state[MASTER] = layer.matrix(weight.detach()).to(layer.dtype, copy=True)


def apply_updates(block: Block, states: Sequence[State], steps: Tensor, bases: Tensor, shrink: float | Tensor) -> None:
    r"""W <- W - shrink P W + lift(steps), for the layers of a block.

    The whole update is formed before it is added: each addition rounds W, and only rounding can move what is protected.

    Args:
        block: L layers; W is a layer's parameter.
        states: of the layers.
        steps: d, scaled and gated, side by side for all subspaces (L x m x r for axis 1, L x r x n for axis 0).
        bases: of the same subspaces (L x d x r); they lie in the null space, so every lifted step does.
        shrink: lr times weight decay, or 0. P = I - K K^T keeps the decay off the protected directions as well.
    """
    shrinks = isinstance(shrink, Tensor) or shrink != 0.0
    together: list[int] = []
    alone: list[int] = []
    for row, layer in enumerate(block.layers):
        simple = _writable(layer) and not (shrinks and layer.protected is not None)
        (together if simple and _small(layer) else alone).append(row)
    first = block.first
    for rows in pieces(together, first.shape[0] * first.shape[1], block.device):
        whole = len(rows) == len(block)
        taken, spanned = (steps, bases) if whole else (steps[list(rows)], bases[list(rows)])
        if first.axis == 0 and first.shards is not None:
            spanned = spanned[:, first.shards.start : first.shards.stop]
        weights = [block.layers[row].matrix(block.layers[row].parameter) for row in rows]
        if shrinks:
            torch._foreach_mul_(weights, 1 - shrink)
        torch._foreach_add_(weights, list(lift(taken, spanned, first.axis).unbind()))
    for row in alone:
        _apply(block.layers[row], states[row], steps[row], bases[row], shrink)


def _writable(layer: Layer) -> bool:
    """Whether what is written to the layer's matrix is written to its parameter, in its own precision."""
    weight = local(layer.parameter)
    return weight.dtype == layer.dtype and (weight.ndim == 2 or weight.is_contiguous())


def _small(layer: Layer) -> bool:
    """Whether starting an operation costs more than doing it; else one product a layer spares memory for the update."""
    return layer.parameter.device.type != "cpu" or layer.parameter.numel() <= 1 << 14


def _apply(layer: Layer, state: State, step: Tensor, basis: Tensor, shrink: float | Tensor) -> None:
    weight = _precise(layer, state)
    shrinks = isinstance(shrink, Tensor) or shrink != 0.0
    if shrinks and layer.protected is not None:
        # P W = W - A K^T: the anchor spares a product with the whole weight.
        step = torch.cat([step, state[ANCHOR] * shrink], dim=layer.axis)
        basis = torch.cat([basis, layer.protected], dim=1)
    left, right = (step, basis.mT) if layer.axis == 1 else (layer.near(basis), step)
    if not shrinks:
        weight = weight.addmm_(left, right)
    elif isinstance(shrink, Tensor):
        weight = weight.add_(layer.lift(step, basis) - weight * shrink)
    else:
        weight = weight.add_(torch.addmm(weight, left, right, beta=-shrink))
    _write(layer, weight)


def hold_protected(layer: Layer, state: State) -> None:
    """Undo what rounding did to the protected part of the weight since the last call; once a refresh.

    Each step rounds W, and the roundings add up like a random walk: over thousands of steps they leave more in the
    protected directions than the update, which is orthogonal to them, ever would. So W + (A - W K) K^T is restored,
    with A = W K as it was. A difference far beyond rounding means that somebody else wrote the weight (a checkpoint
    was loaded): then that is the new A.
    """
    if layer.protected is None:
        return
    weight = _precise(layer, state)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    K = layer.protected.to(wide)
    now = layer.total(layer.project(weight.to(wide), K))
    drift = state[ANCHOR] - now
    rounding = 64 * torch.finfo(weight.dtype).eps * now.norm()
    foreign = drift.norm() > rounding
    state[ANCHOR].copy_(torch.where(foreign, now, state[ANCHOR]))
    _write(layer, weight.copy_(weight + layer.lift(torch.where(foreign, 0.0, drift), K)))


def _precise(layer: Layer, state: State) -> Tensor:
    """The weight in the layer's dtype: itself, its master copy, or a conversion of it."""
    weight = layer.matrix(layer.parameter)
    if weight.dtype == layer.dtype:
        return weight
    converted = weight.to(layer.dtype)
    master: Tensor | None = state.get(MASTER)
    if master is None:
        return converted
    # Entries that somebody else wrote (a checkpoint was loaded into the model) win over the copy.
    return master.copy_(torch.where(master.to(weight.dtype) == weight, master, converted))


def _write(layer: Layer, precise: Tensor) -> None:
    weight = local(layer.parameter)
    if precise.data_ptr() != weight.data_ptr():
        weight.copy_(precise.view(weight.shape))
