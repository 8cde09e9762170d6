from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradsub.capture._captured import squared_norm
from gradsub.capture._held import Held
from gradsub.subspace import SHARED, Layer, sharded_over


def scale_captured(held: Held, task: int, factor: Tensor) -> None:
    """Multiply one task's captured gradients by ``factor`` (0-dim), in place."""
    for tensor in held.tensors(task):
        tensor *= factor.to(tensor)
    scale_norms(held, task, factor)


def scale_norms(held: Held, task: int, factor: Tensor) -> None:
    """Have the norms follow gradients that were multiplied by ``factor`` (0-dim)."""
    for captured in held.single.get(task, {}).values():
        if captured.squared_norm is not None:
            captured.squared_norm *= factor.to(captured.squared_norm).square()


def clip_captured(
    held: Held, task: int, max_norm: float, layers: Mapping[Tensor, Layer], in_common: Callable[[Tensor], Tensor]
) -> Tensor:
    """Scale one task's gradient so that its norm over all parameters is at most ``max_norm``; the norm it had.

    Args:
        held: what was captured.
        task: whose gradient it is.
        max_norm: the bound.
        layers: the parameters that are decomposed.
        in_common: sums over the ranks that hold different parts of the gradients.
    """
    device = next(held.tensors(task)).device
    here, everywhere = ([torch.zeros((), dtype=torch.float32, device=device)] for _ in range(2))
    everywhere += [squared_norm(stack.narrow(1, 0, block.first.widths[SHARED])) for block, stack in held.stacks(task)]
    for parameter, captured in held.single.get(task, {}).items():
        layer = layers.get(parameter)
        split = bool(sharded_over(parameter))
        if layer is not None:
            split = layer.splits_coordinates and captured.squared_norm is None
        (here if split else everywhere).append(captured.squared_norm_known(layer))
    sums = [torch.stack([square.to(device).double() for square in squares]).sum() for squares in (here, everywhere)]
    norm = (in_common(sums[0]) + sums[1]).sqrt()
    scale_captured(held, task, (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0))
    return norm
