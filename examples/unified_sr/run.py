"""One run from settings to report: load, measure, train, measure again, write down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .checkpoint import Checkpoint
from .data import Dataset, Example, format_statistics, load_dataset
from .environment import describe_environment
from .evaluation import Evaluator, TaskResult, choose_examples
from .general_domain import general_batches, token_windows
from .general_text import load_general_text
from .methods import Setup, Updater, method_named
from .model import Collator, LanguageModel, PromptBuilder, Ranker, load_language_model
from .precision import Precision, choose_precision
from .report import write_report
from .retention import General, Retention, retention_summary
from .run_baseline import run_baseline
from .run_folder import CONFIG, METRICS, SAMPLED, RunFolder, State
from .settings import Settings
from .training import History, tasks_to_train, train

NULL_SPACE_WINDOW = 256
"""Tokens of a window of general text that the null space is fitted on."""


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


@dataclass
class Clock:
    """Seconds per phase of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)


def run(settings: Settings, out: str | Path, say: Callable[[str], None] = print) -> RunFolder:
    """Carry out a run, or find that it was carried out already.

    Args:
        settings: the resolved settings.
        out: the run folder; see ``RunFolder.check``.
        say: prints a line to the user.

    Returns:
        The folder with all results.
    """
    folder = RunFolder(out)
    state = folder.check(settings)
    if state is State.FINISHED:
        say(f"{folder.path} holds this very run, finished: its results are reused (remove the folder to run again)")
        return folder
    if state is State.UNFINISHED:
        say(f"{folder.path} holds this run unfinished: it goes on from the last checkpoint, if there is one")
    checkpoint = Checkpoint(folder.file("checkpoint.pt"))
    clock = Clock()
    with clock.phase("loading"):
        precision = choose_precision(settings)
        dataset = load_dataset(
            settings.data,
            min_user_events=settings.min_user_events,
            min_task_events=settings.min_task_events,
            min_item_events=settings.min_item_events,
            item_counts=settings.item_counts,
            max_history=settings.max_history,
            split=settings.split,
            histories=settings.histories,
            searches=settings.searches,
            train_targets=settings.train_targets,
        )
        say(format_statistics(dataset))
    method = method_named(settings.method)
    if method.fit is not None:
        return run_baseline(folder, settings, method, dataset, clock.phase, clock.seconds)
    with clock.phase("loading"):
        text = load_general_text(settings.general_text)
        language_model = load_language_model(settings.model)
        parts = _Parts.assemble(settings, dataset, language_model, text, precision)
        trained = tasks_to_train(settings.train_tasks, parts.tasks)
    folder.start(settings, describe_environment(settings.seed, precision))
    folder.write_json("statistics.json", dataset.statistics())
    say(f"{settings.model} on {precision}; for example: {parts.prompts.text(parts.test[parts.tasks[0]][0])}")
    with clock.phase("zero-shot evaluation"):
        before = parts.measure("zero-shot")
    updater, history = None, History()
    after, leak = before, {}
    if method.build is not None and settings.steps > 0:
        with clock.phase("preparation"):
            intact = parts.retention.intact_layers(parts.ranker.backbone)
            torch.manual_seed(settings.seed)
            updater = method.build(Setup(parts.ranker, settings, trained, parts.general, say))
        with clock.phase("training"):
            history = train(
                parts.ranker,
                updater,
                {task: dataset.train[task] for task in trained},
                parts.prompts,
                parts.collate,
                precision,
                settings,
                folder.file("steps.jsonl"),
                checkpoint,
            )
        with clock.phase("final evaluation"):
            after = parts.measure(settings.method)
            leak = intact.leak() if intact else {}
    else:
        folder.file("steps.jsonl").write_text("", encoding="utf-8")
    for task, result in after.results.items():
        folder.write_rankings(task, result, settings.method)
    folder.write_json(SAMPLED, {"zero_shot": before.sampled, "final": after.sampled})
    retained = retention_summary(before.general, after.general, leak)
    folder.write_json("run.json", {**_summary(parts, updater, history, clock), **retained})
    folder.write_json(METRICS, {"zero_shot": before.metrics, "final": after.metrics})
    write_report(folder)
    checkpoint.remove()
    return folder


def _summary(parts: _Parts, updater: Updater | None, history: History, clock: Clock) -> dict[str, Any]:
    return {
        "tasks": list(parts.tasks),
        "evaluated": {task: len(parts.test[task]) for task in parts.tasks},
        "prompts": {task: parts.prompts.text(parts.test[task][0]) for task in parts.tasks},
        "trained_parameters": sum(weight.numel() for weight in parts.ranker.parameters() if weight.requires_grad)
        if updater
        else 0,
        "notes": list(updater.notes) if updater else [],
        "throughput": history.throughput,
        "seconds": clock.seconds,
        "protected": dict(history.last.protected) if history.last else {},
        # Diagnostics of a layer without a gradient are NaN, which JSON does not know.
        "layers": json.loads(json.dumps(history.last.full), parse_constant=lambda _: None) if history.last else {},
    }


@dataclass
class _Parts:
    ranker: Ranker
    language_model: LanguageModel
    prompts: PromptBuilder
    collate: Collator
    precision: Precision
    evaluator: Evaluator
    tasks: tuple[str, ...]
    test: dict[str, list[Example]]
    fit_windows: list[torch.Tensor]
    retention: Retention

    @classmethod
    def assemble(
        cls,
        settings: Settings,
        dataset: Dataset,
        language_model: LanguageModel,
        text: tuple[str, str],
        precision: Precision,
    ) -> _Parts:
        tasks = tuple(task for task in dataset.tasks if dataset.train[task] and dataset.test[task])
        if not tasks:
            raise ValueError(f"{settings.data!r} has no task with both training and test examples; pass more data")
        ranker = Ranker(language_model, dataset.items).to(precision.device)
        tokenizer = language_model.tokenizer
        prompts = PromptBuilder(
            tokenizer,
            first_item=ranker.first_item,
            encoder_decoder=language_model.encoder_decoder,
            max_history=settings.max_history,
            max_query_tokens=settings.max_query_tokens,
        )
        collate = Collator(tokenizer.pad_token_id or 0)
        evaluator = Evaluator(
            dataset,
            prompts,
            collate,
            precision,
            budget=settings.eval_tokens,
            negatives=settings.negatives,
            seed=settings.seed,
        )
        test = {task: choose_examples(dataset.test[task], settings.eval_users, settings.seed) for task in tasks}
        wanted = getattr(settings, "null_space_tokens", 16)
        fit = token_windows(tokenizer, text[0], tokens=wanted, window=NULL_SPACE_WINDOW)
        retention = Retention(language_model, text[1], settings, precision.device)
        return cls(ranker, language_model, prompts, collate, precision, evaluator, tasks, test, fit, retention)

    def general(self) -> Iterator[Mapping[str, torch.Tensor]]:
        return general_batches(self.language_model, self.fit_windows, self.precision.device)

    def measure(self, name: str) -> Measured:
        results: dict[str, TaskResult] = {}
        with tqdm(total=sum(map(len, self.test.values())), desc=f"ranking, {name}", unit="query") as bar:
            for task, examples in self.test.items():
                results[task] = self.evaluator(self.ranker, examples, bar.update)
        return Measured(results, self.retention.measure(name))


def describe_result(folder: RunFolder) -> str:
    """Return where the results of a run lie, for the end of the command."""
    plots = sorted(path.name for path in folder.path.glob("*.png"))
    return "\n".join(
        [
            f"report: {folder.file('report.md')}",
            f"plots:  {folder.path} ({', '.join(plots)})" if plots else "plots:  none, since nothing was trained",
            f"files:  {CONFIG}, {METRICS}, TREC runs and qrels, steps.jsonl",
        ]
    )
