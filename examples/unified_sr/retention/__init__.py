"""What training left of the model's general abilities: perplexity, answers to questions, and the layers' outputs."""

from __future__ import annotations

from ._leak import IntactLayers
from ._measure import General, Retention, retention_summary
from ._multiple_choice import Accuracy, answer_questions
from ._questions import Question, load_questions

__all__ = [
    "Accuracy",
    "General",
    "IntactLayers",
    "Question",
    "Retention",
    "answer_questions",
    "load_questions",
    "retention_summary",
]
