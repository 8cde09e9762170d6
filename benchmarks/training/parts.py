"""The parts of a case, each measured in a process of its own unless the config says otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from .config import Case, Config
from .environment import describe_environment
from .memory import measure_memory
from .refresh import measure_refreshes
from .steps import measure_steps

_ROOT: Final = Path(__file__).parents[2]

PARTS: Final[dict[str, Callable[[Config, Case], list[dict[str, Any]]]]] = {
    "steps": measure_steps,
    "refreshes": measure_refreshes,
    "memory": measure_memory,
}


def parts_of(case: Case) -> Iterable[str]:
    """Which parts a case has."""
    return ["steps", *(["refreshes"] if case.refresh else []), *(["memory"] if case.memory else [])]


def measure_here(config: Config, case: Case, part: str) -> dict[str, Any]:
    """Measure a part in this process, as the config says."""
    with as_configured(config):
        environment = describe_environment()
        return {"environment": environment, "found": PARTS[part](config, case)}


@contextmanager
def as_configured(config: Config) -> Iterator[None]:
    """The config's number of threads, and numbers below float32's normal range count as zero.

    Of random weights a softmax is so peaked that most of its gradient lies there, where a CPU's products take many
    times as long. A GPU's do not.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def measure_apart(path: Path, rounds: int, case: Case, part: str) -> dict[str, Any]:
    """Measure a part in a fresh process: nothing that ran before is in its memory or its caches.

    Raises:
        RuntimeError: the process failed; its own message is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.training", "measure", case.name, part, str(out)]
        command += ["--config", str(path.resolve()), "--rounds", str(rounds)]
        status = subprocess.run(command, cwd=_ROOT, check=False).returncode
        if status:
            raise RuntimeError(f"{case.name}: measuring its {part} ended with status {status}")
        return json.loads(out.read_text(encoding="utf-8"))
