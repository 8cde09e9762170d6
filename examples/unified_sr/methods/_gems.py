"""GEMS: shared and task subspaces of the gradients around AdamW, kept out of what general text uses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW

from gradsub import GemsOptimizer, NullSpace
from gradsub.layers import select_layers

from ..losses import Pass, total_samples
from ..null_space_cache import fingerprint, fitted_once
from ..settings import MethodSettings, Number
from ._base import (
    Diagnostics,
    Method,
    Setup,
    Updater,
    item_group,
    model_parameters,
    parameter_groups,
    step_losses,
    train_only,
)
from ._conflict import mean_values
from ._mixed import MixedLossUpdater


class GemsSettings(MethodSettings):
    """The subspaces and what is protected from them; the defaults are those of the library."""

    rank: int = Field(128, ge=1, description="dimension of the shared subspace")
    task_rank: int | None = Field(None, ge=1, description="dimension of each task's subspace; null takes half the rank")
    update_proj_gap: int = Field(200, ge=1, description="steps between two refreshes of the subspaces")
    scale: Number = Field(1.0, gt=0, description="factor of the lifted update")
    lr_scale: Literal["adamw"] | None = Field(
        None,
        description="adamw makes updates as large as AdamW's of whole weights at the same rate; null: shorter ones",
    )
    side: Literal["input", "output"] = Field(
        "input", description="side of the weights that subspaces and protection live on"
    )
    orthogonalize: Literal["none", "shared_first"] = Field(
        "none", description="whether task subspaces avoid the shared one"
    )
    task_subspaces: bool = Field(True, description="whether tasks have subspaces of their own beside the shared one")
    gate: Literal["uniform", "heuristic", "hypergradient"] = Field(
        "heuristic", description="how the task subspaces are weighted"
    )
    capture: Literal["auto", "fused", "generic"] = Field("auto", description="how the layers' gradients are captured")
    refresh: Literal["auto", "sketch", "svd"] = Field("auto", description="what the bases are refreshed from")
    protect: bool = Field(True, description="whether to keep the updates inside the null space of general text")
    energy: Number | None = Field(0.95, gt=0, le=1, description="share of the general features' energy protected")
    threshold: Number | None = Field(None, ge=0, description="protect directions above this eigenvalue instead")
    null_space_tokens: int = Field(8192, ge=16, description="tokens of general text that define the null space")
    normalize: bool | None = Field(
        None,
        description="whether each token of general text counts the same, however long its features; null: unless by "
        "threshold",
    )
    train_others: bool = Field(False, description="whether norms, biases and the like are trained too")
    others_lr: Number | None = Field(
        None, gt=0, description="their peak learning rate, if they are trained; null takes training.lr"
    )
    protect_others: bool = Field(
        False, description="whether their steps are kept out of general text's gradients, if they are"
    )


class GemsUpdater(Updater):
    """Steps with a ``gradsub.GemsOptimizer``: one backward pass per task, from one forward pass where tasks share it.

    Args:
        optimizer: takes the steps.
        notes: sentences for the report.
        grad_clip: the largest norm of each task's gradient; ``None`` does not clip.
    """

    def __init__(self, optimizer: GemsOptimizer, notes: list[str], grad_clip: float | None = None) -> None:
        super().__init__(optimizer, notes)
        self._gems = optimizer
        self._grad_clip = grad_clip

    def update(self, passes: Sequence[Pass], *, measure: bool = False) -> dict[str, float]:
        """Take one step from the tasks' separate gradients; the optimizer measures every step."""
        total = total_samples(passes)
        found: list[tuple[str, Tensor]] = []
        for each in passes:
            shares = {task: loss * (each.samples[task] / total[task]) for task, loss in each.compute().items()}
            self._gems.backward(shares, each.samples)
            found += [(task, share.detach()) for task, share in shares.items()]
        if self._grad_clip is not None:
            self._gems.clip_grad_norm_(self._grad_clip)
        self._gems.step()
        self._gems.zero_grad()
        return step_losses(found)

    def diagnostics(self) -> Diagnostics:
        """Average the optimizer's report over the layers."""
        report = self._gems.report()
        layers = report.layers
        cosines = {"|".join(pair): report.cosine(*pair) for pair in itertools.combinations(report.tasks, 2)}
        smallest = mean_values({"|".join(pair): min(found) for pair, found in layer.angles.items()} for layer in layers)
        alignment = mean_values(
            {"|".join(pair): math.fsum(map(math.cos, found)) / len(found) for pair, found in layer.angles.items()}
            for layer in layers
        )
        return Diagnostics(
            cosine={pair: cosine for pair, cosine in cosines.items() if math.isfinite(cosine)},
            cosines=mean_values({"|".join(pair): value for pair, value in layer.cosines.items()} for layer in layers),
            angles={pair: {"mean_cosine": alignment[pair], "smallest": smallest[pair]} for pair in smallest},
            gates=mean_values(layer.gates for layer in layers),
            energy=mean_values(layer.energy for layer in layers),
            protected={layer.name: float(layer.protected_fraction) for layer in layers},
            full=report.to_dict(),
        )


def build(setup: Setup[GemsSettings]) -> Updater:
    """Fit the null space on general text and wrap AdamW.

    Raises:
        ValueError: if ``others_lr`` or ``protect_others`` is given where the others are not trained, or the latter
            where nothing is protected.
    """
    settings, training, ranker = setup.settings.method, setup.settings.training, setup.ranker
    if settings.others_lr is not None and not settings.train_others:
        raise ValueError(
            f"method.others_lr={settings.others_lr} has nothing to train: set method.train_others to true, or "
            "it to null"
        )
    if settings.protect_others and not (settings.train_others and settings.protect):
        raise ValueError(
            f"method.protect_others=True asks for train_others and protect, found train_others={settings.train_others} "
            f"and protect={settings.protect}: set both to true, or protect_others to false"
        )
    layers: list[Any] = list(select_layers(ranker.backbone).values())
    linear: list[nn.Parameter] = [layer.weight for layer in layers]
    protected = {id(weight) for weight in linear}
    others = [weight for weight in model_parameters(ranker) if settings.train_others and id(weight) not in protected]
    train_only(ranker, [*linear, *others])
    others_lr = training.lr if settings.others_lr is None else settings.others_lr
    groups = [
        {**group, "lr": lr, "subspace": name == "linear", "name": f"{name}.{group['name']}"}
        for name, weights, lr in (("linear", linear, training.lr), ("other", others, others_lr))
        for group in parameter_groups(weights, training)
    ]
    groups.append({**item_group(ranker, training), "subspace": False})
    optimizer = GemsOptimizer(
        AdamW(groups),
        # Gradients of no task belong to the shared subspace alone: an optimizer without tasks has only that.
        tasks=tuple(setup.tasks) if settings.task_subspaces else (),
        rank=settings.rank,
        task_rank=settings.task_rank,
        update_proj_gap=settings.update_proj_gap,
        scale=settings.scale,
        lr_scale=settings.lr_scale,
        side=settings.side,
        orthogonalize=settings.orthogonalize,
        gate=settings.gate,
        null_space=_null_space(setup) if settings.protect else None,
        model=ranker.backbone,
        target_modules="all-linear",
        seed=setup.settings.seed,
        capture=settings.capture,
        refresh=settings.refresh,
    )
    notes = ["Linear layers are trained inside the subspaces, the items' rows by plain AdamW."]
    if not settings.train_others:
        notes.append(
            "Norms, biases and all else that is no linear layer are frozen (`train_others: false`): no null space "
            "protects them, so training them would change the model's answers to general text."
        )
    elif others:
        plain = [parameter for parameter in optimizer.summary().parameters if not parameter.ranks]
        held = sum(parameter.protected_fraction > 0 for parameter in plain)
        kept = f"the null space of general text's gradients protects {held} of the {len(others)}"
        notes.append(
            "Norms, biases and all else that is no linear layer are trained by plain AdamW, at the peak rate "
            f"{others_lr:g}; {kept if settings.protect_others else 'no null space protects them'}."
        )
    if not settings.protect:
        notes.append("Nothing is protected (`protect: false`): the subspaces hold any direction of the gradients.")
    if not settings.task_subspaces:
        notes.append(
            "No task has a subspace of its own (`task_subspaces: false`): the gradient of the mixed batch moves the "
            "shared subspace alone, and the update is that of `gems` without the gated terms. The conflict of the "
            "tasks is that of their whole gradients, which this variant has."
        )
        return MixedLossUpdater(optimizer, notes, training.grad_clip)
    notes.append(f"The task subspaces are weighted by the {settings.gate} gate.")
    return GemsUpdater(optimizer, notes, training.grad_clip)


def _null_space(setup: Setup[GemsSettings]) -> NullSpace:
    settings = setup.settings.method
    if (settings.energy is None) == (settings.threshold is None):
        raise ValueError(
            f"exactly one of energy and threshold must be given, got energy={settings.energy} and "
            f"threshold={settings.threshold}; set the other one to null"
        )
    chosen = {"energy": settings.energy} if settings.threshold is None else {"threshold": settings.threshold}
    backbone: nn.Module = setup.ranker.backbone
    batches = setup.general_batches

    def fit() -> NullSpace:
        setup.say(f"null space: {settings.null_space_tokens} tokens of general text")
        null_space = NullSpace(side=settings.side, **chosen)
        null_space.collect(backbone, batches(), target_modules="all-linear", normalize=settings.normalize)
        if settings.protect_others:
            null_space.collect_gradients(backbone, batches(), partial(_next_tokens, setup.ranker.lm))
        return null_space

    key = fingerprint(
        setup.ranker.lm,
        batches(),
        {
            **chosen,
            "side": settings.side,
            "normalize": settings.normalize,
            "others": settings.protect_others,
        },
        # General text has no items, and its loss is that of the words.
        without=setup.ranker.item_parameters(),
    )
    device = next(backbone.parameters()).device
    return fitted_once(key, fit, device, setup.say)


def _next_tokens(lm: nn.Module, _: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The language model's loss on general text, summed over tokens, from its own vocabulary head."""
    logits: Tensor = lm(**batch).logits
    tokens = batch.get("decoder_input_ids", batch["input_ids"])
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


def _variant(name: str, summary: str, **own: object) -> Method:
    defaults = {f"method.{key}": value for key, value in own.items()}
    return Method(name, summary, GemsSettings, build, defaults=defaults, variant_of="gems")


METHODS = (
    Method(
        "gems", "GEMS with the library's defaults (input side)", GemsSettings, build, defaults={"training.lr": 6e-4}
    ),
    # The choices of arXiv 2601.09496 and its released code, as far as they do not depend on the model's size.
    Method(
        "gems-paper",
        "GEMS as published (output side)",
        GemsSettings,
        build,
        defaults={
            "training.lr": 5e-4,
            "training.warmup": 0.01,
            "method.rank": 1024,
            "method.side": "output",
            "method.energy": None,
            "method.threshold": 2e-2,
        },
    ),
    _variant("gems-no-task", "GEMS without the task subspaces", task_subspaces=False),
    _variant("gems-no-null", "GEMS without the null space", protect=False),
    _variant("gems-uniform", "GEMS with equal weights of the task subspaces", gate="uniform"),
    _variant("gems-hypergradient", "GEMS with trained weights of the task subspaces", gate="hypergradient"),
)
