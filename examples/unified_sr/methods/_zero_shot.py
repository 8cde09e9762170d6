"""No training: the language model as it is, with items known by their titles alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Settings, setting
from ._base import Method


@dataclass(frozen=True, kw_only=True)
class ZeroShotSettings(Settings):
    """Nothing of its own."""

    method: str = setting("zero-shot", "name of the training method")
    steps: int = setting(0, "optimizer steps, of which there are none", minimum=0, maximum=0)


ZERO_SHOT = Method("zero-shot", "the language model as it is", ZeroShotSettings, None)
