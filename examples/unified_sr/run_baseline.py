"""The run of a method without a language model: fit, rank, write down; the same files as any other run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .data import Dataset, Example
from .environment import describe_environment
from .evaluation import choose_examples, rank_catalogue
from .memory import peak_memory, reset_peak_memory
from .methods import Fitted, Method
from .precision import Precision
from .run_folder import AFTER, RunFolder
from .settings import Settings
from .training import tasks_to_train
from .zero_shot import Measured, write_results

_CPU = torch.device("cpu")
BATCH = 256
"""Examples that are scored together."""


def run_baseline(
    folder: RunFolder,
    settings: Settings,
    method: Method,
    dataset: Dataset,
    phase: Callable[[str], AbstractContextManager[None]],
    seconds: Mapping[str, float],
) -> RunFolder:
    """Carry out a run of a method with ``fit``.

    Nothing is measured before, since there is no model before: ``zero_shot`` is empty in the metrics, and tasks that
    the method cannot serve are in neither half.

    Args:
        folder: where results go.
        settings: of the method.
        method: has a ``fit``.
        dataset: what to fit and rank.
        phase: measures the time spent in a phase.
        seconds: the times measured so far, and from ``phase``.

    Raises:
        ValueError: if the data has no test example of a task that the method serves.
    """
    if method.fit is None:
        raise ValueError(f"the method {method.name!r} needs a language model: run it with run()")
    split = {"test": dataset.test, "valid": dataset.valid}[settings.evaluation.split]
    tasks = tuple(task for task in dataset.trainable if split[task])
    trained = tasks_to_train(settings.training.tasks, dataset.trainable)
    reset_peak_memory(_CPU)
    with phase("preparation"):
        fitted = method.fit(settings, dataset, [example for task in trained for example in dataset.train[task]])
    test = choose_examples(split, [task for task in tasks if task in fitted.scores], settings.evaluation)
    if not test:
        raise ValueError(
            f"{settings.data.source!r} has no {settings.evaluation.split} example of what {method.name!r} serves; pass "
            "other data"
        )
    folder.start(settings, describe_environment(settings.seed, Precision(fitted.device, None)))
    folder.write_json("statistics.json", dataset.statistics())
    folder.file("steps.jsonl").write_text("", encoding="utf-8")
    with phase(AFTER):
        results = {
            task: rank_catalogue(dataset, examples, _batches(fitted.scores[task], examples), settings.evaluation)
            for task, examples in test.items()
        }
    summary = {**_summary(test, fitted, seconds), "peak_memory": peak_memory(fitted.device)}
    write_results(folder, method.name, None, Measured(results), summary)
    return folder


def _batches(
    scores: Callable[[Sequence[Example]], Tensor], examples: Sequence[Example]
) -> Iterator[tuple[range, Tensor]]:
    for start in range(0, len(examples), BATCH):
        batch = range(start, min(start + BATCH, len(examples)))
        yield batch, scores([examples[index] for index in batch])


def _summary(test: Mapping[str, Sequence[Example]], fitted: Fitted, seconds: Mapping[str, float]) -> dict[str, Any]:
    return {
        "tasks": list(test),
        "evaluated": {task: len(examples) for task, examples in test.items()},
        "prompts": {},
        "perplexity_tokens": 0,
        "trained_parameters": fitted.weights,
        "notes": list(fitted.notes),
        "throughput": {},
        "seconds": dict(seconds),
        "protected": {},
        "layers": {},
    }
