"""Run all cases of a config that are not finished yet."""

from __future__ import annotations

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .config import Case, Config, load
from .contenders import unavailable
from .parts import measure_apart, measure_here, parts_of
from .results import CONFIG_COPY, is_finished, write_result


def run(path: Path, out: Path, rounds: int | None = None, only: str = "*") -> list[str]:
    """Measure and write what is missing.

    Args:
        path: the config.
        out: the folder of the result files.
        rounds: instead of the config's.
        only: a pattern that the cases' names have to match.

    Returns:
        the names of cases that failed; the others are finished.
    """
    config = load(path, rounds)
    cases = [case for case in config.cases if fnmatch(case.name, only)]
    if not cases:
        raise ValueError(f"--only {only!r} matches no case; there are {[case.name for case in config.cases]}")
    finished = {case.name: is_finished(out, case, config) for case in cases}
    out.mkdir(parents=True, exist_ok=True)
    if path.resolve() != (out / CONFIG_COPY).resolve():
        shutil.copyfile(path, out / CONFIG_COPY)
    failed = []
    for case in cases:
        if finished[case.name]:
            print(f"{case.name}: finished, its result is kept", flush=True)
            continue
        print(f"{case.name}: {len(case.methods)} methods", flush=True)
        try:
            write_result(out, case, _measure(path, config, case))
        except RuntimeError as error:
            # One case that fails must not take the hours of the others with it; the command's status tells.
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed.append(case.name)
    return failed


def _measure(path: Path, config: Config, case: Case) -> dict[str, Any]:
    missing = unavailable(case.methods)
    for name, reason in missing.items():
        print(f"  {name} is unavailable: {reason}", flush=True)
    result: dict[str, Any] = {"settings": config.settings(case), "unavailable": missing}
    for part in parts_of(case):
        if config.fresh_process:
            measured = measure_apart(path, config.rounds_of(case), case, part)
        else:
            measured = measure_here(config, case, part)
        result.setdefault("environment", measured["environment"])
        result[part] = measured["found"]
        print(f"  {part} measured", flush=True)
    return result
