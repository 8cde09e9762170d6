from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gradsub.null_space._null_space import check_side
from gradsub.subspace import MOMENT_RULES

ORTHOGONALIZATIONS = ("none", "shared_first")
NONFINITE_RULES = ("raise", "skip", "ignore")
CAPTURES = ("auto", "fused", "generic")
REFRESHES = ("auto", "sketch", "svd")
PLACES = ("auto", "device", "host")
# What a parameter group holds that the base optimizer must not see.
NOT_INNER = frozenset(
    {"params", "param_names", "tasks", "side", "subspace", "rank", "task_rank", "update_proj_gap", "scale", "lr_scale"}
)


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in tuple(choices):
        raise ValueError(f"{argument}={value!r} must be one of {', '.join(map(repr, choices))}")


def check_count(argument: str, value: object, *, optional: bool = False) -> None:
    """Raise a ValueError unless ``value`` is a positive integer (or None, if optional)."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument}={value!r} must be an integer of at least 1{', or None' if optional else ''}")


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


def check_arguments(
    side: str, orthogonalize: str, moments: str, nonfinite: str, capture: str, refresh: str, protection: str
) -> None:
    """Raise a ValueError if one of the optimizer's choices does not exist."""
    check_side(side)
    check_choice("orthogonalize", orthogonalize, ORTHOGONALIZATIONS)
    check_choice("moments", moments, MOMENT_RULES)
    check_choice("nonfinite", nonfinite, NONFINITE_RULES)
    check_choice("capture", capture, CAPTURES)
    check_choice("refresh", refresh, REFRESHES)
    check_choice("protection", protection, PLACES)
