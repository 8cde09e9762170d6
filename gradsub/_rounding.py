"""Which coordinates of a projected gradient are nothing but rounding: they count as zero."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import rounding_unit
from gradsub.subspace import Layer

# Of a basis: columns beyond the rank are orthogonal to the gradient's own directions up to so many epsilons.
_BASIS: Final = 32


def drop_rounding(R: Tensor, layer: Layer, rounding: float, squared_norms: Tensor | None) -> Tensor:
    r"""Set to zero, in place, what is rounding in R = G V, for many G of one shape; nothing waits for the device.

    Where the rank of G is below that of the basis, coordinates are left that would be zero if one could compute
    exactly. A base optimizer that looks at one entry at a time (Adam, sign descent) makes full steps of them, along
    directions that the order of the rows in a batch decides.

    With eps of the basis's format and u of that to which the product rounds its factors, an entry R_ij = G_i V_j has an
    error of up to tau ||G_i||, tau = 32 eps + 2 u / sqrt(d): the columns of V are orthogonal up to some eps, and the
    roundings of d factors add up like a random walk. And G's leading directions, of which V is made, are known up to
    an error of tau ||G||. So R_ij counts as zero if it is less than tau times the largest entry of row i, or if all
    entries of column j are less than tau times the largest of all. Whatever is larger stays: in float32 a direction of
    1e-5 of the largest one does.

    Args:
        R: gradients in the coordinates of all their subspaces (... x m x r for axis 1, ... x r x n for axis 0).
        layer: one of those that they belong to.
        rounding: u, or what is known of it; the format of the coordinates is no finer.
        squared_norms: (...) of the whole gradients, if they are known: then a gradient of which the subspaces hold
            nothing at all is told from a small one.

    Returns:
        a number of the order of each of them, at most some thousand times smaller (... x 1 x 1); 0 of zeros, NaN or Inf
        if an entry is.
    """
    along, across = (-1, -2) if layer.axis == 1 else (-2, -1)
    rounding = max(rounding, rounding_unit(R.dtype, R.device))
    tau = _BASIS * torch.finfo(R.dtype).eps + 2 * rounding / math.sqrt(layer.dimension)
    magnitudes = R.abs()
    bounds = magnitudes.amax(along, keepdim=True) * tau
    unit = least = bounds.amax(across, keepdim=True)
    if squared_norms is not None:
        # The root mean square of the norms of G's rows.
        mean = squared_norms.sqrt() / math.sqrt(layer.codimension)
        least = torch.maximum(least, (tau * mean).to(least).view_as(least))
    columns = magnitudes.amax(across, keepdim=True).lt_(least)
    # As arithmetic, which takes a CPU half as long as masks do. R - R * 0 is R, or NaN where R is not finite.
    R.addcmul_(R, magnitudes.lt_(bounds), value=-1).addcmul_(R, columns, value=-1)
    return unit
