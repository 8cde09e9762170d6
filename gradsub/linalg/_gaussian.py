"""Gaussian test matrices from an explicit generator; the global random state is never read nor advanced."""

import torch
from torch import Tensor

_SEED = 20260914  # any constant: makes generator=None deterministic


def gaussian(rows: int, columns: int, *, like: Tensor, generator: torch.Generator | None, skip: int = 0) -> Tensor:
    """Standard normal (rows, columns) matrix with the dtype and device of ``like``.

    It is drawn on the generator's own device and moved, so a CPU generator gives the same numbers on every device. A
    batch shares one draw: each of its matrices is answered as if it came alone. The first ``skip`` numbers are dropped.
    """
    source = torch.Generator(device="cpu").manual_seed(_SEED) if generator is None else generator
    numbers = torch.randn(skip + rows * columns, generator=source, device=source.device, dtype=like.dtype)
    return numbers[skip:].view(rows, columns).to(like.device)
