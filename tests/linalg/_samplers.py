"""Matrices of known spectrum, rank and scale, and the assertions shared by the tests of this folder."""

import torch
from hypothesis import strategies as st
from torch import Tensor

EPS = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}

dtypes = st.sampled_from([torch.float32, torch.float64])
sizes = st.integers(1, 40)
scales = st.sampled_from([1e-30, 1e-12, 1e-3, 1.0, 1e5, 1e12, 1e30])
seeds = st.integers(0, 2**16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def orthonormal(rows: int, columns: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(gaussian(rows, columns, seed=seed)).Q.to(dtype)


def with_spectrum(m: int, n: int, spectrum: Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A (m, n) with exactly these singular values, up to the rounding to ``dtype``."""
    k = spectrum.numel()
    U, V = orthonormal(m, k, seed=seed), orthonormal(n, k, seed=seed + 1)
    return (U * spectrum.double() @ V.mT).to(dtype)


def of_rank(m: int, n: int, rank: int, *, seed: int = 0, scale: float = 1.0, dtype=torch.float64) -> Tensor:
    """A (m, n) of that rank, with singular values from ``scale`` down to a tenth of it."""
    spectrum = scale * torch.logspace(0, -1, rank, dtype=torch.float64)
    return with_spectrum(m, n, spectrum, seed=seed, dtype=dtype)


def assert_orthonormal(Q: Tensor, *, factor: float = 30.0) -> None:
    gram = Q.mT @ Q
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(gram)
    torch.testing.assert_close(gram, eye, rtol=0, atol=factor * EPS[Q.dtype])


def hmt_spectral_bound(spectrum: Tensor, rank: int, oversampling: int, power_iterations: int) -> float:
    """Expected spectral error of the basis: Halko, Martinsson, Tropp 2011, Corollary 10.10 (q = 0: Theorem 10.6)."""
    k, p = rank, oversampling
    factor = 1 + (k / (p - 1)) ** 0.5 + 2.718281828459045 * (k + p) ** 0.5 / p * (spectrum.numel() - k) ** 0.5
    return float(factor ** (1 / (2 * power_iterations + 1)) * spectrum[k])


def hmt_frobenius_bound(spectrum: Tensor, rank: int, oversampling: int) -> float:
    """Expected Frobenius error of the basis without power iterations: same paper, Theorem 10.5."""
    return float((1 + rank / (oversampling - 1)) ** 0.5 * spectrum[rank:].norm())
