from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsub.capture import MIXED, Held
from gradsub.distributed._ranks import Ranks
from gradsub.linalg._arithmetic import widest


@dataclass(frozen=True)
class Agreement:
    """What all ranks have together, the same on each.

    Attributes:
        samples: by task, N_k = sum_r n_k^r over the ranks r.
        mixed: the same for rows of mixed batches; all samples once the tasks' gradients are merged.
        weights: by task and for `MIXED`, this rank's n_k^r / N_k: what its mean gradient counts in that of all.
        losses: by task, sum_r n_k^r L_k^r / N_k over the ranks that saw a loss.
        present: by task and for `MIXED`: the positions of the parameters that have such a gradient on any rank.
        outside: the parameters that have a gradient from outside any task, in ``p.grad``, on any rank.
        rounding: epsilon of the formats in which gradients were computed, the mean over the ranks.
    """

    samples: dict[int, float]
    mixed: float
    weights: dict[int, float]
    losses: dict[int, Tensor]
    present: dict[int, list[int]]
    outside: list[Tensor]
    rounding: float


def agree(
    ranks: Ranks,
    device: torch.device,
    parameters: Sequence[Tensor],
    held: Held,
    samples: Mapping[int, float],
    losses: Mapping[int, Tensor],
    outside: Sequence[Tensor],
    tasks: int,
    rounding: float,
) -> Agreement:
    """One sum over the ranks of all that is no gradient; waits for the device once.

    A rank whose batch lacks a task, or whose forward pass did not reach a parameter, learns here that others have it.

    Args:
        device: where they sum.
        parameters: those whose gradients are to be summed, in the same order on every rank.
        held: what this rank has captured.
        samples: by task, and for `MIXED` the rows of all mixed batches.
        losses: by task, where a loss was seen.
        outside: the parameters whose ``p.grad`` is to be averaged.
        rounding: epsilon of the coarsest format in which a gradient was computed.
    """
    dtype = widest(device)
    keys = [*range(tasks), MIXED]
    counts = [samples.get(key, 0.0) for key in keys]
    seen = [counts[task] if task in losses else 0.0 for task in range(tasks)]
    arrived = [held.reached(key) for key in keys]
    arrived.append(set(map(id, outside)))
    flags = [float(id(parameter) in found) for found in arrived for parameter in parameters]
    numbers = torch.tensor([*counts, *seen, rounding, *flags], dtype=dtype, device="cpu").to(device, non_blocking=True)
    weighted = torch.stack(
        [
            losses[task].to(device, dtype).reshape(()) * seen[task] if seen[task] else numbers.new_zeros(())
            for task in range(tasks)
        ]
    )
    summed = torch.cat([numbers, weighted])
    ranks.sum_([summed])
    host = summed[: numbers.numel()].tolist()
    totals, seen_by_all = host[: tasks + 1], host[tasks + 1 : 2 * tasks + 1]
    rounding, has = host[2 * tasks + 1] / ranks.size, host[2 * tasks + 2 :]
    sums = summed[numbers.numel() :]
    width = len(parameters)
    # By task, for mixed batches, and last for what came from outside: who has what.
    *present, from_outside = (
        [place for place in range(width) if has[row * width + place]] for row in range(len(keys) + 1)
    )
    return Agreement(
        samples={task: totals[task] for task in range(tasks) if totals[task]},
        mixed=totals[tasks],
        weights={key: counts[i] / totals[i] for i, key in enumerate(keys) if totals[i]},
        losses={task: sums[task] / seen_by_all[task] for task in range(tasks) if seen_by_all[task]},
        present=dict(zip(keys, present, strict=True)),
        outside=[parameters[place] for place in from_outside],
        rounding=rounding,
    )


def check_replicas(ranks: Ranks, parameters: Sequence[Tensor], names: Callable[[Tensor], str]) -> None:
    """Raise where the ranks' weights differ before the first step, since nothing would ever bring them together.

    Compared are two sums of each weight, in float64 where the device has it; waits for the device.

    Raises:
        RuntimeError: naming the first parameter that differs, on every rank.
    """
    device = parameters[0].device
    sums = []
    for parameter in parameters:
        exact = parameter.detach().to(widest(device))
        sums += [exact.sum().to(device), exact.square().sum().to(device)]
    least, greatest = ranks.extremes(torch.stack(sums).nan_to_num())
    for place, same in enumerate((least == greatest).tolist()):
        if not same:
            raise RuntimeError(
                f"the ranks start from different weights ({names(parameters[place // 2])}): seed them alike, wrap the "
                "model in DistributedDataParallel, or broadcast the weights from rank 0, before the first step"
            )
