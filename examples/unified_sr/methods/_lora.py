"""LoRA adapters (peft) on every linear layer, trained with AdamW; the weights themselves stay frozen."""

from __future__ import annotations

from pydantic import Field
from torch.optim import AdamW

from ..settings import MethodSettings, Number
from ._base import Method, Setup, Updater, item_group, parameter_groups, train_only
from ._mixed import MixedLossUpdater


class LoraSettings(MethodSettings):
    """The adapters' shape."""

    rank: int = Field(64, ge=1, description="rank of the adapters")
    alpha: int = Field(64, ge=1, description="scale of the adapters, divided by the rank")
    dropout: Number = Field(0.0, ge=0, le=1, description="share of the adapters' inputs dropped in training")


def build(setup: Setup[LoraSettings]) -> Updater:
    """Add adapters to all linear layers and train them on the mixed batch."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("the method 'lora' needs peft: pip install 'gradsub[examples]'") from error
    settings, training = setup.settings.method, setup.settings.training
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules="all-linear"
    )
    inject_adapter_in_model(config, setup.ranker.backbone)
    adapters = [weight for name, weight in setup.ranker.named_parameters() if "lora_" in name]
    train_only(setup.ranker, adapters)
    optimizer = AdamW([*parameter_groups(adapters, training), item_group(setup.ranker, training)])
    note = (
        f"Adapters of rank {settings.rank} on every linear layer are trained; all other weights are frozen. The "
        "conflict of the tasks is that of the adapters' gradients."
    )
    return MixedLossUpdater(optimizer, [note], training.grad_clip)


METHODS = (Method("lora", "LoRA adapters on every linear layer", LoraSettings, build, defaults={"training.lr": 1e-3}),)
