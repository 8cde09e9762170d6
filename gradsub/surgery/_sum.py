"""The plain sum of the task gradients."""

import torch
from torch import Tensor

from ._checks import check_gramian


def sum_weights(gramian: Tensor) -> Tensor:
    """w_k = 1: the gradient of the total loss, conflicts and all.

    Never waits for the device.

    Args:
        gramian: G_ij = <g_i, g_j>, shape (K, K), squared unit of the gradients. Its values do not matter.

    Returns:
        Ones, shape (K,), no unit.

    Raises:
        ValueError: ``gramian`` is no real floating-point tensor of shape (K, K) with K >= 1.

    Example:
        >>> import torch
        >>> from gradsub.surgery import sum_weights
        >>> sum_weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([1., 1.])
    """
    check_gramian(gramian)
    return torch.ones(gramian.shape[0], dtype=gramian.dtype, device=gramian.device)
