from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradsub.capture._captured import Captured
from gradsub.subspace import Layer, sharded_over


def scale_captured(held: Mapping[Tensor, Captured], factor: Tensor) -> None:
    """Multiply one task's captured gradients by ``factor`` (0-dim), in place."""
    for captured in held.values():
        for tensor in captured.tensors():
            tensor *= factor.to(tensor)
    scale_norms(held, factor)


def scale_norms(held: Mapping[Tensor, Captured], factor: Tensor) -> None:
    """Have the norms follow gradients that were multiplied by ``factor`` (0-dim)."""
    for captured in held.values():
        if captured.squared_norm is not None:
            captured.squared_norm *= factor.to(captured.squared_norm).square()


def clip_captured(
    held: Mapping[Tensor, Captured],
    max_norm: float,
    layers: Mapping[Tensor, Layer],
    in_common: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scale one task's gradient so that its norm over all parameters is at most ``max_norm``; the norm it had.

    Args:
        held: by parameter.
        max_norm: the bound.
        layers: the parameters that are decomposed.
        in_common: sums over the ranks that hold different parts of the gradients.
    """
    device = next(iter(held)).device
    here, everywhere = ([torch.zeros((), dtype=torch.float32, device=device)] for _ in range(2))
    for parameter, captured in held.items():
        layer = layers.get(parameter)
        split = bool(sharded_over(parameter))
        if layer is not None:
            split = layer.splits_coordinates and captured.squared_norm is None
        (here if split else everywhere).append(captured.squared_norm_known(layer))
    sums = [torch.stack([square.to(device).double() for square in squares]).sum() for squares in (here, everywhere)]
    norm = (in_common(sums[0]) + sums[1]).sqrt()
    scale_captured(held, (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0))
    return norm
