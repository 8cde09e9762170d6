"""What will be trained how, before a step is taken: layers, ranks, protection, memory, and what is left out and why."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from gradsub._optional import optional
from gradsub._table import megabytes, table

__all__ = ["ParameterSummary", "Summary"]


@dataclass(frozen=True)
class ParameterSummary:
    """One parameter of the optimizer.

    Attributes:
        name: of the layer, or of the parameter where it is none.
        shape: of the parameter; of a decomposed one, (m, n) of the matrix.
        ranks: columns of the shared basis and of each task's; empty if it is not decomposed.
        capture: ``"fused"``: the layer's own backward pass computes projected gradients; ``"generic"``: autograd's
            gradient of it is taken; ``"none"``: it is frozen.
        refresh: where its bases come from: ``"sketch"`` or ``"svd"``; empty if it is not decomposed.
        protected_fraction: the share of directions that no update may use.
        state: bytes on its device between steps, as in a checkpoint: bases, moments, counts, float32 copies of the
            weight.
        host: bytes in the host's memory: its protected directions; layers with the same input share theirs.
        transient: bytes that a step holds besides: the bases side by side, projected gradients, and in steps of a
            refresh sketches or whole gradients; of other parameters, the tasks' gradients.
        not_decomposed: why it has no subspaces; None if it has.
        not_protected: why its updates may go anywhere, or what its layer computes may change all the same; None if
            they may not, if it is frozen, and if there is no null space.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    capture: str
    refresh: str
    protected_fraction: float
    state: int
    host: int
    transient: int
    not_decomposed: str | None = None
    not_protected: str | None = None

    @property
    def numel(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Summary:
    """All parameters of an optimizer. ``str()`` is a table in which parameters that differ in a number share a line.

    Attributes:
        tasks: their names.
        side: which side of the weights the bases span.
        parameters: in the order of the parameter groups.
        null_space: whether there is one.
        host: bytes in the host's memory, of which layers with the same input have one copy.
        notes: what concerns no parameter of the optimizer: layers of ``target_modules`` that it does not have, layers
            that the null space knows and that move all the same.
    """

    tasks: tuple[str, ...]
    side: str
    parameters: list[ParameterSummary]
    null_space: bool
    host: int
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> list[ParameterSummary]:
        """Those that are decomposed."""
        return [parameter for parameter in self.parameters if parameter.ranks]

    @property
    def not_decomposed(self) -> dict[str, str]:
        """Name -> why."""
        return {p.name: p.not_decomposed for p in self.parameters if p.not_decomposed is not None}

    @property
    def not_protected(self) -> dict[str, str]:
        """Name -> why."""
        return {p.name: p.not_protected for p in self.parameters if p.not_protected is not None}

    @property
    def state(self) -> int:
        """Bytes on the devices between steps."""
        return sum(parameter.state for parameter in self.parameters)

    @property
    def transient(self) -> int:
        """Bytes that a step holds besides, if all layers refreshed at once."""
        return sum(parameter.transient for parameter in self.parameters)

    @property
    def protected_fraction(self) -> float:
        """The mean protected share of the decomposed layers' directions, weighted by the sizes of their weights."""
        size = sum(layer.numel for layer in self.layers)
        return sum(layer.protected_fraction * layer.numel for layer in self.layers) / size if size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, with the totals."""
        totals = {"state": self.state, "transient": self.transient, "protected_fraction": self.protected_fraction}
        return {**asdict(self), **totals}

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON.

        Args:
            options: of ``json.dumps``, such as ``indent``.
        """
        return json.dumps(self.to_dict(), allow_nan=False, **options)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row a parameter.

        Raises:
            ImportError: pandas is not installed.
        """
        return optional("pandas", "pandas", "Summary.to_pandas()").DataFrame(list(map(asdict, self.parameters)))

    def __str__(self) -> str:
        head: tuple[str, ...] = (
            "decomposed",
            "",
            "shape",
            "ranks",
            "capture",
            "bases from",
            "protected",
            "device",
            "host",
            "in a step",
        )
        numbers = (False, True, False, False, False, False, True, True, True, True)
        lines = [table(head, [_line(some) for some in _alike(self.layers, _kind)], numbers), ""]
        others = [parameter for parameter in self.parameters if not parameter.ranks]
        if others:
            head = ("not decomposed", "", "shape", "device", "why", "protected")
            rows = [_other_line(some, self.null_space) for some in _alike(others, _other_kind)]
            lines += [table(head, rows, (False, True, False, True, False, False)), ""]
        free = _alike([layer for layer in self.layers if layer.not_protected is not None], _other_kind)
        lines += [f"not protected: {_name(some)} {_times(some)}: {some[0].not_protected}" for some in free]
        lines += [f"note: {note}" for note in self.notes]
        decomposed, trained = (sum(p.numel for p in found) for found in (self.layers, self._trained()))
        share = f"{decomposed / trained:.1%}" if trained else "none"
        protected = (
            f"{self.protected_fraction:.1%} of their directions protected" if self.null_space else "no null space"
        )
        lines.append(
            f"{len(self.layers)} layers with {share} of the trained weights decomposed, side={self.side!r}, tasks "
            f"{', '.join(self.tasks) or 'none'}; {protected}"
        )
        lines.append(
            f"state {megabytes(self.state) or '0 B'} on the device, {megabytes(self.host) or '0 B'} in the host's "
            f"memory; a step holds up to {megabytes(self.transient) or '0 B'} besides weights and activations"
        )
        return "\n".join(lines)

    def _trained(self) -> list[ParameterSummary]:
        return [parameter for parameter in self.parameters if parameter.capture != "none"]


def _alike(
    parameters: Iterable[ParameterSummary], kind: Callable[[ParameterSummary], Any]
) -> list[list[ParameterSummary]]:
    found: dict[Any, list[ParameterSummary]] = defaultdict(list)
    for parameter in parameters:
        found[kind(parameter)].append(parameter)
    return list(found.values())


def _pattern(name: str) -> str:
    """The name with its numbers left out, by which the layers of a stack differ."""
    return re.sub(r"(?<![^.\[])\d+(?![^.\]])", "*", name)


def _kind(p: ParameterSummary) -> Any:
    return _pattern(p.name), p.shape, p.ranks, p.capture, p.refresh


def _other_kind(p: ParameterSummary) -> Any:
    return _pattern(p.name), p.shape, p.not_decomposed, p.not_protected, p.protected_fraction > 0


def _name(some: list[ParameterSummary]) -> str:
    return some[0].name if len(some) == 1 else _pattern(some[0].name)


def _times(some: list[ParameterSummary]) -> str:
    return f"x{len(some)}" if len(some) > 1 else ""


def _line(some: list[ParameterSummary]) -> tuple[str, ...]:
    first = some[0]
    shares = [
        f"{share:.0%}" for share in (min(p.protected_fraction for p in some), max(p.protected_fraction for p in some))
    ]
    return (
        _name(some),
        _times(some),
        " x ".join(map(str, first.shape)),
        " + ".join(map(str, first.ranks)),
        first.capture,
        first.refresh,
        "-".join(dict.fromkeys(shares)) if any(p.protected_fraction for p in some) else "",
        megabytes(sum(p.state for p in some)),
        megabytes(sum(p.host for p in some)),
        megabytes(sum(p.transient for p in some)),
    )


def _other_line(some: list[ParameterSummary], null_space: bool) -> tuple[str, ...]:
    first = some[0]
    protected = f"{sum(p.protected_fraction for p in some) / len(some):.0%}" if first.protected_fraction else ""
    if null_space and first.not_protected is not None:
        protected = f"no: {first.not_protected}"
    return (
        _name(some),
        _times(some),
        " x ".join(map(str, first.shape)),
        megabytes(sum(p.state for p in some)),
        first.not_decomposed or "",
        protected,
    )
