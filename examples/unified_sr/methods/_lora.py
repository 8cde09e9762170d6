"""LoRA adapters (peft) on every linear layer, trained with AdamW; the weights themselves stay frozen."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import AdamW

from ..settings import Settings, setting
from ._base import Method, Setup, Updater, item_group, parameter_groups, train_only
from ._mixed import MixedLossUpdater


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """The adapters' shape."""

    method: str = setting("lora", "name of the training method")
    lr: float = setting(1e-3, "peak learning rate of the adapters", above=0)
    rank: int = setting(64, "rank of the adapters", minimum=1)
    alpha: int = setting(64, "scale of the adapters, divided by the rank", minimum=1)
    dropout: float = setting(0.0, "share of the adapters' inputs dropped in training", minimum=0, maximum=1)


def build(setup: Setup[LoraSettings]) -> Updater:
    """Add adapters to all linear layers and train them on the mixed batch."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("the method 'lora' needs peft: pip install 'gradsub[examples]'") from error
    settings = setup.settings
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules="all-linear"
    )
    inject_adapter_in_model(config, setup.ranker.backbone)
    adapters = [weight for name, weight in setup.ranker.named_parameters() if "lora_" in name]
    train_only(setup.ranker, adapters)
    optimizer = AdamW([*parameter_groups(adapters, settings), item_group(setup.ranker, settings)])
    note = (
        f"Adapters of rank {settings.rank} on every linear layer are trained; all other weights are frozen. The "
        "conflict of the tasks is that of the adapters' gradients."
    )
    return MixedLossUpdater(optimizer, [note], settings.grad_clip)


LORA = Method("lora", "LoRA adapters on every linear layer", LoraSettings, build)
