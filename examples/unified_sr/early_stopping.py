"""Training ends where the ranking of held-out examples no longer improves, with the weights that ranked them best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import put_back, trained_weights, write_whole
from .processes import current


class EarlyStopping:
    """Watches a validation metric, one value an epoch.

    Args:
        path: the file that holds the best weights so far.
        patience: epochs without a better value after which training is over.
        validate: measures the metric; higher is better.
    """

    def __init__(self, path: Path, patience: int, validate: Callable[[], float]) -> None:
        self.path = path
        self.patience = patience
        self.validate = validate
        self._kept: tuple[int, float] | None = None

    def over(self, values: Sequence[float], model: nn.Module) -> bool:
        """Keep the weights if the last epoch's value is the best, and tell whether training is over.

        Args:
            values: of all epochs so far.
            model: whose trained weights belong to the last value.

        Raises:
            OSError: if the weights cannot be written.
        """
        best = best_epoch(values)
        if best == len(values):
            if current().first:
                content = {"epoch": best, "value": values[-1], "weights": trained_weights(model)}
                write_whole(self.path, content, f"weights of epoch {best}")
            self._kept = best, values[-1]
        elif self._kept is None:
            # An attempt that was killed may have kept a later epoch, which is trained again; the end checks the file.
            self._kept = best, values[best - 1]
        return len(values) - best >= self.patience

    def restore_best(self, model: nn.Module) -> None:
        """Give the model the best weights.

        Raises:
            ValueError: if those that were kept before this process are not of the best epoch.
        """
        current().wait()
        assert self._kept is not None
        put_back(model, self._read(*self._kept))

    def _read(self, epoch: int, value: float) -> dict[str, Any]:
        content = torch.load(self.path, weights_only=True)
        if (content.get("epoch"), content.get("value")) != (epoch, value):
            # An attempt that was killed got further than its checkpoint, and went on otherwise than this one.
            raise ValueError(
                f"{str(self.path)!r} holds the weights of epoch {content.get('epoch')} with the value "
                f"{content.get('value')}, but the best one is epoch {epoch} with {value}: its weights are lost; remove "
                f"{str(self.path.parent)!r} to train again"
            )
        weights: dict[str, Any] = content["weights"]
        return weights

    def remove(self) -> None:
        """Delete the kept weights: the run is finished."""
        self.path.unlink(missing_ok=True)


def best_epoch(values: Sequence[float]) -> int:
    """Return the number of the epoch with the highest value, from 1; of equal ones the first."""
    return 1 + max(range(len(values)), key=lambda epoch: (values[epoch], -epoch))
