"""GaLore (galore-torch): AdamW inside one subspace of each layer's gradient, without tasks and without protection."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub.layers import select_layers

from ..settings import MethodSettings, Number
from ._base import Method, Setup, Updater, item_group, model_parameters, parameter_groups, train_only
from ._mixed import MixedLossUpdater

_PROJECTOR, _BASIS = "projector", "projector_basis"


class GaloreSettings(MethodSettings):
    """The subspaces, with the rank and the gap of GEMS."""

    rank: int = Field(128, ge=1, description="dimension of the subspaces")
    update_proj_gap: int = Field(200, ge=1, description="steps between two decompositions of the gradients")
    scale: Number = Field(1.0, gt=0, description="factor of the update in the subspaces; GaLore's alpha")


def build(setup: Setup[GaloreSettings]) -> Updater:
    """Train all layers on the mixed batch, the linear ones inside their gradients' subspaces."""
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise ImportError("the method 'galore' needs galore-torch: pip install 'gradsub[examples]'") from error
    settings, training, ranker = setup.settings.method, setup.settings.training, setup.ranker
    layers: list[Any] = list(select_layers(ranker.backbone).values())
    linear: list[nn.Parameter] = list(dict.fromkeys(layer.weight for layer in layers))
    others = [weight for weight in model_parameters(ranker) if all(weight is not one for one in linear)]
    train_only(ranker, [*linear, *others])
    subspace = {
        "rank": settings.rank,
        "update_proj_gap": settings.update_proj_gap,
        "scale": settings.scale,
        "proj_type": "std",
    }
    groups = [
        *({**group, **subspace, "name": f"linear.{group['name']}"} for group in parameter_groups(linear, training)),
        *({**group, "name": f"other.{group['name']}"} for group in parameter_groups(others, training)),
        item_group(ranker, training),
    ]
    # torch's eps: GaLore's own default is 1e-6, and the methods are not to differ in that.
    optimizer: Optimizer = GaLoreAdamW(groups, eps=1e-8, no_deprecation_warning=True)
    optimizer.register_state_dict_post_hook(_projectors_to_bases)
    optimizer.register_load_state_dict_post_hook(_bases_to_projectors)
    note = (
        f"Linear layers are trained by GaLoreAdamW inside one subspace of rank {settings.rank} of the mixed batch's "
        "gradient, everything else of the layers by its plain AdamW; the embedding of words and the vocabulary head "
        "are frozen."
    )
    return MixedLossUpdater(optimizer, [note], training.grad_clip)


def _projectors_to_bases(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint is read without running code, so it holds no objects: of a projector only its basis is state."""
    state = {
        key: {
            _BASIS if name == _PROJECTOR else name: value.ortho_matrix if name == _PROJECTOR else value
            for name, value in found.items()
        }
        for key, found in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _bases_to_projectors(optimizer: Optimizer) -> None:
    from galore_torch.galore_projector import GaLoreProjector

    for group in optimizer.param_groups:
        for weight in group["params"]:
            basis: Tensor | None = optimizer.state[weight].pop(_BASIS, None)
            if basis is not None:
                projector = GaLoreProjector(
                    group["rank"],
                    update_proj_gap=group["update_proj_gap"],
                    scale=group["scale"],
                    proj_type=group["proj_type"],
                )
                projector.ortho_matrix = basis
                optimizer.state[weight][_PROJECTOR] = projector


METHODS = (
    Method(
        "galore",
        "GaLore: AdamW inside one subspace of the gradient",
        GaloreSettings,
        build,
        # Twice AdamW's: the scale of 1 keeps the size of a step per direction, and a step has fewer directions.
        defaults={"training.lr": 2e-4},
    ),
)
