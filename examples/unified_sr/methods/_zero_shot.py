"""No training: the language model as it is, with items known by their titles alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Settings, setting
from ._base import Method


@dataclass(frozen=True, kw_only=True)
class ZeroShotSettings(Settings):
    """Nothing of its own; ``steps`` may be given and means nothing."""

    method: str = setting("zero-shot", "name of the training method")
    steps: int = setting(0, "ignored: nothing is trained", minimum=0)


ZERO_SHOT = Method("zero-shot", "the language model as it is", ZeroShotSettings, None)
