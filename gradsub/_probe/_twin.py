"""A copy of a base optimizer on one small matrix, with nothing in common with the original."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Options: TypeAlias = "Mapping[str, Any]"
Setting: TypeAlias = "tuple[torch.dtype, torch.device]"

RATE: Final = 0.02

# How steps are computed, not which: True would only ask for another device.
IMPLEMENTATION: Final = ("foreach", "fused", "capturable")


def base_step(base: Optimizer, *arguments: Any) -> None:
    """The class's own step: not what was patched over it, nor torch's wrapper, which fires the global step hooks."""
    step = type(base).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(base, *arguments)  # type: ignore[attr-defined]


def constant_like(value: Any, parameter: Tensor, other: Tensor) -> Any:
    """A constant accumulator of a parameter's shape, as one of another parameter's shape."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return value.flatten()[0].to(other).expand(other.shape).clone()
    return value.clone() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Sample:
    """What the small matrix stands for: where the parameters are, and what was put into the state for one of them."""

    parameter: Tensor | None
    state: Mapping[str, Any]


class Twin:
    """A copy of a base optimizer with one small matrix in its groups, and nothing in common with the original."""

    def __init__(self, base: Optimizer, options: Options, sample: Sample, setting: Setting, shape: torch.Size) -> None:
        dtype, device = setting
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        # What stands for the parameters in the optimizer's own attributes.
        self.elsewhere = nn.Parameter(torch.zeros_like(self.weight))
        self.failed = False
        self.optimizer = object.__new__(type(base))
        memo: dict[int, Any] = {id(base): self.optimizer}
        for group in base.param_groups:
            memo.update((id(parameter), self.elsewhere) for parameter in group["params"])
        if sample.parameter is not None:
            memo[id(sample.parameter)] = self.elsewhere
        for key, value in vars(base).items():
            if key.startswith("_optimizer_") and key.endswith("_hooks"):
                vars(self.optimizer)[key] = OrderedDict()
            elif key not in ("state", "param_groups", "step"):
                vars(self.optimizer)[key] = _copied(value, memo)
        self.group = {key: _copied(value, memo) for key, value in options.items()}
        self.group["params"] = [self.weight]
        self.group.update(dict.fromkeys(self.group.keys() & set(IMPLEMENTATION), False))
        if isinstance(self.group.get("lr"), (int, float, Tensor)):
            self.group["lr"] = RATE  # a schedule may have begun at 0, where all steps are the same
        self.optimizer.param_groups = [self.group]
        self.optimizer.state = defaultdict(dict)
        if sample.parameter is not None and sample.state:
            self.optimizer.state[self.weight] = {
                key: constant_like(value, sample.parameter, self.weight) for key, value in sample.state.items()
            }

    def step(self, gradient: Tensor, position: Tensor | None, pull: float) -> tuple[Tensor, Tensor]:
        """Where the matrix was, and a step from there."""
        if position is not None:
            self.weight.copy_(position)
        before = self.weight.detach().clone()
        self.weight.grad = gradient.to(before) + pull * before
        try:
            base_step(self.optimizer)
        except Exception:
            if torch.equal(self.weight, before):
                raise
            # It has taken the step: what it raises afterwards is for the user's own step to raise.
            self.failed = True
        return before, self.weight.detach() - before

    def kept(self) -> list[Tensor]:
        """All numbers in the state and in attributes."""
        found: list[Tensor] = []
        _collect(
            {**vars(self.optimizer), "param_groups": self.optimizer.param_groups},
            {id(self.weight), id(self.elsewhere)},
            found,
        )
        return found


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy, as far as there can be one: process groups and the like are shared, and a model is never copied."""
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Tensor) and id(value) not in memo:
        return value.detach().clone()
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever cannot be copied
        return value


def _collect(value: Any, seen: set[int], found: list[Tensor]) -> None:
    if isinstance(value, (str, bytes, nn.Module)) or id(value) in seen:
        return
    if isinstance(value, Tensor):
        found.append(value.detach().clone())
    elif isinstance(value, (int, float)):
        found.append(torch.tensor(float(value), dtype=torch.float64, device="cpu"))
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for item in list(value.values()):
            _collect(item, seen, found)
    elif isinstance(value, (list, tuple)):
        seen.add(id(value))
        for item in value:
            _collect(item, seen, found)


@contextmanager
def isolated(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Random numbers of its own, no global step hooks, no default device, nothing recorded and nothing said."""
    accelerator = None if device.type == "cpu" else getattr(torch, device.type, None)

    def reseed(number: int) -> None:
        torch.default_generator.manual_seed(number)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 (the optimizer's own choice)
        if accelerator is not None:
            accelerator.manual_seed(number)

    hooks: tuple[Any, ...] = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    kept = [dict(each) for each in hooks]
    numbers, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        devices = [] if accelerator is None else [device]
        stack.enter_context(torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else device.type))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(device)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            for each in hooks:
                each.clear()
            yield reseed
        finally:
            for each, held in zip(hooks, kept, strict=True):
                each.update(held)
            random.setstate(numbers)
            np.random.set_state(legacy)  # noqa: NPY002
