"""What a run takes at most in memory, by a formula for each family of methods; of the order of magnitude, not exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradsub.memory import layer_bytes

from ..methods import method_named
from ..settings import Settings
from ._shape import Layer, ModelShape, RowSize

FLOAT = 4
"""Bytes of a weight, a gradient and a moment: all are kept in fp32."""

PROTECTED_SHARE = 0.5
"""Directions of a layer that a null space is assumed to protect, which only general text can tell."""

OVERHEAD = 5 * 2**28
"""Bytes of Python, torch, libraries and what loading leaves behind, measured with SmolLM2 on a CPU."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what holds them.

    Args:
        weights: of the model, with items and adapters.
        gradients: at their most, before the step.
        optimizer: moments, bases and what is remembered of the protected directions.
        null_space: covariances of general text, from the preparation on.
        intact: the layers before training and what they read, by which their leak is measured; on the CPU.
        activations: what one micro-batch keeps for its backward pass.
        overhead: Python, torch and libraries.
    """

    weights: int
    gradients: int
    optimizer: int
    null_space: int
    intact: int
    activations: int
    overhead: int

    @property
    def further(self) -> int:
        """What a process still takes when everything is loaded."""
        return self.total - self.weights - self.overhead

    @property
    def total(self) -> int:
        """All together."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {value / 2**30:.2f}" for name, value in vars(self).items())
        return f"about {self.total / 2**30:.1f} GiB ({parts})"


def estimate_memory(
    settings: Settings, shape: ModelShape, *, items: int, tasks: int, rows: RowSize, autocast: bool, on_gpu: bool
) -> MemoryEstimate:
    """Estimate the peak of a run's training.

    Args:
        settings: of the run.
        shape: of the model.
        items: size of the catalogue.
        tasks: how many are trained.
        rows: the mean size of a row of a batch.
        autocast: whether products are computed in bfloat16.
        on_gpu: whether the memory is a GPU's, where Python takes none.
    """
    item_rows = items * shape.width * (1 if shape.tied else 2)
    training = _training(settings, shape, tasks) if method_named(settings.method.name).build else _NOTHING
    trained_rows = item_rows if training is not _NOTHING else 0
    return MemoryEstimate(
        weights=FLOAT * (shape.weights + item_rows + training.adapters),
        gradients=training.gradients + tasks * FLOAT * trained_rows,
        optimizer=training.optimizer + 2 * FLOAT * trained_rows,
        null_space=training.null_space,
        intact=0 if on_gpu or training is _NOTHING else _intact(settings, shape),
        activations=0 if training is _NOTHING else _activations(settings, shape, items, rows, autocast),
        overhead=0 if on_gpu else OVERHEAD,
    )


@dataclass(frozen=True)
class _Training:
    """Bytes of gradients, optimizer and null space; weights that are added."""

    gradients: int = 0
    optimizer: int = 0
    null_space: int = 0
    adapters: int = 0


_NOTHING = _Training()


def _training(settings: Any, shape: ModelShape, tasks: int) -> _Training:
    """What a family of methods holds. In steps that are measured, as the first one is, tasks' gradients are apart."""
    name = settings.method.name
    trained = shape.others + sum(layer.weights for layer in shape.layers)
    if name.startswith("gems"):
        return _gems(settings, shape, tasks)
    if name == "lora":
        adapters = sum(settings.method.rank * (layer.out_features + layer.in_features) for layer in shape.layers)
        return _Training(tasks * FLOAT * adapters, 2 * FLOAT * adapters, adapters=adapters)
    if name == "galore":
        low = sum(_galore(layer, settings.method.rank) for layer in shape.layers)
        return _Training(tasks * FLOAT * trained, FLOAT * (low + 2 * shape.others))
    return _Training(tasks * FLOAT * trained, 2 * FLOAT * trained)


def _gems(settings: Any, shape: ModelShape, tasks: int) -> _Training:
    gradients = optimizer = null_space = 0
    for layer in shape.layers:
        d = layer.in_features if settings.method.side == "input" else layer.out_features
        found = layer_bytes(
            layer.out_features,
            layer.in_features,
            rank=settings.method.rank,
            task_rank=settings.method.task_rank,
            tasks=tasks if settings.method.task_subspaces else 0,
            side=settings.method.side,
            protected=int(PROTECTED_SHARE * d) if settings.method.protect else 0,
        )
        # Without task subspaces the tasks' whole gradients are what there is.
        whole = 0 if settings.method.task_subspaces else tasks * FLOAT * layer.weights
        gradients += found.captured + found.sketches + whole
        optimizer += found.state
        null_space += 2 * FLOAT * d * d if settings.method.protect else 0  # sums of products are kept in float64
    others = shape.others if settings.method.train_others else 0
    if (
        settings.method.protect_others
    ):  # shape.others counts entries, not vectors; those of a norm are as wide as the model
        null_space += 2 * FLOAT * others * shape.width
        optimizer += int(PROTECTED_SHARE * FLOAT * others * shape.width)
    return _Training(gradients + FLOAT * others, optimizer + 2 * FLOAT * others, null_space)


def _intact(settings: Settings, shape: ModelShape) -> int:
    if not settings.training.leak_tokens:
        return 0
    return FLOAT * sum(layer.weights + settings.training.leak_tokens * layer.in_features for layer in shape.layers)


def _galore(layer: Layer, rank: int) -> int:
    """Numbers of a projection and of two moments inside it."""
    short, long = sorted((layer.out_features, layer.in_features))
    rank = min(rank, short)
    return rank * short + 2 * rank * long


def _activations(settings: Any, shape: ModelShape, items: int, rows: RowSize, autocast: bool) -> int:
    """What is kept for the backward pass, roughly inputs and outputs of every linear layer for every token.

    Outputs stand for what norms, attention and activation functions keep. With GEMS on the input side, only the inputs'
    coordinates in the subspaces are kept. The logits of the catalogue are kept three times: raw, in fp32, normalised.
    """
    micro = -(-settings.training.batch_size // settings.training.accumulation)
    count = micro * rows.tokens
    kept = None
    if settings.method.name.startswith("gems") and settings.method.side == "input":
        kept = settings.method.rank + (
            max(1, settings.method.rank // 2) if settings.method.task_rank is None else settings.method.task_rank
        )
    read = [layer for layer in shape.layers if layer.per_token]
    inputs = sum(layer.in_features if kept is None else min(layer.in_features, kept) for layer in read)
    outputs = sum(layer.out_features for layer in read)
    per_token = (inputs + outputs) * (FLOAT // 2 if autocast else FLOAT)
    if settings.training.gradient_checkpointing:
        per_token = per_token // max(1, shape.blocks) + shape.blocks * shape.width * FLOAT
    # Under autocast a layer's weight is kept in bfloat16 too, as long as a backward pass needs it.
    weights = FLOAT // 2 * sum(layer.weights for layer in shape.layers) if autocast else 0
    return int(count * per_token + weights + 3 * FLOAT * micro * rows.targets * items)
