"""How many steps a training takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass

from .settings import Settings


@dataclass(frozen=True)
class Plan:
    """How long training is.

    Args:
        steps: optimizer steps, if nothing ends it earlier.
        per_epoch: steps in which the largest stream of joint training is read once.
    """

    steps: int
    per_epoch: int


def plan_training(settings: Settings, pools: Mapping[str, Sized]) -> Plan:
    """Settle the number of steps.

    Args:
        settings: of the run.
        pools: what an epoch of all tasks goes through, by stream, whichever are trained.

    Raises:
        ValueError: if ``early_stop`` is set without ``epochs``, or ``accumulation`` exceeds ``batch_size``.
    """
    training = settings.training
    if training.early_stop is not None and training.epochs is None:
        raise ValueError(
            f"training.early_stop={training.early_stop} counts epochs, but training.epochs is null; set it to the most "
            "wanted, or early_stop to null"
        )
    if training.accumulation > training.batch_size:
        raise ValueError(
            f"training.accumulation={training.accumulation} parts cannot be cut from training.batch_size="
            f"{training.batch_size} examples; lower it"
        )
    per_epoch = max(math.ceil(len(rows) / training.batch_size) for rows in pools.values())
    return Plan(training.steps if training.epochs is None else training.epochs * per_epoch, per_epoch)
