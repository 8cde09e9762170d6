"""No training: the language model as it is, with items known by their titles alone."""

from __future__ import annotations

from ..settings import MethodSettings
from ._base import Method

ZERO_SHOT = Method("zero-shot", "the language model as it is", MethodSettings, None, defaults={"training.steps": 0})
