"""What the measurements need to know of a method."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import Batch
from ..models import mean_loss
from ..problem import Problem


class Training(ABC):
    """A model and its optimizer, ready to take steps.

    Args:
        model: the model, which only this training uses.
        optimizer: what steps; None if nothing does.
        mapped_bytes: of files that are mapped into memory, which the system reads when they are used.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, mapped_bytes: int = 0) -> None:
        self.model = model
        self.optimizer = optimizer
        self.mapped_bytes = mapped_bytes

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> float:
        """Forward, backward, optimizer step and zero_grad on one batch a task; the mean of the tasks' losses."""

    def trained(self) -> list[Tensor]:
        """The tensors that steps change."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state, and of what is trained beside the model's own weights."""
        return tensor_bytes(self.optimizer.state) if self.optimizer is not None else 0


class Accumulating(Training):
    """The usual loop: the tasks' part batches one after the other, their gradients added up, one step."""

    def step(self, batches: Sequence[Batch]) -> float:
        total = 0.0
        for batch in batches:
            loss = mean_loss(self.model, batch) / len(batches)
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class Method(ABC):
    """How a training is built.

    Attributes:
        summary: one line for the report.
        warm_up_steps: steps after which the ordinary ones begin.
        refreshes: ``"decomposition"``: every ``update_proj_gap``-th step recomputes all bases; ``"cycle"``: gradsub's
            own schedule, which repeats after ``update_proj_gap`` steps; None: there is nothing to refresh.
    """

    summary: str
    warm_up_steps: int = 2
    refreshes: str | None = None
    packages: ClassVar[Mapping[str, str]] = {}

    def unavailable(self) -> str | None:
        """Why the method cannot run here, or None."""
        for module, install in self.packages.items():
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed: pip install '{install}'"
        return None

    @abstractmethod
    def build(self, model: nn.Module, problem: Problem) -> Training:
        """Take ``model`` over."""


def tensor_bytes(state: object) -> int:
    """Bytes of all distinct tensors in nested mappings, sequences and plain objects."""
    distinct = {(tensor.data_ptr(), tensor.shape, tensor.dtype): tensor.nbytes for tensor in _tensors(state)}
    return sum(distinct.values())


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        yield from _all_tensors(state.values())
    elif isinstance(state, list | tuple):
        yield from _all_tensors(state)
    elif type(state).__module__.startswith("galore_torch"):  # its projector holds the basis as an attribute
        yield from _all_tensors(vars(state).values())


def _all_tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        yield from _tensors(value)


def adamw(parameters: Iterable[Tensor], problem: Problem) -> torch.optim.AdamW:
    """AdamW as every method here uses it."""
    return torch.optim.AdamW(parameters, lr=problem.learning_rate, weight_decay=problem.weight_decay)
