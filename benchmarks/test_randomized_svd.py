"""`gradsub.linalg.randomized_svd` against torch.svd_lowrank at the same sketch, and against the full SVD."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsub.linalg import randomized_svd

from .alternate import OURS, alternate
from .settings import CONFIG

SVD = CONFIG["svd"]
CASES = [pytest.param(case, id="{m}x{n}-rank{rank}-decay{decay}".format(**case)) for case in SVD["cases"]]
Factors = tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=1)
def _matrix(m: int, n: int, decay: float) -> tuple[Tensor, Tensor]:
    """A with random singular vectors and singular values i^-decay."""
    source = torch.Generator().manual_seed(0)
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=source)).Q for size in (m, n))
    spectrum = torch.arange(1, k + 1).float() ** -decay
    return U * spectrum @ V.mT, spectrum


def _ours(A: Tensor, rank: int) -> Factors:
    return randomized_svd(A, rank, oversampling=SVD["oversampling"], power_iterations=SVD["power_iterations"])


def _svd_lowrank(A: Tensor, rank: int) -> Factors:
    # Its q counts the whole sketch, and it returns all of it: the same subspace iteration, cut to the same rank.
    U, S, V = torch.svd_lowrank(A, rank + SVD["oversampling"], niter=SVD["power_iterations"])
    return U[:, :rank], S[:rank], V[:, :rank].mT


def _full(A: Tensor, rank: int) -> Factors:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


CONTENDERS: dict[str, Callable[[Tensor, int], Factors]] = {
    OURS: _ours,
    "torch.svd_lowrank": _svd_lowrank,
    "torch.linalg.svd": _full,
}


def _excess(A: Tensor, spectrum: Tensor, rank: int, factors: Factors) -> float:
    """Frobenius error relative to the optimum of Eckart and Young; 1 is perfect."""
    U, S, Vh = factors
    return float((A - U * S @ Vh).norm() / spectrum[rank:].norm())


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def test_svd(benchmark: Any, case: dict[str, Any], name: str) -> None:
    A, spectrum = _matrix(case["m"], case["n"], case["decay"])
    full = name == "torch.linalg.svd"
    benchmark.group = "svd {m} x {n}, rank {rank}, decay {decay}".format(**case)
    factors = benchmark.pedantic(
        CONTENDERS[name],
        args=(A, case["rank"]),
        rounds=SVD["exact_rounds" if full else "rounds"],
        warmup_rounds=0 if full else 1,
    )
    benchmark.extra_info.update(contender=name, error=_excess(A, spectrum, case["rank"], factors))


@pytest.mark.parametrize("case", CASES)
def test_svd_alternating(benchmark: Any, case: dict[str, Any]) -> None:
    A, _ = _matrix(case["m"], case["n"], case["decay"])
    contenders = {
        name: lambda run=CONTENDERS[name]: run(A, case["rank"])  # type: ignore[misc]
        for name in (OURS, "torch.svd_lowrank")
    }
    benchmark.group = "svd {m} x {n}, rank {rank}, decay {decay}".format(**case)
    benchmark.extra_info["alternating"] = benchmark.pedantic(alternate, args=(contenders, SVD["rounds"]), rounds=1)
