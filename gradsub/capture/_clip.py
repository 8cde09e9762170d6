from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradsub.capture._captured import Captured


def scale_captured(held: Mapping[Tensor, Captured], factor: Tensor) -> None:
    """Multiply one task's captured gradients by ``factor`` (0-dim), in place."""
    for captured in held.values():
        for tensor in captured.tensors():
            tensor *= factor.to(tensor)
        if captured.squared_norm is not None:
            captured.squared_norm *= factor.to(captured.squared_norm).square()


def clip_captured(held: Mapping[Tensor, Captured], max_norm: float) -> Tensor:
    """Scale one task's gradient so that its norm over all parameters is at most ``max_norm``; the norm it had."""
    squares = [captured.norm_known().double() for captured in held.values()]
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    scale_captured(held, (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0))
    return norm
