"""Full fine-tuning: AdamW on every weight of the layers, the strongest learner and the most forgetful."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import AdamW

from ..settings import Settings, setting
from ._base import Method, Setup, Updater, item_group, model_parameters, parameter_groups, train_only
from ._mixed import MixedLossUpdater, Surgery


@dataclass(frozen=True, kw_only=True)
class AdamWSettings(Settings):
    """Nothing of its own."""

    method: str = setting("adamw", "name of the training method")


@dataclass(frozen=True, kw_only=True)
class AdamWRecSettings(AdamWSettings):
    """Recommendation alone: one of the two models that a joint one replaces."""

    method: str = setting("adamw-rec", "name of the training method")
    train_tasks: str | None = setting("rec", "tasks that are trained, separated by commas; null trains all")


@dataclass(frozen=True, kw_only=True)
class AdamWSearchSettings(AdamWSettings):
    """Search alone."""

    method: str = setting("adamw-search", "name of the training method")
    train_tasks: str | None = setting("search", "tasks that are trained, separated by commas; null trains all")


def build(setup: Setup[AdamWSettings]) -> Updater:
    """Train all layers with AdamW on the mixed batch."""
    return full_fine_tuning(setup, [])


def full_fine_tuning(setup: Setup[Any], notes: list[str], surgery: Surgery | None = None) -> Updater:
    """Train all layers with AdamW.

    Args:
        setup: what to build on.
        notes: further sentences for the report.
        surgery: how the tasks' gradients are combined; ``None`` adds them up.
    """
    weights = model_parameters(setup.ranker)
    train_only(setup.ranker, weights)
    optimizer = AdamW([*parameter_groups(weights, setup.settings), item_group(setup.ranker, setup.settings)])
    note = "All weights of the layers are trained; the embedding of words and the vocabulary head are frozen."
    return MixedLossUpdater(optimizer, [note, *notes], setup.settings.grad_clip, surgery)


ADAMW = Method("adamw", "full fine-tuning with AdamW", AdamWSettings, build)
ADAMW_REC = Method(
    "adamw-rec", "full fine-tuning with AdamW on recommendation alone", AdamWRecSettings, build, variant_of="adamw"
)
ADAMW_SEARCH = Method(
    "adamw-search", "full fine-tuning with AdamW on search alone", AdamWSearchSettings, build, variant_of="adamw"
)
