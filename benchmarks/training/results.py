"""Result files: one a case, written when the case is finished, skipped when it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .config import Case, Config, load

CONFIG_COPY: Final = "config.yaml"


def result_path(folder: Path, case: Case) -> Path:
    """Where a case's result belongs."""
    return folder / f"{case.name}.json"


def is_finished(folder: Path, case: Case, config: Config) -> bool:
    """Whether the case was measured already, with these settings.

    Raises:
        ValueError: it was measured with other settings.
    """
    path = result_path(folder, case)
    if not path.exists():
        return False
    there, wanted = json.loads(path.read_text(encoding="utf-8"))["settings"], config.settings(case)
    if there != json.loads(json.dumps(wanted)):
        raise ValueError(
            f"{path} has other settings ({_difference(there, wanted)}): delete it, or choose another --out"
        )
    return True


def write_result(folder: Path, case: Case, result: Mapping[str, Any]) -> None:
    """Write a finished case; an interrupted write leaves no file of that name."""
    path = result_path(folder, case)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read_results(folder: Path) -> tuple[Config, dict[str, dict[str, Any]]]:
    """The config that was run, and the finished cases' results in its order.

    Raises:
        ValueError: the folder holds no results.
    """
    copy = folder / CONFIG_COPY
    if not copy.exists():
        raise ValueError(f"{folder} holds no {CONFIG_COPY}: it is no folder of results, give the run's --out")
    config = load(copy)
    paths = {case.name: result_path(folder, case) for case in config.cases}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    if not found:
        raise ValueError(f"{folder} holds no finished case; run the benchmark first")
    return config, found


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    wanted = json.loads(json.dumps(wanted))
    keys = sorted(there.keys() | wanted.keys())
    return ", ".join(
        f"{key}: {there.get(key)} -> {wanted.get(key)}" for key in keys if there.get(key) != wanted.get(key)
    )
