"""Memory: what a training will take, estimated before it, and what the process has taken and is free, measured.

The estimate is of what comes beyond what is loaded, asked of the model and the optimizer as they are.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub import GemsOptimizer
from gradsub.layers import is_transposed, select_layers

from .feeds import Pool
from .model import Ranker
from .settings import TrainingSettings

FLOAT = 4
"""Bytes of a number that is kept in fp32."""

SAMPLE = 256
"""Rows of a stream that are measured."""


class RowSize(NamedTuple):
    """How many tokens a row of a batch has, and how many targets, on average over the largest stream."""

    tokens: float
    targets: float


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training takes when model, bases and protected directions are there; at their most.

    Args:
        gradients: the tasks' gradients, which a measured step holds side by side.
        moments: what the first step of the base optimizer allocates.
        activations: what one micro-batch keeps for its backward pass.
    """

    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in vars(self).items())
        return f"about {self.total / 2**30:.1f} GiB ({parts})"


def estimate_memory(
    ranker: Ranker, optimizer: Optimizer, training: TrainingSettings, rows: RowSize, *, tasks: int, autocast: bool
) -> MemoryEstimate:
    """Estimate what the steps of a training take.

    Args:
        ranker: with the weights that a method trains.
        optimizer: of the method, before its first step.
        training: the settings.
        rows: the mean size of a row of a batch.
        tasks: how many are trained.
        autocast: whether products are computed in bfloat16.
    """
    summary = optimizer.summary() if isinstance(optimizer, GemsOptimizer) else None
    weights = _bytes(weight for group in optimizer.param_groups for weight in group["params"])
    kept = {}
    if summary is not None and summary.side == "input":  # of the inputs only the coordinates in the bases are kept
        kept = {layer.name: sum(layer.ranks) for layer in summary.layers if layer.capture == "fused"}
    return MemoryEstimate(
        gradients=tasks * weights if summary is None or not summary.tasks else summary.transient,
        moments=0 if optimizer.state else 2 * weights,
        activations=_activations(ranker, training, rows, kept, FLOAT // 2 if autocast else FLOAT),
    )


def row_size(pools: Mapping[str, Pool], measure: Callable[[Any], tuple[int, int]]) -> RowSize:
    """Return the mean size of the rows of a training batch, from a sample of each stream.

    Args:
        pools: what is trained on.
        measure: tokens and targets of a row.
    """
    means = []
    for pool in pools.values():
        sizes = [measure(row) for row in pool.epoch(np.random.default_rng(0))[:SAMPLE]]
        means.append(RowSize(*map(statistics.fmean, zip(*sizes, strict=True))))
    return max(means, key=lambda size: size.tokens)


def _activations(ranker: Ranker, training: TrainingSettings, rows: RowSize, kept: Mapping[str, int], size: int) -> int:
    """Roughly inputs and outputs of every linear layer for every token; outputs stand for all that is no input.

    A layer whose weight is frozen keeps no input. The logits of the catalogue are kept three times: raw, in fp32,
    normalised. Layers of a decoder that answers with one token read none of the prompt's.
    """
    reader = ranker.lm.get_encoder() if ranker.encoder_decoder else ranker.backbone
    read = {id(module) for module in reader.modules()}
    layers: dict[str, Any] = dict(select_layers(ranker.backbone))
    per_token = numbers = 0
    for name, layer in layers.items():
        outputs, inputs = layer.weight.shape[::-1] if is_transposed(layer) else layer.weight.shape
        numbers += outputs * inputs
        if id(layer) in read:
            read_for_weight = min(inputs, kept.get(name, inputs)) if layer.weight.requires_grad else 0
            per_token += size * (outputs + read_for_weight)
    if training.gradient_checkpointing:
        blocks = _blocks(reader)
        per_token = per_token // max(1, blocks) + blocks * ranker.embedding.new_rows.shape[1] * FLOAT
    # Under autocast a layer's weight is kept in the reduced precision too, as long as a backward pass needs it.
    copies = size * numbers if size < FLOAT else 0
    micro = -(-training.batch_size // training.accumulation)
    items = len(ranker.embedding.new_rows)
    return int(micro * rows.tokens * per_token + copies + 3 * FLOAT * micro * rows.targets * items)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _blocks(module: nn.Module) -> int:
    """The entries of the outermost lists of modules."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    return sum(_blocks(child) for child in module.children())


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure anew, where the system can: on Linux, and on a GPU."""
    with contextlib.suppress(OSError):
        _RESET.write_text("5", encoding="ascii")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Return the bytes that this process has taken at most, since the last reset where there was one.

    Returns:
        ``resident``: in main memory, all of the process: Python, torch, data and model.
        ``device``: of torch's tensors on the GPU; ``None`` on a CPU.
    """
    return {
        "resident": _peak_resident(),
        "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free where the model computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _peak_resident() -> int:
    # getrusage keeps the maximum of the whole life of a process, also over a reset: Linux' own counter comes first.
    if _STATUS.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii"))):
        return 1024 * int(found[1])
    if (on_windows := getattr(psutil.Process().memory_info(), "peak_wset", None)) is not None:
        return int(on_windows)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
