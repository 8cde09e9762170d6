"""Full fine-tuning: AdamW on every weight of the layers, the strongest learner and the most forgetful."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import AdamW

from ..settings import Settings, setting
from ._base import Method, MixedLossUpdater, Setup, Updater, item_group, model_parameters, parameter_groups, train_only


@dataclass(frozen=True, kw_only=True)
class AdamWSettings(Settings):
    """Nothing of its own."""

    method: str = setting("adamw", "name of the training method")


def build(setup: Setup[AdamWSettings]) -> Updater:
    """Train all layers with AdamW on the mixed batch."""
    weights = model_parameters(setup.ranker)
    train_only(setup.ranker, weights)
    optimizer = AdamW([*parameter_groups(weights, setup.settings), item_group(setup.ranker, setup.settings)])
    note = "All weights of the layers are trained; the embedding of words and the vocabulary head are frozen."
    return MixedLossUpdater(optimizer, [note], setup.settings.grad_clip)


ADAMW = Method("adamw", "full fine-tuning with AdamW", AdamWSettings, build)
