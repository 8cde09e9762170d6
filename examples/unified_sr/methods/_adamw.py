"""Full fine-tuning: AdamW on every weight of the layers, the strongest learner and the most forgetful."""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW

from ..settings import MethodSettings
from ._base import Method, Setup, Updater, item_group, model_parameters, parameter_groups, train_only
from ._mixed import MixedLossUpdater, Surgery


def build(setup: Setup[MethodSettings]) -> Updater:
    """Train all layers with AdamW on the mixed batch."""
    return full_fine_tuning(setup, [])


def full_fine_tuning(setup: Setup[Any], notes: list[str], surgery: Surgery | None = None) -> Updater:
    """Train all layers with AdamW.

    Args:
        setup: what to build on.
        notes: further sentences for the report.
        surgery: how the tasks' gradients are combined; ``None`` adds them up.
    """
    training = setup.settings.training
    weights = model_parameters(setup.ranker)
    train_only(setup.ranker, weights)
    optimizer = AdamW([*parameter_groups(weights, training), item_group(setup.ranker, training)])
    note = "All weights of the layers are trained; the embedding of words and the vocabulary head are frozen."
    return MixedLossUpdater(optimizer, [note, *notes], training.grad_clip, surgery)


METHODS = (
    Method("adamw", "full fine-tuning with AdamW", MethodSettings, build),
    Method(
        "adamw-rec",
        "full fine-tuning with AdamW on recommendation alone",
        MethodSettings,
        build,
        defaults={"training.tasks": "rec"},
        variant_of="adamw",
    ),
    Method(
        "adamw-search",
        "full fine-tuning with AdamW on search alone",
        MethodSettings,
        build,
        defaults={"training.tasks": "search"},
        variant_of="adamw",
    ),
)
