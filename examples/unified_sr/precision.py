"""In which precision and where this machine computes fastest."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch

from .settings import Settings


@dataclass(frozen=True)
class Precision:
    """Where to compute, and in what precision the matrix products of training and ranking run.

    Args:
        device: a torch device.
        autocast: the reduced precision; ``None`` computes in fp32. Weights are fp32 in any case.
    """

    device: torch.device
    autocast: torch.dtype | None

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def __str__(self) -> str:
        return f"{self.device}, {'fp32' if self.autocast is None else 'bfloat16 autocast'}"


def choose_precision(settings: Settings) -> Precision:
    """Settle ``device`` and ``autocast``, whose ``auto`` is measured here and now.

    Raises:
        ValueError: if ``device`` is ``"cuda"`` and there is none.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("the setting device is 'cuda', but torch finds no GPU; pass device=cpu or device=auto")
    reduced = settings.autocast == "bfloat16" or (settings.autocast == "auto" and _faster_in_bfloat16(device))
    return Precision(torch.device(device), torch.bfloat16 if reduced else None)


def _faster_in_bfloat16(device: str) -> bool:
    # A CPU without bfloat16 instructions emulates them, and a training step takes 25 times longer.
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return 1.2 * _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)
