"""Feeds collected gradients to two optimizers that differ in ``refresh`` alone, and measures what their bases keep."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradsub import GemsOptimizer, NullSpace

from .collect import SIDES, TASKS

SUBSPACES = ("shared", *TASKS)
REFRESHES = ("svd", "sketch")
Row = dict[str, Any]


def judge(folder: Path, rank: int, gap: int) -> list[Row]:
    """One row a side, protection, layer, refresh and subspace, with what either basis keeps.

    ``refresh``: of the batch at which the exact basis was taken. ``following``: the mean over the batches from two
    steps later, when the sketched basis is complete, to the next refresh.

    Raises:
        FileNotFoundError: the folder holds no gradients.
    """
    files = sorted(folder.glob("step*.pt"))
    if not files:
        raise FileNotFoundError(f"folder={folder} holds no step*.pt: run collect first")
    names = list(torch.load(files[0], weights_only=True))
    rows: list[Row] = []
    for side in SIDES:
        protected = torch.load(folder / f"null_{side}.pt", weights_only=True)
        for protects in (False, True):
            for name in tqdm(names, desc=f"{side}, {'with' if protects else 'without'} null space"):
                gradients = [torch.load(file, weights_only=True, mmap=True)[name].clone() for file in files]
                K = protected[name] if protects else None
                dimension = gradients[0].shape[2 if side == "input" else 1]
                if K is not None and dimension - K.shape[1] < rank:
                    continue  # nothing is left to choose from
                found = _energies(gradients, rank, gap, side, K)
                rows += [{"side": side, "null_space": protects, "layer": name, **row} for row in found]
    return rows


def _energies(gradients: list[Tensor], rank: int, gap: int, side: str, K: Tensor | None) -> list[Row]:
    weights, optimizers = {}, {}
    for refresh in REFRESHES:
        weights[refresh] = nn.Parameter(torch.zeros_like(gradients[0][0]))
        # Nothing moves: the gradients are those of a training run that has been.
        base = torch.optim.SGD([("layer.weight", weights[refresh])], lr=0.0)
        null_space = None
        if K is not None:
            null_space = NullSpace(side=side, max_rank=K.shape[1])
            null_space.update("layer", K.mT.contiguous())
        optimizers[refresh] = GemsOptimizer(
            base, tasks=TASKS, rank=rank, update_proj_gap=gap, side=side, refresh=refresh, null_space=null_space
        )
    bases: list[dict[str, Tensor]] = []
    for pair in gradients:
        for refresh in REFRESHES:
            for k, task in enumerate(TASKS):
                with optimizers[refresh].task(task):
                    (weights[refresh] * pair[k]).sum().backward()
            optimizers[refresh].step()
        bases.append({refresh: optimizers[refresh].state[weights[refresh]]["basis"].clone() for refresh in REFRESHES})
    widths = [rank, rank // 2, rank // 2]
    rows = []
    for refresh_step in range(gap, len(gradients) - gap + 1, gap):
        # The only layer's place in the gap is 0: its sketches are of this batch and the next one.
        complete = bases[refresh_step + 1]
        for subspace, name in enumerate(SUBSPACES):
            row: Row = {"step": refresh_step, "subspace": name}
            for refresh in REFRESHES:
                basis = complete[refresh].split(widths, dim=1)[subspace]
                kept = [
                    _kept(_gradient(gradients[step], subspace), basis, side, K)
                    for step in (refresh_step, *range(refresh_step + 2, refresh_step + gap))
                ]
                row[refresh] = {"refresh": kept[0], "following": statistics.mean(kept[1:])}
            rows.append(row)
    return rows


def _gradient(pair: Tensor, subspace: int) -> Tensor:
    return pair.mean(0) if subspace == 0 else pair[subspace - 1]


def _kept(gradient: Tensor, basis: Tensor, side: str, K: Tensor | None) -> float:
    """The share of the free part's squared norm that the basis keeps."""
    columns = gradient.mT if side == "input" else gradient
    if K is not None:
        columns = columns - K @ (K.mT @ columns)
    return float((basis.mT @ columns).square().sum() / columns.square().sum())


def table(rows: list[Row], rank: int, gap: int) -> str:
    """Means over layers and refreshes, and the worst layer, of the sketched basis relative to the exact one."""
    lines = [
        f"rank {rank}, task_rank {rank // 2}, gap {gap}; energies are shares of the (free) gradient's squared norm,",
        "ratios are sketch / exact. A layer's ratio is that of its means over the refreshes.",
        "",
        "| side | null space | subspace | layers | exact, following | sketch, following | ratio, following: mean "
        "| worst layer | layers below 1 | ratio, refresh batch: mean | worst single |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        for protects in (False, True):
            for subspace in SUBSPACES:
                chosen = [r for r in rows if (r["side"], r["null_space"], r["subspace"]) == (side, protects, subspace)]
                if chosen:
                    lines.append(_line(chosen, [side, "yes" if protects else "no", subspace]))
    return "\n".join(lines) + "\n"


def _line(rows: list[Row], head: list[str]) -> str:
    layers: dict[str, list[Row]] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).append(row)

    def mean(some: list[Row], refresh: str) -> float:
        return statistics.mean(row[refresh]["following"] for row in some)

    following = [mean(some, "sketch") / mean(some, "svd") for some in layers.values()]
    itself = [row["sketch"]["refresh"] / row["svd"]["refresh"] for row in rows]
    cells = [
        *head,
        str(len(layers)),
        *(f"{mean(rows, refresh):.3f}" for refresh in REFRESHES),
        f"{statistics.mean(following):.3f}",
        f"{min(following):.3f}",
        str(sum(ratio < 1 for ratio in following)),
        f"{statistics.mean(itself):.3f}",
        f"{min(itself):.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def write(folder: Path, rows: list[Row], text: str) -> None:
    """``energy.json`` with every number and ``energy.md`` with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy.json").write_text(json.dumps(rows, indent=None, separators=(",", ":")) + "\n")
    (folder / "energy.md").write_text(text)
