"""What the device decided in one step, for the host in the next: reading it then does not keep the device waiting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsub.subspace._layer import Layer


class Verdicts:
    """Which layers' ``state["usable"]`` the host has not seen; the numbers travel while the next step is computed."""

    def __init__(self) -> None:
        self._layers: dict[Layer, None] = {}
        self._sent: list[tuple[Tensor, Any]] = []

    def expect(self, layer: Layer) -> None:
        """Its verdict changes in this step, or came with a checkpoint."""
        self._layers[layer] = None

    def send(self, state: Mapping[Tensor, Any]) -> None:
        """Let the verdicts of all that were expected travel to the host."""
        self._sent = []
        for device, layers in self._by_device().items():
            here = torch.cat([state[layer.parameter]["usable"] for layer in layers])
            if device.type == "cpu":
                self._sent.append((here, None))
                continue
            there = torch.empty(here.shape, dtype=here.dtype, pin_memory=device.type == "cuda")
            there.copy_(here, non_blocking=True)
            event = torch.Event(device)
            event.record()
            self._sent.append((there, event))

    def read(self, state: Mapping[Tensor, Any]) -> list[tuple[Layer, list[bool]]]:
        """The verdicts by layer, which are then no longer expected; waits for the step in which they were sent."""
        if not self._sent:
            self.send(state)
        found = []
        for (values, event), layers in zip(self._sent, self._by_device().values(), strict=True):
            if event is not None:
                event.synchronize()
            parts = torch.split(values, [len(layer.widths) for layer in layers])
            found += [(layer, part.tolist()) for layer, part in zip(layers, parts, strict=True)]
        self._layers, self._sent = {}, []
        return found

    def _by_device(self) -> dict[torch.device, list[Layer]]:
        devices: dict[torch.device, list[Layer]] = {}
        for layer in self._layers:
            devices.setdefault(layer.parameter.device, []).append(layer)
        return devices

    def __getstate__(self) -> dict[str, Any]:
        # A copy reads from its own state.
        return {"_layers": self._layers, "_sent": []}
