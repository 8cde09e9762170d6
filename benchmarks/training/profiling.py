"""Where one method's step spends its time: operators, python functions, and the optimizer's own share."""

from __future__ import annotations

import cProfile
import functools
import io
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from torch.profiler import ProfilerActivity, profile

from ..alternate import quiet_collector
from .config import Case, Config
from .contenders import Builder, Contender, Key
from .environment import describe_environment
from .methods import METHODS
from .parts import as_configured
from .steps import seconds_of

_ROWS: Final = 30
_PROFILED_STEPS: Final = 3


def profile_step(config: Config, case: Case, method: str, folder: Path) -> str:
    """Profile ordinary steps and write ``profile-CASE-METHOD.txt``; its text.

    Raises:
        ValueError: the method is unknown or cannot run here.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; there are {list(METHODS)}")
    reason = METHODS[method].unavailable()
    if reason is not None:
        raise ValueError(f"method {method!r} is unavailable: {reason}")
    with as_configured(config):
        environment = describe_environment()
        key = Key(method, case.tasks[0])
        contender = Builder(config, case).build(key)
        for _ in range(METHODS[method].warm_up_steps):
            contender.step()
        text = "\n\n".join(
            [
                f"{case.name}, {key}: {METHODS[method].summary}",
                "\n".join(f"{name}: {value}" for name, value in environment.items()),
                _shares(contender, config.rounds_of(case)),
                _operators(contender),
                _functions(contender),
            ]
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"profile-{case.name}-{method}.txt").write_text(text + "\n", encoding="utf-8")
    return text


def _shares(contender: Contender, rounds: int) -> str:
    """How much of a step `optimizer.step` takes, without any profiler."""
    inside: list[float] = []
    with quiet_collector() as collect:
        totals = []
        with _Wrapped(contender.training.optimizer, lambda seconds: inside.append(seconds)):
            for _ in range(rounds):
                collect()
                totals.append(seconds_of(contender.step))
    total = statistics.median(totals)
    if not inside:
        return f"step: {total:.4f} s, median of {rounds}"
    own = statistics.median(inside)
    return (
        f"step: {total:.4f} s, median of {rounds}\n"
        f"of which optimizer.step(): {own:.4f} s, {100 * own / total:.1f} %\n"
        f"the rest (forward, backward, capture, zero_grad): {total - own:.4f} s"
    )


def _operators(contender: Contender) -> str:
    """torch's operators by their own time; what no aten operator accounts for is python and dispatch."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = seconds_of(lambda: [contender.step() for _ in range(_PROFILED_STEPS)])
    averages = profiler.key_averages()
    # Other entries, such as Optimizer.step and autograd functions written in python, count python's time as their own.
    covered = sum(event.self_cpu_time_total for event in averages if event.key.startswith("aten::")) / 1e6
    head = (
        f"aten operators of {_PROFILED_STEPS} steps: {covered:.3f} s of {seconds:.3f} s, and "
        f"{100 * (1 - covered / seconds):.1f} % outside of them (python, dispatch, and the profiler itself)"
    )
    return f"{head}\n{averages.table(sort_by='self_cpu_time_total', row_limit=_ROWS, max_name_column_width=48)}"


def _functions(contender: Contender) -> str:
    """Python functions inside `optimizer.step` by their own time, which includes the operators that they call."""
    watcher = cProfile.Profile()
    with _Wrapped(contender.training.optimizer, lambda seconds: None, watcher):
        for _ in range(_PROFILED_STEPS):
            contender.step()
    if not watcher.getstats():
        return "no optimizer.step()"
    stream = io.StringIO()
    pstats.Stats(watcher, stream=stream).strip_dirs().sort_stats("tottime").print_stats(_ROWS)
    return f"python functions in optimizer.step(), {_PROFILED_STEPS} steps\n{stream.getvalue().strip()}"


class _Wrapped:
    """While it is open, every `optimizer.step` is timed, and watched by a profiler if there is one."""

    def __init__(self, optimizer: Any, tell: Callable[[float], None], watcher: cProfile.Profile | None = None) -> None:
        self._optimizer = optimizer
        self._tell = tell
        self._watcher = watcher

    def __enter__(self) -> None:
        if self._optimizer is None:
            return
        plain = self._optimizer.step

        @functools.wraps(plain)
        def step(*arguments: Any, **options: Any) -> Any:
            if self._watcher is not None:
                self._watcher.enable()
            start = time.perf_counter()
            try:
                return plain(*arguments, **options)
            finally:
                self._tell(time.perf_counter() - start)
                if self._watcher is not None:
                    self._watcher.disable()

        self._optimizer.step = step

    def __exit__(self, *error: object) -> None:
        if self._optimizer is not None:
            del self._optimizer.step
