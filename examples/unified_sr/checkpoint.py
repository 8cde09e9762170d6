"""What an interrupted training run goes on from: one file, replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def write_whole(path: Path, content: Any, name: str) -> None:
    """Put tensors into a file that is replaced as a whole or not at all.

    It is written beside its place, flushed to the disk, and only then put there, so a run that is killed while it
    writes, or finds the disk full, leaves the earlier file as it was.

    Args:
        path: the file.
        content: tensors in containers that ``torch.load(weights_only=True)`` reads.
        name: how the error calls it.

    Raises:
        OSError: if it cannot be written, a full disk among other reasons; the earlier file is still there.
    """
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError of its archive writer.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(
            f"the {name} could not be written to {str(path)!r} ({error}); the earlier one is unchanged. Make room and "
            "start the same command again: it goes on from there"
        ) from error


def write_text_whole(path: Path, text: str) -> None:
    """Put text into a file that others read meanwhile, who find the earlier one or this one."""
    partial = _partial(path)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name: the model's own memory, without a graph."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the trained weights of a model the values that they had."""
    for name, weight in trained_weights(model).items():
        weight.copy_(weights[name])


class Checkpoint:
    """The file of a training run's state.

    Args:
        path: the file.

    Attributes:
        renew: writes it again as training is or ended, for whoever is interrupted later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.renew: Callable[[], None] = lambda: None

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, history: dict[str, Any]
    ) -> None:
        """Replace the checkpoint by one that was taken after ``step`` steps.

        Raises:
            OSError: if it cannot be written, a full disk among other reasons; the earlier checkpoint is still there.
        """
        content: dict[str, Any] = {
            "step": step,
            "weights": trained_weights(model),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "history": history,
            "random": torch.get_rng_state(),
        }
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            content["random_cuda"] = torch.cuda.get_rng_state()
        write_whole(self.path, content, f"checkpoint after step {step}")

    def restore(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> tuple[int, dict[str, Any]]:
        """Put weights, optimizer, schedule and random state back; return the step and the history, ``(0, {})`` if none.

        Raises:
            ValueError: if the weights of the checkpoint are not those that are trained.
        """
        _partial(self.path).unlink(missing_ok=True)
        if not self.path.is_file():
            return 0, {}
        content = torch.load(self.path, weights_only=True)
        different = sorted(trained_weights(model).keys() ^ content["weights"].keys())
        if different:
            raise ValueError(
                f"the checkpoint {str(self.path)!r} is of other weights ({different[:3]} ...); remove it to start again"
            )
        put_back(model, content["weights"])
        optimizer.load_state_dict(content["optimizer"])
        schedule.load_state_dict(content["schedule"])
        torch.set_rng_state(content["random"])
        if "random_cuda" in content and torch.cuda.is_available():
            torch.cuda.set_rng_state(content["random_cuda"])
        return int(content["step"]), content["history"]

    def remove(self) -> None:
        """Delete it: the run is finished."""
        self.path.unlink(missing_ok=True)
