"""In which precision and where this machine computes fastest."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from .settings import ModelSettings


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


def choose_precision(model: ModelSettings) -> Precision:
    """Settle ``device`` and ``autocast``, whose ``auto`` asks the hardware.

    Raises:
        ValueError: if ``device`` is ``"cuda"`` and there is none.
    """
    device = model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("the setting device is 'cuda', but torch finds no GPU; pass device=cpu or device=auto")
    reduced = model.autocast == "bfloat16" or (model.autocast == "auto" and _faster_in_bfloat16(device))
    return Precision(torch.device(device), torch.bfloat16 if reduced else None)


def _faster_in_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than those of fp32.

    Of CPUs, one with AMX does. With the vector instructions of AVX512 alone it took twice as long as in fp32, and a CPU
    without either emulates them, 50 times slower. Asked of the hardware, not timed: on a busy machine a timing can go
    either way.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
