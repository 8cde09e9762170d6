"""Full fine-tuning with gradient surgery: AdamW on what PCGrad or CAGrad makes of the tasks' whole gradients."""

from __future__ import annotations

from functools import partial

from pydantic import Field
from torch import Tensor

from gradsub.surgery import cagrad, pcgrad

from ..settings import MethodSettings, Number
from ._adamw import full_fine_tuning
from ._base import Method, Setup, Updater

_ITEMS = (
    "The items' rows, embedding and classifier of both tasks, take the plain gradient of the mixed batch, as in every "
    "other method."
)


class CAGradSettings(MethodSettings):
    """The radius; the rates are those of plain AdamW, whose step it is with radius 0."""

    radius: Number = Field(0.5, ge=0, description="c of the paper: how far the step may leave the mean gradient")


def build_pcgrad(setup: Setup[MethodSettings]) -> Updater:
    """Train all layers on the gradients without what opposes another task."""
    note = "The tasks' gradients of all these weights, taken as one vector, are combined by PCGrad before AdamW. "
    return full_fine_tuning(setup, [note + _ITEMS], pcgrad)


def build_cagrad(setup: Setup[CAGradSettings]) -> Updater:
    """Train all layers on the gradient near the mean that serves the worst-served task most."""
    note = (
        f"The tasks' gradients of all these weights, taken as one vector, are combined by CAGrad (c = "
        f"{setup.settings.method.radius:g}) before AdamW. "
    )
    return full_fine_tuning(setup, [note + _ITEMS], partial(_cagrad_sum, radius=setup.settings.method.radius))


def _cagrad_sum(gramian: Tensor, radius: float) -> Tensor:
    """CAGrad's weights in the size of the tasks' sum, which is the gradient of the mixed batch, not of their mean."""
    return len(gramian) * cagrad(gramian, c=radius)


METHODS = (
    Method(
        "pcgrad", "AdamW on the tasks' gradients combined by PCGrad", MethodSettings, build_pcgrad, variant_of="adamw"
    ),
    Method(
        "cagrad", "AdamW on the tasks' gradients combined by CAGrad", CAGradSettings, build_cagrad, variant_of="adamw"
    ),
)
