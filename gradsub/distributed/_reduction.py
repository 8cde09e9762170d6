from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradsub.capture import MIXED, Captured, Held, mix
from gradsub.distributed._agreement import Agreement
from gradsub.distributed._ranks import Ranks
from gradsub.subspace import SHARED, Block, Layer, SubspaceBank

Gradients = MutableMapping[int, dict[Tensor, Captured]]


@dataclass(frozen=True)
class _Piece:
    """One tensor of what was captured of a task: its place is the same in every rank's bucket.

    Attributes:
        task: its index.
        of: a parameter, or a block of which all layers' projected gradients are wanted and nothing else.
        field: of the `Captured` of a parameter.
    """

    task: int
    of: Tensor | Block
    field: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def put(self, held: Held, weight: float, place: Tensor) -> None:
        """Write this rank's part into zeros."""
        mine = held.single.get(self.task, {})
        if isinstance(self.of, Block):
            stack = dict(held.stacks(self.task)).get(self.of)
            if stack is not None:
                torch.mul(stack, weight, out=place)
                return
            for layer, row in zip(self.of.layers, place.unbind(), strict=True):
                if (captured := mine.get(layer.parameter)) is not None:
                    projected = captured.projected
                    assert projected is not None  # since nothing is due
                    torch.mul(projected.mT if layer.axis == 1 else projected, weight, out=row)
        elif (captured := mine.get(self.of)) is not None:
            torch.mul(getattr(captured, self.field), weight, out=place)

    def take(self, held: Held, summed: Tensor) -> None:
        """Give the sum over the ranks back."""
        if isinstance(self.of, Block):
            held.add_stack(self.task, self.of, summed)
        else:
            captured = held.single.setdefault(self.task, {}).setdefault(self.of, Captured())
            setattr(captured, self.field, summed)


def reduce_captured(
    ranks: Ranks,
    bank: SubspaceBank,
    parameters: Sequence[Tensor],
    layers: Mapping[Tensor, Layer],
    held: Held,
    agreement: Agreement,
) -> None:
    """Replace what this rank has captured by the gradient of all ranks' samples: G_k = sum_r (n_k^r / N_k) G_k^r.

    Projections and sketches are linear in the gradient, and all ranks have the same bases and the same Omega: so their
    sums are those of the gradient of the whole batch, r x n numbers a layer instead of m x n. All of them go in one
    flat bucket for each dtype and device.

    Args:
        bank: tells what is due, and so what the others have captured.
        held: what this rank has captured; replaced.
        agreement: who has what.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[_Piece]] = {}
    every = list(_pieces(bank, parameters, layers, agreement))
    held.by_parameter(keep={(piece.task, piece.of) for piece in every if isinstance(piece.of, Block)})
    for piece in every:
        kinds.setdefault((piece.dtype, piece.device), []).append(piece)
    buckets = []
    for (dtype, device), pieces in kinds.items():
        flat = torch.zeros(sum(piece.numel for piece in pieces), dtype=dtype, device=device)
        parts = torch.split(flat, [piece.numel for piece in pieces])
        views = [part.view(piece.shape) for piece, part in zip(pieces, parts, strict=True)]
        for piece, view in zip(pieces, views, strict=True):
            piece.put(held, agreement.weights.get(piece.task, 0.0), view)
        buckets.append((flat, pieces, views))
    held.drop(parameters)
    ranks.sum_(flat for flat, _, _ in buckets)
    for _, pieces, views in buckets:
        for piece, view in zip(pieces, views, strict=True):
            piece.take(held, view)


def _pieces(
    bank: SubspaceBank, parameters: Sequence[Tensor], layers: Mapping[Tensor, Layer], agreement: Agreement
) -> Iterator[_Piece]:
    """What captures hold in this step; the other ranks know it without being told."""
    whole: dict[Block, list[int]] = {}
    for task, places in agreement.present.items():
        blocks: dict[Block, list[Layer]] = {}
        for parameter in (parameters[place] for place in places):
            if (layer := layers.get(parameter)) is not None:
                blocks.setdefault(layer.block, []).append(layer)
            else:
                shape = tuple(parameter.shape)
                yield _Piece(task, parameter, "full", shape, parameter.dtype, parameter.device)
        for block, members in blocks.items():
            if len(members) == len(block) and bank.due_for(block, task) is None:
                whole.setdefault(block, []).append(task)
            else:
                for layer in members:
                    yield from _pieces_of(bank, layer, task)
    # A block's tasks are neighbours: so the step finds them side by side.
    for block, tasks in whole.items():
        for task in tasks:
            first = block.first
            width = first.widths[SHARED] + first.widths[task + 1]
            shape = (len(block), width, first.shape[1 - first.axis])
            yield _Piece(task, block, "", shape, first.dtype, block.device)


def _pieces_of(bank: SubspaceBank, layer: Layer, task: int) -> Iterator[_Piece]:
    parameter = layer.parameter
    full, sketch = bank.demand(layer, task)
    if full:
        yield _Piece(task, parameter, "full", layer.shape, layer.dtype, parameter.device)
        return
    rows, columns = layer.coordinates(SHARED)
    own = layer.widths[task + 1]
    shape = (rows, columns + own) if layer.axis == 1 else (rows + own, columns)
    yield _Piece(task, parameter, "projected", shape, layer.dtype, parameter.device)
    if sketch:
        shape = (layer.dimension, layer.sketch_size)
        yield _Piece(task, parameter, "sketch", shape, layer.dtype, parameter.device)


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
