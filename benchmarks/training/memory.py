"""Memory as the tensor allocator counts it: every allocation and every release, from the first parameter on.

The profiler knows the size of a block only if it saw its allocation. So it watches from before the model is built; the
sum over its events is then exact for everything that torch's CPU allocator hands out (not for what libraries keep for
themselves, such as packed matrices, nor for python).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .config import Case, Config
from .contenders import Key
from .data import make_batches
from .methods import METHODS
from .models import build_model, model_bytes

# The profiler would announce every start and stop on stderr. It reads this when it first starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_STEP: Final = "gradsub.benchmark.measured_step"


@dataclass(frozen=True)
class Memory:
    """Bytes before a step, and at most during it."""

    held: int
    peak: int


def trace(prepare: Callable[[], Callable[[], object]]) -> Memory:
    """What is allocated since ``prepare`` began: before the step that it returns, and at most during that step."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = prepare()
        gc.collect()
        with record_function(_STEP):
            step()
    events = profiler.profiler.kineto_results.events()
    (start,) = [event.start_ns() for event in events if event.name() == _STEP]
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"), key=lambda each: each[0]
    )
    held = sum(change for time, change in changes if time < start)
    peak = running = held
    for time, change in changes:
        if time >= start:
            running += change
            peak = max(peak, running)
    return Memory(held, peak)


def measure_memory(config: Config, case: Case) -> list[dict[str, Any]]:
    """For every contender of ``case.memory``: bytes of the model, held between steps, and at most during a step."""
    available = [name for name in case.memory if METHODS[name].unavailable() is None]
    return [_measure(config, case, Key(name, tasks)) for tasks in case.tasks for name in available]


def _measure(config: Config, case: Case, key: Key) -> dict[str, Any]:
    problem = config.problem(case, key.tasks)
    method = METHODS[key.method]
    parameters = mapped = 0

    def prepare() -> Callable[[], object]:
        nonlocal parameters, mapped
        model = build_model(config.models[case.model], config.seed)
        parameters = model_bytes(model)
        batches = make_batches(problem, model.config.vocab_size, model.config.is_encoder_decoder)
        torch.manual_seed(problem.seed)
        training = method.build(model, problem)
        mapped = training.mapped_bytes
        for _ in range(method.warm_up_steps):
            training.step(batches)
        return lambda: training.step(batches)

    memory = trace(prepare)
    return {
        "method": key.method,
        "tasks": key.tasks,
        "parameter_bytes": parameters,
        "held_bytes": memory.held - mapped,  # the profiler counts a mapped file as if it had been read
        "peak_bytes": memory.peak - mapped,
        "mapped_bytes": mapped,
    }
