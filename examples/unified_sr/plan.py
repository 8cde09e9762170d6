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
        per_epoch: steps in which the largest stream is read once.
    """

    steps: int
    per_epoch: int


def plan_training(settings: Settings, pools: Mapping[str, Sized]) -> Plan:
    """Settle the number of steps.

    Args:
        settings: of the run.
        pools: what an epoch goes through, by stream.

    Raises:
        ValueError: if ``early_stop`` is set without ``epochs``, or ``accumulation`` exceeds ``batch_size``.
    """
    if settings.training.early_stop is not None and settings.training.epochs is None:
        raise ValueError(
            f"training.early_stop={settings.training.early_stop} counts epochs, but epochs is null; set epochs to the most wanted"
        )
    if settings.training.accumulation > settings.training.batch_size:
        raise ValueError(
            f"training.accumulation={settings.training.accumulation} parts cannot be cut from batch_size={settings.training.batch_size} examples; "
            "lower it"
        )
    per_epoch = max(math.ceil(len(rows) / settings.training.batch_size) for rows in pools.values())
    return Plan(
        settings.training.steps if settings.training.epochs is None else settings.training.epochs * per_epoch, per_epoch
    )
