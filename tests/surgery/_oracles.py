"""The methods as their papers write them: on the gradients themselves, one task after the other, slowly."""

import itertools

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor


def pcgrad(J: Tensor, order: list[list[int]]) -> Tensor:
    total = torch.zeros_like(J[0])
    for i, others in enumerate(order):
        g = J[i].clone()
        for j in others:
            inner = g @ J[j]
            if inner < 0:
                g = g - inner / (J[j] @ J[j]) * J[j]
        total = total + g
    return total


def gradvac(J: Tensor, order: list[list[int]], targets: Tensor, beta: float = 0.0) -> tuple[Tensor, Tensor]:
    """The common gradient and the new targets."""
    total = torch.zeros_like(J[0])
    targets = targets.clone()
    for i, others in enumerate(order):
        g = J[i].clone()
        for j in others:
            cosine = (g @ J[j]) / (g.norm() * J[j].norm())
            target = targets[i, j].clone()
            if cosine < target:
                sine, target_sine = (1 - cosine**2).clamp(min=0).sqrt(), (1 - target**2).sqrt()
                step = g.norm() * (target * sine - cosine * target_sine) / (J[j].norm() * target_sine)
                g = g + step * J[j]
            targets[i, j] = (1 - beta) * target + beta * cosine
        total = total + g
    return total, targets


def shortest_of_all_faces(J: Tensor) -> Tensor:
    """The point of the convex hull nearest to zero, as the best of the affine hulls of all subsets of tasks."""
    best = J[J.norm(dim=1).argmin()]
    for size in range(2, len(J) + 1):
        for face in itertools.combinations(range(len(J)), size):
            P = J[list(face)]
            edges = (P[1:] - P[0]).mT
            along = torch.linalg.pinv(edges) @ -P[0]
            if (along >= 0).all() and along.sum() <= 1 and (p := P[0] + edges @ along).norm() < best.norm():
                best = p
    return best


def cagrad_in_gradient_space(J: Tensor, c: float) -> Tensor:
    """max_d min_k <g_k, d> over the ball around the mean, as a cone programme in d and the minimum t."""
    G = J.numpy()
    mean = G.mean(0)
    radius = c * np.linalg.norm(mean)
    n = mean.size
    constraints = [
        {"type": "ineq", "fun": lambda x: G @ x[:n] - x[n], "jac": lambda x: np.hstack([G, -np.ones((len(G), 1))])},
        {
            "type": "ineq",
            "fun": lambda x: radius**2 - ((x[:n] - mean) ** 2).sum(),
            "jac": lambda x: np.append(-2 * (x[:n] - mean), 0.0),
        },
    ]
    start = np.append(mean, (G @ mean).min())
    found = minimize(
        lambda x: -x[n],
        start,
        jac=lambda x: np.append(np.zeros(n), -1.0),
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return torch.from_numpy(found.x[:n])


def cagrad_dual(J: Tensor, c: float, w: Tensor) -> Tensor:
    """<g_w, g_0> + c |g_0| |g_w| for the rows of w."""
    mean = J.mean(0)
    return w @ J @ mean + c * mean.norm() * (w @ J).norm(dim=-1)


def upgrad(J: Tensor) -> Tensor:
    """The mean of the gradients' projections onto {d : J d >= 0}, each a projection onto the polar cone (Moreau)."""
    units = J / J.norm(dim=1, keepdim=True)
    total = torch.zeros_like(J[0])
    for g in J:
        # The part outside of the dual cone is the nearest point among non-negative combinations of the -g_j.
        outside = nnls((-units).mT.numpy(), (g / g.norm()).numpy())[0]
        total = total + g + g.norm() * torch.from_numpy(outside) @ units
    return total / len(J)
