"""What the intact model scores before training: measured, or taken over from a run that measured the very same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .alone import alone
from .checkpoint import write_text_whole
from .evaluation import TaskResult
from .report import write_report
from .retention import General
from .run_folder import AFTER, BEFORE, METRICS, SAMPLED, RunFolder


@dataclass
class Measured:
    """What one evaluation found; there are no general abilities without a language model."""

    results: Mapping[str, TaskResult]
    general: General | None = None

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """One half of ``metrics.json``."""
        ranking = {task: result.metrics for task, result in self.results.items()}
        return ranking if self.general is None else {**ranking, "general": self.general.metrics}

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
        questions = measured.general.questions if measured.general else None
        return cls(measured.metrics, measured.sampled, questions.summary if questions else None, seconds)

    def on(self, results: Mapping[str, TaskResult], seconds: float) -> ZeroShot:
        """Return the same model's scores on other examples; what it knows of general text does not depend on these."""
        other = Measured(results)
        return ZeroShot({**other.metrics, "general": self.metrics["general"]}, other.sampled, self.questions, seconds)

    @classmethod
    def taken(cls, path: str | Path, intact: str) -> ZeroShot | None:
        """Read it out of a folder, if that holds a finished run which measured the very same.

        Args:
            path: the folder.
            intact: of ``Parts.intact``.
        """
        folder = RunFolder(path)
        if not folder.finished:
            return None
        summary = folder.read_json("run.json")
        if summary.get("intact") != intact:
            return None
        seconds = max(summary["seconds"].get(phase, 0.0) for phase in (BEFORE, AFTER))
        questions = (summary.get("multiple_choice") or {}).get("zero_shot")
        metrics, sampled = (folder.read_json(name)["zero_shot"] for name in (METRICS, SAMPLED))
        return cls(metrics, sampled, questions, seconds)


def write_results(
    folder: RunFolder, method: str, before: ZeroShot | None, after: Measured, summary: Mapping[str, Any]
) -> None:
    """Write what a run has found, and its report.

    Args:
        folder: with all other files of the run.
        method: its name.
        before: nothing without a language model.
        after: what is left of the model.
        summary: the content of ``run.json``.
    """
    for task, result in after.results.items():
        folder.write_rankings(task, result, method)
    folder.write_json(SAMPLED, {"zero_shot": before.sampled if before else {}, "final": after.sampled})
    folder.write_json("run.json", summary)
    folder.write_json(METRICS, {"zero_shot": before.metrics if before else {}, "final": after.metrics})
    write_report(folder)


@dataclass(frozen=True)
class Shared:
    """A folder with what runs side by side measure of the intact model: the first one does, the others read it.

    Args:
        path: the folder.
    """

    path: Path

    def once(
        self, intact: str, measure: Callable[[], ZeroShot], say: Callable[[str], None], *, again: bool = False
    ) -> ZeroShot:
        """Read the measurement, or make and keep it; who comes in between waits for it.

        Args:
            intact: of ``Parts.intact``.
            measure: makes it.
            say: prints a line to the user.
            again: whether it is made even if it is there, for a run that wants more of it than is kept.
        """
        file = self.path / f"{intact}.json"
        with alone(file.with_suffix(".lock"), "zero-shot", say):
            if file.is_file() and not again:
                say(f"zero-shot: as measured before, {file}")
                return ZeroShot(**json.loads(file.read_text(encoding="utf-8")))
            found = measure()
            write_text_whole(file, json.dumps(asdict(found), indent=1))
            return found
