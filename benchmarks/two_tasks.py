"""A Llama with random weights, trained on two tasks by a method: what `benchmarks.host` and `benchmarks.gpu` step."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace

from .training.data import Batch, join, make_batches
from .training.models import build_model, mean_loss, trained_layers, trained_weights
from .training.problem import Problem

TASKS: Final = ("first", "second")
NEVER: Final = 10**6
DEFAULT_GAP: Final[int] = inspect.signature(GemsOptimizer).parameters["update_proj_gap"].default


@dataclass(frozen=True)
class Method:
    """How a model is trained.

    Args:
        summary: one line for the report.
        optimizer: ``"adamw"``, ``"lora"`` (AdamW on peft's adapters) or ``"gems"`` (`GemsOptimizer` around AdamW).
        one_batch: one pass on both tasks' rows; for gems ``optimizer.mixed``. Otherwise a pass a task.
        protected: whether gems has a null space.
        refresh: of gems.
        gap: ``update_proj_gap`` of gems.
        compiled: whether the model goes through ``torch.compile``.
        clipped: whether gradients are clipped before the step, as a ``Trainer`` does unless told otherwise.
    """

    summary: str
    optimizer: str
    one_batch: bool = False
    protected: bool = False
    refresh: str = "auto"
    gap: int = NEVER
    compiled: bool = False
    clipped: bool = False


@dataclass(frozen=True)
class Workload:
    """What is trained, and where.

    Args:
        model: options of the LlamaConfig.
        rows: of a task's batch.
        length: tokens in a row.
        rank: of LoRA and the shared subspace; a task's own subspace has half of it.
        protect: makes the null space of a model.
        device: where all of it is.
        autocast: whether passes run in bfloat16 (the weights are float32).
        backend: of ``torch.compile``.
    """

    model: Mapping[str, Any]
    rows: int
    length: int
    rank: int
    protect: Callable[[nn.Module], NullSpace]
    device: str = "cpu"
    autocast: bool = False
    backend: str = "inductor"

    def batches(self) -> list[Batch]:
        """One batch a task, the same for every method and at every step: speed does not depend on what is learned."""
        tokens = self.rows * self.length * len(TASKS)
        problem = Problem(tokens, self.rank, len(TASKS), sequence_length=self.length)
        batches = make_batches(problem, self.model["vocab_size"], encoder_decoder=False)
        return [
            Batch({name: ids.to(self.device) for name, ids in batch.inputs.items()}, batch.targets.to(self.device))
            for batch in batches
        ]


class Contender:
    """A model and its optimizer. A step is `passes`, which leaves gradients, and then `step`, which consumes them.

    Raises:
        ImportError: the method needs peft, and it is not installed.
    """

    def __init__(self, method: Method, workload: Workload) -> None:
        self._autocast = workload.autocast
        self._clipped = method.clipped
        self._device = torch.device(workload.device).type
        with torch.device(workload.device):
            self.model = build_model({"architecture": "llama", **workload.model}, seed=0)
        batches = workload.batches()
        self._ids = [task for task, batch in enumerate(batches) for _ in range(batch.rows)]
        self._batches = [join(batches)] if method.one_batch else batches
        self.weights = trained_weights(self.model)
        self._gems: GemsOptimizer | None = None
        if method.optimizer == "gems":
            self.optimizer = self._gems = GemsOptimizer(
                _adamw(self.weights),
                tasks=TASKS,
                rank=workload.rank,
                update_proj_gap=method.gap,
                null_space=workload.protect(self.model) if method.protected else None,
                model=self.model,
                capture="fused",
                refresh=method.refresh,
            )
        else:
            if method.optimizer == "lora":
                self.model = _adapted(self.model, workload.rank)
            self.optimizer = _adamw([p for p in self.model.parameters() if p.requires_grad])
        self._forward = torch.compile(self.model, backend=workload.backend) if method.compiled else self.model

    def passes(self) -> None:
        """All forward and backward passes of a step."""
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._autocast):
            for task, batch in enumerate(self._batches):
                with self._opened(task):
                    mean_loss(self._forward, batch).backward()

    def step(self) -> None:
        """The optimizer's step, and zero_grad; before them the clipping, if there is one."""
        if self._clipped and self._gems is not None:
            self._gems.clip_grad_norm_(1.0)
        elif self._clipped:
            nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_step(self) -> None:
        """Both."""
        self.passes()
        self.step()

    def _opened(self, task: int) -> contextlib.AbstractContextManager[Any]:
        if self._gems is None:
            return contextlib.nullcontext()
        if len(self._batches) == 1:
            return self._gems.mixed(self._ids)
        return self._gems.task(TASKS[task], samples=self._batches[task].rows)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'gradsub[benchmarks]'") from error
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=list(trained_layers(model))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, about its own use of transformers
        return get_peft_model(model, config)
