"""What the last step did in every layer: norms, conflicts, energies, angles, gates, protection."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gradsub._optional import optional
from gradsub._table import finite_or_none, table

__all__ = ["LayerReport", "Report"]


@dataclass(frozen=True)
class LayerReport:
    """One layer after one step.

    Attributes:
        name: the layer.
        shape: (m, n) of its weight.
        step: how many steps the layer has taken.
        gradient_norms: task -> ||G_k||, the Frobenius norm of its whole gradient, or an estimate of it (``estimated``).
        cosines: (task, task) -> cosine of their gradients inside the shared subspace; NaN if one is zero there.
        energy: ``"shared"`` and task -> the share in [0, 1] of the gradients' squared norm that the subspace keeps;
            for the shared one over all tasks together; NaN where the norm is zero or unknown.
        angles: (subspace, subspace) -> principal angles in radians, largest first.
        gates: task -> g_k.
        protected_fraction: k / d, the share of directions that no update may use.
        estimated: the tasks whose gradients were never there as a whole in this step (fused capture, or several
            backward passes). In steps that renew a basis from a sketch Y = G Omega their norm is ||Y||, of which the
            square is unbiased. In other steps the share of it that the subspaces held when it was last known stands for
            today's; where that was at an exact refresh, which fits bases to that very gradient, estimated norms are
            rather too small and energies too large. NaN if nothing was ever known, as right after a resume.
        leak: ||K K^T B|| / ||B||: how much of the bases B, in which every update lies, are protected directions K;
            rounding, if all is well. None if nothing is protected or it was not asked for.
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
    estimated: tuple[str, ...] = ()
    leak: float | None = None

    @property
    def size(self) -> int:
        """m n, by which layers count in means over them."""
        return self.shape[0] * self.shape[1]

    @property
    def overlaps(self) -> dict[tuple[str, str], float]:
        """(subspace, subspace) -> mean squared cosine of their principal angles: the share, in [0, 1], of the smaller
        subspace that lies in the other one.
        """
        return {pair: math.fsum(math.cos(angle) ** 2 for angle in a) / len(a) for pair, a in self.angles.items() if a}


@dataclass(frozen=True)
class Report:
    """All layers after one step. ``str()`` is a table; the rest of the world takes one of the ``to_...``, or `scalars`.

    Attributes:
        layers: those that had a gradient.
        tasks: their names, in order.
        losses: task -> its loss in this step, summed over its backward passes; without tasks whose loss was not seen.
        gramian: (task, task) -> inner product of their gradients inside the shared subspaces, summed over the layers;
            of each pair once, and of each task with itself. Without the weights w_k, which a surgery's Gramian has.
    """

    layers: list[LayerReport]
    tasks: tuple[str, ...] = ()
    losses: dict[str, float] = field(default_factory=dict)
    gramian: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The largest number of steps that a layer has taken; 0 without layers."""
        return max((layer.step for layer in self.layers), default=0)

    def cosine(self, first: str, second: str) -> float:
        """The cosine of two tasks' gradients inside the shared subspaces, all layers taken as one vector; NaN if one is
        zero or absent.
        """
        product = self.gramian.get((first, second), self.gramian.get((second, first), math.nan))
        squares = (self.gramian.get((name, name), math.nan) for name in (first, second))
        return ratio(product, math.prod(math.sqrt(square) for square in squares))

    def mean_cosine(self, first: str, second: str) -> float:
        """The mean over the layers of two tasks' cosine, in either order; NaN if no layer saw both."""
        pairs = ((first, second), (second, first))
        found = [layer.cosines[pair] for layer in self.layers for pair in pairs if pair in layer.cosines]
        found = [cosine for cosine in found if cosine == cosine]
        return math.fsum(found) / len(found) if found else math.nan

    def scalars(self) -> dict[str, float]:
        """The step in a few numbers, for a logger: flat names, and no entry for what is unknown.

        | name | number |
        |---|---|
        | ``loss/<task>`` | the task's loss |
        | ``norm/<task>`` | norm of its gradient over all layers: the root of the sum of squares |
        | ``cosine/<a>\\|<b>`` | `cosine`: layers count by the sizes of their gradients, as in a surgery |
        | ``energy/shared``, ``energy/<task>`` | kept squared norm of all layers, over squared norm of all layers |
        | ``gate/<task>`` | mean gate |
        | ``overlap/<a>\\|<b>`` | mean overlap of two subspaces, ``shared`` or a task's |
        | ``protected`` | mean protected share of directions |
        | ``leak`` | the largest leak of a layer |

        Means are over the layers that have the number, weighted by the sizes m n of their weights. Norms and energies
        of layers whose gradients never exist as a whole are estimates, see `LayerReport`.
        """
        found = {f"loss/{task}": loss for task, loss in self.losses.items()}
        for task in self.tasks:
            norms = [layer.gradient_norms[task] for layer in self.layers if task in layer.gradient_norms]
            found[f"norm/{task}"] = math.hypot(*norms) if norms else math.nan
        pairs = [pair for pair in self.gramian if pair[0] != pair[1]]
        found.update({f"cosine/{'|'.join(pair)}": self.cosine(*pair) for pair in pairs})
        found.update({f"energy/{name}": self._energy(name) for name in ("shared", *self.tasks)})
        found.update(self._means("gate", lambda layer: layer.gates))
        found.update(self._means("overlap", lambda layer: layer.overlaps))
        found.update(self._means("", lambda layer: {"protected": layer.protected_fraction}))
        leaks = [layer.leak for layer in self.layers if layer.leak is not None and layer.leak == layer.leak]
        found["leak"] = max(leaks) if leaks else math.nan
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _energy(self, name: str) -> float:
        """What a kind of subspace keeps of the gradients of all layers together."""
        kept, whole = [], []
        largest = max((n for layer in self.layers for n in layer.gradient_norms.values() if n == n), default=0.0)
        for layer in self.layers:
            norms = [n / largest for task, n in layer.gradient_norms.items() if name in ("shared", task) and largest]
            square, energy = math.fsum(n * n for n in norms), layer.energy.get(name, math.nan)
            if energy * square == energy * square:
                kept.append(energy * square)
                whole.append(square)
        return ratio(math.fsum(kept), math.fsum(whole))

    def _means(self, prefix: str, values: Callable[[LayerReport], Mapping[Any, float]]) -> dict[str, float]:
        """By name, means over the layers that have a number, weighted by their sizes."""
        sums: dict[str, list[tuple[float, int]]] = {}
        for layer in self.layers:
            for key, value in values(layer).items():
                if math.isfinite(value):
                    sums.setdefault("/".join(filter(None, (prefix, _flat_name(key)))), []).append((value, layer.size))
        return {
            name: math.fsum(value * size for value, size in found) / sum(size for _, size in found)
            for name, found in sums.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, pairs of names joined by ``"|"``; None where a number is unknown."""
        found = {
            "tasks": list(self.tasks),
            "losses": dict(self.losses),
            "gramian": _by_name(self.gramian),
            "layers": [{key: _by_name(value) for key, value in asdict(layer).items()} for layer in self.layers],
        }
        return {key: finite_or_none(value) for key, value in found.items()}

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON, in the strict sense, which has no NaN.

        Args:
            options: of ``json.dumps``, such as ``indent``.
        """
        return json.dumps(self.to_dict(), allow_nan=False, **options)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row a layer and the columns of `scalars`, besides name, shape and step.

        ``angle/<a>|<b>`` is the smallest principal angle of two subspaces, in radians; ``estimated`` names the tasks
        whose norm and energy are estimates.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = optional("pandas", "pandas", "Report.to_pandas()")
        return pandas.DataFrame([_row(layer) for layer in self.layers])

    def __str__(self) -> str:
        head = ("layer", "shape", "step", "gradient norm", "energy", "gates", "cosine", "protected", "leak")
        # What holds for all comes first: a model of many layers fills more than a screen.
        rows = [self._totals()] if self.layers else []
        rows += [_cells(layer) for layer in self.layers]
        return table(head, rows, (False, False, True, False, False, False, True, True, True))

    def _totals(self) -> tuple[str, ...]:
        found = self.scalars()

        def named(kind: str) -> dict[str, float]:
            return {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{kind}/")}

        cosines = named("cosine").values()
        return (
            f"all {len(self.layers)} layers",
            "",
            str(self.step),
            _listed(named("norm"), "{:.1e}", any(layer.estimated for layer in self.layers)),
            _listed(named("energy"), "{:.2f}", any(layer.estimated for layer in self.layers)),
            _listed(named("gate"), "{:.2f}"),
            f"{min(cosines):.3f}" if cosines else "",
            f"{found['protected']:.1%}",
            f"{found['leak']:.0e}" if "leak" in found else "",
        )


def _cells(layer: LayerReport) -> tuple[str, ...]:
    cosines = [cosine for cosine in layer.cosines.values() if cosine == cosine]
    return (
        layer.name,
        " x ".join(map(str, layer.shape)),
        str(layer.step),
        _listed(layer.gradient_norms, "{:.1e}", bool(layer.estimated)),
        _listed(layer.energy, "{:.2f}", bool(layer.estimated)),
        _listed(layer.gates, "{:.2f}"),
        f"{min(cosines):.3f}" if cosines else "",
        f"{layer.protected_fraction:.1%}",
        "" if layer.leak is None else f"{layer.leak:.0e}",
    )


def _listed(values: Mapping[str, float], form: str, estimated: bool = False) -> str:
    known = {name: value for name, value in values.items() if value == value}
    return " ".join(f"{name} {'~' if estimated else ''}{form.format(value)}" for name, value in known.items())


def _row(layer: LayerReport) -> dict[str, Any]:
    """A layer in flat columns."""
    row: dict[str, Any] = {
        "layer": layer.name,
        "rows": layer.shape[0],
        "columns": layer.shape[1],
        "step": layer.step,
        "protected": layer.protected_fraction,
        "leak": math.nan if layer.leak is None else layer.leak,
        "estimated": " ".join(layer.estimated),
    }
    smallest = {pair: min(angles) for pair, angles in layer.angles.items() if angles}
    kinds: Iterable[tuple[str, Mapping[Any, float]]] = (
        ("norm", layer.gradient_norms),
        ("cosine", layer.cosines),
        ("energy", layer.energy),
        ("gate", layer.gates),
        ("overlap", layer.overlaps),
        ("angle", smallest),
    )
    row.update({f"{kind}/{_flat_name(key)}": value for kind, values in kinds for key, value in values.items()})
    return row


def _by_name(value: Any) -> Any:
    return {_flat_name(key): each for key, each in value.items()} if isinstance(value, dict) else value


def _flat_name(key: str | tuple[str, ...]) -> str:
    return "|".join(key) if isinstance(key, tuple) else key


def ratio(part: float, whole: float) -> float:
    """NaN where there is nothing."""
    return part / whole if whole > 0 else math.nan
