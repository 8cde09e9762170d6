"""What the last step did in every layer: norms, conflicts, energies, angles, gates, protection."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gradsub.linalg import subspace_angles
from gradsub.subspace import Layer, SubspaceBank

__all__ = ["LayerReport", "Measurements", "Report", "make_report"]


@dataclass(frozen=True)
class LayerReport:
    """One layer after one step.

    Attributes:
        name: the layer.
        shape: (m, n) of its weight.
        step: how many steps the layer has taken.
        gradient_norms: task -> ||G_k||, the Frobenius norm of its whole gradient; NaN where that never existed (fused
            capture) and where a task accumulated several backward passes, whose norms do not add up.
        cosines: (task, task) -> cosine of their gradients inside the shared subspace.
        energy: ``"shared"`` and task -> the share in [0, 1] of the gradients' squared norm that the subspace keeps;
            for the shared one over all tasks together; NaN where the norm is.
        angles: (subspace, subspace) -> principal angles in radians, largest first.
        gates: task -> g_k.
        protected_fraction: k / d, the share of directions that no update may use.
    """

    name: str
    shape: tuple[int, int]
    step: int
    gradient_norms: dict[str, float]
    cosines: dict[tuple[str, str], float]
    energy: dict[str, float]
    angles: dict[tuple[str, str], list[float]]
    gates: dict[str, float]
    protected_fraction: float


@dataclass(frozen=True)
class Report:
    """All layers after one step; ``str()`` is a table, `to_dict` is JSON."""

    layers: list[LayerReport]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, pairs of names joined by ``"|"``."""
        return {
            "layers": [
                {
                    key: {"|".join(k) if isinstance(k, tuple) else k: v for k, v in value.items()}
                    if isinstance(value, dict)
                    else value
                    for key, value in asdict(layer).items()
                }
                for layer in self.layers
            ]
        }

    def mean_cosine(self, first: str, second: str) -> float:
        """The mean over the layers of two tasks' cosine; NaN if no layer saw both."""
        found = [layer.cosines[first, second] for layer in self.layers if (first, second) in layer.cosines]
        return sum(found) / len(found) if found else math.nan

    def __str__(self) -> str:
        head = f"{'layer':40} {'step':>6} {'energy':24} {'gates':24} {'cosine':>7} {'protected':>9}"
        rows = [head, "-" * len(head)]
        for layer in self.layers:
            energy = " ".join(f"{name[:6]} {value:.2f}" for name, value in layer.energy.items())
            gates = " ".join(f"{name[:6]} {value:.2f}" for name, value in layer.gates.items())
            cosine = min(layer.cosines.values(), default=math.nan)
            rows.append(
                f"{layer.name[-40:]:40} {layer.step:6d} {energy:24} {gates:24} {cosine:7.3f} "
                f"{layer.protected_fraction:9.1%}"
            )
        return "\n".join(rows)


@dataclass(frozen=True)
class Measurements:
    """What a step leaves for a report, still on the device; L layers that had a gradient, K tasks.

    Attributes:
        layers: those layers.
        gramian: (L, K, K) inner products of the tasks' gradients inside the shared subspace.
        squared_norms: (L, K) of the whole gradients, NaN where unknown.
        own_norms: (L, K) norms inside the tasks' own subspaces.
        gates: (L, K).
        present: (L, K) booleans.
    """

    layers: Sequence[Layer]
    gramian: Tensor
    squared_norms: Tensor
    own_norms: Tensor
    gates: Tensor
    present: Tensor


def make_report(bank: SubspaceBank, tasks: Sequence[str], steps: Sequence[int], measured: Measurements) -> Report:
    """Read the measurements of the last step; waits for the device, so it stays off the hot path."""
    columns = zip(
        measured.layers,
        steps,
        measured.gramian.tolist(),
        measured.squared_norms.tolist(),
        measured.own_norms.tolist(),
        measured.gates.tolist(),
        measured.present.tolist(),
        strict=True,
    )
    reports = {column[0].index: _layer_report(bank, tasks, *column) for column in columns}
    return Report([reports[index] for index in sorted(reports)])


def _layer_report(
    bank: SubspaceBank,
    tasks: Sequence[str],
    layer: Layer,
    step: int,
    gramian: list[list[float]],
    squared_norms: list[float],
    own_norms: list[float],
    gates: list[float],
    present: list[bool],
) -> LayerReport:
    here = [k for k in range(len(tasks)) if present[k]]
    return LayerReport(
        name=layer.name,
        shape=layer.whole_shape,
        step=step,
        gradient_norms={tasks[k]: math.sqrt(squared_norms[k]) for k in here},
        cosines={
            (tasks[a], tasks[b]): _ratio(gramian[a][b], math.sqrt(gramian[a][a] * gramian[b][b]))
            for a, b in itertools.combinations(here, 2)
        },
        energy={
            **(
                {"shared": _share(sum(gramian[k][k] for k in here), sum(squared_norms[k] for k in here))}
                if here
                else {}
            ),
            **{tasks[k]: _share(own_norms[k] ** 2, squared_norms[k]) for k in here},
        },
        angles=_angles(layer, bank, tasks),
        gates={tasks[k]: gates[k] for k in here},
        protected_fraction=1.0 - layer.free / layer.dimension,
    )


def _angles(layer: Layer, bank: SubspaceBank, tasks: Sequence[str]) -> dict[tuple[str, str], list[float]]:
    """Between all pairs of subspaces; a basis that no gradient has reached yet is zero and has none."""
    bases = {}
    for subspace, name in enumerate(("shared", *tasks)):
        basis = bank.basis(layer, subspace)
        used = basis[:, basis.square().sum(0) > 0.5]
        if used.shape[1]:
            bases[name] = used
    with torch.no_grad():
        return {(a, b): subspace_angles(bases[a], bases[b]).tolist() for a, b in itertools.combinations(bases, 2)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _share(part: float, whole: float) -> float:
    """A share of energy: rounding may not push it out of [0, 1]."""
    return min(1.0, _ratio(part, whole)) if whole > 0 else math.nan
