from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from gradsub.capture import Projected
from gradsub.gates import Gate, GateInputs
from gradsub.linalg._arithmetic import norm, widest
from gradsub.report import Measurements

GATE_MEMORY: Final = "gate_memory"
PREVIOUS_STEP: Final = "previous_step."


def previous_step(task: int) -> str:
    """The key of the state that holds the last step taken in a task's own subspace, where the gate needs it."""
    return f"{PREVIOUS_STEP}{task}"


def measure(
    blocks: Sequence[Projected],
    losses: Mapping[int, Tensor],
    samples: Mapping[int, float],
    tasks: int,
    gate: Gate,
    unseen_losses: Callable[[list[int]], None],
) -> Measurements | None:
    """The gates of this step, and what they and a report are computed from; None without a layer or a task.

    Rows are layers, in the order of the blocks. Everything stays on the device of the first layer.

    Args:
        blocks: the gradients of the layers that had any; the blocks keep the memory of the gate.
        losses: by task, where a loss was seen.
        samples: by task.
        tasks: K.
        gate: the gate.
        unseen_losses: told of the tasks without a loss, if the gate reads losses.

    Raises:
        ValueError: the gate returned something of another shape than (L, K).
    """
    if not blocks or not tasks:
        return None
    layers = [layer for block in blocks for layer in block.block.layers]
    zero = torch.zeros((), device=layers[0].parameter.device, dtype=layers[0].dtype)
    unknown = zero + math.nan
    wide = zero.to(widest(zero.device))

    def by_task(block: Projected, values: Mapping[int, Tensor], missing: Tensor) -> Tensor:
        empty = missing.expand(len(block.block.layers))
        return torch.stack([values[k].to(missing) if k in values else empty for k in range(tasks)], dim=1)

    norms = [{k: norm(R, dim=(1, 2)) for k, R in block.own.items()} for block in blocks]
    own_norms = torch.cat([by_task(block, found, wide) for block, found in zip(blocks, norms, strict=True)])
    own_norms = _over_shards(blocks, own_norms.square()).sqrt() if _split(blocks) else own_norms
    # A gate sums them; tasks whose sum overflows count as equally large.
    own_norms = own_norms.clamp_max(torch.finfo(zero.dtype).max / (tasks + 1)).to(zero)
    present = torch.tensor(
        [[k in block.own for k in range(tasks)] for block in blocks for _ in block.block.layers],
        dtype=torch.bool,
        device="cpu",
    ).to(zero.device, non_blocking=True)
    memory = torch.cat([block.block.stacks[GATE_MEMORY].to(zero) for block in blocks])
    known = [losses[k].to(unknown) if k in losses else unknown for k in range(tasks)]
    inputs = GateInputs(
        losses=torch.stack(known),
        gradient_norms=own_norms,
        samples=torch.tensor([samples.get(k, 0.0) for k in range(tasks)], dtype=zero.dtype, device="cpu").to(
            zero.device, non_blocking=True
        ),
        present=present,
        memory=memory,
        alignment=_alignments(blocks, tasks).to(zero) if needs_alignment(gate) else None,
    )
    missing = [k for k in range(tasks) if k not in losses and any(k in block.own for block in blocks)]
    if missing:
        inputs = _Noticing(**vars(inputs), notice=partial(unseen_losses, missing))
    gates = gate(inputs)
    if gates.shape != own_norms.shape:
        raise ValueError(
            f"gate returned shape {tuple(gates.shape)}, expected (layers, tasks) = {tuple(own_norms.shape)}"
        )
    lengths = [len(block.block) for block in blocks]
    torch._foreach_copy_([block.block.stacks[GATE_MEMORY] for block in blocks], list(torch.split(memory, lengths)))
    return Measurements(
        layers=layers,
        gramian=_over_shards(blocks, torch.cat([_gramian(block, tasks).to(wide) for block in blocks])),
        squared_norms=torch.cat([by_task(block, block.squared_norms, wide + math.nan) for block in blocks]),
        own_norms=own_norms,
        gates=gates,
        present=present,
    )


@dataclass(frozen=True)
class _Noticing(GateInputs):
    """Tells when the losses are read."""

    notice: Callable[[], None] = lambda: None

    def __getattribute__(self, name: str) -> Any:
        if name == "losses":
            self.notice()
        return super().__getattribute__(name)


def needs_alignment(gate: Gate) -> bool:
    """Whether the steps taken in the tasks' own subspaces have to be kept for the gate."""
    return bool(getattr(gate, "needs_alignment", False))


def _split(blocks: Sequence[Projected]) -> bool:
    """Whether each rank has only some rows of some layers' coordinates."""
    return any(block.block.first.splits_coordinates for block in blocks)


def _over_shards(blocks: Sequence[Projected], values: Tensor) -> Tensor:
    """Sums over the coordinates of a layer, a row each (L, ...): of all rows, where ranks have some each."""
    if not _split(blocks):
        return values
    layers = [layer for block in blocks for layer in block.block.layers]
    shards = next(layer.shards for layer in layers if layer.splits_coordinates)
    assert shards is not None
    # What every rank has as a whole must count once.
    counts = torch.tensor(
        [layer.splits_coordinates or shards.first for layer in layers], dtype=torch.bool, device="cpu"
    )
    counts = counts.to(values.device, non_blocking=True).view(-1, *[1] * (values.ndim - 1))
    summed = torch.where(counts, values, 0)
    shards.sum_([summed])
    return summed


def _alignments(blocks: Sequence[Projected], tasks: int) -> Tensor:
    """Cosines (L, K) between R_k and the task's previous step; 0 without one."""
    first = blocks[0].block.first
    found = []
    for block in blocks:
        device = first.parameter.device
        products = torch.zeros(len(block.block), tasks, 3, dtype=widest(device), device=device)
        for task, gradient in block.own.items():
            previous = block.block.stacks[previous_step(task)]
            both = torch.stack([gradient.flatten(1), previous.flatten(1)], dim=1)
            gramian = _inner_products(both).to(products)
            products[:, task] = torch.stack([gramian[:, 0, 1], gramian[:, 1, 1], gramian[:, 0, 0]], dim=1)
        found.append(products)
    products = _over_shards(blocks, torch.cat(found))
    norms = products[..., 1].sqrt() * products[..., 2].sqrt()
    return products[..., 0] / norms.where(norms > 0, 1.0)


def _gramian(block: Projected, tasks: int) -> Tensor:
    """Inner products (L x K x K) of the tasks' gradients in the shared subspace; zeros where a task is absent."""
    if not block.parts:
        like = block.block.stacks["basis"]
        return like.new_zeros(len(block.block), tasks, tasks)
    products = _inner_products(torch.stack([part.flatten(1) for part in block.parts.values()], dim=1))
    if len(block.parts) == tasks:
        return products
    gramian = products.new_zeros(len(block.block.layers), tasks, tasks)
    for i, a in enumerate(block.parts):
        for j, b in enumerate(block.parts):
            gramian[:, a, b] = products[:, i, j]
    return gramian


def _inner_products(rows: Tensor) -> Tensor:
    """The Gramians (L x K x K) of L x K rows (used up), whose squares their own format need not have room for."""
    units = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True)
    units.masked_fill_(units == 0, 1)
    rows /= units
    units = units.to(widest(rows.device))
    products: Tensor = (rows @ rows.mT).to(units)
    return torch.mul(products * units, units.mT)
