"""The trainings of one case: every available method with every number of tasks, each on its own copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from .config import Case, Config
from .data import Batch, make_batches
from .methods import METHODS, Training
from .models import build_model
from .problem import Problem


@dataclass(frozen=True)
class Key:
    """A method with a number of tasks."""

    method: str
    tasks: int

    def __str__(self) -> str:
        return f"{self.method}, tasks {self.tasks}"


@dataclass
class Contender:
    """A training and the batches of its step."""

    training: Training
    batches: list[Batch]

    def step(self) -> float:
        return self.training.step(self.batches)


class Builder:
    """Builds the contenders of a case from one set of initial weights."""

    def __init__(self, config: Config, case: Case) -> None:
        self._config = config
        self._case = case
        self._model = build_model(config.models[case.model], config.seed)

    def keys(self, methods: tuple[str, ...]) -> Iterator[Key]:
        """These methods with every number of tasks of the case, as far as they are available."""
        for tasks in self._case.tasks:
            for method in methods:
                if METHODS[method].unavailable() is None:
                    yield Key(method, tasks)

    def model(self) -> nn.Module:
        """A fresh copy of the model."""
        return copy.deepcopy(self._model)

    def problem(self, key: Key, update_proj_gap: int | None = None) -> Problem:
        """The contender's problem, with another gap if one is given."""
        problem = self._config.problem(self._case, key.tasks)
        return problem if update_proj_gap is None else replace(problem, update_proj_gap=update_proj_gap)

    def build(self, key: Key, update_proj_gap: int | None = None) -> Contender:
        """A contender that has not stepped."""
        model, problem = self.model(), self.problem(key, update_proj_gap)
        config = model.config
        batches = make_batches(problem, config.vocab_size, config.is_encoder_decoder)
        # peers draw orders and adapters from the global generator: the same ones in every run
        torch.manual_seed(problem.seed)
        return Contender(METHODS[key.method].build(model, problem), batches)


def unavailable(methods: tuple[str, ...]) -> dict[str, str]:
    """The methods that cannot run here, and why."""
    return {name: reason for name in methods if (reason := METHODS[name].unavailable()) is not None}
