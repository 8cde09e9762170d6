from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub.capture import MIXED, Gathered
from gradsub.linalg._arithmetic import widest
from gradsub.subspace import local


class NonFiniteError(FloatingPointError, ValueError):
    """A task's loss or gradient is NaN or Inf; weights and state are as they were before the step."""


def largest_entry(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' largest absolute entry (0-dim): NaN or Inf if any entry of any of them is."""
    here = [local(tensor) for tensor in tensors]
    norms = torch._foreach_norm(
        [tensor for tensor in here if tensor.numel()] or [torch.zeros(1, dtype=torch.float32, device="cpu")], math.inf
    )
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for norm in norms:
        alike[norm.device, norm.dtype].append(norm)
    first, *others = [torch.stack(found).amax() for found in alike.values()]
    for other in others:
        first = torch.maximum(first, other.to(first))
    return first


def find_nonfinite(
    losses: Mapping[int, Tensor],
    gathered: Sequence[Gathered],
    others: Mapping[int, Sequence[Tensor]],
    tasks: Sequence[str],
    outside: Sequence[Tensor],
    in_common: Callable[[Tensor], Tensor],
) -> str | None:
    """What is NaN or Inf, by task, or None; waits for the device once.

    Args:
        others: by task, further gradients.
        in_common: sums over the ranks that hold different parts of the gradients.
    """
    flags = [(f"the loss of task {tasks[task]!r}", loss) for task, loss in losses.items()]
    whose = {task: f"the gradient of task {name!r}" for task, name in enumerate(tasks)}
    whose[MIXED] = "the gradient of parameters without subspaces"
    left = {task: list(tensors) for task, tensors in others.items()}
    units: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for each in gathered:
        if each.joint is None:
            for task, held in each.captured.items():
                left.setdefault(task, []).extend(captured.tensors()[0] for captured in held)
        else:
            unit = each.joint.unit
            units[tuple(each.tasks), unit.device, unit.dtype].append(unit)
    for (here, *_), found in units.items():
        largest = torch.cat(found).amax((0, 2, 3))
        flags += [(whose[task], one) for task, one in zip(here, largest.unbind(), strict=True)]
    flags += [(whose[task], largest_entry(tensors)) for task, tensors in sorted(left.items()) if tensors]
    dense = [gradient for gradient in outside if gradient.layout is torch.strided]
    if dense:
        flags.append(("a gradient from outside any task", largest_entry(dense)))
    if not flags:
        return None
    like = flags[0][1]
    alike = len({(value.device, value.dtype) for _, value in flags}) == 1
    values = [value if alike else value.to(like.device, widest(like.device)) for _, value in flags]
    bad = in_common((torch.stack(values) * 0 != 0).to(torch.float32))  # of NaN and Inf alone
    return next((what for (what, _), wrong in zip(flags, bad.tolist(), strict=True) if wrong), None)
