"""One run from settings to report: load, measure, train, measure again, write down."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .alone import alone
from .busy import busy_notice, own_load
from .checkpoint import Checkpoint
from .data import format_statistics, load_dataset
from .environment import describe_environment
from .feeds import Feed
from .general_text import load_general_text
from .interruption import Interrupted
from .memory import estimate_memory, free_memory, peak_memory, reset_peak_memory, row_size
from .methods import Setup, Updater, method_named
from .model import load_language_model
from .parts import Parts
from .precision import choose_precision
from .processes import current
from .retention import retention_summary
from .run_baseline import run_baseline
from .run_folder import AFTER, BEFORE, CONFIG, METRICS, RunFolder, State
from .sealed import seal
from .settings import DatasetSettings, Settings
from .time_left import TimeNotice
from .training import History, train
from .zero_shot import Measured, Shared, ZeroShot, write_results

UNSEEN_BEFORE, UNSEEN_AFTER = f"{BEFORE}, test split", f"{AFTER}, test split"
PATIENCE = 5.0
"""Seconds that a process which was told to end may still hold its run folder."""

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
        zero_shot: a run whose measurement of the intact model is taken over, if it is finished and measured the very
            same; otherwise, and where nothing is trained, the intact model is measured.
        further: names of methods that the same command runs after this one, for its estimate of the time.
        measured: where runs side by side keep what they measure of the intact model.
        sealing: whether a run on the validation split also leaves its evaluation on the test split, see ``sealed``.

    Returns:
        The folder with all results.

    Raises:
        BlockingIOError: if another process is at this folder.
    """
    processes = current()
    place = Path(out).resolve()
    with ExitStack() as held:
        # Beside the folder: one with anything else in it is refused.
        lock = alone(place.with_name(f".{place.name}.lock"), f"the run in {out}", say, patience=PATIENCE)
        processes.of_first(lambda: held.enter_context(lock))
        if processes.first:
            return _run(settings, RunFolder(out), RunFolder(out), say, zero_shot, further, measured, sealing)
        # Everything is written once; what this process would write as well goes where nobody looks.
        elsewhere = held.enter_context(tempfile.TemporaryDirectory())
        nobody: Callable[[str], None] = lambda line: None  # noqa: E731
        return _run(settings, RunFolder(out), RunFolder(elsewhere), nobody, zero_shot, further, measured, sealing)


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
        dataset = load_dataset(**dict(DatasetSettings.of(settings)))
        say(format_statistics(dataset))
    method = method_named(settings.method.name)
    if method.fit is not None:
        if not processes.first:
            return folder  # nothing to share out
        return run_baseline(folder, settings, method, dataset, clock.phase, clock.seconds)
    with clock.phase("loading"):
        text = load_general_text(settings.evaluation.general_text)
        language_model = load_language_model(settings.model.name)
        parts = Parts.assemble(settings, dataset, language_model, text, precision)
        feed = parts.feed(dataset)
    plan = parts.plan(dataset)
    folder.start(settings, describe_environment(settings.seed, precision))
    folder.write_json("statistics.json", dataset.statistics())
    say(f"{settings.model.name} on {precision}; for example: {parts.prompts.text(parts.evaluated[parts.tasks[0]][0])}")
    build = method.build if plan.steps > 0 else None
    unseen = parts.on_test(dataset) if sealing and build is not None else None
    after: Measured

    def measure() -> ZeroShot:
        nonlocal after
        with clock.phase(BEFORE), _untrained():
            after = parts.measure("zero-shot")
        return ZeroShot.of(after, clock.seconds[BEFORE])

    taken = None
    if build is not None and zero_shot is not None:
        taken = processes.of_first(lambda: ZeroShot.taken(zero_shot, parts.intact))
    if taken is not None:
        before = taken
        say(f"zero-shot: as measured in {zero_shot}")
    elif measured is not None:
        before = measured.once(parts.intact, measure, say, again=build is None)
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
            updater = build(Setup(parts.ranker, settings, parts.trained, parts.general, say))
            _say_memory(parts, updater, feed, say)
        with clock.phase("training"):
            history = train(
                parts.ranker,
                updater,
                feed,
                precision,
                settings,
                plan,
                folder.file("steps.jsonl"),
                checkpoint,
                stopping=stopping,
                watch=TimeNotice(plan.steps, before.seconds, say, further),
            )
        clock.seconds["training"] = round(history.elapsed, 2)  # before interruptions as well
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


@contextmanager
def _untrained() -> Iterator[None]:
    """Scores that are no numbers are no training that diverged where nothing was trained yet."""
    try:
        yield
    except FloatingPointError as error:
        raise ValueError(
            "the scores of the intact model are NaN or infinite: look at its weights, or set model.autocast=none"
        ) from error


def _measure_unseen(
    unseen: Parts, before: ZeroShot, clock: Clock, measured: Shared | None, say: Callable[[str], None]
) -> ZeroShot:
    def measure() -> ZeroShot:
        with clock.phase(UNSEEN_BEFORE), _untrained():
            results = unseen.ranked(unseen.evaluated, "zero-shot, test")
        return before.on(results, clock.seconds[UNSEEN_BEFORE])

    return measure() if measured is None else measured.once(unseen.intact, measure, say)


def _write_results(
    folder: RunFolder,
    parts: Parts,
    before: ZeroShot,
    after: Measured,
    leak: Mapping[str, float],
    summary: Mapping[str, Any],
) -> None:
    retained = retention_summary(before.questions, after.general, leak) if after.general else {}
    losses = {task: result.loss for task, result in after.results.items()}
    found = {**parts.summary(), **summary, "evaluated_loss": losses, **retained}
    write_results(folder, parts.settings.method.name, before, after, found)


def _say_memory(parts: Parts, updater: Updater, feed: Feed, say: Callable[[str], None]) -> None:
    rows, autocast = row_size(feed.pools, feed.size), parts.precision.autocast is not None
    training, tasks = parts.settings.training, len(parts.trained)
    memory = estimate_memory(parts.ranker, updater.optimizer, training, rows, tasks=tasks, autocast=autocast)
    free = free_memory(parts.precision.device)
    say(f"memory: training takes {memory}, an estimate; {free / 2**30:.1f} GiB are free on {parts.precision.device}")
    if memory.total > free:
        say(
            "the estimate exceeds what is free: raise training.accumulation, set training.gradient_checkpointing, or "
            "lower training.batch_size"
        )


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
