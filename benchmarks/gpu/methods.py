"""The methods, and null spaces of a given size."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsub import NullSpace

from ..training.models import trained_layers
from ..two_tasks import Method, Workload

_SPREAD = 0.1  # between the layers that protect most and least, as a share of the directions


def methods(gap: int) -> dict[str, Method]:
    """By name; the refreshing ones refresh every basis within ``gap`` steps."""
    return {
        "adamw": Method("AdamW (fused), a pass a task", "adamw"),
        "lora": Method("peft's LoRA of the same rank under AdamW (fused), a pass a task", "lora"),
        "gems": Method("an ordinary step, a pass a task", "gems"),
        "gems-mixed": Method("an ordinary step, one pass of both tasks' rows", "gems", one_batch=True),
        "gems-null": Method("an ordinary step with a null space", "gems", protected=True),
        "gems-refresh": Method(f"every basis is refreshed within {gap} steps", "gems", gap=gap),
        "gems-null-refresh": Method(
            f"every basis is refreshed within {gap} steps, with a null space", "gems", protected=True, gap=gap
        ),
        "adamw+compile": Method("AdamW (fused), the model through torch.compile", "adamw", compiled=True),
        "gems+compile": Method("an ordinary step, the model through torch.compile", "gems", compiled=True),
    }


class RandomNullSpace(NullSpace):
    """Random directions instead of collected ones: neither an eigendecomposition nor statistics that need room.

    How many there are differs from layer to layer, as it does where the energy decides.

    Args:
        widths: layer -> its input features.
        share: of the directions that are protected, on average.
        device: where the directions are.
    """

    def __init__(self, widths: Mapping[str, int], share: float, device: str) -> None:
        super().__init__(max_rank=max(widths.values()))
        self._widths = dict(widths)
        self._share = share
        self._device = device

    def basis(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        width = self._widths[name]
        seed = zlib.crc32(name.encode())
        share = self._share + _SPREAD * (seed / 0xFFFFFFFF - 0.5)
        generator = torch.Generator(self._device).manual_seed(seed)
        random = torch.randn(width, round(share * width), device=self._device, generator=generator)
        return torch.linalg.qr(random).Q.to(dtype)

    def complement(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        basis = self.basis(name, dtype)
        return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :].contiguous()

    def protected_fraction(self, name: str) -> float:
        width, count = self.basis(name).shape
        return count / width

    def extended(self, name: str, kept: Tensor) -> Tensor:
        return kept

    def version(self, name: str) -> int:
        return 0

    def __contains__(self, name: object) -> bool:
        return name in self._widths

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)


def workload(config: Mapping[str, Any], model: str, device: str) -> Workload:
    """What the config says of one of its models."""

    def protect(built: nn.Module) -> NullSpace:
        widths = {name: layer.in_features for name, layer in trained_layers(built).items()}
        return RandomNullSpace(widths, config["protected"], device)

    return Workload(
        config["models"][model],
        config["rows"],
        config["length"],
        config["rank"],
        protect,
        device,
        autocast=True,
        backend=config["backend"],
    )
