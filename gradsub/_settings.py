from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gradsub._kinds import check_kind
from gradsub.null_space import NullSpace
from gradsub.subspace import MOMENT_RULES

CHOICES: Mapping[str, tuple[str, ...]] = {
    "orthogonalize": ("none", "shared_first"),
    "moments": MOMENT_RULES,
    "nonfinite": ("raise", "skip", "ignore"),
    "capture": ("auto", "fused", "generic"),
    "refresh": ("auto", "sketch", "svd"),
    "protection": ("auto", "device", "host"),
}
_KINDS: Mapping[str, tuple[Any, str]] = {
    "tasks": (Iterable, "the names of the tasks, such as ('search', 'rec')"),
    "null_space": (NullSpace | None, "a NullSpace, as NullSpace(...).collect(model, batches) gives it, or None"),
    "model": (nn.Module | None, "the torch.nn.Module that the base optimizer trains, or None"),
    "master_weights": (bool, "True or False"),
    "anchor": (bool, "True or False"),
}
# What a parameter group holds that the base optimizer must not see.
NOT_INNER = frozenset(
    {"params", "param_names", "tasks", "side", "subspace", "rank", "task_rank", "update_proj_gap", "scale", "lr_scale"}
)


def base_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a group's options that are the base optimizer's."""
    return {key: value for key, value in group.items() if key not in NOT_INNER}


def check_choices(**chosen: object) -> None:
    """Raise a ValueError unless each argument is one of the choices that it has."""
    for argument, value in chosen.items():
        if value not in CHOICES[argument]:
            raise ValueError(f"{argument}={value!r} must be one of {', '.join(map(repr, CHOICES[argument]))}")


def check_kinds(**given: object) -> None:
    """Raise a TypeError unless each argument is of the kind that it must be."""
    for argument, value in given.items():
        check_kind(argument, value, *_KINDS[argument])


def check_count(argument: str, value: object, *, least: int = 1, optional: bool = False) -> None:
    """Raise a ValueError unless ``value`` is an integer, numpy's too, of at least that (or None, if optional)."""
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        other = ", or None" if optional else ""
        raise ValueError(f"{argument}={value!r} must be an integer of at least {least}{other}")


def check_tasks(tasks: Iterable[str]) -> tuple[str, ...]:
    """The task names as a tuple, checked."""
    if isinstance(tasks, str):
        raise ValueError(f"tasks={tasks!r} is one string: pass a tuple of names, such as ({tasks!r},)")
    names = tuple(tasks)
    if any(not isinstance(name, str) or not name for name in names):
        raise ValueError(f"tasks={names!r} must be non-empty strings")
    # Members of a `str` enumeration count by what they are as strings: checkpoints hold nothing but plain ones.
    names = tuple(map(str.__str__, names))
    if len(set(names)) != len(names):
        raise ValueError(f"tasks={names!r} names a task twice")
    if "shared" in names:
        raise ValueError(f"tasks={names!r}: 'shared' is the name of the common subspace, choose another")
    return names


def check_samples(samples: object, task: str) -> float:
    """``samples`` as a positive, finite number."""
    number = isinstance(samples, numbers.Real) and not isinstance(samples, bool)
    if not number or not 0 < samples < math.inf:  # type: ignore[operator]
        raise ValueError(f"samples={samples!r} of task {task!r} must be a positive number")
    return float(samples)  # type: ignore[arg-type]


def check_loss(loss: object, task: str) -> None:
    """Raise a ValueError unless ``backward()`` can be called on the loss."""
    remedy = f"of task {task!r}: pass the scalar on which you would call backward(), or leave the task out"
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss={loss!r} ({type(loss).__name__}) {remedy}")
    if loss.numel() != 1:
        raise ValueError(f"loss of shape {tuple(loss.shape)} {remedy}")
    if not loss.requires_grad:
        raise ValueError(f"detached loss (requires_grad=False) {remedy}")


def check_group(group: dict[str, Any]) -> None:
    """Raise a ValueError if one of a group's own options is out of range; numbers of numpy become Python's."""
    for option in ("rank", "task_rank", "update_proj_gap", "scale"):
        value = group[option]
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            group[option] = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not isinstance(group["subspace"], bool):
        raise ValueError(f"subspace={group['subspace']!r} of a parameter group must be True or False")
    check_count("rank", group["rank"])
    check_count("task_rank", group["task_rank"], optional=True)
    check_count("update_proj_gap", group["update_proj_gap"])
    check_lr_scale(group["lr_scale"], numbers_too=True)
    scale = group["scale"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scale={scale!r} must be a positive number: it multiplies the lifted update")


def check_lr_scale(value: object, numbers_too: bool = False) -> None:
    """Raise a ValueError unless ``lr_scale`` is one there is; in a group a number may be another library's."""
    other = numbers_too and isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and value != "adamw" and not other:
        raise ValueError(f"lr_scale={value!r} must be None or 'adamw'")
