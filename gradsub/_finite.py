from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradsub.capture import MIXED, Captured
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
    gradients: Mapping[int, Mapping[Tensor, Captured]],
    tasks: Sequence[str],
    outside: Sequence[Tensor],
    in_common: Callable[[Tensor], Tensor],
) -> str | None:
    """What is NaN or Inf, by task, or None; waits for the device once.

    Args:
        losses: by task.
        gradients: by task.
        tasks: their names.
        outside: further gradients.
        in_common: sums over the ranks that hold different parts of the gradients.
    """
    flags = [(f"the loss of task {tasks[task]!r}", loss) for task, loss in losses.items()]
    whose = {task: f"task {name!r}" for task, name in enumerate(tasks)} | {MIXED: "parameters without subspaces"}
    flags += [
        (f"the gradient of {whose[task]}", largest_entry([captured.tensors()[0] for captured in held.values()]))
        for task, held in gradients.items()
    ]
    dense = [gradient for gradient in outside if gradient.layout is torch.strided]
    if dense:
        flags.append(("a gradient from outside any task", largest_entry(dense)))
    if not flags:
        return None
    like = flags[0][1]
    alike = len({(value.device, value.dtype) for _, value in flags}) == 1
    found = [value if alike else value.to(like.device, widest(like.device)) for _, value in flags]
    bad = in_common((torch.stack(found) * 0 != 0).to(torch.float32))  # of NaN and Inf alone
    return next((what for (what, _), wrong in zip(flags, bad.tolist(), strict=True) if wrong), None)
