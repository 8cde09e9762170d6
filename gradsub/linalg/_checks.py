"""Argument checks of the public functions: each error names the argument, the value found and the remedy."""

import torch
from torch import Tensor

from ._arithmetic import largest_magnitude


def check_matrix(name: str, A: Tensor) -> None:
    """Raise unless ``A`` is a real, non-empty, finite (..., m, n) floating-point tensor. Waits for the device once."""
    check_format(name, A)
    check_finite(name, A)


def check_format(name: str, A: Tensor) -> None:
    """Raise unless ``A`` is a real, non-empty (..., m, n) floating-point tensor. Does not look at the values."""
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(A).__name__}: convert it with torch.as_tensor.")
    if A.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (..., m, n), got shape {tuple(A.shape)}: reshape it.")
    if A.is_complex():
        raise ValueError(f"{name} must be real, got {A.dtype}: pass its real and imaginary parts as separate matrices.")
    if A.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {A.dtype}: use {name}.float().")
    if A.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(A.shape)}: skip empty matrices before the call.")


def check_finite(name: str, A: Tensor) -> None:
    """Raise unless all entries are finite. Waits for the device."""
    largest = largest_magnitude(A).amax()
    if not torch.isfinite(largest):
        raise ValueError(
            f"{name} must be finite, got an entry {largest.item()}: skip this matrix, or repair it with "
            "torch.nan_to_num, before the call."
        )


def check_finite_through(result: Tensor, name: str, A: Tensor) -> None:
    """Raise unless ``A`` is finite, seen from a small ``result`` that is NaN wherever ``A`` is not.

    A pass over ``A`` itself is needed only where the result is not finite: to name the entry, or because the sum of
    the result overflowed for a finite ``A``.
    """
    if not torch.isfinite(result.sum()):
        check_finite(name, A)


def check_count(name: str, value: int, *, at_least: int) -> None:
    """Raise unless ``value`` is an int no smaller than ``at_least``; True and 2.0 are no counts."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an int >= {at_least}, got {value!r}: pass {at_least} or more.")
