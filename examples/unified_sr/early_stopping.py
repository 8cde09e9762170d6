"""Training ends where the ranking of held-out examples no longer improves, with the weights that ranked them best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .checkpoint import write_whole
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

    def over(self, values: Sequence[float], model: nn.Module) -> bool:
        """Keep the weights if the last epoch's value is the best, and tell whether training is over.

        Args:
            values: of all epochs so far.
            model: whose trained weights belong to the last value.

        Raises:
            OSError: if the weights cannot be written.
        """
        best = max(range(len(values)), key=lambda epoch: (values[epoch], -epoch))
        if best == len(values) - 1 and current().first:
            weights = {name: weight.detach() for name, weight in _trained(model).items()}
            write_whole(self.path, weights, f"weights of epoch {len(values)}")
        return len(values) - 1 - best >= self.patience

    def restore_best(self, model: nn.Module) -> None:
        """Give the model the best weights."""
        current().wait()
        kept = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            for name, weight in _trained(model).items():
                weight.copy_(kept[name])

    def remove(self) -> None:
        """Delete the kept weights: the run is finished."""
        self.path.unlink(missing_ok=True)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
