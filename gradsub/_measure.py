from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from gradsub.capture import Projected
from gradsub.gates import Gate, GateInputs
from gradsub.report import Measurements
from gradsub.subspace import Layer

GATE_MEMORY: Final = "gate_memory"
PREVIOUS_STEP: Final = "previous_step."


def measure(
    projected: Mapping[Layer, Projected],
    losses: Mapping[int, Tensor],
    samples: Mapping[int, float],
    tasks: int,
    gate: Gate,
    state: Mapping[Tensor, Any],
) -> Measurements | None:
    """The gates of this step, and what they and a report are computed from; None without a layer or a task.

    Everything stays on the device of the first layer.

    Args:
        projected: the layers that had a gradient.
        losses: by task, where a loss was seen.
        samples: by task.
        tasks: K.
        gate: the gate.
        state: the optimizer's state, where the gate's memory and a task's previous steps are kept by weight.

    Raises:
        ValueError: the gate returned something of another shape than (L, K).
    """
    if not projected or not tasks:
        return None
    first = next(iter(projected))
    zero = torch.zeros((), device=first.parameter.device, dtype=first.dtype)
    unknown = zero + math.nan

    def vector(values: Mapping[int, Tensor], missing: Tensor) -> Tensor:
        return torch.stack([values[k].to(missing) if k in values else missing for k in range(tasks)])

    norms = [{k: torch.linalg.vector_norm(R) for k, R in found.own.items()} for found in projected.values()]
    # Squares of large float32 entries overflow; tasks whose norms do count as equally large.
    largest = torch.finfo(zero.dtype).max / (tasks + 1)
    own_norms = torch.stack([vector(values, zero) for values in norms]).clamp_max(largest)
    present = torch.tensor([[k in values for k in range(tasks)] for values in norms]).to(zero.device, non_blocking=True)
    memory = torch.stack([state[layer.parameter][GATE_MEMORY].to(zero) for layer in projected])
    inputs = GateInputs(
        losses=vector(losses, unknown),
        gradient_norms=own_norms,
        samples=torch.tensor([samples.get(k, 0.0) for k in range(tasks)]).to(zero, non_blocking=True),
        present=present,
        memory=memory,
        alignment=_alignment(projected, own_norms, state) if needs_alignment(gate) else None,
    )
    gates = gate(inputs)
    if gates.shape != own_norms.shape:
        raise ValueError(
            f"gate returned shape {tuple(gates.shape)}, expected (layers, tasks) = {tuple(own_norms.shape)}"
        )
    for layer, row in zip(projected, memory, strict=True):
        state[layer.parameter][GATE_MEMORY].copy_(row)
    return Measurements(
        layers=list(projected),
        gramian=torch.stack([_gramian(found.parts, zero.new_zeros(tasks, tasks)) for found in projected.values()]),
        squared_norms=torch.stack([vector(found.squared_norms, unknown) for found in projected.values()]),
        own_norms=own_norms,
        gates=gates,
        present=present,
    )


def needs_alignment(gate: Gate) -> bool:
    """Whether the steps taken in the tasks' own subspaces have to be kept for the gate."""
    return bool(getattr(gate, "needs_alignment", False))


def _alignment(projected: Mapping[Layer, Projected], own_norms: Tensor, state: Mapping[Tensor, Any]) -> Tensor:
    """Cosines (L, K) between R_k and the task's previous step; 0 without one."""
    alignment = torch.zeros_like(own_norms)
    for row, (layer, found) in enumerate(projected.items()):
        for task, gradient in found.own.items():
            previous = state[layer.parameter][f"{PREVIOUS_STEP}{task}"]
            norms = torch.linalg.vector_norm(previous) * torch.linalg.vector_norm(gradient)
            cosine = (gradient * previous).sum() / norms.where(norms > 0, 1.0)
            alignment[row, task] = cosine.to(alignment)
    return alignment


def _gramian(parts: Mapping[int, Tensor], gramian: Tensor) -> Tensor:
    """Inner products (K x K) of the tasks' gradients in the shared subspace; zeros where a task is absent."""
    if parts:
        rows = torch.stack([part.flatten() for part in parts.values()])
        products = (rows @ rows.mT).to(gramian)
        if len(parts) == len(gramian):
            return products
        for i, a in enumerate(parts):
            for j, b in enumerate(parts):
                gramian[a, b] = products[i, j]
    return gramian
