"""The step in the subspaces, lifted to the weight: the only place where a decomposed weight changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import compress
from typing import Any, Final

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import widest
from gradsub.subspace import Block, Layer, Protected, lift, local, pieces

__all__ = [
    "ANCHOR",
    "FREE",
    "MASTER",
    "PENDING_DECAY",
    "PROTECTED",
    "apply_updates",
    "collect_decay",
    "decay",
    "hold_protected",
    "initialise_update",
    "protected_in",
]

ANCHOR: Final = "anchor"
MASTER: Final = "master"
PENDING_DECAY: Final = "pending_decay"
PROTECTED: Final = "protected"
FREE: Final = "free"

State = MutableMapping[str, Any]


def protected_in(state: Mapping[str, Any]) -> Protected | None:
    """What a layer's state says is protected."""
    if FREE in state:
        return Protected(state[FREE], complement=True)
    return Protected(state[PROTECTED]) if PROTECTED in state else None


def initialise_update(layer: Layer, state: State, master_weights: bool, anchor: bool = False) -> None:
    """The state that updates need: what is protected, where it stood, and the precise weight.

    ``"protected"`` is K (d x k), so that a resumed run protects the same; where most directions are protected,
    ``"free"`` is an orthonormal basis of what K leaves (d x (d - k)) instead. ``"anchor"`` is W K (m x k) for axis 1,
    K^T W (k x n) for axis 0, beside K in memory; it exists on demand. ``"master"`` (m x n) exists for weights below
    float32, on demand.
    """
    weight = layer.parameter
    here = None if layer.protected is None else FREE if layer.protected.complement else PROTECTED
    # What stays keeps its place: the state of a resumed run has the same order.
    for key in {FREE, PROTECTED} - {here}:
        state.pop(key, None)
    if layer.protected is None or not anchor:
        state.pop(ANCHOR, None)
    if layer.protected is not None and here is not None:
        K = state[here] = layer.protected.directions
        rows, columns = layer.shape
        expected = (rows, K.shape[1]) if layer.axis == 1 else (K.shape[1], columns)
        if anchor and (ANCHOR not in state or state[ANCHOR].shape != expected):
            state[ANCHOR] = layer.total(layer.project(layer.matrix(weight.detach()), K.to(weight.device)))
        if anchor:
            state[ANCHOR] = state[ANCHOR].to(K.device)
    if master_weights and weight.dtype != layer.dtype and MASTER not in state:
        state[MASTER] = layer.matrix(weight.detach()).to(layer.dtype, copy=True)


def apply_updates(block: Block, states: Sequence[State], steps: Tensor, bases: Tensor, shrink: float | Tensor) -> None:
    r"""W <- (1 - shrink) W + lift(steps), for the layers of a block; of protected layers without the decay.

    The whole update is formed before it is added: each addition rounds W, and only rounding can move what is protected.
    As in torch's own decay, 1 - s may be rounded to the format of W.

    Args:
        block: L layers; W is a layer's parameter.
        states: of the layers.
        steps: d, scaled and gated, side by side for all subspaces (L x m x r for axis 1, L x r x n for axis 0).
        bases: of the same subspaces (L x d x r); they lie in the null space, so every lifted step does.
        shrink: lr times weight decay, or 0. Protected layers collect it, see `collect_decay`.
    """
    first = block.first
    # Below a quarter of an epsilon 1 - s is 1.
    shrinks = isinstance(shrink, Tensor) or abs(shrink) > torch.finfo(first.dtype).eps / 4
    if first.parameter.dtype != first.dtype or not _small(first):
        for row, layer in enumerate(block.layers):
            _apply(layer, states[row], steps[row], bases[row], 0.0 if layer.protected is not None else shrink)
        return
    for rows in pieces(range(len(block)), first.shape[0] * first.shape[1], block.device):
        whole = len(rows) == len(block)
        taken, spanned = (steps, bases) if whole else (steps[list(rows)], bases[list(rows)])
        if first.axis == 0 and first.shards is not None:
            spanned = spanned[:, first.shards.start : first.shards.stop]
        weights = [local(block.layers[row].parameter) for row in rows]
        decays = [shrinks and block.layers[row].protected is None for row in rows]
        # (1 - s) W + U = W + s (U / s - W): one operation that passes over the weights once.
        once = shrink if all(decays) and not isinstance(shrink, Tensor) else None
        updates = list(lift(taken if once is None else taken / once, spanned, first.axis).unbind())
        if weights[0].ndim != 2:
            # The update takes the weight's shape, never the reverse: as a matrix, a channels_last weight is a copy.
            updates = [update.reshape(weight.shape) for update, weight in zip(updates, weights, strict=True)]
        if once is not None:
            torch._foreach_lerp_(weights, updates, once)
            continue
        if any(decays):
            # A rate on the CPU goes along: torch's operations on lists take a factor of the same device alone.
            there = weights[0].device
            kept = (1 - shrink).to(there, non_blocking=True) if isinstance(shrink, Tensor) else 1 - shrink
            torch._foreach_mul_(list(compress(weights, decays)), kept)
        torch._foreach_add_(weights, updates)


def _small(layer: Layer) -> bool:
    """Whether starting an operation costs more than doing it; else one product a layer spares memory for the update."""
    return layer.parameter.device.type != "cpu" or layer.parameter.numel() <= 1 << 14


def _apply(layer: Layer, state: State, step: Tensor, basis: Tensor, shrink: float | Tensor) -> None:
    weight = _precise(layer, state)
    left, right = (step, basis.mT) if layer.axis == 1 else (layer.near(basis), step)
    if isinstance(shrink, Tensor):
        weight = weight.add_(layer.lift(step, basis) - weight * shrink)
    else:
        weight = weight.addmm_(left, right, beta=1 - shrink)
    _write(layer, weight)


def collect_decay(block: Block, states: Sequence[State], shrink: float | Tensor) -> None:
    """Of a block's protected layers: c <- c + s (1 - c), the share of P W that decay has yet to take away.

    P = I - K K^T, and K is on the device at refreshes only. After steps with the shares s_t, 1 - c is the product of
    all 1 - s_t. A share that is a tensor on an accelerator is not read: c then lives there as well.

    Args:
        block: the layers.
        states: of the layers.
        shrink: s, lr times weight decay, or 0.
    """
    rows = [row for row, layer in enumerate(block.layers) if layer.protected is not None]
    if not rows or (not isinstance(shrink, Tensor) and shrink == 0.0):
        return
    pending = block.stacks[PENDING_DECAY]
    if isinstance(shrink, Tensor) and shrink.device.type != "cpu" and pending.device.type == "cpu":
        pending = block.stacks[PENDING_DECAY] = pending.to(shrink.device)
        for state, mine in zip(states, pending.unbind(), strict=True):
            state[PENDING_DECAY] = mine
    if pending.device.type == "cpu":
        array = block.array(PENDING_DECAY)
        array[rows] += float(shrink) * (1 - array[rows])
        return
    share = shrink.reshape(()) if isinstance(shrink, Tensor) else shrink
    # Without an index: the device would have to be told of one.
    for part in [pending] if len(rows) == len(block) else [pending[row] for row in rows]:
        part += (1 - part) * share


def decay(layer: Layer, state: State) -> None:
    r"""W <- W - c P W: take away what was collected since the last time.

    With updates U d_t in the range of P, decay at each step gives P W_T = (1 - c) P W_0 + sum_t a_t U d_t, where a_t is
    the product of the 1 - s of the steps after t; this gives 1 - c in the place of every a_t. So the two differ by at
    most c times the sum of the norms of the updates since: decay and updates of one gap, multiplied.
    """
    pending = state[PENDING_DECAY]
    on_host = pending.device.type == "cpu"
    share = float(layer.block.array(PENDING_DECAY)[layer.row]) if on_host else pending
    if layer.protected is None or (on_host and share == 0.0):
        return
    weight = _precise(layer, state)
    # Of the weight as it is: somebody else may have written it since.
    protected = layer.protected.to(weight.device)
    directions, complement = protected.directions, protected.complement
    inside = layer.total(layer.project(weight, directions))
    if on_host:
        left, right = (inside, directions.mT) if layer.axis == 1 else (layer.near(directions), inside)
        weight.addmm_(left, right, beta=1.0 if complement else 1 - share, alpha=-share if complement else share)
        layer.block.array(PENDING_DECAY)[layer.row] = 0.0
    else:
        free = layer.lift(inside, directions)
        weight.sub_((free if complement else weight - free).mul_(share))
        pending.zero_()
    _write(layer, weight)


def hold_protected(layer: Layer, state: State, steps: int) -> None:
    r"""Undo what rounding did to the protected part of the weight in the last steps, where there is an anchor.

    Each step rounds W, and the roundings add up like a random walk: over thousands of steps they leave more in the
    protected directions than the update, which is orthogonal to them, ever would. So W + (A - W K) K^T is restored,
    with A = W K as it was; K is held whole then. Rounding an entry w errs by up to eps |w| / 2, so that T steps move a
    row of W K by about
    eps sqrt(T) / 5 times the root of the sum over j of w_j^2 |K_j|^2, and storing A costs an eps of its own. A row that
    moved by five times as much was written by somebody else (weights were loaded, scaled, clipped, pruned): then that
    is the new row of A.

    Args:
        layer: the layer.
        state: its state.
        steps: T, how many steps it has taken since the last call, at most.
    """
    if layer.protected is None or ANCHOR not in state:
        return
    weight = _precise(layer, state)
    wide = widest(weight.device)
    K, W = layer.protected.directions.to(weight.device, wide), weight.to(wide)
    now = layer.total(layer.project(W, K))
    exposed = layer.total(layer.project(W.square(), K.square().sum(1, keepdim=True)))
    anchor = state[ANCHOR].to(now.device, non_blocking=True)
    drift = anchor - now
    along = 1 if layer.axis == 1 else 0
    stored = torch.linalg.vector_norm(now, dim=along, keepdim=True)
    rounding = torch.finfo(weight.dtype).eps * (math.sqrt(steps) * exposed.sqrt() + stored)
    foreign = torch.linalg.vector_norm(drift, dim=along, keepdim=True) > rounding
    state[ANCHOR].copy_(torch.where(foreign, now, anchor))
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
