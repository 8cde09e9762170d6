"""What a run is made of: the model with its catalogue, prompts, evaluated examples and what measures them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .checking import changed
from .data import Dataset, Example
from .early_stopping import EarlyStopping
from .evaluation import Evaluator, TaskResult, choose_examples
from .feeds import Feed, Plan, plan_training, training_pools
from .fingerprints import Fingerprint
from .general_domain import general_batches, token_windows
from .model import Collator, LanguageModel, PromptBuilder, Ranker, SequenceBuilder
from .precision import Precision
from .processes import current
from .retention import Retention
from .settings import EVALUATION, Settings
from .training import tasks_to_train
from .zero_shot import Measured

VALIDATION_METRIC = "ndcg@10"
"""Its mean over the trained tasks decides when training ends early."""

NULL_SPACE_WINDOW = 256
"""Tokens of a window of general text that the null space is fitted on."""


@dataclass
class Parts:
    """What a run works with.

    Args:
        settings: of the run.
        ranker: the model with the catalogue's rows.
        language_model: the same model with its tokenizer.
        prompts: turns examples into tokens.
        collate: pads them.
        precision: of the forward passes.
        evaluator: ranks the catalogue.
        trained: the tasks that are trained, whatever is evaluated.
        tasks: those that have examples to train and to evaluate.
        valid: trained task -> validation examples, for early stopping.
        evaluated: task -> evaluated examples.
        fit_windows: token ids of general text that the null space is fitted on.
        retention: measures general abilities.
        model: a fingerprint of the model and its catalogue before training.
    """

    settings: Settings
    ranker: Ranker
    language_model: LanguageModel
    prompts: PromptBuilder
    collate: Collator
    precision: Precision
    evaluator: Evaluator
    trained: tuple[str, ...]
    tasks: tuple[str, ...]
    valid: dict[str, list[Example]]
    evaluated: dict[str, list[Example]]
    fit_windows: list[torch.Tensor]
    retention: Retention
    model: str

    @classmethod
    def assemble(
        cls,
        settings: Settings,
        dataset: Dataset,
        language_model: LanguageModel,
        text: tuple[str, str],
        precision: Precision,
    ) -> Parts:
        """Put a loaded data set, model and text together."""
        tasks, evaluated = _evaluated(dataset, settings)
        trained = tasks_to_train(settings.training.tasks, dataset.trainable)
        if settings.evaluation.split == "valid" and not set(trained) & set(tasks):
            raise ValueError(
                f"training.tasks={settings.training.tasks!r}, but the validation examples are of {', '.join(tasks)} "
                "alone: nothing could be chosen by them"
            )
        ranker = Ranker(language_model, dataset.items).to(precision.device)
        tokenizer = language_model.tokenizer
        prompts = prompt_builder(settings, language_model, ranker.first_item)
        if settings.training.gradient_checkpointing:
            ranker.recompute_activations()
        collate = Collator(tokenizer.pad_token_id or 0)
        evaluator = Evaluator(dataset, prompts, collate, precision, settings)
        wanted = getattr(settings.method, "null_space_tokens", 16)
        fit = token_windows(tokenizer, text[0], tokens=wanted, window=NULL_SPACE_WINDOW)
        retention = Retention(language_model, text[1], settings, precision.device)
        return cls(
            settings=settings,
            ranker=ranker,
            language_model=language_model,
            prompts=prompts,
            collate=collate,
            precision=precision,
            evaluator=evaluator,
            trained=trained,
            tasks=tasks,
            valid=choose_examples(dataset.valid, trained, settings.evaluation),
            evaluated=evaluated,
            fit_windows=fit,
            retention=retention,
            model=_fingerprint(ranker),
        )

    def feed(self, dataset: Dataset) -> Feed:
        """Return what a step of training reads."""
        return Feed(training_pools(dataset, self.settings, self.trained), self.collate, self.prompts)

    def plan(self, dataset: Dataset) -> Plan:
        """Return how long training is: as joint training, whose epoch is that of all tasks."""
        return plan_training(self.settings, training_pools(dataset, self.settings, dataset.trainable))

    def general(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Yield batches of general text for the null space."""
        return general_batches(self.language_model, self.fit_windows, self.precision.device)

    def early_stopping(self, path: Path) -> EarlyStopping | None:
        """Return what ends the training early and keeps the best weights at the path, if anything does."""
        if self.settings.training.early_stop is None:
            return None
        empty = [task for task in self.trained if not self.valid[task]]
        if empty:
            raise ValueError(f"early_stop needs validation examples, but {empty} have none; set early_stop to null")
        return EarlyStopping(path, self.settings.training.early_stop, self.validation)

    def validation(self) -> float:
        """Return the mean of the validation metric over the trained tasks."""
        ranked = self.ranked(self.valid, "validation")
        return math.fsum(result.metrics[VALIDATION_METRIC] for result in ranked.values()) / len(ranked)

    def ranked(self, chosen: Mapping[str, list[Example]], name: str) -> dict[str, TaskResult]:
        """Rank the catalogue for some examples, shared out among the processes."""
        processes = current()
        mine = {task: examples[processes.index :: processes.count] for task, examples in chosen.items()}
        total = sum(map(len, mine.values()))
        with tqdm(total=total, desc=f"ranking, {name}", unit="query", disable=not processes.first) as bar:
            found = {task: self.evaluator(self.ranker, examples, bar.update) for task, examples in mine.items()}
        gathered = processes.gather(found)
        return {
            task: TaskResult.joined([each[task] for each in gathered], [example.qid for example in examples])
            for task, examples in chosen.items()
        }

    def on_test(self, dataset: Dataset) -> Parts:
        """The same parts with the test examples to evaluate, which may be of other tasks."""
        settings = changed(self.settings, {"evaluation.split": "test"})
        tasks, evaluated = _evaluated(dataset, settings)
        return replace(self, settings=settings, tasks=tasks, evaluated=evaluated)

    @property
    def intact(self) -> str:
        """What is measured of the intact model, as a hash: the model itself, and all that it reads and is to answer."""
        sections = self.settings.model_dump(include={*EVALUATION, "model"})
        read = {task: self.evaluator.reads(examples) for task, examples in self.evaluated.items()}
        return Fingerprint().add([self.model, str(self.precision), sections, read, self.retention.reads()]).name

    def summary(self) -> dict[str, Any]:
        """Return what is evaluated, as plain values."""
        return {
            "intact": self.intact,
            "tasks": list(self.tasks),
            "evaluated": {task: len(self.evaluated[task]) for task in self.tasks},
            "prompts": {task: self.prompts.text(self.evaluated[task][0]) for task in self.tasks},
        }

    def measure(self, name: str) -> Measured:
        """Rank the evaluated examples and measure what is left of general abilities."""
        return Measured(self.ranked(self.evaluated, name), self.retention.measure(name))


def _evaluated(dataset: Dataset, settings: Settings) -> tuple[tuple[str, ...], dict[str, list[Example]]]:
    split = {"test": dataset.test, "valid": dataset.valid}[settings.evaluation.split]
    tasks = tuple(task for task in dataset.trainable if split[task])
    if not tasks:
        raise ValueError(
            f"{settings.data.source!r} has no task with both training and {settings.evaluation.split} examples; "
            "pass more data"
        )
    return tasks, choose_examples(split, tasks, settings.evaluation)


def _fingerprint(ranker: Ranker) -> str:
    found = Fingerprint().add_model(ranker.lm)
    for number, rows in enumerate(ranker.item_parameters()):
        found.add_tensor(f"items {number}", rows)
    return found.name


def prompt_builder(settings: Settings, language_model: LanguageModel, first_item: int) -> PromptBuilder:
    """Return what turns examples into tokens, by the setting ``model.format``.

    Raises:
        ValueError: if sequences are asked of an encoder-decoder.
    """
    limits = {"max_history": settings.model.max_history, "max_query_tokens": settings.model.max_query_tokens}
    if settings.model.format == "prompt":
        encoder_decoder = language_model.encoder_decoder
        return PromptBuilder(language_model.tokenizer, first_item=first_item, encoder_decoder=encoder_decoder, **limits)
    if language_model.encoder_decoder:
        raise ValueError(
            f"model.format='sequence' predicts behind every item, which the encoder-decoder {settings.model.name!r} "
            "cannot; set it to 'prompt', or take a decoder alone"
        )
    each = settings.training.targets == "each"
    return SequenceBuilder(language_model.tokenizer, first_item=first_item, each=each, **limits)
