"""What a null space protects of each parameter, in which form it is kept, and whether more has become known since."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from gradsub._effective import own_weight
from gradsub._fit import Fit
from gradsub._placement import Placement
from gradsub._unprotected import Use, embeds_alone
from gradsub.layers import is_linear, named_layers
from gradsub.null_space import NullSpace
from gradsub.subspace import Layer, Protected


def called(parameter: Tensor, names: Mapping[Tensor, str]) -> str:
    """What reports and errors call a parameter."""
    return names.get(parameter, f"a parameter of shape {tuple(parameter.shape)}")


def check_sides(null_space: NullSpace | None, side: str) -> None:
    """Raise a ValueError if the null space was collected for the other side."""
    if null_space is not None and null_space.side != side:
        raise ValueError(
            f"side={side!r}, but null_space was collected for side={null_space.side!r}: make both the same"
        )


class Guard:
    """Asks the null space about parameters.

    Args:
        uses: of every parameter of the model, the modules that have it.
        names: as of `called`.
        anchor: whether the protected part of each weight is kept, too.

    Attributes:
        held: the parameters that move inside their null space alone, by what name, and of how many directions (d) how
            many are protected (k); None if rows of an embedding rest.
    """

    def __init__(
        self,
        null_space: NullSpace | None,
        side: str,
        model: nn.Module | None,
        uses: Mapping[Tensor, Collection[Use]],
        names: Mapping[Tensor, str],
        where: str,
        anchor: bool,
    ) -> None:
        check_sides(null_space, side)
        self._null_space = null_space
        self._side = side
        self._nameless = model is None
        self._uses = uses
        self._names = names
        self._placement = Placement(where)
        self._anchor = anchor
        self.fit = Fit(null_space)
        self.held: dict[Tensor, tuple[str, int, int] | None] = {}
        self._seen: dict[Tensor, tuple[int, ...]] = {}
        self._vectors: set[Tensor] = set()
        self._aliases: dict[Tensor, list[str]] = defaultdict(list)
        for layer, module in () if model is None else named_layers(model):
            if is_linear(module) and (weight := own_weight(module)) is not None:
                self._aliases[weight].append(layer)

    @property
    def protects(self) -> bool:
        """Whether there is a null space."""
        return self._null_space is not None

    @property
    def on_host(self) -> bool:
        """Whether protected directions lie in the host's memory between refreshes."""
        return self._placement.on_host

    def protecting(self, parameter: Tensor) -> list[str]:
        """The names under which the null space knows the parameter."""
        if self._null_space is None:
            return []
        names = [*self._aliases.get(parameter, ()), called(parameter, self._names).removesuffix(".weight")]
        return [name for name in dict.fromkeys(names) if name in self._null_space]

    def knows(self, parameter: Tensor) -> bool:
        """Whether the null space has something for a parameter."""
        return bool(self.protecting(parameter))

    def resting(self, parameter: Tensor) -> Tensor | None:
        """Of an embedding of which some rows rest: which ones move (V, of truth values)."""
        rows = {} if self._null_space is None else self._null_space._free_rows
        uses = self._uses.get(parameter, ())
        if not rows or parameter.ndim != 2 or not (embeds_alone(uses) or self._nameless):
            return None
        names = [called(parameter, self._names), *(f"{name}.{use.key}" for use in uses for name in use.names)]
        free = next((rows[name] for name in names if name in rows), None)
        if free is not None and len(free) != len(parameter):
            raise ValueError(
                f"null_space remembers new_tokens of {len(free)} rows for {names[0]}, which has "
                f"{len(parameter)}: call freeze_unprotected again after the embedding was resized"
            )
        return free

    def add_layer(self, layer: Layer) -> None:
        """Protect what is known of a layer."""
        parameter, names = layer.parameter, self.protecting(layer.parameter)
        if names:
            protected = self._smaller(names, parameter, layer.dimension, layer.dtype)
            layer.protected = self.keep(protected, parameter)
            self.held[parameter] = (layer.name, layer.dimension, layer.dimension - layer.free)
            self._seen[parameter] = self._versions(names)
            self.fit.look(layer, names)

    def add_vector(self, parameter: Tensor) -> None:
        """Protect what is known of a vector, such as a norm's weight."""
        self._vectors.add(parameter)
        self._seen[parameter] = self._versions(self.protecting(parameter))
        protected = self.vector(parameter)
        assert protected is not None
        self.held[parameter] = (called(parameter, self._names), *protected.shape)

    def add_resting(self, parameter: Tensor) -> None:
        """Hold the resting rows of an embedding, if it has any."""
        if self.resting(parameter) is not None:
            self.held[parameter] = None

    def vector(self, parameter: Tensor) -> Tensor | None:
        """The protected directions (d x k) of a vector, such as a norm's weight, if the null space knows it."""
        if parameter not in self._vectors:
            return None
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return self._protected(self.protecting(parameter), parameter, parameter.numel(), dtype).to(parameter.device)

    def renewed(self, parameter: Tensor, kept: Tensor) -> Tensor:
        """The directions to protect now; at least ``kept``, and ``kept`` itself where nothing was added.

        Args:
            kept: what was protected before (d x k).
        """
        names = self.protecting(parameter)
        if self._null_space is None or not names:
            return kept
        self._seen[parameter] = self._versions(names)
        for name in names:
            kept = self._null_space.extended(name, kept)
        return kept

    def keep(self, protected: Protected, parameter: Tensor) -> Protected:
        """What is protected in a layer, as it is kept between refreshes: where it is to lie, in the smaller form.

        An anchor needs K itself.
        """
        protected = Protected(protected.whole()) if self._anchor else protected.smaller()
        return Protected(self._placement.keep(protected.directions, parameter.device), protected.complement)

    def grown(self, layer: Layer) -> Protected | None:
        """What is protected in a layer now: at least what was, and the very same where nothing was added."""
        if layer.protected is None:
            return None
        whole = layer.protected.whole()
        found = self.renewed(layer.parameter, whole)
        return layer.protected if found is whole else Protected(found)

    def reconsider(self, parameter: Tensor) -> None:
        """Directions came from elsewhere: at the next occasion the null space says what it knows beyond them."""
        if self.protecting(parameter):
            self._seen[parameter] = ()

    def outdated(self, parameter: Tensor) -> bool:
        """Whether the null space has seen more of a parameter since its directions were last taken."""
        return parameter in self._seen and self._seen[parameter] != self._versions(self.protecting(parameter))

    def _versions(self, names: list[str]) -> tuple[int, ...]:
        assert self._null_space is not None
        return tuple(self._null_space.version(name) for name in names)

    def _smaller(self, names: list[str], parameter: Tensor, dimension: int, dtype: torch.dtype) -> Protected:
        """What a weight's layers protect, in the smaller form where the null space has that at hand."""
        assert self._null_space is not None
        if len(names) > 1 or self._anchor or self._null_space.protected_fraction(names[0]) <= 0.5:
            return Protected(self._protected(names, parameter, dimension, dtype))
        free = self._null_space.complement(names[0], dtype)
        self._check_length(names[0], free, parameter, dimension)
        return Protected(free, complement=True)

    def _protected(self, names: list[str], parameter: Tensor, dimension: int, dtype: torch.dtype) -> Tensor:
        """K (d x k) of a parameter; of a weight that several modules share, what protects all of them."""
        assert self._null_space is not None
        bases = [self._null_space.basis(name, dtype) for name in names]
        for name, basis in zip(names, bases, strict=True):
            self._check_length(name, basis, parameter, dimension)
        if len(bases) == 1:
            return bases[0]
        several = torch.cat([basis.to(parameter.device) for basis in bases], dim=1)
        vectors, values, _ = torch.linalg.svd(several, full_matrices=False)
        union: Tensor = vectors[:, values > 1e-5 * values[0]]
        return union

    def _check_length(self, name: str, directions: Tensor, parameter: Tensor, dimension: int) -> None:
        if directions.shape[0] != dimension:
            raise ValueError(
                f"null_space has directions of length {directions.shape[0]} for {name!r}, but the weight "
                f"{tuple(parameter.shape)} has {dimension} on side={self._side!r}: "
                "collect it on this model, for this side"
            )

    def protected_share(self, parameter: Tensor) -> float:
        """k / d of a vector that the null space knows."""
        protected = self.vector(parameter)
        return 0.0 if protected is None else protected.shape[1] / protected.shape[0]
