"""Groups of methods that take turns on one device: milliseconds of every step, and the most memory that it took."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..alternate import quiet_collector
from ..two_tasks import Contender, Method, Workload
from .methods import methods, workload

_GIB = 2**30
_FEWEST_ROUNDS = 3


@dataclass
class Record:
    """What was measured of one method in one group; lists are by round.

    Attributes:
        model: of the config.
        group: position in the config's list; methods of one group took turns.
        method: by name.
        ms: the whole step by CUDA events (without a GPU by the clock), that is the slower of device and host.
        step_ms: of that the part in `step()` and zero_grad.
        host_ms: until the host had asked for all of it.
        host_step_ms: of that the part in `step()` and zero_grad.
        first_ms: the steps before the first round, which build state and bases, and compile.
        peak_gib: the most that this method's tensors took, over all steps; None without a GPU.
        gap: steps within which every basis is refreshed; None: never after the first steps.
        graphs: how many torch.compile made; None where the model was not compiled.
        graph_breaks: how often it could not go on in the same graph.
        note: what went wrong, or why there are fewer rounds.
    """

    model: str
    group: int
    method: str
    ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    host_step_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    gap: int | None = None
    graphs: int | None = None
    graph_breaks: int | None = None
    note: str = ""


def measure(config: Mapping[str, Any], device: str, tell: Callable[[str], None]) -> Iterator[list[dict[str, Any]]]:
    """The records of one group of one model after the other, within ``config["seconds"]`` as far as that is known."""
    end = time.perf_counter() + config["seconds"]
    for group, names in enumerate(config["groups"]):
        for model in config["models"]:
            tell(f"{model}: {', '.join(names)}")
            records = [Record(model, group, name) for name in names]
            if time.perf_counter() > end:
                for record in records:
                    record.note = f"not begun: the {config['seconds']} seconds were over"
            else:
                _Group(config, model, records, device).run()
            yield [asdict(record) for record in records]


class _Group:
    def __init__(self, config: Mapping[str, Any], model: str, records: list[Record], device: str) -> None:
        self._config = config
        self._records = records
        self._methods = methods(config["gap"])
        self._workload = workload(config, model, device)
        self._running: list[_Running] = []

    def run(self) -> None:
        """Build all, then rounds for ``config["seconds_per_group"]``; what compiles needs its time before them."""
        torch._dynamo.reset()
        with quiet_collector() as collect:
            for record in self._records:
                self._start(record, collect)
            refreshing = any(self._methods[record.method].gap == self._config["gap"] for record in self._records)
            rounds = self._config["gap"] if refreshing else self._config["rounds"]
            end = time.perf_counter() + self._config["seconds_per_group"]
            for done in range(rounds):
                if done >= _FEWEST_ROUNDS and time.perf_counter() > end:
                    for each in self._running:
                        each.record.note = f"{done} of {rounds} rounds: the time of the group was over"
                    break
                for each in list(self._running):
                    collect()
                    self._attempt(each, each.round)
        for each in self._running:
            each.finish()
        self._running.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _start(self, record: Record, collect: Callable[[], None]) -> None:
        method = self._methods[record.method]
        record.gap = method.gap if method.gap == self._config["gap"] else None
        running = _Running(record, method, self._workload)
        self._running.append(running)
        collect()  # or what a failed method left would be released, and counted, in this one's steps
        self._attempt(running, running.build)
        for _ in range(self._config["warm_up"]):
            if running in self._running:
                collect()
                self._attempt(running, running.warm_up)

    def _attempt(self, running: _Running, run: Callable[[], None]) -> None:
        """A method that fails (no memory, no peft) leaves its place; the others go on."""
        try:
            run()
        except Exception as error:
            running.record.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            self._running.remove(running)
            running.contender = None


class _Running:
    """A contender and its record.

    Several contenders lie on the device at once. A step's own peak is what it takes beyond all that lay there before,
    and what this contender held of that; the latter is counted from its construction on, step by step.
    """

    def __init__(self, record: Record, method: Method, given: Workload) -> None:
        self.record = record
        self.contender: Contender | None = None
        self._method = method
        self._workload = given
        self._cuda = torch.device(given.device).type == "cuda"
        self._held = 0
        self._peak = 0
        self._compilations = (0, 0)

    def build(self) -> None:
        before = self._allocated()
        self.contender = Contender(self._method, self._workload)
        self._held = self._allocated() - before

    def warm_up(self) -> None:
        self.record.first_ms.append(round(self._step()[0], 2))

    def round(self) -> None:
        record = self.record
        for values, value in zip(
            (record.ms, record.step_ms, record.host_ms, record.host_step_ms), self._step(), strict=True
        ):
            values.append(round(value, 3))

    def finish(self) -> None:
        if self._cuda:
            self.record.peak_gib = round(self._peak / _GIB, 3)
        if self._method.compiled:
            self.record.graphs, self.record.graph_breaks = self._compilations
        self.contender = None

    def _step(self) -> tuple[float, float, float, float]:
        counted = _compilations()
        taken = self._timed()
        self._compilations = tuple(  # the counters are the process's: methods that take turns share them
            old + now - then for old, now, then in zip(self._compilations, _compilations(), counted, strict=True)
        )
        return taken

    def _timed(self) -> tuple[float, float, float, float]:
        assert self.contender is not None
        before = self._allocated()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if self._cuda else []
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        marks = []

        def mark() -> None:
            marks.append(time.perf_counter())
            if events:
                events[len(marks) - 1].record()

        mark()
        self.contender.passes()
        mark()
        self.contender.step()
        mark()
        host, host_step = 1e3 * (marks[2] - marks[0]), 1e3 * (marks[2] - marks[1])
        if not self._cuda:
            return host, host_step, host, host_step
        torch.cuda.synchronize()
        self._peak = max(self._peak, self._held + torch.cuda.max_memory_allocated() - before)
        self._held += self._allocated() - before
        return events[0].elapsed_time(events[2]), events[1].elapsed_time(events[2]), host, host_step

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._cuda else 0


def _compilations() -> tuple[int, int]:
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
