"""What the intact model scores before training: measured, or taken over from a finished run that evaluated alike."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from .config import read_yaml
from .evaluation import TaskResult
from .retention import General
from .run_folder import AFTER, BEFORE, CONFIG, METRICS, SAMPLED, RunFolder
from .settings import Settings

_OF_TRAINING = frozenset(
    {
        *("method", "steps", "epochs", "early_stop", "seed", "train_tasks", "batch_size"),
        *("accumulation", "gradient_checkpointing", "lr", "item_lr", "warmup", "weight_decay", "grad_clip"),
        *("leak_tokens", "checkpoint_every", "report_every"),
    }
)
"""Settings that change nothing for a model that is not trained."""


@dataclass
class Measured:
    """What one evaluation found."""

    results: dict[str, TaskResult]
    general: General

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """One half of ``metrics.json``."""
        ranking = {task: result.metrics for task, result in self.results.items()}
        return {**ranking, "general": self.general.metrics}

    @property
    def sampled(self) -> dict[str, dict[str, float]]:
        """The same among sampled negatives, without general text."""
        return {task: result.sampled for task, result in self.results.items()}


@dataclass(frozen=True)
class ZeroShot:
    """The intact model's scores, as the files of a run hold them.

    Args:
        metrics: the part ``zero_shot`` of ``metrics.json``.
        sampled: that of ``metrics.sampled.json``.
        questions: that of ``multiple_choice`` in ``run.json``, if questions were asked.
        seconds: an evaluation took.
    """

    metrics: dict[str, dict[str, float]]
    sampled: dict[str, dict[str, float]]
    questions: dict[str, float] | None
    seconds: float

    @classmethod
    def of(cls, measured: Measured, seconds: float) -> ZeroShot:
        """Keep what the files need."""
        questions = measured.general.questions
        return cls(measured.metrics, measured.sampled, questions.summary if questions else None, seconds)

    @classmethod
    def read(cls, path: str | Path) -> ZeroShot:
        """Read it out of a finished run with a language model."""
        folder = RunFolder(path)
        summary = folder.read_json("run.json")
        seconds = max(summary["seconds"].get(phase, 0.0) for phase in (BEFORE, AFTER))
        questions = (summary.get("multiple_choice") or {}).get("zero_shot")
        metrics, sampled = (folder.read_json(name)["zero_shot"] for name in (METRICS, SAMPLED))
        return cls(metrics, sampled, questions, seconds)


def evaluates_alike(path: str | Path, settings: Settings) -> bool:
    """Tell whether a folder holds a finished run that measured the same intact model on the same examples.

    All settings but those of training have to agree, so a setting that is not known to be one of these counts.
    """
    folder = RunFolder(path)
    if not folder.finished or not folder.read_json(METRICS)["zero_shot"]:
        return False
    written = read_yaml(folder.file(CONFIG))
    names = [item.name for item in fields(Settings) if item.name not in _OF_TRAINING]
    return all(name in written and written[name] == getattr(settings, name) for name in names)
