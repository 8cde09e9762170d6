"""Settings of GEMS."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import MethodSettings, Number


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
