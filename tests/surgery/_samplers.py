"""Task gradients of known number, rank and scale; strategies shared by the tests of this folder."""

from functools import partial

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from gradsub.surgery import GradVac, cagrad, gradvac, mgda, pcgrad, sum_weights, upgrad

EPS = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}

# One name per behaviour; a GradVac is made anew for each call, because it remembers.
METHODS = {
    "sum": sum_weights,
    "pcgrad": pcgrad,
    "gradvac": partial(gradvac, target=0.3),
    "GradVac": lambda gramian: GradVac()(gramian),
    "mgda": mgda,
    "cagrad": cagrad,
    "upgrad": upgrad,
}
ONES = ("sum", "pcgrad", "gradvac", "GradVac")
WHERE_ALL_ARE_ZERO = {name: 1.0 if name in ONES else 1 / 3 for name in METHODS}

names = st.sampled_from(sorted(METHODS))
dtypes = st.sampled_from([torch.float32, torch.float64])
tasks = st.integers(1, 7)
scales = st.sampled_from([1e-12, 1e-3, 1.0, 1e5, 1e12])  # of the gradients: their Gramian spans 1e-24 .. 1e24
seeds = st.integers(0, 2**16)
few = settings(max_examples=40, deadline=None, derandomize=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(K: int, rank: int, *, seed: int = 0, scale: float = 1.0, spread: float = 1.0) -> Tensor:
    """J (K, 9) in float64: ``rank`` random directions, norms from ``scale`` to ``scale * spread``."""
    numbers = generator(seed)
    J = torch.randn(K, rank, generator=numbers, dtype=torch.float64)
    J = J @ torch.randn(rank, 9, generator=numbers, dtype=torch.float64)
    norms = torch.logspace(0, 1, K, base=spread, dtype=torch.float64) if spread != 1 else torch.ones(K).double()
    return scale * norms[:, None] * J / J.norm(dim=1, keepdim=True)
