"""From what a step left on the device to a `Report`; nothing of it happens before one is asked for."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsub.linalg import subspace_angles
from gradsub.report import LayerReport, Report, ratio
from gradsub.subspace import Block, Layer


@dataclass(frozen=True)
class Measurements:
    """What a step leaves for a report, still on the device; L layers that had a gradient, K tasks.

    Attributes:
        layers: those layers.
        steps: how many each had taken before, in order, a part for each block.
        losses: (K,) NaN where none was seen.
        gramian: (L, K, K) inner products of the tasks' gradients inside the shared subspace.
        squared_norms: (L, K) of the whole gradients, NaN where unknown.
        sketched: of which layers and tasks that is the norm of a sketch.
        own_norms: (L, K) norms inside the tasks' own subspaces.
        gates: (L, K).
        present: (L, K) booleans.
        informed: the indices of the first layers of the blocks of which some norm is known.
    """

    layers: Sequence[Layer]
    steps: Sequence[Any]
    losses: Tensor
    gramian: Tensor
    squared_norms: Tensor
    sketched: frozenset[tuple[int, int]]
    own_norms: Tensor
    gates: Tensor
    present: Tensor
    informed: Sequence[int]


class LastKnown:
    """By block, the last measurements in which the norm of a whole gradient was known.

    Blocks are known by the index of their first layer, which stays where a block is split: the block itself would stay
    in memory.
    """

    def __init__(self) -> None:
        self._found: dict[int, Measurements] = {}
        self._count = 0
        self._when: dict[int, int] = {}

    def see(self, measured: Measurements | None) -> None:
        """Take notice of a step."""
        if measured is not None:
            self._count += 1
            for first in measured.informed:
                self._found[first], self._when[first] = measured, self._count

    def shares(self) -> dict[tuple[int, int], float]:
        """(index of a layer, task) -> what `_held` gave for one unit of the squared norm."""
        found: dict[tuple[int, int], float] = {}
        for first in sorted(self._found, key=self._when.__getitem__):
            measured = self._found[first]
            shares = (_held(measured) / measured.squared_norms).tolist()
            for layer, of_layer in zip(measured.layers, shares, strict=True):
                found.update({(layer.index, k): share for k, share in enumerate(of_layer) if 0 < share < math.inf})
        return found


def _held(measured: Measurements) -> Tensor:
    """Of each task's squared norm in a layer (L, K), what the shared and its own subspace hold, added up."""
    own = measured.own_norms.to(measured.squared_norms).square()
    return own + measured.gramian.diagonal(dim1=1, dim2=2).to(own)


def make_report(tasks: Sequence[str], measured: Measurements, known: LastKnown, angles: bool, leak: bool) -> Report:
    """Read the measurements of the last step; waits for the device."""
    gramians, norms = measured.gramian.tolist(), measured.squared_norms.tolist()
    columns = (measured.own_norms.tolist(), measured.gates.tolist(), measured.present.tolist())
    steps = [int(step) + 1 for part in measured.steps for step in part]
    shares = known.shares() if any(square != square for of_layer in norms for square in of_layer) else {}
    held = _held(measured).tolist()
    between = _angles(measured.layers, ("shared", *tasks)) if angles else {}
    reports = {}
    for row, (layer, own, gates, present) in enumerate(zip(measured.layers, *columns, strict=True)):
        here = [k for k in range(len(tasks)) if present[k]]
        squares, estimated = {}, []
        for k in here:
            squares[k] = norms[row][k]
            if squares[k] != squares[k]:
                estimate = ratio(held[row][k], shares.get((layer.index, k), 0.0))
                # No subspace holds more than there is.
                squares[k] = max(estimate, own[k] ** 2, gramians[row][k][k]) if estimate == estimate else estimate
            elif (row, k) not in measured.sketched:
                continue
            estimated.append(tasks[k])
        gramian = gramians[row]
        reports[layer.index] = LayerReport(
            name=layer.name,
            shape=layer.whole_shape,
            step=steps[row],
            gradient_norms={tasks[k]: math.sqrt(squares[k]) for k in here},
            cosines={
                (tasks[a], tasks[b]): ratio(gramian[a][b], math.sqrt(gramian[a][a]) * math.sqrt(gramian[b][b]))
                for a, b in itertools.combinations(here, 2)
            },
            energy=_energies(tasks, here, gramian, own, squares),
            angles=between.get(layer.index, {}),
            gates={tasks[k]: gates[k] for k in here},
            protected_fraction=1.0 - layer.free / layer.dimension,
            estimated=tuple(estimated),
            leak=_leak(layer) if leak else None,
        )
    losses = dict(zip(tasks, measured.losses.tolist(), strict=True))
    total = measured.gramian.sum(0).tolist()
    seen = [k for k, here in enumerate(measured.present.any(0).tolist()) if here]
    return Report(
        [reports[index] for index in sorted(reports)],
        tuple(tasks),
        {task: loss for task, loss in losses.items() if loss == loss},
        {(tasks[a], tasks[b]): total[a][b] for a, b in itertools.combinations_with_replacement(seen, 2)},
    )


def _energies(
    tasks: Sequence[str], here: Sequence[int], gramian: list[list[float]], own: list[float], squares: dict[int, float]
) -> dict[str, float]:
    if not here:
        return {}
    shared = _share(math.fsum(gramian[k][k] for k in here), math.fsum(squares.values()))
    return {"shared": shared, **{tasks[k]: _share(own[k] ** 2, squares[k]) for k in here}}


def _angles(layers: Sequence[Layer], names: Sequence[str]) -> dict[int, dict[tuple[str, str], list[float]]]:
    """By layer, between all pairs of subspaces; a basis that no gradient has reached yet is zero and has none."""
    blocks: dict[Block, list[Layer]] = defaultdict(list)
    for layer in layers:
        blocks[layer.block].append(layer)
    found: dict[int, dict[tuple[str, str], list[float]]] = defaultdict(dict)
    for block, members in blocks.items():
        used = (block.stacks["basis"].square().sum(1) > 0.5).cpu()
        alike: dict[tuple[bool, ...], list[Layer]] = defaultdict(list)
        for layer in members:
            alike[tuple(used[layer.row].tolist())].append(layer)
        for columns, some in alike.items():
            bases = {}
            for subspace, name in enumerate(names):
                part = block.first.columns(subspace)
                kept = [place for place, here in enumerate(columns[part]) if here]
                if kept:
                    basis = block.basis(subspace, [layer.row for layer in some])
                    bases[name] = basis if len(kept) == basis.shape[2] else basis[:, :, kept]
            for a, b in itertools.combinations(bases, 2):
                with torch.no_grad():
                    angles = subspace_angles(bases[a], bases[b]).tolist()
                for layer, its in zip(some, angles, strict=True):
                    found[layer.index][a, b] = its
    return found


def _leak(layer: Layer) -> float | None:
    """How much of a layer's bases lies in what is protected; None if nothing is."""
    if layer.protected is None:
        return None
    with torch.no_grad():
        basis = layer.block.stacks["basis"][layer.row]
        protected = layer.protected.to(basis.device)
        inside = torch.linalg.matrix_norm(basis - protected.leaves(basis))
        return ratio(float(inside), float(torch.linalg.matrix_norm(basis)))


def _share(part: float, whole: float) -> float:
    """A share of energy: rounding, or an estimate, may not push it out of [0, 1]."""
    return min(1.0, part / whole) if whole > 0 else math.nan
