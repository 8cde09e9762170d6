"""What a training method is: it chooses the trained weights and turns the tasks' losses into one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..data import Dataset, Example
from ..losses import Pass
from ..model import Ranker
from ..settings import MethodSettings, Settings, TrainingSettings

S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True)
class Setup(Generic[S]):
    """What a method builds on.

    Args:
        ranker: the model, of which nothing is frozen yet but the language model's own embedding and head.
        settings: of the run, whose section ``method`` is of the method's own class.
        tasks: their names.
        general_batches: makes keyword arguments of ``ranker.backbone``, each a batch of general-domain text.
        say: prints a line to the user.
    """

    ranker: Ranker
    settings: Settings[S]
    tasks: Sequence[str]
    general_batches: Callable[[], Iterable[Mapping[str, Tensor]]]
    say: Callable[[str], None]


@dataclass(frozen=True)
class Diagnostics:
    """What is known about one step, averaged over the layers.

    The gradients compared are those of the trained weights without the items' rows; of GEMS, whose whole gradients
    never exist, what its shared subspaces hold of them.

    Args:
        cosine: ``"a|b"`` -> cosine of the two tasks' gradients, all weights taken as one vector.
        cosines: ``"a|b"`` -> mean over the weights of the cosine in each of them.
        angles: ``"a|b"`` -> ``"mean_cosine"`` and ``"smallest"`` (radians) of the principal angles of two subspaces.
        gates: task -> weight of its subspace.
        energy: subspace -> share of its gradient's energy that it keeps.
        protected: layer -> share of its directions that are protected.
        full: everything, for a JSON file.
    """

    cosine: Mapping[str, float] = field(default_factory=dict)
    cosines: Mapping[str, float] = field(default_factory=dict)
    angles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gates: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    protected: Mapping[str, float] = field(default_factory=dict)
    full: Mapping[str, Any] = field(default_factory=dict)


class Updater(ABC):
    """Takes training steps.

    Args:
        optimizer: its parameter groups follow the learning-rate schedule.
        notes: sentences for the report about what is trained and what is not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, notes: Sequence[str] = ()) -> None:
        self.optimizer = optimizer
        self.notes = tuple(notes)

    @abstractmethod
    def update(self, passes: Sequence[Pass], *, measure: bool = False) -> dict[str, float]:
        """Take one step.

        Args:
            passes: the forward passes of the step; a task's loss is its mean over the targets of all of them.
            measure: whether ``diagnostics`` will be asked for; the step itself is the same.

        Returns:
            Each task's loss.
        """

    def diagnostics(self) -> Diagnostics | None:
        """Return what is known about the last step, which was measured, or ``None`` if there is nothing to know."""
        return None


@dataclass(frozen=True)
class Fitted:
    """A method without a language model, ready to rank.

    Args:
        scores: for each task that it serves, a function from B examples to (B, items), higher is better.
        notes: sentences for the report.
        device: where it computes.
        weights: numbers that gradient descent has trained.
    """

    scores: Mapping[str, Callable[[Sequence[Example]], Tensor]]
    notes: Sequence[str] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    weights: int = 0


@dataclass(frozen=True)
class Method:
    """A method's name, settings and builder.

    Args:
        name: as on the command line.
        summary: one line for tables and help.
        settings: the class of its section ``method``.
        build: makes the updater; ``None`` for a method that trains no language model.
        fit: makes the rankings of a method without any language model, from the settings, the data set and its training
            examples; ``None`` for all others.
        fit_seconds: what ``fit`` takes, roughly, until a run has shown it.
        defaults: settings by ``section.key`` whose default is another one than that of their class.
        variant_of: the method whose defaults hold for this one too, and whose section in a configuration file, so that
            the two differ in this one's own defaults and in nothing else.
    """

    name: str
    summary: str
    settings: type[MethodSettings]
    build: Callable[[Setup[Any]], Updater] | None
    fit: Callable[[Any, Dataset, Sequence[Example]], Fitted] | None = None
    fit_seconds: float = 0.0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    variant_of: str | None = None

    @property
    def defining(self) -> dict[str, Any]:
        """Its defaults that no other method's settings replace: all of a variant, and those of ``method``."""
        whole = self.variant_of is not None
        return {key: value for key, value in self.defaults.items() if whole or key.startswith("method.")}


def step_losses(found: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Return each task's loss from its detached shares of several passes, fetched from the device at once."""
    shares: dict[str, list[Tensor]] = {}
    for task, share in found:
        shares.setdefault(task, []).append(share)
    values = torch.stack([torch.stack(each).sum() for each in shares.values()]).tolist() if shares else []
    return dict(zip(shares, values, strict=True))


def train_only(ranker: Ranker, trained: Iterable[nn.Parameter]) -> None:
    """Freeze every weight but ``trained`` and the items' rows."""
    chosen = {id(weight) for weight in (*trained, *ranker.item_parameters())}
    for weight in ranker.parameters():
        weight.requires_grad_(id(weight) in chosen)


def model_parameters(ranker: Ranker) -> list[nn.Parameter]:
    """Return the weights of the language model without its embedding and head: those that may be trained."""
    items = {id(weight) for weight in ranker.item_parameters()}
    return [weight for weight in ranker.parameters() if weight.requires_grad and id(weight) not in items]


def parameter_groups(weights: Iterable[nn.Parameter], training: TrainingSettings) -> list[dict[str, Any]]:
    """Return optimizer groups of a model's weights: matrices with weight decay, vectors without."""
    weights = list(weights)
    matrices = [weight for weight in weights if weight.ndim >= 2]
    vectors = [weight for weight in weights if weight.ndim < 2]
    groups = [
        {"name": "matrices", "params": matrices, "lr": training.lr, "weight_decay": training.weight_decay},
        {"name": "vectors", "params": vectors, "lr": training.lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def item_group(ranker: Ranker, training: TrainingSettings) -> dict[str, Any]:
    """Return the optimizer group of the items' rows; decay would pull them away from what their titles say."""
    return {"name": "items", "params": ranker.item_parameters(), "lr": training.item_lr, "weight_decay": 0.0}
