"""All that is measured of a model's general abilities, before and after training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..general_domain import Perplexity, general_batches, perplexity, token_windows
from ..model import LanguageModel
from ..settings import Settings
from ._leak import IntactLayers
from ._multiple_choice import Accuracy, Question, answer_questions, load_questions

LEAK_WINDOW = 128
"""Tokens of a window of held-out general text that the layers' leak is measured on."""


@dataclass(frozen=True)
class General:
    """What one measurement found.

    Args:
        perplexity: on held-out general text.
        questions: the answers to multiple-choice questions, if any were asked.
    """

    perplexity: Perplexity
    questions: Accuracy | None

    @property
    def metrics(self) -> dict[str, float]:
        """The part ``general`` of ``metrics.json``."""
        return {"perplexity": self.perplexity.value, **(self.questions.metrics if self.questions else {})}


class Retention:
    """Measures the same things again and again.

    Args:
        language_model: before, during or after training.
        text: held-out general text.
        settings: of the run.
        device: where the model is.

    Raises:
        FileNotFoundError: if there is no file of questions where one was named.
        ValueError: if it cannot be read, or the text is too short.
    """

    def __init__(self, language_model: LanguageModel, text: str, settings: Settings, device: torch.device) -> None:
        self._language_model = language_model
        self._device = device
        self._budget = settings.model.inference_tokens
        self._windows = token_windows(
            language_model.tokenizer,
            text,
            tokens=settings.evaluation.perplexity_tokens,
            window=settings.evaluation.perplexity_window,
        )
        self._leak_windows: list[torch.Tensor] = []
        if settings.training.leak_tokens:
            self._leak_windows = token_windows(
                language_model.tokenizer, text, tokens=settings.training.leak_tokens, window=LEAK_WINDOW
            )
        self._questions: list[Question] = []
        if settings.evaluation.multiple_choice is not None:
            self._questions = load_questions(
                settings.evaluation.multiple_choice, settings.evaluation.multiple_choice_questions
            )

    def measure(self, name: str) -> General:
        """Measure perplexity and ask the questions; ``name`` says in the progress bar of what."""
        found = perplexity(self._language_model, self._windows, self._device)
        return General(found, self._answers(name) if self._questions else None)

    def reads(self) -> list[Any]:
        """Return all that is read in a measurement, as plain values."""
        return [[window.tolist() for window in self._windows], [asdict(question) for question in self._questions]]

    def intact_layers(self, backbone: nn.Module) -> IntactLayers | None:
        """Record the layers before they are trained, if their leak is to be measured."""
        if not self._leak_windows:
            return None
        return IntactLayers(backbone, general_batches(self._language_model, self._leak_windows, self._device))

    def _answers(self, name: str) -> Accuracy:
        total = sum(len(question.choices) for question in self._questions)
        with tqdm(total=total, desc=f"questions, {name}", unit="choice") as bar:
            return answer_questions(
                self._language_model, self._questions, self._device, budget=self._budget, progress=bar.update
            )


def retention_summary(before: Mapping[str, float] | None, after: General, leak: Mapping[str, float]) -> dict[str, Any]:
    """Return the part of ``run.json`` about general abilities.

    Args:
        before: the summary of the intact model's answers to questions, if any were asked.
        after: what training left.
        leak: of each layer; one that is not finite becomes ``None``.
    """
    found: dict[str, Any] = {
        "perplexity_tokens": after.perplexity.tokens,
        "leak": {name: value if math.isfinite(value) else None for name, value in leak.items()},
    }
    if before and after.questions:
        found["multiple_choice"] = {
            "questions": len(after.questions.raw),
            "zero_shot": dict(before),
            "final": after.questions.summary,
        }
    return found
