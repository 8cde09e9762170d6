"""Where protected directions lie between refreshes."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


class Placement:
    """Keeps the protected directions K of layers: equal ones once, in the memory of the host or on the device.

    Layers with the same input have the same K, and only refreshes need it. In the host's memory it is page-locked where
    there is CUDA, so that copying it to the device does not keep the host waiting.

    Args:
        where: ``"device"``, ``"host"``, or ``"auto"``: the host, which for layers on a CPU is the same.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._kept: dict[Hashable, list[weakref.ref[Tensor]]] = defaultdict(list)

    @property
    def on_host(self) -> bool:
        """Whether that is the host's memory."""
        return self._where != "device"

    def keep(self, K: Tensor, device: torch.device) -> Tensor:
        """K where it is to lie: itself if it lies there, or an equal tensor that does."""
        on_host = self.on_host
        found = K.to("cpu" if on_host else device)
        key = (found.shape, found.dtype, found.device, device.type, tuple(found.flatten()[:4].tolist()))
        self._kept[key] = [reference for reference in self._kept[key] if reference() is not None]
        for reference in self._kept[key]:
            earlier = reference()
            if earlier is not None and (earlier is found or torch.equal(earlier, found)):
                return earlier
        if on_host and device.type == "cuda":
            found = found.pin_memory()
        self._kept[key].append(weakref.ref(found))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_where": self._where, "_kept": defaultdict(list)}
