"""The step in the subspaces, lifted to the weight: the only place where a decomposed weight changes."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import widest
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
        simple = layer.parameter.dtype == layer.dtype and not (shrinks and layer.protected is not None)
        (together if simple and _small(layer) else alone).append(row)
    first = block.first
    for rows in pieces(together, first.shape[0] * first.shape[1], block.device):
        whole = len(rows) == len(block)
        taken, spanned = (steps, bases) if whole else (steps[list(rows)], bases[list(rows)])
        if first.axis == 0 and first.shards is not None:
            spanned = spanned[:, first.shards.start : first.shards.stop]
        weights = [local(block.layers[row].parameter) for row in rows]
        updates = list(lift(taken, spanned, first.axis).unbind())
        if weights[0].ndim != 2:
            # The update takes the weight's shape, never the reverse: as a matrix, a channels_last weight is a copy.
            updates = [update.reshape(weight.shape) for update, weight in zip(updates, weights, strict=True)]
        if shrinks:
            kept = 1 - shrink
            torch._foreach_mul_(weights, kept.reshape(()) if isinstance(kept, Tensor) else kept)
        torch._foreach_add_(weights, updates)
    for row in alone:
        _apply(block.layers[row], states[row], steps[row], bases[row], shrink)


def _small(layer: Layer) -> bool:
    """Whether starting an operation costs more than doing it; else one product a layer spares memory for the update."""
    return layer.parameter.device.type != "cpu" or layer.parameter.numel() <= 1 << 14


def _apply(layer: Layer, state: State, step: Tensor, basis: Tensor, shrink: float | Tensor) -> None:
    weight = _precise(layer, state)
    shrinks = isinstance(shrink, Tensor) or shrink != 0.0
    if shrinks and layer.protected is not None:
        # P W = W - (W K) K^T, of the weight as it is: somebody else may have written it since the last step.
        along = layer.total(layer.project(weight, layer.protected))
        step = torch.cat([step, along * shrink], dim=layer.axis)
        basis = torch.cat([basis, layer.protected], dim=1)
    left, right = (step, basis.mT) if layer.axis == 1 else (layer.near(basis), step)
    if not shrinks:
        weight = weight.addmm_(left, right)
    elif isinstance(shrink, Tensor):
        weight = weight.add_(layer.lift(step, basis) - weight * shrink)
    else:
        weight = weight.add_(torch.addmm(weight, left, right, beta=-shrink))
    _write(layer, weight)


def hold_protected(layer: Layer, state: State, steps: int) -> None:
    r"""Undo what rounding did to the protected part of the weight in the last steps.

    Each step rounds W, and the roundings add up like a random walk: over thousands of steps they leave more in the
    protected directions than the update, which is orthogonal to them, ever would. So W + (A - W K) K^T is restored,
    with A = W K as it was. Rounding an entry w errs by up to eps |w| / 2, so that T steps move a row of W K by about
    eps sqrt(T) / 5 times the root of the sum over j of w_j^2 |K_j|^2, and storing A costs an eps of its own. A row that
    moved by five times as much was written by somebody else (weights were loaded, scaled, clipped, pruned): then that
    is the new row of A.

    Args:
        layer: the layer.
        state: its state.
        steps: T, how many steps it has taken since the last call, at most.
    """
    if layer.protected is None:
        return
    weight = _precise(layer, state)
    wide = widest(weight.device)
    K, W = layer.protected.to(wide), weight.to(wide)
    now = layer.total(layer.project(W, K))
    exposed = layer.total(layer.project(W.square(), K.square().sum(1, keepdim=True)))
    drift = state[ANCHOR] - now
    along = 1 if layer.axis == 1 else 0
    stored = torch.linalg.vector_norm(now, dim=along, keepdim=True)
    rounding = torch.finfo(weight.dtype).eps * (math.sqrt(steps) * exposed.sqrt() + stored)
    foreign = torch.linalg.vector_norm(drift, dim=along, keepdim=True) > rounding
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
        weight.copy_(precise.reshape(weight.shape))
