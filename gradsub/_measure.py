from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from gradsub._constants import Constants
from gradsub._reporting import Measurements
from gradsub.capture import Projected
from gradsub.capture._captured import squared_norm
from gradsub.gates import Gate, GateInputs
from gradsub.linalg._arithmetic import widest
from gradsub.subspace import SHARED

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
    constants: Constants,
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
        constants: what is on the device already.

    Raises:
        ValueError: the gate returned something of another shape than (L, K).
    """
    if not blocks or not tasks:
        return None
    layers = [layer for block in blocks for layer in block.block.layers]
    device, dtype = layers[0].parameter.device, layers[0].dtype
    wide = widest(device)

    lengths = [len(block.block) for block in blocks]
    # Each where its block is: a model may be spread over several devices.
    inside = [tuple(part.to(device) for part in found) for found in _inside(blocks, tasks)]
    # Numbers of the order of the gradients, whose squares their own format need not have room for.
    units = torch.cat([unit for unit, _, _ in inside]).flatten(1).to(device, wide)
    own_norms = torch.cat([norms for _, norms, _ in inside]) * units
    own_norms = _over_shards(blocks, own_norms.square()).sqrt() if _split(blocks) else own_norms
    # A gate sums them; tasks whose sum overflows count as equally large.
    own_norms = own_norms.clamp_max(torch.finfo(dtype).max / (tasks + 1)).to(device, dtype)
    rows = tuple((len(block.block), tuple(block.own)) for block in blocks)
    present = constants.send(
        "present",
        (rows, tasks),
        device,
        torch.bool,
        lambda: [[k in own for k in range(tasks)] for length, own in rows for _ in range(length)],
    )
    memory = torch.cat([block.block.stacks[GATE_MEMORY].to(device, dtype) for block in blocks])
    unknown = constants.send("unknown", (), device, dtype, lambda: math.nan)
    counts = tuple(samples.get(k, 0.0) for k in range(tasks))
    seen = torch.stack([losses[k].to(unknown) if k in losses else unknown for k in range(tasks)])
    inputs = GateInputs(
        losses=seen,
        gradient_norms=own_norms,
        samples=constants.send("samples", counts, device, dtype, lambda: counts),
        present=present,
        memory=memory,
        alignment=_alignments(blocks, tasks).to(device, dtype) if needs_alignment(gate) else None,
    )
    missing = [k for k in range(tasks) if k not in losses and any(k in block.own for block in blocks)]
    if missing:
        inputs = _Noticing(**vars(inputs), notice=partial(unseen_losses, missing))
    gates = gate(inputs)
    if gates.shape != own_norms.shape:
        raise ValueError(
            f"gate returned shape {tuple(gates.shape)}, expected (layers, tasks) = {tuple(own_norms.shape)}"
        )
    torch._foreach_copy_([block.block.stacks[GATE_MEMORY] for block in blocks], list(torch.split(memory, lengths)))
    nothing_known = constants.send("nothing known", (), device, wide, lambda: math.nan)
    squared_norms, sketched = _squared_norms(blocks, tasks, nothing_known)
    return Measurements(
        layers=layers,
        steps=[block.block.array("step").copy() for block in blocks],
        losses=seen,
        gramian=_over_shards(blocks, torch.cat([g for _, _, g in inside]) * units.unsqueeze(2) * units.unsqueeze(1)),
        squared_norms=squared_norms,
        sketched=sketched,
        own_norms=own_norms,
        gates=gates,
        present=present,
        informed=[block.block.first.index for block in blocks if block.squared_norms or block.sketches],
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


def _inside(blocks: Sequence[Projected], tasks: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """By block: of each layer and task a unit (L x K x 1 x 1) and the norm in its own subspace in that unit (L x K);
    and the Gramians in the shared subspaces in these units (L x K x K). Zeros where a task is absent.
    """
    there = [block.joint for block in blocks if block.joint is not None]
    if not there:
        return [_nothing(block, tasks) for block in blocks]
    units = torch._foreach_clamp_min(
        [joint.unit for joint in there], [torch.finfo(joint.unit.dtype).tiny for joint in there]
    )
    shared, own = (
        torch._foreach_div(halves, units) for halves in ([joint.shared for joint in there], [j.own for j in there])
    )
    in_units = iter(zip(units, shared, own, strict=True))
    return [_of_block(block, tasks, *next(in_units)) if block.joint else _nothing(block, tasks) for block in blocks]


def _nothing(found: Projected, tasks: int) -> tuple[Tensor, Tensor, Tensor]:
    size, like = len(found.block), found.block.stacks["basis"]
    return like.new_zeros(size, tasks, 1, 1), like.new_zeros(size, tasks), like.new_zeros(size, tasks, tasks)


def _of_block(found: Projected, tasks: int, unit: Tensor, shared: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    norms = torch.linalg.vector_norm(own, dim=(2, 3))
    # As they lie in memory: an inner product is the same in any order.
    rows = (shared.mT if found.block.first.axis == 1 else shared).flatten(2)
    gramian = torch.bmm(rows, rows.mT)
    if len(found.own) == tasks:
        return unit, norms, gramian
    here = list(found.own)
    spread = [value.new_zeros(len(value), tasks, *value.shape[2:]) for value in (unit, norms)]
    for all_tasks, value in zip(spread, (unit, norms), strict=True):
        all_tasks[:, here] = value
    whole = gramian.new_zeros(len(gramian), tasks, tasks)
    for i, a in enumerate(here):
        whole[:, a, here] = gramian[:, i]
    return spread[0], spread[1], whole


def _squared_norms(
    blocks: Sequence[Projected], tasks: int, unknown: Tensor
) -> tuple[Tensor, frozenset[tuple[int, int]]]:
    """Of the whole gradients (L x K), NaN where unknown; and of which of them it is that of a sketch.

    E ||G Omega||^2 = ||G||^2, since the entries of Omega have the variance 1 / c; of a sketch through all directions
    it is no estimate.
    """
    every = sum(len(block.block) for block in blocks)
    if not any(block.squared_norms or block.sketches for block in blocks):
        return unknown.expand(every, tasks), frozenset()
    found = unknown.repeat(every, tasks)
    sketched: set[tuple[int, int]] = set()
    start = 0
    for block in blocks:
        first, size = block.block.first, len(block.block)
        for subspace, (rows, Y) in block.sketches.items():
            # What is known of a part of the layers is known by their whole gradients, and better.
            if subspace == SHARED or subspace - 1 in block.squared_norms:
                continue
            values = squared_norm(Y, dim=(1, 2)).to(found)
            if len(rows) == size:
                found[start : start + size, subspace - 1] = values
            else:
                for row, value in zip(rows, values.unbind(), strict=True):
                    found[start + row, subspace - 1] = value
            if first.sketch_size < first.codimension:
                sketched.update((start + row, subspace - 1) for row in rows)
        for task, values in block.squared_norms.items():
            found[start : start + size, task] = values.to(found)
        start += size
    return found, frozenset(sketched)


def _inner_products(rows: Tensor) -> Tensor:
    """The Gramians (L x K x K) of L x K rows (used up), whose squares their own format need not have room for."""
    units = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True)
    units.masked_fill_(units == 0, 1)
    rows /= units
    units = units.to(widest(rows.device))
    products: Tensor = (rows @ rows.mT).to(units)
    return torch.mul(products * units, units.mT)
