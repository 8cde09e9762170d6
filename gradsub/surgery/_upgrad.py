"""Unconflicting projection of gradients."""

import itertools
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gradsub.linalg._arithmetic import widest

from ._checks import check_gramian
from ._cosines import Cosines, cosines, weights_of

# Up to here all 2^K sets of active constraints are tried at once, on the device.
_FEW = 8
# Of unit gradients: what counts as no conflict.
_TOLERANCE = 1e-10


def upgrad(gramian: Tensor) -> Tensor:
    """Every gradient is projected onto the directions that harm no task; the weights of the mean of the projections.

    The dual cone of the gradients, D = {d : <d, g_j> >= 0 for all j}, holds the directions along which no loss rises to
    first order. With the projection g'_k of g_k onto D the common gradient is 1/K sum_k g'_k. Since D is convex, it
    lies in D itself:

        <g_j, sum_k w_k g_k> >= 0   for all j

    and gradients that do not conflict are left as they are (w_k = 1 / K). Unlike with `pcgrad`, no order of meetings
    decides, and no conflict is left with three tasks or more; unlike with `mgda`, every task's gradient counts by its
    size.

    A projection is g'_k = g_k + sum_j m_j g_j with m >= 0, the solution of a quadratic program in K numbers. Up to
    K = 8 all sets of positive m_j are tried at once, on the Gramian's device, and nothing waits for it. For more tasks
    the programs go to the host, in float64, and the device is waited for once. Where gradients are linearly dependent,
    and several weights give the same common gradient, the fewest m_j are positive.

    Tasks with a zero gradient count as absent: K is the number of the others, their own weight is 0. If all gradients
    are zero, all weights are 1 / K. NaN or Inf anywhere gives NaN weights. Not differentiable.

    Args:
        gramian: G_ij = <g_i, g_j>, shape (K, K), squared unit of the gradients.

    Returns:
        Weights, shape (K,), no unit, at least 1 / K.

    Raises:
        ValueError: ``gramian`` is no real floating-point tensor of shape (K, K) with K >= 1.

    Example:
        >>> import torch
        >>> from gradsub.surgery import upgrad
        >>> gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> weights = upgrad(gradients @ gradients.T)
        >>> weights
        tensor([1.0000, 0.7500])
        >>> weights @ gradients
        tensor([0.2500, 0.7500])

    References:
        Quinton, Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, equations 3 and 7 and
        proposition 1.
    """
    check_gramian(gramian)
    split = cosines(gramian.detach().to(widest(gramian.device)))
    C = _tried(split.values) if gramian.shape[0] <= _FEW else _pivoted(split)
    present = split.present.to(C)
    count = present.sum()
    # Rows of absent tasks would add their own unit gradients.
    weights = weights_of(C * present[:, None], split, gramian) / count.clamp_min(1).to(gramian.dtype)
    return weights.where(count > 0, 1 / gramian.shape[0])


@lru_cache(maxsize=32)
def _sets(tasks: int, device: torch.device) -> Tensor:
    """All sets of tasks (2^K, K) as zeros and ones, the small ones first."""
    every = sorted(itertools.product((0.0, 1.0), repeat=tasks), key=sum)
    return torch.tensor(every, dtype=torch.float64, device="cpu").to(widest(device)).to(device)


def _tried(R: Tensor) -> Tensor:
    """Coefficients (K, K) of the projections in unit gradients with these cosines: row k is that of task k.

    With y = R (e_k + m), the cosines of the projection with all gradients, m and y are >= 0 and never both positive.
    So of the right set S of tasks with m > 0, m solves R_SS m_S = -R_Sk.
    """
    tasks = R.shape[0]
    sets = _sets(tasks, R.device)
    unit = torch.eye(tasks, dtype=R.dtype, device=R.device)
    diagonal = torch.diag_embed(1 - sets)
    inside = sets[:, :, None] * sets[:, None, :] * R + diagonal
    m, _ = torch.linalg.solve_ex(inside, -sets[:, :, None] * R)
    y = R @ (unit + m)
    # Of sets whose gradients are linearly dependent the solution is arbitrary, infinite or none.
    faults = torch.stack([-m, -y, sets[:, :, None] * y.abs()]).amax((0, 2))
    faults = faults.nan_to_num(torch.inf, torch.inf, torch.inf).clamp_min(_TOLERANCE)
    best = faults.argmin(0)
    chosen: Tensor = m[best, :, torch.arange(tasks, device=R.device)]
    return unit + chosen.clamp_min(0)


def _pivoted(split: Cosines) -> Tensor:
    """The same for many tasks: the positive m are those of a non-negative least-squares problem, one a task."""
    from scipy.optimize import nnls  # here: importing it takes longer than importing gradsub

    R = split.values.cpu().numpy().astype(np.float64)
    if not np.isfinite(R).all():
        return split.values + torch.nan
    values, vectors = np.linalg.eigh(R)
    # Rounding in the row of an absent task is a direction, too, which a huge coefficient would make use of.
    units = vectors * np.sqrt(values.clip(min=0)) * split.present.cpu().numpy()[:, None]
    found = np.eye(len(R)) + [nnls(units.T, -unit)[0] for unit in units]
    return torch.from_numpy(found).to(split.values)
