from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsub.subspace._basis import dominant_basis
from gradsub.subspace._layer import Layer

SHARED = 0

State = MutableMapping[Tensor, Any]


class SubspaceBank:
    """Every layer's bases, and when each is due for a refresh; all of it lives in the optimizer's state.

    A layer's state holds ``"step"`` (a count of the layer's steps, 0-dim, CPU), ``"basis"`` (d x sum of widths: the
    shared basis, then one a task) and ``"next_refresh"`` (the step at which each basis is due, int64, CPU). A basis
    that could not be refreshed when it was due, because its gradient was absent or zero, stays as it is and stays due.

    Args:
        state: the optimizer's state.
        orthogonalize: ``"none"``, or ``"shared_first"``: task bases are orthogonal to the shared one.
        seed: with a layer's index, the subspace and the step it determines every random number.
    """

    def __init__(self, state: State, orthogonalize: str, seed: int) -> None:
        self._state = state
        self._orthogonalize = orthogonalize
        self._seed = seed

    def attach(self, state: State) -> None:
        """Follow the optimizer to another state dictionary: torch replaces it when it loads."""
        self._state = state

    def initialise(self, layer: Layer) -> None:
        """Zero bases, all of them due: a zero basis moves nothing until the first gradient arrives."""
        self._state[layer.parameter].update(
            step=torch.tensor(0.0),
            basis=torch.zeros(layer.dimension, sum(layer.widths), dtype=layer.dtype, device=layer.parameter.device),
            next_refresh=torch.zeros(len(layer.widths), dtype=torch.int64),
        )

    def basis(self, layer: Layer, subspace: int) -> Tensor:
        """The subspace's basis (d x r), a view."""
        joint: Tensor = self._state[layer.parameter]["basis"]
        return joint[:, layer.columns(subspace)]

    def joint_basis(self, layer: Layer, subspaces: Collection[int]) -> Tensor:
        """The bases of several subspaces side by side, in this order (d x sum of r); all of them are there as such."""
        joint: Tensor = self._state[layer.parameter]["basis"]
        if list(subspaces) == list(range(len(layer.widths))):
            return joint
        return torch.cat([self.basis(layer, subspace) for subspace in subspaces], dim=1)

    def due(self, layer: Layer, subspace: int) -> bool:
        """Whether this step should refresh the subspace."""
        state = self._state[layer.parameter]
        return bool(state["step"] >= state["next_refresh"][subspace])

    def enforce(self, layer: Layer) -> None:
        """Keep bases that came from elsewhere out of the protected directions, and let them be refreshed soon.

        A checkpoint may know of another null space, or of none; bases that obey this one stay bit for bit.
        """
        if layer.protected is None:
            return
        state = self._state[layer.parameter]
        inside = layer.protected.mT @ state["basis"]
        if bool(inside.abs().max() > 64 * torch.finfo(layer.dtype).eps):
            state["basis"] -= layer.protected @ inside
            state["next_refresh"].fill_(int(state["step"]))

    def advance(self, layer: Layer) -> None:
        """Count a step."""
        self._state[layer.parameter]["step"] += 1

    def refresh(
        self,
        layer: Layer,
        gradients: Mapping[int, Tensor],
        update_proj_gap: int,
        changed: Callable[[int, Tensor, Tensor], None],
    ) -> bool:
        """Recompute the bases that are due and whose gradient is there and not zero.

        Args:
            layer: the layer.
            gradients: full gradients (m x n) by subspace.
            update_proj_gap: steps between refreshes; the next one falls on the next multiple of it.
            changed: told the subspace, its old and its new basis.

        Returns:
            whether any basis changed.
        """
        state = self._state[layer.parameter]
        step, refreshed = int(state["step"]), False
        for subspace in sorted(gradients):
            if not self.due(layer, subspace):
                continue
            # Reading this waits for the device, on refresh steps only, where the decompositions wait as well.
            if not 0.0 < float(gradients[subspace].abs().amax()) < math.inf:
                continue
            against, free = self._forbidden(layer, subspace)
            old = self.basis(layer, subspace)
            new = dominant_basis(
                gradients[subspace].to(layer.dtype),
                layer.widths[subspace],
                layer.axis,
                against,
                free,
                self._generator(layer, subspace, step),
            )
            changed(subspace, old, new)
            old.copy_(new)
            state["next_refresh"][subspace] = (step // update_proj_gap + 1) * update_proj_gap
            refreshed = True
            if subspace == SHARED and self._orthogonalize == "shared_first":
                # The tasks' bases were orthogonal to the old one: they follow, now or with their next gradient.
                state["next_refresh"][1:] = step
        return refreshed

    def _forbidden(self, layer: Layer, subspace: int) -> tuple[Tensor | None, int]:
        protected, free = layer.protected, layer.free
        if subspace == SHARED or self._orthogonalize == "none":
            return protected, free
        shared = self.basis(layer, SHARED)
        free = max(0, free - min(shared.shape[1], free))
        return shared if protected is None else torch.cat([protected, shared], dim=1), free

    def _generator(self, layer: Layer, subspace: int, step: int) -> torch.Generator:
        """An own generator for every draw: reproducible after a resume, and the global one is left alone."""
        entropy = np.random.SeedSequence([self._seed, layer.index, subspace, step])
        generator = torch.Generator(device=layer.parameter.device)
        return generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
