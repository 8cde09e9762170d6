"""How much of each task's own subspace step enters the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

__all__ = ["GATES", "Gate", "GateInputs", "heuristic_gate", "resolve_gate", "uniform_gate"]


@dataclass(frozen=True)
class GateInputs:
    """What a gate may look at; L layers, K tasks, all on one device.

    Attributes:
        losses: (K,) each task's loss in this step, summed over its backward passes; NaN where none was seen.
        gradient_norms: (L, K) Frobenius norms of the gradients projected on the tasks' own subspaces; 0 where absent.
        samples: (K,) the number of samples that each task contributed in this step.
        present: (L, K) booleans: whether the task reached the layer in this step.
    """

    losses: Tensor
    gradient_norms: Tensor
    samples: Tensor
    present: Tensor


class Gate(Protocol):
    """Anything that turns `GateInputs` into gates g (L x K), positive and summing to 1 over the tasks present."""

    def __call__(self, inputs: GateInputs) -> Tensor:
        """The gates (L, K); what stands at absent tasks is ignored."""
        ...


def _shares(values: Tensor, present: Tensor) -> Tensor:
    """Each row's shares over the tasks present; equal ones where all values are 0."""
    masked = values.abs() * present
    total = masked.sum(-1, keepdim=True)
    equal = present / present.sum(-1, keepdim=True).clamp_min(1)
    return (masked / total.where(total > 0, 1.0)).where(total > 0, equal)


def uniform_gate(inputs: GateInputs) -> Tensor:
    """g_k = 1 / (number of tasks present in the layer).

    Example:
        >>> import torch
        >>> one = torch.ones(1, 2)
        >>> uniform_gate(GateInputs(torch.ones(2), one, torch.ones(2), one.bool()))
        tensor([[0.5000, 0.5000]])
    """
    present = inputs.present.to(inputs.gradient_norms.dtype)
    return _shares(present, present)


def heuristic_gate(inputs: GateInputs) -> Tensor:
    r"""g_k = 0.4 loss share + 0.4 gradient-norm share + 0.2 sample share.

    Each share is a task's part of the sum over the tasks present in the layer: of |loss|, of the norm of the gradient
    projected on the task's own subspace of this layer, of the samples. If a present task's loss was not seen, the
    losses count as equal.

    Example:
        >>> import torch
        >>> inputs = GateInputs(
        ...     losses=torch.tensor([3.0, 1.0]),
        ...     gradient_norms=torch.tensor([[1.0, 1.0]]),
        ...     samples=torch.tensor([8.0, 8.0]),
        ...     present=torch.tensor([[True, True]]),
        ... )
        >>> heuristic_gate(inputs)
        tensor([[0.6000, 0.4000]])

    Source: GEMS (arXiv 2601.09496), the gate of its released configuration.
    """
    norms = inputs.gradient_norms
    present = inputs.present.to(norms.dtype)
    losses = inputs.losses.to(norms.dtype).expand_as(norms)
    seen = ((losses == losses) | ~inputs.present).all(-1, keepdim=True)
    losses = losses.where(seen, 1.0).nan_to_num(0.0)
    samples = inputs.samples.to(norms.dtype).expand_as(norms)
    return 0.4 * _shares(losses, present) + 0.4 * _shares(norms, present) + 0.2 * _shares(samples, present)


GATES: Final[dict[str, Gate]] = {"uniform": uniform_gate, "heuristic": heuristic_gate}


def resolve_gate(gate: str | Gate) -> Gate:
    """The gate of that name, or the callable itself.

    Raises:
        ValueError: there is no gate of that name.
    """
    if not isinstance(gate, str):
        return gate
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} must be one of {sorted(GATES)} or a callable from GateInputs to (L, K) gates")
    return GATES[gate]
