"""From the folder of a finished run to the rows of the three tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import read_config
from ..run_folder import CONFIG, ENVIRONMENT, METRICS, SAMPLED, SELECTION, RunFolder
from ._settings import identity, label_of, setting_columns

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """What one run adds to the tables.

    Args:
        run: its row of the runs.
        steps: one row a step.
        queries: one row a task and query; none of a trial, whose queries are nobody's test.
    """

    run: Row
    steps: list[Row]
    queries: list[Row]


def rows_of(folder: RunFolder) -> Rows:
    """Read a finished run.

    Raises:
        OSError: if one of its files is missing.
    """
    settings = read_config(folder.file(CONFIG))
    summary = folder.read_json("run.json")
    lines = folder.file("steps.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [{key: _short(value) for key, value in _flat(json.loads(line))} for line in lines]
    columns = {"label": label_of(folder.path, settings), **setting_columns(settings)}
    if not steps:
        columns |= {"lr": None, "item_lr": None}
    name = identity({**columns, "lr": settings["training.lr"]})
    selection = folder.path.parent / SELECTION
    run = {
        "run": name,
        **columns,
        "selection": _compact(selection.read_text(encoding="utf-8")) if steps and selection.is_file() else None,
        "steps": len(steps),
        "trained_tasks": _trained(steps),
        **_environment(folder.read_json(ENVIRONMENT)),
        **_summary(summary),
        **_metrics(folder),
    }
    ranked = [task for task in folder.read_json(METRICS)["final"] if task != "general"]
    tasks = [] if columns["split"] == "valid" else ranked
    queries = [{"run": name, "task": task, **row} for task in tasks for row in _queries(folder, task)]
    return Rows(run, [{"run": name, **step} for step in steps], queries)


def _short(value: Any) -> Any:
    """Four significant digits: single steps are noise beyond them, and the file a quarter smaller."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _trained(steps: list[Row]) -> str | None:
    names = dict.fromkeys(key.removeprefix("loss_") for step in steps for key in step if key.startswith("loss_"))
    return ",".join(sorted(names)) or None


def _flat(record: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Names of nested mappings joined by ``_``, pairs in one order; the diagnostics are at the top."""
    for name, value in record.items():
        key = "|".join(sorted(name.split("|")))
        if isinstance(value, Mapping):
            yield from _flat(value, head if key == "diagnostics" else f"{head}{key}_")
        else:
            yield f"{head}{key}", value


def _environment(found: Mapping[str, Any]) -> Row:
    """All but what names the machine."""
    git = found.get("git") or {}
    return {
        **{key: found.get(key) for key in ("device", "cores", "threads", "precision", "python")},
        "packages": json.dumps(found.get("packages") or {}, sort_keys=True),
        "revision": git.get("revision"),
        "uncommitted_changes": git.get("uncommitted_changes"),
    }


def _summary(found: Mapping[str, Any]) -> Row:
    seconds, peak = found.get("seconds") or {}, found.get("peak_memory") or {}
    throughput = found.get("throughput") or {}
    return {
        "trained_parameters": found.get("trained_parameters"),
        "seconds": sum(seconds.values()),
        "seconds_training": seconds.get("training"),
        **{key: throughput.get(key) for key in ("seconds_per_step", "examples_per_second", "tokens_per_second")},
        "peak_resident": peak.get("resident"),
        "peak_device": peak.get("device"),
        "protected": _mean(found.get("protected")),
        "leak": _mean(found.get("leak")),
        "multiple_choice_questions": (found.get("multiple_choice") or {}).get("questions"),
        **{f"{task}_examples": count for task, count in (found.get("evaluated") or {}).items()},
        **{f"{task}_evaluated_loss": loss for task, loss in (found.get("evaluated_loss") or {}).items()},
    }


def _metrics(folder: RunFolder) -> Row:
    columns: Row = {}
    for file, kind in ((METRICS, ""), (SAMPLED, "sampled_")):
        found = folder.read_json(file)
        for part, suffix in (("zero_shot", "_before"), ("final", "")):
            for task, values in found[part].items():
                head = "" if task == "general" else f"{task}_{kind}"
                columns |= {f"{head}{name}{suffix}": value for name, value in values.items()}
    return columns


def _queries(folder: RunFolder, task: str) -> Iterator[Row]:
    file = folder.file(f"queries.{task}.jsonl")
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(file)!r} is not there, though the run has ranked {task}: the folder is not complete; leave it out, "
            "or remove it and run again"
        )
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"query": row.pop("qid"), **row}


def _mean(by_layer: Mapping[str, float | None] | None) -> float | None:
    known = [float(value) for value in (by_layer or {}).values() if value is not None]
    return sum(known) / len(known) if known else None


def _compact(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)
