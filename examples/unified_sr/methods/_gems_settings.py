"""The settings of GEMS, of its published form and of its ablations, each of which changes one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class GemsSettings(Settings):
    """The subspaces and what is protected from them; the defaults are those of the library."""

    method: str = setting("gems", "name of the training method")
    lr: float = setting(6e-4, "peak learning rate inside the subspaces", above=0)
    rank: int = setting(128, "dimension of the shared subspace", minimum=1)
    task_rank: int | None = setting(None, "dimension of each task's subspace; null takes half the rank", minimum=1)
    update_proj_gap: int = setting(200, "steps between two refreshes of the subspaces", minimum=1)
    scale: float = setting(1.0, "factor of the lifted update", above=0)
    lr_scale: Literal["adamw"] | None = setting(
        None, "adamw makes updates as large as AdamW's of whole weights at the same rate; null leaves them shorter"
    )
    side: Literal["input", "output"] = setting("input", "side of the weights that subspaces and protection live on")
    orthogonalize: Literal["none", "shared_first"] = setting("none", "whether task subspaces avoid the shared one")
    task_subspaces: bool = setting(True, "whether tasks have subspaces of their own beside the shared one")
    gate: Literal["uniform", "heuristic", "hypergradient"] = setting("heuristic", "how the task subspaces are weighted")
    capture: Literal["auto", "fused", "generic"] = setting("auto", "how the layers' gradients are captured")
    refresh: Literal["auto", "sketch", "svd"] = setting("auto", "what the bases are refreshed from")
    protect: bool = setting(True, "whether to keep the updates inside the null space of general text")
    energy: float | None = setting(0.95, "share of the general features' energy protected", above=0, maximum=1)
    threshold: float | None = setting(None, "protect directions above this eigenvalue instead", minimum=0)
    null_space_tokens: int = setting(8192, "tokens of general text that define the null space", minimum=16)
    normalize: bool | None = setting(
        None, "whether each token of general text counts the same, however long its features; null: unless by threshold"
    )
    train_others: bool = setting(False, "whether norms, biases and the like are trained too")
    others_lr: float | None = setting(None, "their peak learning rate, if they are trained; null takes lr", above=0)
    protect_others: bool = setting(False, "whether their steps are kept out of general text's gradients, if they are")


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


@dataclass(frozen=True, kw_only=True)
class GemsNoTaskSettings(GemsSettings):
    """Ablation: the shared subspace alone."""

    method: str = setting("gems-no-task", "name of the training method")
    task_subspaces: bool = setting(False, "whether tasks have subspaces of their own beside the shared one")


@dataclass(frozen=True, kw_only=True)
class GemsNoNullSettings(GemsSettings):
    """Ablation: nothing is protected."""

    method: str = setting("gems-no-null", "name of the training method")
    protect: bool = setting(False, "whether to keep the updates inside the null space of general text")


@dataclass(frozen=True, kw_only=True)
class GemsUniformSettings(GemsSettings):
    """Ablation: all task subspaces count the same."""

    method: str = setting("gems-uniform", "name of the training method")
    gate: Literal["uniform", "heuristic", "hypergradient"] = setting("uniform", "how the task subspaces are weighted")


@dataclass(frozen=True, kw_only=True)
class GemsHypergradientSettings(GemsSettings):
    """Variant: the weights of the task subspaces are trained."""

    method: str = setting("gems-hypergradient", "name of the training method")
    gate: Literal["uniform", "heuristic", "hypergradient"] = setting(
        "hypergradient", "how the task subspaces are weighted"
    )
