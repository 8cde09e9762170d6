"""How far the change of each layer's weight alone moves what the layer answers to general text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsub.layers import is_transposed, select_layers


class IntactLayers:
    """The linear layers of a model before training: their weights, and their inputs on some general text.

    Everything is kept on the CPU in fp32; layers that read the very same tensor (query, key and value) share it. For
    SmolLM2-135M and 512 tokens these are 200 MB of inputs and 425 MB of weights.

    Args:
        model: is run once over the batches and not changed; it is where ``leak`` looks for the layers again.
        batches: keyword arguments of its forward pass, without padding.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self._model = model
        layers: dict[str, Any] = dict(select_layers(model))
        self._weights = {
            name: layer.weight.detach().to("cpu", torch.float32, copy=True) for name, layer in layers.items()
        }
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(name: str, x: Tensor) -> None:
            # The tensor itself is kept beside its copy, so that its id is not given to another one in the meantime.
            if id(x) not in copies:
                copies[id(x)] = x, x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float32, copy=True)
            self._inputs[name].append(copies[id(x)][1])

        def hook(name: str) -> Any:
            return lambda _, args, kwargs: keep(name, args[0] if args else next(iter(kwargs.values())))

        handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
        mode = model.training
        model.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
                    copies.clear()
        finally:
            model.train(mode)
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def leak(self) -> dict[str, float]:
        r"""Return layer -> ||dW x|| / ||W x||, both over all kept inputs x of the intact model.

        W is the weight before training and dW its change, of a layer with adapters the effective one. The inputs are
        those of the intact model, so a layer is not charged with what earlier layers did. NaN where W x is 0.
        """
        return {name: self._leak(name, weight) for name, weight in self._weights.items() if self._inputs[name]}

    def _leak(self, name: str, before: Tensor) -> float:
        module = self._model.get_submodule(name)
        change = _effective_weight(module).detach().cpu().float() - before
        inputs = torch.cat(self._inputs[name])
        if not is_transposed(_base(module)):
            before, change = before.T, change.T
        moved, whole = float((inputs @ change).norm()), float((inputs @ before).norm())
        return moved / whole if whole > 0 else math.nan


def _base(module: Any) -> Any:
    """The layer itself, of one that peft has wrapped."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _effective_weight(module: Any) -> Tensor:
    weight: Tensor = _base(module).weight
    if hasattr(module, "get_delta_weight"):
        for adapter in module.active_adapters:
            weight = weight + module.get_delta_weight(adapter)
    return weight
