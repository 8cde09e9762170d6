from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsub._rounding import drop_rounding
from gradsub.capture._captured import Captured, squared_norm
from gradsub.capture._tray import side_by_side, tasks_side_by_side
from gradsub.subspace import SHARED, Block, Rows, SubspaceBank, pieces, project


@dataclass(frozen=True)
class Stacked:
    """A block's gradients in the coordinates of the shared and of their task's own subspace.

    Attributes:
        R: of each layer the K present tasks' (L x K x m x (r + r_k)), without what is only rounding.
        unit: a number of the order of each of them (L x K x 1 x 1); NaN or Inf where an entry of it is.
        squared_norms: (L x K) of the whole gradients, NaN where unknown; None if none is known.
        shared: what of R lies in the shared subspace, a view.
        own: what lies in the tasks' own.
    """

    R: Tensor
    unit: Tensor
    squared_norms: Tensor | None
    shared: Tensor
    own: Tensor


@dataclass
class Gathered:
    """What a capture left of a block, before anything is changed.

    Attributes:
        block: L layers.
        tasks: those whose gradients were captured.
        captured: by task, of each layer; nothing of what came as a stack.
        outside: the gradients of backward passes outside any task, which belong to the shared subspace alone.
        joint: of captured gradients, if all of them are projected already.
    """

    block: Block
    tasks: Sequence[int]
    captured: Mapping[int, Sequence[Captured]]
    outside: Sequence[Tensor | None]
    joint: Stacked | None


def gather_block(
    block: Block, captured: Mapping[int, Sequence[Captured]], outside: Sequence[Tensor | None], rounding: float
) -> Gathered:
    """Lay what a capture has projected side by side.

    Args:
        block: the layers.
        captured: by task, what the capture left of each layer.
        outside: what autograd left of each layer.
        rounding: epsilon of the coarsest format in which a gradient was computed.
    """
    ready = bool(captured) and all(each.projected is not None for held in captured.values() for each in held)
    return Gathered(block, list(captured), captured, outside, _joint(block, captured, rounding) if ready else None)


def gather_stacks(
    block: Block, stacks: Mapping[int, Tensor], outside: Sequence[Tensor | None], rounding: float
) -> Gathered:
    """The same of what came as stacks.

    Args:
        block: L layers.
        stacks: by task (L x r x m).
        outside: what autograd left of each layer.
        rounding: epsilon of the coarsest format in which a gradient was computed.
    """
    R = tasks_side_by_side(list(stacks.values()), block.first.axis)
    return Gathered(block, list(stacks), {}, outside, _without_rounding(block, R, rounding, None, None))


def _joint(block: Block, captured: Mapping[int, Sequence[Captured]], rounding: float) -> Stacked:
    projected = [[each.projected for each in held if each.projected is not None] for held in captured.values()]
    R = side_by_side(projected)
    norms = [each.squared_norm for of_layer in zip(*captured.values(), strict=True) for each in of_layer]
    squared_norms = _norms(norms, len(projected))
    known = all(each is not None for each in norms)
    return _without_rounding(block, R, rounding, squared_norms, squared_norms if known else None)


def _without_rounding(
    block: Block, R: Tensor, rounding: float, squared_norms: Tensor | None, all_known: Tensor | None
) -> Stacked:
    first = block.first
    unit = drop_rounding(R, first, rounding, all_known)
    axis, width = 2 + first.axis, first.widths[SHARED]
    return Stacked(R, unit, squared_norms, *torch.split(R, [width, R.shape[axis] - width], axis))


@dataclass
class Projected:
    """A block's gradients in the coordinates of its subspaces.

    Attributes:
        block: L layers.
        parts: each present task's gradients in the shared subspaces (L x m x r).
        outside: what came from no task, in the shared subspaces, likewise, or None.
        own: R_k in each present task's own subspaces (L x m x r_k).
        squared_norms: each present task's squared norms of the whole gradients (L,), NaN where unknown; without a task
            of which none is known.
        sketches: by subspace, what bases are to be renewed from after the step.
        joint: what of `Stacked` the parts and R_k are views of, or None without a task.
    """

    block: Block
    parts: dict[int, Tensor]
    outside: Tensor | None
    own: dict[int, Tensor]
    squared_norms: dict[int, Tensor]
    sketches: dict[int, Rows] = field(default_factory=dict)
    joint: Stacked | None = None


def project_block(
    gathered: Gathered, bank: SubspaceBank, weights: Mapping[int, float | Tensor], update_proj_gap: int, rounding: float
) -> Projected:
    """Refresh the bases that are due, and project what still has to be projected.

    Args:
        gathered: the layers and their gradients, which are freed on the way.
        bank: their bases.
        weights: w_k, each task's share of the samples.
        update_proj_gap: steps between refreshes.
        rounding: epsilon of the coarsest format in which a gradient was computed.
    """
    block, captured, joint = gathered.block, gathered.captured, gathered.joint
    first = block.first
    matrices = [
        None if each is None else layer.matrix(each).to(layer.dtype)
        for layer, each in zip(block.layers, gathered.outside, strict=True)
    ]
    stacked = bool(gathered.tasks) and not captured
    sketches = _sketches(block, bank, captured, matrices, weights) if first.sketched and not stacked else {}
    if joint is None:
        _project_whole(block, bank, captured, matrices, weights, update_proj_gap)
    aside = _aside(block, bank, matrices)
    if aside is not None:
        drop_rounding(aside, first, rounding, None)
    if not gathered.tasks:
        return Projected(block, {}, aside, {}, {}, sketches)
    joint = _joint(block, captured, rounding) if joint is None else joint
    for held in captured.values():
        for each in held:
            each.projected = each.sketch = None
    norms = joint.squared_norms
    tasks = gathered.tasks
    squared_norms = {} if norms is None else dict(zip(tasks, norms.unbind(1), strict=True))
    parts = dict(zip(tasks, joint.shared.unbind(1), strict=True))
    own = dict(zip(tasks, joint.own.unbind(1), strict=True))
    return Projected(block, parts, aside, own, squared_norms, sketches, joint)


def _norms(found: Sequence[Tensor | None], tasks: int) -> Tensor | None:
    """The squared norms of all whole gradients (L x K), NaN where unknown; None if none is known."""
    like = next((each for each in found if each is not None), None)
    if like is None:
        return None
    unknown = like.new_full((), math.nan)
    return torch.stack([unknown if each is None else each for each in found]).view(-1, tasks)


def _project_whole(
    block: Block,
    bank: SubspaceBank,
    captured: Mapping[int, Sequence[Captured]],
    outside: Sequence[Tensor | None],
    weights: Mapping[int, float | Tensor],
    update_proj_gap: int,
) -> None:
    """Layers of which whole gradients were captured: their bases are refreshed, and the gradients projected."""
    kinds: dict[tuple[tuple[int, ...], bool], list[int]] = defaultdict(list)
    alone_due = [not block.first.sketched and due for due in bank.due(block)[:, SHARED]]
    for row in range(len(block)):
        whole = tuple(task for task, found in captured.items() if found[row].full is not None)
        if whole or (alone_due[row] and not captured and outside[row] is not None):
            kinds[whole, outside[row] is None].append(row)
    first = block.first
    for (whole, alone), members in kinds.items():
        for rows in pieces(members, first.shape[0] * first.shape[1], block.device):
            gradients: dict[int, Tensor] = {}
            for task in whole:
                held = [captured[task][row] for row in rows]
                gradients[task + 1] = torch.stack([one.full for one in held if one.full is not None]).to(first.dtype)
                for one in held:
                    one.full = None
            if len(whole) == len(captured):
                aside = None if alone else torch.stack([each for row in rows if (each := outside[row]) is not None])
                gradients[SHARED] = _mixed({task: gradients[task + 1] for task in whole}, weights, aside)
            bank.refresh(block, rows, gradients, update_proj_gap)
            for task in whole:
                gradient = gradients[task + 1]
                bases = block.joint(task, first.dtype)
                projected = project(gradient, bases if len(rows) == len(block) else bases[list(rows)], first.axis)
                squares = squared_norm(gradient, dim=(1, 2))
                for row, R, square in zip(rows, projected.unbind(), squares.unbind(), strict=True):
                    captured[task][row].projected = R
                    if captured[task][row].squared_norm is None:
                        captured[task][row].squared_norm = square


def _aside(block: Block, bank: SubspaceBank, outside: Sequence[Tensor | None]) -> Tensor | None:
    """What came from outside any task, in the shared subspaces (L x m x r); zero where nothing did."""
    if all(each is None for each in outside):
        return None
    found = []
    for layer, each in zip(block.layers, outside, strict=True):
        if each is None:
            found.append(layer.block.stacks["basis"].new_zeros(layer.coordinates(SHARED)))
        else:
            found.append(layer.total(layer.project(each, bank.basis(layer, SHARED))))
    return _stack(found)


def _sketches(
    block: Block,
    bank: SubspaceBank,
    captured: Mapping[int, Sequence[Captured]],
    outside: Sequence[Tensor | None],
    weights: Mapping[int, float | Tensor],
) -> dict[int, Rows]:
    """The sketch of the shared gradient is that of its parts, mixed; only what is due is there."""
    due = bank.due(block)
    found: dict[int, Rows] = {}
    for task, held in captured.items():
        there = [row for row, each in enumerate(held) if each.sketch is not None]
        if there:
            found[task + 1] = there, torch.stack([each.sketch for each in held if each.sketch is not None])
    rows = [
        row
        for row in range(len(block))
        if due[row, SHARED]
        and (captured or outside[row] is not None)
        and all(held[row].sketch is not None for held in captured.values())
    ]
    if rows:
        chosen = {
            task: Y if len(every) == len(rows) else Y[[every.index(row) for row in rows]]
            for task in captured
            for every, Y in (found[task + 1],)
        }
        found[SHARED] = rows, _mixed(chosen, weights, _sketched_aside(block, bank, rows, outside))
    return found


def _sketched_aside(
    block: Block, bank: SubspaceBank, rows: Sequence[int], outside: Sequence[Tensor | None]
) -> Tensor | None:
    if all(outside[row] is None for row in rows):
        return None
    found = []
    for row in rows:
        layer, each = block.layers[row], outside[row]
        if each is None:
            found.append(block.stacks["basis"].new_zeros(layer.dimension, layer.sketch_size))
            continue
        found.append(layer.sketch(each, bank.directions(layer)))
        if layer.shards is not None:
            layer.shards.sum_([found[-1]])
    return torch.stack(found)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    # Contiguous in any case: torch's fused optimizers read a gradient's memory as if it were, and say nothing.
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack(list(tensors))


def _mixed(parts: Mapping[int, Tensor], weights: Mapping[int, float | Tensor], outside: Tensor | None) -> Tensor:
    return mix([parts], weights, [outside])[0]


def mix(
    parts: Sequence[Mapping[int, Tensor]], weights: Mapping[int, float | Tensor], outside: Sequence[Tensor | None]
) -> list[Tensor]:
    """Shared gradients: of each sum_k w_k G_k, and what came from no task; all in a few operations.

    Args:
        parts: of each, G_k by task.
        weights: w_k.
        outside: of each, what came from no task.
    """
    found: list[Tensor | None] = list(outside)
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    for place, of_one in enumerate(parts):
        # No operation takes tensors that lie on different meshes of ranks.
        meshes = [getattr(part, "device_mesh", None) for part in of_one.values()]
        kinds[tuple(of_one), tuple(map(id, meshes))].append(place)
    for places in kinds.values():
        totals: list[Tensor] = []
        for task in parts[places[0]]:
            added, weight = [parts[place][task] for place in places], weights[task]
            if isinstance(weight, Tensor):
                totals = totals or [torch.zeros_like(part) for part in added]
                for total, part in zip(totals, added, strict=True):
                    total.addcmul_(part, weight.to(part))
            elif totals:
                torch._foreach_add_(totals, added, alpha=weight)
            else:
                totals = list(torch._foreach_mul(added, weight))
        for place, total in zip(places, totals, strict=False):
            aside = outside[place]
            found[place] = total if aside is None else total + aside
    assert all(each is not None for each in found)
    return [each for each in found if each is not None]
