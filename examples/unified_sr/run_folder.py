"""The folder that a run leaves behind, and whether one may be written."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from .checkpoint import write_text_whole
from .config import differences, read_config, to_yaml
from .evaluation import TaskResult
from .settings import Settings
from .trec import write_qrels, write_run

CONFIG, ENVIRONMENT, DONE = "config.yaml", "environment.json", "report.md"
METRICS, SAMPLED = "metrics.json", "metrics.sampled.json"
SELECTION = "selection.json"
"""The file beside a grid's runs of a method that says how its rate was chosen."""
BEFORE, AFTER = "zero-shot evaluation", "final evaluation"
"""What a run calls its evaluations under ``seconds`` of ``run.json``."""


PARTIAL = ".partial"
"""Behind the name of a folder or file that is being filled; one that is left over is no run."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a folder to fill that then takes its place, and that of what is there: as a whole or not at all."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


class State(Enum):
    """What a folder holds."""

    NEW = "nothing"
    UNFINISHED = "a run with the same settings that did not finish"
    FINISHED = "a finished run with the same settings"


class RunFolder:
    """Reads and writes a run's files.

    Args:
        path: the folder, which need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check(self, settings: Settings) -> State:
        """Tell whether a run with these settings can be, or has been, written here; changes nothing.

        Raises:
            FileExistsError: if the folder holds another run's results, naming the settings that differ, or holds
                something that is no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"the output {str(self.path)!r} is a file; pass a folder with --out")
        if not self.path.exists() or all(file.suffix == PARTIAL for file in self.path.iterdir()):
            return State.NEW  # or what one left that was killed as it began
        if not (self.path / CONFIG).is_file():
            raise FileExistsError(
                f"the output folder {str(self.path)!r} is not empty and holds no run (no {CONFIG}); pass another "
                "folder with --out"
            )
        changed = differences(read_config(self.path / CONFIG), settings)
        if changed:
            raise FileExistsError(
                f"the output folder {str(self.path)!r} holds another run's results, whose settings differ: "
                f"{'; '.join(changed)}. Pass another folder with --out, or remove this one"
            )
        return State.FINISHED if self.finished else State.UNFINISHED

    @property
    def finished(self) -> bool:
        """Whether it holds all results of a run, whatever its settings."""
        return self.file(DONE).is_file() and self.file(METRICS).is_file()

    def file(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.path / name

    def start(self, settings: Settings, environment: dict[str, Any]) -> None:
        """Make the folder with the settings and the environment in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        # What an interrupted run left would otherwise pass for this run's.
        for name in (DONE, METRICS, SAMPLED):
            self.file(name).unlink(missing_ok=True)
        if not self.file(CONFIG).is_file():  # ``check`` has compared it otherwise
            write_text_whole(self.file(CONFIG), to_yaml(settings).rstrip("\n"))
        self.write_json(ENVIRONMENT, environment)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.file(name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def read_json(self, name: str) -> Any:
        """Read a JSON file."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def write_rankings(self, task: str, result: TaskResult, tag: str) -> None:
        """Write a task's TREC files and its values per query."""
        write_run(self.file(f"run.{task}.trec"), result.rankings, tag=tag)
        write_qrels(self.file(f"qrels.{task}.trec"), result.relevant)
        with self.file(f"queries.{task}.jsonl").open("w", encoding="utf-8") as file:
            for qid, values in result.per_query.items():
                file.write(json.dumps({"qid": qid, **values}, ensure_ascii=False) + "\n")
