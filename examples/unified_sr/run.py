"""One run from settings to report: load, measure, train, measure again, write down."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .busy import busy_notice, own_load
from .checking import changed
from .checkpoint import Checkpoint
from .data import Dataset, Example, format_statistics, load_dataset
from .early_stopping import EarlyStopping
from .environment import describe_environment
from .estimates import TimeNotice, estimate_memory, row_size
from .evaluation import Evaluator, TaskResult, choose_examples
from .feeds import Feed, PromptFeed, SequenceFeed, training_pools
from .general_domain import general_batches, token_windows
from .general_text import load_general_text
from .interruption import Interrupted
from .methods import Setup, Updater, method_named
from .model import Collator, LanguageModel, PromptBuilder, Ranker, SequenceBuilder, load_language_model
from .peak_memory import free_memory, peak_memory, reset_peak_memory
from .plan import plan_training
from .precision import Precision, choose_precision
from .processes import current
from .report import write_report
from .retention import Retention, retention_summary
from .run_baseline import run_baseline
from .run_folder import AFTER, BEFORE, CONFIG, METRICS, SAMPLED, RunFolder, State
from .sealed import seal
from .settings import Settings
from .training import History, tasks_to_train, train
from .zero_shot import Measured, Shared, ZeroShot

VALIDATION_METRIC = "ndcg@10"
"""Its mean over the tasks decides when training ends early."""

NULL_SPACE_WINDOW = 256
"""Tokens of a window of general text that the null space is fitted on."""


UNSEEN_BEFORE, UNSEEN_AFTER = f"{BEFORE}, test split", f"{AFTER}, test split"
_UNSEEN = {UNSEEN_BEFORE: BEFORE, UNSEEN_AFTER: AFTER}


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

    def of_unseen(self) -> dict[str, float]:
        """The seconds of the run on the test split that was measured in the same process."""
        others = {name: taken for name, taken in self.seconds.items() if name not in (BEFORE, AFTER, *_UNSEEN)}
        return {**others, **{name: self.seconds[key] for key, name in _UNSEEN.items() if key in self.seconds}}


def run(
    settings: Settings,
    out: str | Path,
    say: Callable[[str], None] = print,
    *,
    zero_shot: str | Path | None = None,
    further: Sequence[str] = (),
    measured: Shared | None = None,
    sealing: bool = False,
) -> RunFolder:
    """Carry out a run, or find that it was carried out already.

    Args:
        settings: the resolved settings.
        out: the run folder; see ``RunFolder.check``. Of several processes the first one writes it, and all read it.
        say: prints a line to the user.
        zero_shot: a finished run that evaluated alike (``evaluates_alike``), whose measurement of the intact model is
            taken over; without it, and where nothing is trained, it is measured.
        further: names of methods that the same command runs after this one, for its estimate of the time.
        measured: where runs side by side keep what they measure of the intact model.
        sealing: whether a run on the validation split also leaves its evaluation on the test split, see ``sealed``.

    Returns:
        The folder with all results.
    """
    processes = current()
    if not processes.first:
        # Everything is written once; what this process would write as well goes where nobody looks.
        with tempfile.TemporaryDirectory() as elsewhere:
            nobody: Callable[[str], None] = lambda line: None  # noqa: E731
            return _run(settings, RunFolder(out), RunFolder(elsewhere), nobody, zero_shot, further, measured, sealing)
    return _run(settings, RunFolder(out), RunFolder(out), say, zero_shot, further, measured, sealing)


def _run(
    settings: Settings,
    shared: RunFolder,
    folder: RunFolder,
    say: Callable[[str], None],
    zero_shot: str | Path | None,
    further: Sequence[str],
    measured: Shared | None,
    sealing: bool,
) -> RunFolder:
    processes = current()
    state = processes.of_first(lambda: shared.check(settings))
    if state is State.FINISHED:
        say(f"{folder.path} holds this very run, finished: its results are reused (remove the folder to run again)")
        return folder
    if state is State.UNFINISHED:
        say(f"{folder.path} holds this run unfinished: it goes on from the last checkpoint, if there is one")
    # What ran before in this process counts in the load as well.
    busy = busy_notice(own_load() if zero_shot else 0.0)
    if busy is not None:
        say(busy)
    checkpoint = Checkpoint(shared.file("checkpoint.pt"))
    clock = Clock()
    precision = choose_precision(settings.model)
    with clock.phase("loading"):
        dataset = load_dataset(**data_arguments(settings))
        say(format_statistics(dataset))
    method = method_named(settings.method.name)
    if method.fit is not None:
        if not processes.first:
            return folder  # nothing to share out
        return run_baseline(folder, settings, method, dataset, clock.phase, clock.seconds)
    with clock.phase("loading"):
        text = load_general_text(settings.evaluation.general_text)
        language_model = load_language_model(settings.model.name)
        parts = _Parts.assemble(settings, dataset, language_model, text, precision)
        trained = tasks_to_train(settings.training.tasks, parts.tasks)
        feed = parts.feed(dataset, trained)
    plan = plan_training(settings, feed.pools)
    folder.start(settings, describe_environment(settings.seed, precision))
    folder.write_json("statistics.json", dataset.statistics())
    say(f"{settings.model.name} on {precision}; for example: {parts.prompts.text(parts.evaluated[parts.tasks[0]][0])}")
    build = method.build if plan.steps > 0 else None
    unseen = parts.on_test(dataset, say) if sealing and build is not None else None
    after: Measured

    def measure() -> ZeroShot:
        nonlocal after
        with clock.phase(BEFORE):
            after = parts.measure("zero-shot")
        return ZeroShot.of(after, clock.seconds[BEFORE])

    if build is not None and zero_shot is not None:
        before = processes.of_first(lambda: ZeroShot.read(zero_shot))
        say(f"zero-shot: as measured in {zero_shot}")
    elif measured is not None:
        before = measured.once(settings, measure, say, again=build is None)
    else:
        before = measure()
    if unseen is not None:
        before_unseen = _measure_unseen(unseen, before, clock, measured, say)
    updater, history, leak = None, History(), {}
    stopping = parts.early_stopping(shared.file("best.pt"))
    # Loading may take more than training, and would hide what a method takes.
    reset_peak_memory(precision.device)
    peak = peak_memory(precision.device)
    if build is not None:
        with clock.phase("preparation"):
            intact = parts.retention.intact_layers(parts.ranker.backbone)
            torch.manual_seed(settings.seed)
            updater = build(Setup(parts.ranker, settings, trained, parts.general, say))
            _say_memory(parts, updater, feed, say)
        with clock.phase("training"):
            history = train(
                parts.ranker,
                updater,
                feed,
                precision,
                settings,
                folder.file("steps.jsonl"),
                checkpoint,
                stopping=stopping,
                watch=TimeNotice(plan.steps, before.seconds, say, further),
            )
        peak = peak_memory(precision.device)
        try:
            with clock.phase(AFTER):
                after = parts.measure(settings.method.name)
                leak = intact.leak() if intact else {}
            if unseen is not None:
                with clock.phase(UNSEEN_AFTER):
                    after_unseen = Measured(unseen.ranked(unseen.evaluated, "test"), after.general)
        except Interrupted:
            checkpoint.renew()
            raise
    else:
        folder.file("steps.jsonl").write_text("", encoding="utf-8")
    if not processes.first:
        return folder  # the first one writes, and takes away what is done with
    weights = sum(weight.numel() for weight in parts.ranker.parameters() if weight.requires_grad) if updater else 0
    summary = {"trained_parameters": weights, **_summary(updater, history, clock, peak)}
    if unseen is not None:

        def write(sealed: RunFolder) -> None:
            sealed.start(unseen.settings, describe_environment(settings.seed, precision))
            for name in ("statistics.json", "steps.jsonl"):
                shutil.copy(folder.file(name), sealed.path)
            _write_results(sealed, unseen, before_unseen, after_unseen, leak, {**summary, "seconds": clock.of_unseen()})

        seal(folder, write)
    _write_results(folder, parts, before, after, leak, summary)
    checkpoint.remove()
    if stopping is not None:
        stopping.remove()
    return folder


def _measure_unseen(
    unseen: _Parts, before: ZeroShot, clock: Clock, measured: Shared | None, say: Callable[[str], None]
) -> ZeroShot:
    def measure() -> ZeroShot:
        with clock.phase(UNSEEN_BEFORE):
            results = unseen.ranked(unseen.evaluated, "zero-shot, test")
        return before.on(results, clock.seconds[UNSEEN_BEFORE])

    return measure() if measured is None else measured.once(unseen.settings, measure, say)


def _write_results(
    folder: RunFolder,
    parts: _Parts,
    before: ZeroShot,
    after: Measured,
    leak: Mapping[str, float],
    summary: Mapping[str, Any],
) -> None:
    for task, result in after.results.items():
        folder.write_rankings(task, result, parts.settings.method.name)
    folder.write_json(SAMPLED, {"zero_shot": before.sampled, "final": after.sampled})
    retained = retention_summary(before.questions, after.general, leak)
    losses = {task: result.loss for task, result in after.results.items()}
    folder.write_json("run.json", {**parts.summary(), **summary, "evaluated_loss": losses, **retained})
    folder.write_json(METRICS, {"zero_shot": before.metrics, "final": after.metrics})
    write_report(folder)


def _say_memory(parts: _Parts, updater: Updater, feed: Feed, say: Callable[[str], None]) -> None:
    rows, autocast = row_size(feed.pools, feed.size), parts.precision.autocast is not None
    training, tasks = parts.settings.training, len(tasks_to_train(parts.settings.training.tasks, parts.tasks))
    memory = estimate_memory(parts.ranker, updater.optimizer, training, rows, tasks=tasks, autocast=autocast)
    free = free_memory(parts.precision.device)
    say(f"memory: training takes {memory}, an estimate; {free / 2**30:.1f} GiB are free on {parts.precision.device}")
    if memory.total > free:
        say(
            "the estimate exceeds what is free: raise training.accumulation, set training.gradient_checkpointing, or "
            "lower training.batch_size"
        )


def data_arguments(settings: Settings) -> dict[str, Any]:
    """Return what decides the data set of a run: the arguments of ``load_dataset``."""
    return {
        **settings.data.model_dump(),
        "max_history": settings.model.max_history,
        "train_targets": settings.training.targets,
    }


def _summary(
    updater: Updater | None,
    history: History,
    clock: Clock,
    peak: dict[str, int | None],
) -> dict[str, Any]:
    return {
        "notes": list(updater.notes) if updater else [],
        "steps": len(history.records),
        "validation": history.validation,
        "throughput": history.throughput,
        "seconds": clock.seconds,
        "peak_memory": peak,
        "protected": dict(history.last.protected) if history.last else {},
        # Diagnostics of a layer without a gradient are NaN, which JSON does not know.
        "layers": json.loads(json.dumps(history.last.full), parse_constant=lambda _: None) if history.last else {},
    }


@dataclass
class _Parts:
    settings: Settings
    ranker: Ranker
    language_model: LanguageModel
    prompts: PromptBuilder
    collate: Collator
    precision: Precision
    evaluator: Evaluator
    tasks: tuple[str, ...]
    train: Mapping[str, Sequence[Example]]
    valid: dict[str, list[Example]]
    evaluated: dict[str, list[Example]]
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
        split = {"test": dataset.test, "valid": dataset.valid}[settings.evaluation.split]
        tasks = tuple(task for task in dataset.tasks if dataset.train[task] and split[task])
        if not tasks:
            raise ValueError(
                f"{settings.data.source!r} has no task with both training and {settings.evaluation.split} examples; "
                "pass more data"
            )
        ranker = Ranker(language_model, dataset.items).to(precision.device)
        tokenizer = language_model.tokenizer
        prompts = _prompts(settings, language_model, ranker.first_item)
        if settings.training.gradient_checkpointing:
            ranker.recompute_activations()
        collate = Collator(tokenizer.pad_token_id or 0)
        evaluator = Evaluator(
            dataset,
            prompts,
            collate,
            precision,
            budget=settings.model.inference_tokens,
            negatives=settings.evaluation.negatives,
            seed=settings.evaluation.seed,
            compat=settings.evaluation.compat,
        )
        train = {task: dataset.train[task] for task in tasks}
        valid, evaluated = (
            {
                task: choose_examples(examples[task], settings.evaluation.users, settings.evaluation.seed)
                for task in tasks
            }
            for examples in (dataset.valid, split)
        )
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
            tasks=tasks,
            train=train,
            valid=valid,
            evaluated=evaluated,
            fit_windows=fit,
            retention=retention,
        )

    def feed(self, dataset: Dataset, tasks: Sequence[str]) -> Feed:
        pools = training_pools(dataset, self.settings, tasks)
        if isinstance(self.prompts, SequenceBuilder):
            return SequenceFeed(pools, self.collate, self.prompts)
        return PromptFeed(pools, self.collate, self.prompts)

    def general(self) -> Iterator[Mapping[str, torch.Tensor]]:
        return general_batches(self.language_model, self.fit_windows, self.precision.device)

    def early_stopping(self, path: Path) -> EarlyStopping | None:
        if self.settings.training.early_stop is None:
            return None
        empty = [task for task in self.tasks if not self.valid[task]]
        if empty:
            raise ValueError(f"early_stop needs validation examples, but {empty} have none; set early_stop to null")
        return EarlyStopping(path, self.settings.training.early_stop, self.validation)

    def validation(self) -> float:
        ranked = self.ranked(self.valid, "validation")
        return math.fsum(result.metrics[VALIDATION_METRIC] for result in ranked.values()) / len(ranked)

    def ranked(self, chosen: Mapping[str, list[Example]], name: str) -> dict[str, TaskResult]:
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

    def on_test(self, dataset: Dataset, say: Callable[[str], None]) -> _Parts | None:
        """The same parts with the test examples to evaluate, or None if other tasks would be trained there."""
        settings = changed(self.settings, {"evaluation.split": "test"})
        tasks = tuple(task for task in dataset.tasks if dataset.train[task] and dataset.test[task])
        if tasks != self.tasks:
            say(f"the test split is not evaluated in the same run: it has the tasks {tasks}, validation {self.tasks}")
            return None
        chosen = {
            task: choose_examples(dataset.test[task], settings.evaluation.users, settings.evaluation.seed)
            for task in tasks
        }
        return replace(self, settings=settings, evaluated=chosen)

    def summary(self) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks),
            "evaluated": {task: len(self.evaluated[task]) for task in self.tasks},
            "prompts": {task: self.prompts.text(self.evaluated[task][0]) for task in self.tasks},
        }

    def measure(self, name: str) -> Measured:
        return Measured(self.ranked(self.evaluated, name), self.retention.measure(name))


def _prompts(settings: Settings, language_model: LanguageModel, first_item: int) -> PromptBuilder:
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


def describe_result(folder: RunFolder) -> str:
    """Return where the results of a run lie, for the end of the command."""
    plots = sorted(path.name for path in folder.path.glob("*.png"))
    return "\n".join(
        [
            f"report: {folder.file('report.md')}",
            f"plots:  {folder.path} ({', '.join(plots)})" if plots else "plots:  none: no language model was trained",
            f"files:  {CONFIG}, {METRICS}, TREC runs and qrels, steps.jsonl",
        ]
    )
