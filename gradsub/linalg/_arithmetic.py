"""Number formats and scales: full precision whatever the caller's settings, and products that cannot overflow."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device | None = None) -> Iterator[None]:
    """Compute every fp32 product in fp32: under autocast or TF32 a basis is orthonormal to 1e-3 only.

    Args:
        device: where; None: on the CPU and on the accelerator.
    """
    backends = _backends_with_precision()
    found = [backend.fp32_precision for backend in backends]
    found_globally = None if backends else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if found_globally is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.no_grad(), without_autocast(device):
            yield
    finally:
        for backend, precision in zip(backends, found, strict=True):
            backend.fp32_precision = precision
        if found_globally is not None:
            torch.set_float32_matmul_precision(found_globally)


@contextmanager
def without_autocast(device: torch.device | None = None) -> Iterator[None]:
    """Compute in the formats of the factors; ``device`` as of `full_precision`."""
    kinds = _KINDS if device is None else (device.type,)
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


_ACCELERATOR = torch.accelerator.current_accelerator()
_KINDS = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR.type)


def _backends_with_precision() -> list[Any]:
    # torch 2.9 gave each backend its own switch; the older global getter raises once somebody has used the new ones.
    candidates = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return candidates if all(hasattr(candidate, "fp32_precision") for candidate in candidates) else []


def widen(A: Tensor) -> Tensor:
    """``A`` in the format of the computation: float64 stays, everything narrower becomes float32."""
    return A.detach() if A.dtype == torch.float64 else A.detach().float()


def widest(device: torch.device) -> torch.dtype:
    """The format of squares and inner products of gradients, whose exponents are twice as large as a gradient's."""
    return torch.float32 if device.type == "mps" else torch.float64


def norm(A: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Frobenius norm over ``dim``, or over all: entries of 1e30 do not overflow when squared, those of 1e-30 count."""
    if A.numel() == 0:
        return A.new_zeros([length for i, length in enumerate(A.shape) if dim is not None and i not in dim])
    largest = torch.linalg.vector_norm(A, math.inf, dim=dim, keepdim=True)
    unit = largest.masked_fill(largest == 0, 1)
    scaled: Tensor = torch.linalg.vector_norm(A / unit, dim=dim)
    return torch.mul(scaled, unit.view(scaled.shape))


def rounding_unit(dtype: torch.dtype, device: torch.device) -> float:
    """Epsilon of the format to which a product rounds its factors: TF32's or bfloat16's where the user allows it."""
    chosen = _precision(device) if dtype == torch.float32 and device.type in ("cpu", "cuda") else "ieee"
    return {"tf32": 2.0**-10, "bf16": 2.0**-7}.get(chosen, torch.finfo(dtype).eps)


def _precision(device: torch.device) -> str:
    backends = _backends_with_precision()
    if not backends:
        return "ieee" if device.type == "cpu" or torch.get_float32_matmul_precision() == "highest" else "tf32"
    found = str(backends[0 if device.type == "cuda" else 1].fp32_precision)
    return str(torch.backends.fp32_precision) if found == "none" else found  # type: ignore[attr-defined]


def largest_magnitude(A: Tensor) -> Tensor:
    """Maximum norm of each matrix, shape (..., 1, 1); NaN where the matrix holds one."""
    # Two reductions instead of abs().amax(): no copy of A, and 5 times faster on a CPU.
    return torch.maximum(A.amax((-2, -1), keepdim=True), -A.amin((-2, -1), keepdim=True))


def magnitude(A: Tensor) -> Tensor:
    """A power of two near the largest entry of each matrix (1 for the zero matrix), shape (..., 1, 1).

    Factors are divided by it before they meet ``A``, so that the products are near 1 at every scale of ``A``. It is
    bounded to 2^(+-100) in float32 (2^(+-900) in float64), because its reciprocal must be a normal number.
    """
    bound = 100.0 if A.dtype != torch.float64 else 900.0
    largest = largest_magnitude(A)
    exponent = torch.log2(torch.where(largest == 0, 1, largest)).round().clamp(-bound, bound)
    return torch.exp2(exponent)


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B, of stacks of matrices in one operation: ``@`` asks for five around it, since it broadcasts."""
    return torch.bmm(A, B) if A.ndim == B.ndim == 3 and len(A) == len(B) else A @ B


def multiply(A: Tensor, X: Tensor) -> Tensor:
    """A X for a thin X, in the order in which the larger factor is read along its rows."""
    # (X^T A^T)^T saves a quarter of the time where A is a transposed view, as in A^T Q.
    return product(A, X) if A.stride(-1) == 1 else product(X.mT, A.mT).mT
