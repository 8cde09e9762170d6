from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradsub.capture import MIXED, Captured, mix
from gradsub.distributed._agreement import Agreement
from gradsub.distributed._ranks import Ranks
from gradsub.subspace import SHARED, Layer, SubspaceBank

Gradients = MutableMapping[int, dict[Tensor, Captured]]


@dataclass(frozen=True)
class _Piece:
    """One tensor of one captured gradient: its place is the same in every rank's bucket."""

    task: int
    parameter: Tensor
    field: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def reduce_captured(
    ranks: Ranks,
    bank: SubspaceBank,
    parameters: Sequence[Tensor],
    layers: Mapping[Tensor, Layer],
    gradients: Gradients,
    agreement: Agreement,
) -> None:
    """Replace what this rank has captured by the gradient of all ranks' samples: G_k = sum_r (n_k^r / N_k) G_k^r.

    Projections and sketches are linear in the gradient, and all ranks have the same bases and the same Omega: so their
    sums are those of the gradient of the whole batch, r x n numbers a layer instead of m x n. All of them go in one
    flat bucket for each dtype and device.

    Args:
        bank: tells what is due, and so what the others have captured.
        gradients: by task; replaced.
        agreement: who has what.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[_Piece]] = {}
    for task, places in agreement.present.items():
        for place in places:
            for piece in _pieces(bank, parameters[place], layers.get(parameters[place]), task):
                kinds.setdefault((piece.dtype, piece.parameter.device), []).append(piece)
    buckets = []
    for (dtype, device), pieces in kinds.items():
        flat = torch.zeros(sum(piece.numel for piece in pieces), dtype=dtype, device=device)
        views = torch.split(flat, [piece.numel for piece in pieces])
        for piece, view in zip(pieces, views, strict=True):
            held = gradients.get(piece.task, {}).get(piece.parameter)
            if held is not None:
                found = getattr(held, piece.field)
                torch.mul(found.reshape(-1), agreement.weights.get(piece.task, 0.0), out=view)
                setattr(held, piece.field, None)
        buckets.append((flat, pieces, views))
    ranks.sum_(flat for flat, _, _ in buckets)
    for held_by_task in gradients.values():
        for parameter in parameters:
            held_by_task.pop(parameter, None)
    for _, pieces, views in buckets:
        for piece, view in zip(pieces, views, strict=True):
            held = gradients.setdefault(piece.task, {}).setdefault(piece.parameter, Captured())
            setattr(held, piece.field, view.view(piece.shape))


def _pieces(bank: SubspaceBank, parameter: Tensor, layer: Layer | None, task: int) -> list[_Piece]:
    """What a capture holds of a parameter in this step; the other ranks know it without being told."""
    if layer is None:
        return [_Piece(task, parameter, "full", tuple(parameter.shape), parameter.dtype)]
    full, sketch = bank.demand(layer, task)
    if full:
        return [_Piece(task, parameter, "full", layer.shape, layer.dtype)]
    shape = list(layer.coordinates(SHARED))
    shape[layer.axis] += layer.widths[task + 1]
    pieces = [_Piece(task, parameter, "projected", tuple(shape), layer.dtype)]
    if sketch:
        pieces.append(_Piece(task, parameter, "sketch", (layer.dimension, layer.sketch_size), layer.dtype))
    return pieces


def complete_sharded(layers: Mapping[Tensor, Layer], gradients: Gradients) -> None:
    """Sum what each rank could only compute of its own rows of a weight: sketches, norms, coordinates along axis 0.

    The gradient itself is that of all ranks' data already: ``fully_shard`` has averaged it.
    """
    if all(layer.shards is None for layer in layers.values()):
        return
    parts: list[Tensor] = []
    shards = None
    for _, held in sorted(gradients.items()):
        for parameter, captured in held.items():
            layer = layers.get(parameter)
            if layer is None or layer.shards is None or layer.shards.group is None:
                continue
            shards = layer.shards
            whole = [] if layer.splits_coordinates else [captured.projected]
            parts += [part for part in (captured.sketch, captured.squared_norm, *whole) if part is not None]
    if shards is not None:
        _sum_flat(parts, shards.sum_)


def _sum_flat(tensors: Sequence[Tensor], sum_: Callable[[Iterable[Tensor]], None]) -> None:
    """Replace tensors by their sums over ranks, all of one dtype and device in one message."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    flats = [torch.cat([tensor.reshape(-1) for tensor in alike]) for alike in kinds.values()]
    sum_(flats)
    for flat, alike in zip(flats, kinds.values(), strict=True):
        for tensor, view in zip(alike, torch.split(flat, [each.numel() for each in alike]), strict=True):
            tensor.copy_(view.view(tensor.shape))


def merge_plain(
    gradients: Gradients, parameters: Sequence[Tensor], layers: Mapping[Tensor, Layer], agreement: Agreement
) -> Agreement:
    """Bring the tasks' gradients of parameters without subspaces together before they travel: one instead of K.

    Without a surgery only sum_k w_k G_k of them is used, and what the tasks weigh among all ranks is known by now.

    Returns:
        the agreement on what is left.
    """
    total = sum(agreement.samples.values())
    shares: dict[int, float | Tensor] = {
        task: agreement.weights[task] * count / total for task, count in agreement.samples.items()
    }
    shares[MIXED] = agreement.weights.get(MIXED, 0.0) * agreement.mixed / total if total else 0.0
    plain = {place for place, parameter in enumerate(parameters) if parameter not in layers}
    found: dict[Tensor, dict[int, Tensor]] = {}
    for parameter in (parameters[place] for place in sorted(plain)):
        parts = {
            task: full
            for task in shares
            if (held := gradients.get(task, {}).pop(parameter, None)) is not None and (full := held.full) is not None
        }
        if parts:
            found[parameter] = parts
    mixed = mix(list(found.values()), shares, [None] * len(found))
    for parameter, gradient in zip(found, mixed, strict=True):
        gradients.setdefault(MIXED, {})[parameter] = Captured(full=gradient)
    merged = sorted(plain & set().union(*agreement.present.values()))
    present = {task: [place for place in places if place not in plain] for task, places in agreement.present.items()}
    return replace(
        agreement, mixed=total, weights={**agreement.weights, MIXED: 1.0}, present={**present, MIXED: merged}
    )


def reduce_outside(ranks: Ranks, agreement: Agreement) -> None:
    """Average ``p.grad`` over the ranks, in place, as data parallelism does; a rank without one counts as zero."""
    found = []
    for parameter in agreement.outside:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    _sum_flat(found, ranks.sum_)
    for gradient in found:
        gradient /= ranks.size
