"""Geometry on the host: gradients recovered from their Gramian, and the point of a convex hull nearest to zero."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


def weights_on_host(gramian: Tensor, weigh: Callable[[Array], Array]) -> Tensor:
    """What ``weigh`` makes of the gradients (P x P, rows) of the P tasks that have one; waits for the device.

    The rows have the tasks' Gramian, in float64, in the unit in which their squared norms sum to 1. The square root is
    taken of the cosines, not of the Gramian: one scale for all tasks would bury a small gradient in the rounding error
    of a large one. Negative eigenvalues are rounding and count as 0.

    Returns:
        the weights of all tasks, like the Gramian: 0 for the absent, equal ones with sum 1 if all are, NaN if the
        Gramian is not finite.
    """
    G = gramian.detach().to(device="cpu", dtype=torch.float64).numpy()
    weights = np.full(len(G), 1 / len(G))
    present = np.flatnonzero(np.diagonal(G) > 0)
    if not np.isfinite(G).all():
        weights[:] = np.nan
    elif present.size:
        G = G[np.ix_(present, present)]
        norms = np.sqrt(np.diagonal(G))
        values, vectors = np.linalg.eigh(G / norms[:, None] / norms)
        units = vectors * np.sqrt(values.clip(min=0))
        weights[:] = 0.0
        weights[present] = weigh(norms[:, None] / np.linalg.norm(norms) * units)
    return torch.from_numpy(weights).to(device=gramian.device, dtype=gramian.dtype)


def nearest_to_zero(points: Array) -> Array:
    """Convex weights w of the rows whose combination p = wᵀ points is shortest, to working precision.

    Wolfe's algorithm: p is the nearest point of the affine hull of some corners; as long as a point x lies before the
    plane <x, p> = |p|², it joins the corners, and corners that the new nearest point would weigh negatively leave.
    Finite: |p| falls with every round, and each set of corners has one nearest point.
    """
    lengths = np.linalg.norm(points, axis=1)
    corners = [int(lengths.argmin())]
    weights = np.zeros(len(points))
    weights[corners] = 1.0
    # No example needed more than 2 K rounds; the bound only turns a cycle by rounding into an almost nearest point.
    for _ in range(20 * len(points)):
        p = weights @ points
        length = float(np.linalg.norm(p))
        gain = length**2 - points @ p - 8 * _EPS * lengths * length
        gain[corners] = 0.0
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        found = _move(points, weights, [*corners, best])
        # Below the resolution of float64 a move no longer shortens p.
        if np.linalg.norm(found @ points) >= length:
            break
        weights = found
        corners = [int(i) for i in np.flatnonzero(weights)]
    return weights


def _move(points: Array, weights: Array, corners: list[int]) -> Array:
    """The nearest point of the affine hull of ``corners``, or of those that remain on the way to it."""
    weights = weights.copy()
    while True:
        goal = _nearest_in_affine_hull(points[corners])
        if (goal > 0).all():
            weights[corners] = goal
            return weights
        start = weights[corners]
        # The floor makes 0 / 0 a step of 0: a corner without weight whose goal is 0 leaves at once.
        steps = np.full(len(corners), np.inf)
        falling = goal <= 0
        steps[falling] = start[falling] / np.maximum(start[falling] - goal[falling], np.finfo(np.float64).tiny)
        weights[corners] = start + steps.min() * (goal - start)
        weights[corners[int(steps.argmin())]] = 0.0
        weights = weights.clip(min=0)
        corners = [i for i in corners if weights[i] > 0]
        weights /= weights.sum()


def _nearest_in_affine_hull(points: Array) -> Array:
    """Weights with sum 1, of any sign, of the combination of the rows nearest to zero."""
    base = int(np.linalg.norm(points, axis=1).argmin())
    others = np.delete(np.arange(len(points)), base)
    edges = points[others] - points[base]
    sizes = np.linalg.norm(edges, axis=1)
    sizes[sizes == 0] = 1.0
    # Unit columns: the cut-off for dependent directions must not depend on the tasks' scales.
    along = np.linalg.lstsq((edges / sizes[:, None]).T, -points[base], rcond=None)[0] / sizes
    weights = np.empty(len(points))
    weights[others] = along
    weights[base] = 1.0 - along.sum()
    return weights
