"""How much of each task's own subspace step enters the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

__all__ = [
    "GATES",
    "Gate",
    "GateInputs",
    "HypergradientGate",
    "heuristic_gate",
    "resolve_gate",
    "uniform_gate",
]


@dataclass(frozen=True)
class GateInputs:
    """What a gate may look at; L layers, K tasks, all on one device.

    Attributes:
        losses: (K,) each task's loss in this step, summed over its backward passes; NaN where none was seen.
        gradient_norms: (L, K) Frobenius norms of the gradients projected on the tasks' own subspaces; 0 where absent.
        samples: (K,) the number of samples that each task contributed in this step.
        present: (L, K) booleans: whether the task reached the layer in this step.
        memory: (L, K) numbers that the optimizer keeps for the gate and saves with its state; zeros at first, to be
            changed in place.
        alignment: (L, K) cosines between a task's projected gradient R_k now and the step d_k taken along it last time:
            the sign and size of dL_k/dg_k = scale <R_k, d_k>, negative while the step helps its task; 0 where unknown.
            None unless the gate has the attribute ``needs_alignment = True``, because the steps have to be kept for it.
    """

    losses: Tensor
    gradient_norms: Tensor
    samples: Tensor
    present: Tensor
    memory: Tensor | None = None
    alignment: Tensor | None = None


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
    return (masked / total).where(total > 0, equal)


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
    largest = torch.finfo(losses.dtype).max / losses.shape[-1]  # of which the sum is finite
    losses = losses.where(seen, 1.0).nan_to_num(0.0, largest, -largest)
    samples = inputs.samples.to(norms.dtype).expand_as(norms)
    of_loss, of_norm, of_samples = _shares(torch.stack([losses, norms, samples]), present).unbind()
    return 0.2 * torch.add(of_samples, of_loss + of_norm, alpha=2)


@dataclass(frozen=True)
class HypergradientGate:
    r"""Gates that follow their own gradient: g = softmax(theta / temperature), theta trained in every layer.

    The loss of the next batch moves with a gate by dL_k/dg_k = scale <G_k(t+1), B_k d_k(t)> = scale <R_k(t+1), d_k(t)>,
    an inner product of two things that are there anyway. It is normalised to the cosine a_k in [-1, 1], so that
    neither the scale of a task's loss nor the base optimizer's learning rate matters, and theta descends along
    g_k (a_k - sum_j g_j a_j). A task whose steps help its next batch gains weight; one of noisy gradients loses it.

    Args:
        lr: step size of theta (dimensionless). Typical: 0.01 to 0.5. What theta descends along is at most 1/2 for
            any number of tasks, so theta moves by at most lr / (2 temperature) a step.
        temperature: of the softmax; larger is flatter.
        limit: bound on |theta|, which keeps every gate positive: at least exp(-2 limit / temperature) / K.

    Raises:
        ValueError: an argument is not positive.
    """

    lr: float = 0.1
    temperature: float = 1.0
    limit: float = 4.0

    needs_alignment = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value} of HypergradientGate must be positive")

    def __call__(self, inputs: GateInputs) -> Tensor:
        """The gates (L, K) after a step of theta, which is ``inputs.memory``."""
        assert inputs.alignment is not None
        assert inputs.memory is not None
        # A checkpoint may hold any number, and exp of a large one is infinite.
        theta = inputs.memory.clamp_(-self.limit, self.limit)
        gates = self._softmax(theta, inputs.present)
        slope = gates * (inputs.alignment - (gates * inputs.alignment).sum(-1, keepdim=True))
        theta.sub_(self.lr / self.temperature * slope).clamp_(-self.limit, self.limit)
        return self._softmax(theta, inputs.present)

    def _softmax(self, theta: Tensor, present: Tensor) -> Tensor:
        return _shares((theta / self.temperature).exp(), present.to(theta.dtype))


GATES: Final[dict[str, Gate]] = {
    "uniform": uniform_gate,
    "heuristic": heuristic_gate,
    "hypergradient": HypergradientGate(),
}


def resolve_gate(gate: str | Gate) -> Gate:
    """The gate of that name, or the callable itself.

    Raises:
        ValueError: there is no gate of that name, or the object cannot be called.
    """
    if isinstance(gate, str) and gate in GATES:
        return GATES[gate]
    if isinstance(gate, str) or not callable(gate):
        raise ValueError(f"gate={gate!r} must be one of {sorted(GATES)} or a callable from GateInputs to (L, K) gates")
    return gate
