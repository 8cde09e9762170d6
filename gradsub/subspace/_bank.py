from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsub.linalg._gaussian import gaussian
from gradsub.linalg._orthonormal import _orthonormalize_unchecked
from gradsub.subspace._basis import dominant_basis, orthonormality, sketched_basis
from gradsub.subspace._layer import Layer
from gradsub.subspace._schedule import SKETCHES_PER_REFRESH, check_steps_taken, next_multiple, next_place, own_place
from gradsub.subspace._verdicts import Verdicts

SHARED = 0

# What a layer's state holds only if the layer is sketched.
SKETCHES = frozenset({"singular_values", "sketches", "usable"})

# In the place of a subspace, for random numbers that belong to none.
_DIRECTIONS = 1 << 16

# In multiples of the gap that is in force: how far ahead a refresh may be planned in a checkpoint.
_LONGEST_GAP = 1024

State = MutableMapping[Tensor, Any]
BasisChanged = Callable[[Layer, int, Tensor, Tensor], None]


class SubspaceBank:
    """Every layer's bases, and when each is due for a refresh; all of it lives in the optimizer's state.

    A layer's state holds ``"step"`` (a count of the layer's steps, 0-dim, int64, CPU), ``"basis"`` (d x sum of widths:
    the shared basis, then one a task) and ``"next_refresh"`` (the step at which each basis is due, int64, CPU). A basis
    that could not be refreshed when it was due, because its gradient was absent, zero or protected as a whole, stays as
    it is and stays due.

    There are two kinds of refresh. An exact one (`refresh`) decomposes the whole gradient before the step. A sketched
    one (`renew`) takes the basis after the step from Y = G^T Omega with a Gaussian Omega, and improves it with a second
    sketch one step later. A sketched layer's state also holds ``"singular_values"`` (of the first sketch, one a
    column), ``"sketches"`` (how many of a refresh's sketches were taken, int64, CPU) and ``"usable"`` (whether the last
    one was). The device decides what is usable; the schedule assumes that it is, and is put right one step later, when
    reading the decision does not keep the device waiting.

    Args:
        state: the optimizer's state.
        orthogonalize: ``"none"``, or ``"shared_first"``: task bases are orthogonal to the shared one.
        seed: with a layer's index, the subspace and the step it determines every random number.
    """

    def __init__(self, state: State, orthogonalize: str, seed: int) -> None:
        self._state = state
        self._orthogonalize = orthogonalize
        self._seed = seed
        self._directions: dict[Layer, Tensor] = {}
        self._verdicts = Verdicts()

    def attach(self, state: State) -> None:
        """Follow the optimizer to another state dictionary: torch replaces it when it loads."""
        self._state = state

    def initialise(self, layer: Layer) -> None:
        """The first bases, all of them due.

        Zero ones where the first gradient is decomposed before it is used: until then nothing moves. Random ones where
        it is sketched, since the first step is taken before its sketch is there.
        """
        basis = torch.zeros(layer.dimension, sum(layer.widths), dtype=layer.dtype, device=layer.parameter.device)
        self._state[layer.parameter].update(
            step=torch.zeros((), dtype=torch.int64, device="cpu"), basis=basis, next_refresh=_counts(layer)
        )
        if not layer.sketched:
            return
        self._expect_sketches(layer)
        for subspace, width in enumerate(layer.widths):
            against, free = self._forbidden(layer, subspace)
            kept = min(width, free)
            if kept:
                generator = self._generator(layer.parameter.device, layer.index, subspace, 0)
                random = gaussian(layer.dimension, kept, like=basis, generator=generator)
                orthonormal = _orthonormalize_unchecked(random, against=against, generator=generator)
                self.basis(layer, subspace)[:, :kept] = orthonormal

    def basis(self, layer: Layer, subspace: int) -> Tensor:
        """The subspace's basis (d x r), a view."""
        joint: Tensor = self._state[layer.parameter]["basis"]
        return joint[:, layer.columns(subspace)]

    def joint_basis(self, layer: Layer, subspaces: Collection[int]) -> Tensor:
        """The bases of several subspaces side by side, in this order (d x sum of r); all of them are there as such."""
        joint: Tensor = self._state[layer.parameter]["basis"]
        subspaces = list(subspaces)
        if subspaces == list(range(len(subspaces))):
            return joint[:, : sum(layer.widths[: len(subspaces)])]
        return torch.cat([self.basis(layer, subspace) for subspace in subspaces], dim=1)

    def due(self, layer: Layer, subspace: int) -> bool:
        """Whether this step should refresh the subspace."""
        state = self._state[layer.parameter]
        return bool(state["step"] >= state["next_refresh"][subspace])

    def at_place(self, layer: Layer, gap: int) -> bool:
        """Whether this step is the layer's first or its own place within ``gap`` steps."""
        step = int(self._state[layer.parameter]["step"])
        return step == 0 or step % gap == own_place(gap, layer.index)

    def directions(self, layer: Layer) -> Tensor:
        """Omega (codimension x c), Gaussian: through which directions a sketch looks at the gradient.

        It is the same for all tasks and the whole step, so that sketches of several backward passes add up.
        """
        if layer not in self._directions:
            state = self._state[layer.parameter]
            size = layer.sketch_size
            if size == layer.codimension:
                found = torch.eye(size, dtype=layer.dtype, device=layer.parameter.device)
            else:
                generator = self._generator(layer.parameter.device, layer.index, _DIRECTIONS, int(state["step"]))
                found = gaussian(layer.codimension, size, like=state["basis"], generator=generator) / size**0.5
            self._directions[layer] = found
        return self._directions[layer]

    def forget_directions(self) -> None:
        """The step is over."""
        self._directions.clear()

    def enforce(self, layer: Layer) -> None:
        """Keep bases that came from elsewhere out of the protected directions, and let them be refreshed soon.

        A checkpoint may know of no null space; bases that obey this one stay bit for bit.
        """
        if layer.protected is None:
            return
        state = self._state[layer.parameter]
        inside = layer.protected.mT @ state["basis"]
        if inside.numel() and bool(inside.abs().max() > 64 * torch.finfo(layer.dtype).eps):
            state["basis"] -= layer.protected @ inside
            state["next_refresh"].fill_(int(state["step"]))

    def check(self, layer: Layer, state: Mapping[str, Any], update_proj_gap: int) -> None:
        """Raise if a layer's state from elsewhere, of the right shapes, cannot have come about.

        Args:
            layer: the layer.
            state: with the protected directions that its bases were taken under, if any.
            update_proj_gap: steps between refreshes.

        Raises:
            ValueError: a count or a time is out of range, or a basis is not orthonormal.
        """
        of = f"of {layer.name}"
        check_steps_taken(f"state_dict: 'step' {of}", state["step"])
        step, due = int(state["step"]), state["next_refresh"].tolist()
        # The gap may have been longer when the refresh was planned.
        latest = step + _LONGEST_GAP * update_proj_gap
        if not all(0 <= time <= latest for time in due):
            raise ValueError(
                f"state_dict: 'next_refresh' {of} is {due}: it must lie between 0 and {latest} at step {step}"
            )
        if "sketches" in state and not all(0 <= n < SKETCHES_PER_REFRESH for n in state["sketches"].tolist()):
            raise ValueError(f"state_dict: 'sketches' {of} must be 0 to {SKETCHES_PER_REFRESH - 1}")
        if "singular_values" in state and bool((state["singular_values"] < 0).any()):
            raise ValueError(f"state_dict: 'singular_values' {of} has negative entries")
        free = layer.dimension - (state["protected"].shape[1] if "protected" in state else 0)
        for subspace, width in enumerate(layer.widths):
            room = free
            if subspace != SHARED and self._orthogonalize == "shared_first":
                room -= min(layer.widths[SHARED], free)
            basis = state["basis"][:, layer.columns(subspace)]
            if not _plausible(basis, min(width, room), step >= due[subspace]):
                raise ValueError(
                    f"state_dict: 'basis' {of} is not orthonormal in its columns {layer.columns(subspace)}"
                )

    def follow_refresh(self, layer: Layer) -> None:
        """Make a state that came from elsewhere one of this kind of refresh: sketches are begun anew, or forgotten."""
        state = self._state[layer.parameter]
        if not layer.sketched:
            for key in SKETCHES:
                state.pop(key, None)
        else:
            self._expect_sketches(layer)
            self._verdicts.expect(layer)

    def _expect_sketches(self, layer: Layer) -> None:
        """What a sketched layer's state has and a checkpoint of another kind, or of an earlier version, lacks."""
        state = self._state[layer.parameter]
        if "sketches" not in state:
            state["singular_values"] = state["basis"].new_zeros(sum(layer.widths))
            state["sketches"] = _counts(layer)
        if "usable" not in state:
            state["usable"] = torch.ones(len(layer.widths), dtype=torch.bool, device=state["basis"].device)

    def advance(self, layers: Iterable[Layer]) -> None:
        """Count a step."""
        torch._foreach_add_([self._state[layer.parameter]["step"] for layer in layers], 1)

    def refresh(
        self, layer: Layer, gradients: Mapping[int, Tensor], update_proj_gap: int, changed: BasisChanged
    ) -> None:
        """Recompute the bases that are due and whose gradient is there and says something.

        Args:
            layer: the layer.
            gradients: full gradients (m x n) by subspace.
            update_proj_gap: steps between refreshes; the next one falls on the next multiple of it.
            changed: told the layer, the subspace, its old and its new basis.
        """
        state = self._state[layer.parameter]
        step = int(state["step"])
        for subspace in sorted(gradients):
            if not self.due(layer, subspace):
                continue
            against, free = self._forbidden(layer, subspace)
            old = self.basis(layer, subspace)
            new = dominant_basis(
                gradients[subspace].to(layer.dtype),
                layer.widths[subspace],
                layer.axis,
                against,
                free,
                self._generator(layer.parameter.device, layer.index, subspace, step),
                self._may_vanish(subspace) or not free,
            )
            if new is None:
                continue
            changed(layer, subspace, old, new)
            old.copy_(new)
            state["next_refresh"][subspace] = next_multiple(step, update_proj_gap)
            if subspace == SHARED and self._orthogonalize == "shared_first":
                # The tasks' bases were orthogonal to the old one: they follow, now or with their next gradient.
                state["next_refresh"][1:] = step

    def renew(
        self, sketches: Mapping[Layer, Mapping[int, Tensor]], gaps: Mapping[Layer, int], changed: BasisChanged
    ) -> None:
        """Take the bases that are due from sketches of this step's gradients; equal shapes are done together.

        Args:
            sketches: of each layer and subspace, Y (d x c), in equal numbers of columns for one layer.
            gaps: of each layer, the steps between refreshes.
            changed: told the layer, the subspace, its old and its new basis.
        """
        self._settle()
        due = {
            layer: {subspace: Y for subspace, Y in found.items() if self.due(layer, subspace)}
            for layer, found in sketches.items()
        }
        shared = {layer: found[SHARED] for layer, found in due.items() if SHARED in found}
        self._renew_alike(SHARED, shared, changed)
        for subspace in range(1, 1 + max((len(layer.widths) - 1 for layer in sketches), default=0)):
            own = {layer: found[subspace] for layer, found in due.items() if subspace in found}
            if self._orthogonalize == "shared_first":
                # A task without a sketch keeps what the new shared basis leaves of its own.
                own = {layer: self.basis(layer, subspace).clone() for layer in shared} | own
            self._renew_alike(subspace, own, changed)
        for layer, found in due.items():
            state = self._state[layer.parameter]
            step = int(state["step"])
            for subspace in found:
                taken = int(state["sketches"][subspace]) + 1
                complete = taken == SKETCHES_PER_REFRESH
                state["sketches"][subspace] = 0 if complete else taken
                state["next_refresh"][subspace] = next_place(step, gaps[layer], layer.index) if complete else step + 1
        for layer, found in due.items():
            if found:
                self._verdicts.expect(layer)
        self._verdicts.send(self._state)

    def _settle(self) -> None:
        """Take back what the schedule assumed of the last step's sketches and the device found otherwise."""
        for layer, usable in self._verdicts.read(self._state):
            state = self._state[layer.parameter]
            for subspace, good in enumerate(usable):
                if not good:
                    state["sketches"][subspace] = (int(state["sketches"][subspace]) - 1) % SKETCHES_PER_REFRESH
                    state["next_refresh"][subspace] = int(state["step"])
            if not all(usable):
                state["usable"].fill_(True)

    def _renew_alike(self, subspace: int, sketches: Mapping[Layer, Tensor], changed: BasisChanged) -> None:
        """One decomposition for all layers of the same shape; nothing here waits for the device."""
        alike: dict[Any, list[tuple[Layer, Tensor | None]]] = defaultdict(list)
        for layer, Y in sketches.items():
            against, free = self._forbidden(layer, subspace)
            width = min(layer.widths[subspace], free)
            state = self._state[layer.parameter]
            constraint = None if against is None else against.shape
            count = int(state["sketches"][subspace])
            if width:
                alike[width, count, int(state["step"]), Y.shape, constraint, Y.device, Y.dtype].append((layer, against))
        for (width, count, step, *_), members in alike.items():
            layers = [layer for layer, _ in members]
            bases, values = zip(*(self._kept(layer, subspace, width) for layer in layers), strict=True)
            constraints = [against for _, against in members if against is not None]
            fresh, strengths, usable = sketched_basis(
                torch.stack([sketches[layer] for layer in layers]),
                torch.stack([basis * value for basis, value in zip(bases, values, strict=True)]) if count else None,
                width,
                torch.stack(constraints) if constraints else None,
                self._generator(layers[0].parameter.device, layers[0].index, subspace, step),
                self._may_vanish(subspace),
            )
            for i, layer in enumerate(layers):
                old = self.basis(layer, subspace)
                new = torch.zeros_like(old)
                new[:, :width] = torch.where(usable[i], fresh[i], bases[i])
                changed(layer, subspace, old, new)
                old.copy_(new)
                # What is left of a refresh that began with nothing must not enter the next sketch.
                kept = values[i] if count else 0.0
                values[i].copy_(torch.where(usable[i, 0], strengths[i], kept))
                if self.due(layer, subspace):
                    self._state[layer.parameter]["usable"][subspace].copy_(usable[i, 0, 0])

    def _kept(self, layer: Layer, subspace: int, width: int) -> tuple[Tensor, Tensor]:
        """The basis and the singular values, views of as many columns as there is room for."""
        columns = layer.columns(subspace)
        return self.basis(layer, subspace)[:, :width], self._state[layer.parameter]["singular_values"][columns][:width]

    def _may_vanish(self, subspace: int) -> bool:
        """Whether a gradient counts of which nothing is left: where another basis has all of it, waiting is in vain."""
        return subspace != SHARED and self._orthogonalize != "none"

    def _forbidden(self, layer: Layer, subspace: int) -> tuple[Tensor | None, int]:
        protected, free = layer.protected, layer.free
        if subspace == SHARED or self._orthogonalize == "none":
            return protected, free
        shared = self.basis(layer, SHARED)
        free = max(0, free - min(shared.shape[1], free))
        return shared if protected is None else torch.cat([protected, shared], dim=1), free

    def _generator(self, device: torch.device, index: int, subspace: int, step: int) -> torch.Generator:
        """An own generator for every draw: reproducible after a resume, and the global one is left alone."""
        entropy = np.random.SeedSequence([self._seed, index, subspace, step])
        generator = torch.Generator(device=device)
        return generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_directions": {}}


def _counts(layer: Layer) -> Tensor:
    """A zero for each subspace, whatever the default dtype and device are."""
    return torch.zeros(len(layer.widths), dtype=torch.int64, device="cpu")


def _plausible(basis: Tensor, columns: int, due: bool) -> bool:
    """Whether a basis (d x r) can have come about: orthonormal in as many columns as there is room for, else zero.

    One that is due may also be zero still, or what new protected directions have left of it.
    """
    gramian = basis.mT @ basis
    slack = orthonormality(basis.dtype)
    if due:
        return not gramian.numel() or float(torch.linalg.eigvalsh(gramian)[-1]) <= 1 + slack
    there = gramian.diagonal() != 0
    return int(there.sum()) == columns and float((gramian - there.diag().to(gramian)).abs().amax()) <= slack
