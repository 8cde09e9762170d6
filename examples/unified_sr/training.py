"""The training loop that every method shares: same data, same order, same schedule."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .checkpoint import Checkpoint
from .early_stopping import EarlyStopping, best_epoch
from .feeds import Feed, Plan, cut
from .interruption import INTERRUPTION, Interrupted
from .losses import passes_of, total_samples
from .methods import Diagnostics, Updater
from .model import Ranker
from .precision import Precision
from .processes import current
from .settings import Settings


@dataclass
class History:
    """What a training run leaves: one record per step, as in ``steps.jsonl``, and the last diagnostics.

    ``seconds`` are those of the steps, ``elapsed`` those of the whole training, before interruptions as well.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    last: Diagnostics | None = None
    seconds: float = 0.0
    elapsed: float = 0.0
    examples: int = 0
    tokens: int = 0

    def state(self) -> dict[str, Any]:
        """Everything as plain values, for a checkpoint."""
        last = None if self.last is None else asdict(self.last)
        return {**vars(self), "last": last}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> History:
        """The inverse of ``state``; an empty history of an empty one. An older checkpoint has no ``elapsed``."""
        last = state.get("last")
        found = {"elapsed": state.get("seconds", 0.0), **state}
        return cls(**{**found, "last": None if last is None else Diagnostics(**last)})

    @property
    def validation(self) -> list[float]:
        """The validation metric after each epoch, where it was measured."""
        return [record["validation"] for record in self.records if "validation" in record]

    @property
    def throughput(self) -> dict[str, float]:
        """Targets (an example has one in a prompt) and tokens per second, and the median seconds of a step."""
        if not self.records:
            return {}
        return {
            "seconds_per_step": float(np.median([record["seconds"] for record in self.records])),
            "examples_per_second": self.examples / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }


def tasks_to_train(wanted: str | None, available: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks that ``training.tasks`` names, in the order of ``available``; all of them for ``None``.

    Raises:
        ValueError: naming a task that is not there.

    Example:
        >>> tasks_to_train("search, rec", ["rec", "search"]), tasks_to_train("rec", ["rec", "search"])
        (('rec', 'search'), ('rec',))
    """
    if wanted is None:
        return tuple(available)
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in available:
            raise ValueError(f"training.tasks names {name!r}, but the data's tasks are {', '.join(available)}")
    return tuple(task for task in available if task in names)


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate: a linear rise over ``warmup * steps``, then a cosine to 0.

    Example:
        >>> [round(warmup_cosine(step, 10, 0.2), 2) for step in range(10)]
        [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train(
    ranker: Ranker,
    updater: Updater,
    feed: Feed,
    precision: Precision,
    settings: Settings,
    plan: Plan,
    log: Path,
    checkpoint: Checkpoint,
    *,
    stopping: EarlyStopping | None = None,
    watch: Callable[[History], object] = lambda history: None,
) -> History:
    """Take as many steps as planned, each on one batch of every stream.

    Args:
        ranker: the model.
        updater: turns the tasks' losses into a step.
        feed: of training rows.
        precision: of the forward passes.
        settings: of the run.
        plan: how many steps that are.
        log: a file that gets one JSON object per step.
        checkpoint: where an interrupted run left off, if it is there; written every ``checkpoint_every`` steps.
        stopping: may end it after an epoch, and then chooses the weights.
        watch: is called with the history after each step.

    Raises:
        FloatingPointError: naming the task whose loss is NaN or infinite; the log ends before that step.
        Interrupted: if this process was asked to stop, after the step that was going on and a checkpoint.
    """
    streams = {name: pool.batches(settings.training.batch_size, settings.seed) for name, pool in feed.pools.items()}
    processes = current()
    processes.check_batch(settings.training.batch_size, settings.training.accumulation)
    schedule = LambdaLR(updater.optimizer, lambda step: warmup_cosine(step, plan.steps, settings.training.warmup))
    done, state = checkpoint.restore(ranker, updater.optimizer, schedule)
    history = History.of(state)
    began = time.perf_counter() - history.elapsed
    for stream in streams.values():
        for _ in range(done):
            next(stream)
    ranker.train()
    with (
        INTERRUPTION.deferred(),
        log.open("w", encoding="utf-8") as file,
        tqdm(total=plan.steps, initial=done, desc="training", unit="step", disable=not processes.first) as bar,
    ):

        def save() -> None:
            # Also called when evaluation is interrupted, whose time is none of training.
            if settings.training.checkpoint_every and processes.first:
                checkpoint.save(len(history.records), ranker, updater.optimizer, schedule, history.state())

        def end_epoch() -> bool:
            """Validate, unless that was done before an interruption, and tell whether training is over."""
            if stopping is None or not history.records or len(history.records) % plan.per_epoch:
                return False
            if "validation" not in history.records[-1]:
                # It may take minutes, so a request to stop ends it, and training goes on with it.
                with INTERRUPTION.deferred(wait=False):
                    history.records[-1]["validation"] = stopping.validate()
                ranker.train()
                _write_log(file, history)
            return stopping.over(history.validation, ranker)

        _write_log(file, history)
        checkpoint.renew = save
        over = end_epoch()
        for step in range(done + 1, plan.steps + 1):
            if over:
                break
            start = time.perf_counter()
            batches = [
                feed.batch(rows)
                for stream in streams.values()
                for rows in cut(feed.arranged(processes.part(next(stream))), settings.training.accumulation)
            ]
            passes = passes_of(ranker, batches, precision)
            reported = step % settings.training.report_every == 0 or step in (1, plan.steps)
            taken = [
                updater.update(passes, measure=reported),
                total_samples(passes),
                sum(each.tokens for each in batches),
            ]
            losses, samples, tokens = _of_all(processes.gather(taken))
            history.tokens += tokens
            history.examples += samples
            rates = {str(group["name"]): float(group["lr"]) for group in updater.optimizer.param_groups}
            schedule.step()
            seconds = time.perf_counter() - start
            record: dict[str, Any] = {"step": step, "loss": losses, "lr": rates, "seconds": round(seconds, 4)}
            if reported:
                found = updater.diagnostics()
                if found is not None:
                    history.last = found
                    short = {key: value for key, value in asdict(found).items() if key not in ("protected", "full")}
                    record["diagnostics"] = short
            file.write(json.dumps(record) + "\n")
            file.flush()
            history.records.append(record)
            history.seconds += seconds
            bar.set_postfix({task: f"{loss:.3f}" for task, loss in losses.items()}, refresh=False)
            bar.update()
            watch(history)
            history.elapsed = time.perf_counter() - began
            try:
                over = end_epoch()
            except Interrupted:
                save()
                raise
            history.elapsed = time.perf_counter() - began
            every = settings.training.checkpoint_every
            # The best weights are kept in their own file, which whoever goes on must know of.
            best = "validation" in record and best_epoch(history.validation) == len(history.validation)
            if INTERRUPTION.wanted or (every and step % every == 0) or best:
                save()
            if INTERRUPTION.wanted:
                raise Interrupted
    if stopping is not None:
        stopping.restore_best(ranker)
    ranker.eval()
    history.elapsed = time.perf_counter() - began
    return history


def _of_all(taken: Sequence[Sequence[Any]]) -> tuple[dict[str, float], int, int]:
    """Each task's loss over the targets of all processes, and how many targets and tokens these are."""
    counts: Counter[str] = Counter()
    sums: dict[str, float] = {}
    for losses, samples, _ in taken:
        counts.update(samples)
        for task, loss in losses.items():
            sums[task] = sums.get(task, 0.0) + loss * samples[task]
    return {task: value / counts[task] for task, value in sums.items()}, counts.total(), sum(each[2] for each in taken)


def _write_log(file: TextIO, history: History) -> None:
    file.seek(0)
    file.truncate()
    file.writelines(json.dumps(record) + "\n" for record in history.records)
    file.flush()
