from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradsub.distributed._ranks import Ranks


def check_replicas(ranks: Ranks, parameters: Sequence[Tensor], names: Callable[[Tensor], str]) -> None:
    """Raise where the ranks' weights differ before the first step, since nothing would ever bring them together.

    Compared are two sums of each weight, in float64 where the device has it; waits for the device.

    Raises:
        RuntimeError: naming the first parameter that differs, on every rank.
    """
    device = parameters[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = []
    for parameter in parameters:
        exact = parameter.detach().to(dtype)
        sums += [exact.sum().to(device), exact.square().sum().to(device)]
    least, greatest = ranks.extremes(torch.stack(sums).nan_to_num())
    for place, same in enumerate((least == greatest).tolist()):
        if not same:
            raise RuntimeError(
                f"the ranks start from different weights ({names(parameters[place // 2])}): seed them alike, wrap the "
                "model in DistributedDataParallel, or broadcast the weights from rank 0, before the first step"
            )
