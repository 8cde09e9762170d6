"""From a learning rate of whole weights to one of steps inside subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsub.subspace import SHARED, Block, Layer, SubspaceBank

ADAMW = "adamw"


def asks(group: Mapping[str, Any], own: str | None) -> bool:
    """Whether a group's updates are to be as large as those of the base optimizer on whole weights.

    Args:
        group: the parameter group; a number there is another library's (layer-wise rates of timm have that name).
        own: the optimizer's own ``lr_scale``.
    """
    wanted = group["lr_scale"]
    return (wanted if wanted is None or isinstance(wanted, str) else own) == ADAMW


def match_rms(layer: Layer, bank: SubspaceBank) -> float:
    r"""The factor c with which the lifted update has the root mean square that a step of the whole weight has.

    Where each entry of a step has the size lr, a step of W (m x n) has the squared norm lr^2 m n, and one of the
    coordinates (m x r) has lr^2 m r. Orthonormal bases keep norms, so the update
    d_sh B_sh^T + sum_k g_k d_k B_k^T has lr^2 m (r + sum_k g_k^2 r_k) if the subspaces are orthogonal to one another:

        c = sqrt(d / (r + sum_k r_k / K^2))

    with d the length of the axis that the bases span and gates of 1 / K. Columns for which the null space leaves no
    room do not count, since nothing moves there.
    """
    shared, *own = (bank.columns(layer, subspace) for subspace in range(SHARED, len(layer.widths)))
    columns = shared + sum(own) / len(own) ** 2 if own else float(shared)
    return (layer.dimension / columns) ** 0.5 if columns else 1.0


def factor(block: Block, bank: SubspaceBank) -> float | Tensor:
    """`match_rms` of a block's layers: one number, or (L x 1) where the null space leaves some of them less room."""
    protected = [layer.protected for layer in block.layers]
    if block.lr_factor is None or block.lr_factor[0] != protected:
        found = [match_rms(layer, bank) for layer in block.layers]
        alike = all(each == found[0] for each in found)
        like = block.stacks["basis"]
        several = torch.tensor(found, dtype=like.dtype, device="cpu")[:, None].to(like.device)
        block.lr_factor = protected, found[0] if alike else several
    return block.lr_factor[1]
