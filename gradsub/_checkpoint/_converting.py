"""What a saved value becomes here: of the kind, shape, dtype and place of what stands in its place, or refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from gradsub._checkpoint._stand_in import TRIAL_STEPS
from gradsub.subspace import check_steps_taken, local

ANYTHING = object()


def convert(
    what: str, value: Any, like: Any, parameter: Tensor, device: torch.device | None = None, finite: bool = True
) -> Any:
    """A copy of a saved value as it is used here: its dtype, device and memory format are those of ``like``.

    Args:
        what: names it in errors.
        like: what stands in its place here, or would; a number for a tensor and the reverse are converted.
        device: where numbers go, if not where ``like`` is.
        finite: whether NaN and Inf are refused.

    Raises:
        ValueError: it is of another kind or shape, not finite, or cannot be had in that dtype.
    """
    if like is ANYTHING:
        if isinstance(value, Tensor):
            like = value if value.device.type == "meta" else value.detach().to(parameter.device)
        else:
            like = value
    if isinstance(like, Tensor):
        return _tensor(what, value, like, device, finite)
    if isinstance(like, (int, float)) and not isinstance(like, bool):
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"state_dict: {what} is {described(value)}, expected a number")
        if finite and not math.isfinite(value):
            raise ValueError(f"state_dict: {what} is {value}: the checkpoint is damaged, or its run had diverged")
        return value
    if type(value) is not type(like):
        raise ValueError(f"state_dict: {what} is {described(value)}, expected {described(like)}")
    return copy.deepcopy(value)


def _tensor(what: str, value: Any, like: Tensor, device: torch.device | None, finite: bool) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and like.ndim == 0:
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64, device="cpu")
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type == "meta":
        raise ValueError(f"state_dict: {what} is {described(value)}, expected a tensor of shape {tuple(like.shape)}")
    if value.shape != like.shape:
        raise ValueError(
            f"state_dict: {what} has shape {tuple(value.shape)} there and {tuple(like.shape)} here: use the same "
            "tasks, rank, task_rank, side and null space"
        )
    counts = like.ndim == 0 or not like.is_floating_point()
    fits = value.dtype == like.dtype or (
        not value.is_complex() and value.dtype != torch.bool and like.dtype != torch.bool
    )
    if not fits or not (counts or value.is_floating_point()):
        raise ValueError(f"state_dict: {what} has dtype {value.dtype} there and {like.dtype} here")
    value = value.detach()
    # As an empty copy, so that it lies in memory like its parameter: fused optimizers read both side by side.
    where = device if device is not None and like.ndim == 0 else like.device
    found = torch.empty_like(like, device=where, requires_grad=False).copy_(value)
    here = local(found)
    if finite and not bool(here.isfinite().all()):
        raise ValueError(f"state_dict: {what} holds NaN or Inf: the checkpoint is damaged, or its run had diverged")
    if value.is_floating_point() and not like.is_floating_point() and not bool((value.cpu() == here.cpu()).all()):
        raise ValueError(f"state_dict: {what} has values that are no {like.dtype}")
    return found


def check_usual(what: str, value: Any, seen: Any) -> None:
    """Raise if a value is what the base optimizer never makes: where steps in both directions left nothing negative
    (a second moment, a count), it makes nothing negative.
    """
    if not isinstance(seen, (Tensor, float, int)) or not isinstance(value, (Tensor, float, int)):
        return
    least, most = _range(seen)
    if least >= 0 and most > 0 and _range(value)[0] < 0:
        raise ValueError(f"{what} has negative entries, which the base optimizer never makes: it is damaged")
    if least == most == TRIAL_STEPS and count_of(value) == 1:
        check_steps_taken(what, value)


def is_finite(value: Any) -> bool:
    """Whether no number in it is NaN or Inf."""
    if isinstance(value, (list, tuple)):
        return all(map(is_finite, value))
    if isinstance(value, Tensor):
        return bool(local(value).isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def count_of(value: Tensor | float) -> int:
    """How many numbers it is."""
    return value.numel() if isinstance(value, Tensor) else 1


def _range(value: Tensor | float) -> tuple[float, float]:
    """The smallest and the largest entry; NaN where there is none."""
    if not isinstance(value, Tensor):
        return float(value), float(value)
    here = local(value)
    if not here.numel() or here.is_complex() or here.dtype == torch.bool:
        return math.nan, math.nan
    return float(here.min()), float(here.max())


def described(value: Any) -> str:
    """What errors say of it."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} ({value.layout}, {value.device})"
    return (
        f"{value!r} ({type(value).__name__})"
        if value is None or isinstance(value, (int, str))
        else f"a {type(value).__name__}"
    )
