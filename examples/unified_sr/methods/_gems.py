"""GEMS: shared and task subspaces of the gradients around AdamW, kept out of what general text uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import AdamW

from ..settings import Settings, setting
from ._base import Diagnostics, Method, Setup, Updater, item_group, model_parameters, parameter_groups, train_only


@dataclass(frozen=True, kw_only=True)
class GemsSettings(Settings):
    """The subspaces and what is protected from them; the defaults are those of the library."""

    method: str = setting("gems", "name of the training method")
    lr: float = setting(6e-4, "peak learning rate inside the subspaces", above=0)
    rank: int = setting(128, "dimension of the shared subspace", minimum=1)
    task_rank: int | None = setting(None, "dimension of each task's subspace; null takes half the rank", minimum=1)
    update_proj_gap: int = setting(200, "steps between two refreshes of the subspaces", minimum=1)
    scale: float = setting(1.0, "factor of the lifted update", above=0)
    side: Literal["input", "output"] = setting("input", "side of the weights that subspaces and protection live on")
    orthogonalize: Literal["none", "shared_first"] = setting("none", "whether task subspaces avoid the shared one")
    gate: Literal["uniform", "heuristic"] = setting("heuristic", "how the task subspaces are weighted")
    capture: Literal["auto", "fused", "generic"] = setting("auto", "how the layers' gradients are captured")
    refresh: Literal["auto", "sketch", "svd"] = setting("auto", "what the bases are refreshed from")
    protect: bool = setting(True, "whether to keep the updates inside the null space of general text")
    energy: float | None = setting(0.95, "share of the general features' energy protected", above=0, maximum=1)
    threshold: float | None = setting(None, "protect directions above this eigenvalue instead", minimum=0)
    null_space_tokens: int = setting(8192, "tokens of general text that define the null space", minimum=16)
    train_others: bool = setting(False, "whether norms, biases and the like are trained too, which nothing protects")


@dataclass(frozen=True, kw_only=True)
class GemsPaperSettings(GemsSettings):
    """The choices of arXiv 2601.09496 and its released code, as far as they do not depend on the model's size."""

    method: str = setting("gems-paper", "name of the training method")
    lr: float = setting(5e-4, "peak learning rate inside the subspaces", above=0)
    warmup: float = setting(0.01, "share of the steps in which the learning rates rise", minimum=0, maximum=1)
    rank: int = setting(1024, "dimension of the shared subspace", minimum=1)
    side: Literal["input", "output"] = setting("output", "side of the weights that subspaces and protection live on")
    energy: float | None = setting(None, "share of the general features' energy protected", above=0, maximum=1)
    threshold: float | None = setting(2e-2, "protect directions above this eigenvalue", minimum=0)


class GemsUpdater(Updater):
    """Steps with a ``gradsub.GemsOptimizer``: one forward and backward pass per task."""

    def update(self, losses: Mapping[str, Callable[[], Tensor]], samples: Mapping[str, int]) -> dict[str, float]:
        """Take one step from the tasks' separate gradients."""
        optimizer: Any = self.optimizer
        values: dict[str, float] = {}
        for task, compute in losses.items():
            with optimizer.task(task, samples=samples[task]):
                loss = compute()
                loss.backward()  # type: ignore[no-untyped-call]
            values[task] = float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return values

    def diagnostics(self) -> Diagnostics:
        """Average the optimizer's report over the layers."""
        report = self.optimizer.report()  # type: ignore[attr-defined]
        layers = report.layers
        return Diagnostics(
            cosines=_mean({"|".join(pair): value for pair, value in layer.cosines.items()} for layer in layers),
            gates=_mean(layer.gates for layer in layers),
            energy=_mean(layer.energy for layer in layers),
            protected={layer.name: float(layer.protected_fraction) for layer in layers},
            full=report.to_dict(),
        )


def build(setup: Setup[GemsSettings]) -> Updater:
    """Fit the null space on general text and wrap AdamW."""
    from gradsub import GemsOptimizer
    from gradsub.layers import select_layers

    settings, ranker = setup.settings, setup.ranker
    layers: list[Any] = list(select_layers(ranker.backbone).values())
    linear: list[nn.Parameter] = [layer.weight for layer in layers]
    protected = {id(weight) for weight in linear}
    others = [weight for weight in model_parameters(ranker) if settings.train_others and id(weight) not in protected]
    train_only(ranker, [*linear, *others])
    groups = [
        {**group, "subspace": name == "linear", "name": f"{name}.{group['name']}"}
        for name, weights in (("linear", linear), ("other", others))
        for group in parameter_groups(weights, settings)
    ]
    groups.append({**item_group(ranker, settings), "subspace": False})
    optimizer = GemsOptimizer(
        AdamW(groups),
        tasks=tuple(setup.tasks),
        rank=settings.rank,
        task_rank=settings.task_rank,
        update_proj_gap=settings.update_proj_gap,
        scale=settings.scale,
        side=settings.side,
        orthogonalize=settings.orthogonalize,
        gate=settings.gate,
        null_space=_null_space(setup) if settings.protect else None,
        model=ranker.backbone,
        target_modules="all-linear",
        seed=settings.seed,
        capture=settings.capture,
        refresh=settings.refresh,
    )
    notes = ["Linear layers are trained inside the subspaces, the items' rows by plain AdamW."]
    if not settings.train_others:
        notes.append(
            "Norms, biases and all else that is no linear layer are frozen (`train_others: false`): no null space "
            "protects them, so training them would change the model's answers to general text."
        )
    return GemsUpdater(optimizer, notes)


def _null_space(setup: Setup[GemsSettings]) -> Any:
    from gradsub import NullSpace

    settings = setup.settings
    if (settings.energy is None) == (settings.threshold is None):
        raise ValueError(
            f"exactly one of energy and threshold must be given, got energy={settings.energy} and "
            f"threshold={settings.threshold}; set the other one to null"
        )
    chosen = {"energy": settings.energy} if settings.threshold is None else {"threshold": settings.threshold}
    null_space = NullSpace(side=settings.side, **chosen)
    backbone: nn.Module = setup.ranker.backbone
    setup.say(f"null space: {settings.null_space_tokens} tokens of general text")
    null_space.collect(backbone, setup.general_batches(), target_modules="all-linear")
    return null_space


def _mean(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    gathered: dict[str, list[float]] = {}
    for mapping in values:
        for key, value in mapping.items():
            if math.isfinite(value):
                gathered.setdefault(key, []).append(float(value))
    return {key: math.fsum(found) / len(found) for key, found in gathered.items()}


GEMS = Method("gems", "GEMS with the library's defaults (input side)", GemsSettings, build)
GEMS_PAPER = Method("gems-paper", "GEMS as published (output side)", GemsPaperSettings, build)
