"""What a result depends on, as a hash: by content and not by name, whose file may have been exchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class Fingerprint:
    """A hash of plain values, tensors and models, which depends on their order too."""

    def __init__(self) -> None:
        self._digest: Any = hashlib.sha256()

    def add(self, content: Any) -> Fingerprint:
        """Add plain values in lists and mappings."""
        self._digest.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())
        return self

    def add_tensor(self, name: str, tensor: Tensor) -> Fingerprint:
        """Add a tensor with its kind and shape."""
        self.add([name, str(tensor.dtype), list(tensor.shape)])
        # As bytes, because numpy has no bfloat16.
        self._digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return self

    def add_model(self, model: nn.Module, without: Collection[nn.Parameter] = ()) -> Fingerprint:
        """Add all that decides what a model computes: its class, configuration, weights and buffers.

        Args:
            model: the module; that it has a configuration is not asked for.
            without: weights that are left out.
        """
        config: Any = getattr(model, "config", None)
        content = {} if config is None else json.loads(config.to_json_string(use_diff=False))
        # Where it was loaded from, and which version saved it, changes nothing.
        plain = {key: value for key, value in content.items() if key[0] != "_" and key != "transformers_version"}
        self.add([type(model).__qualname__, plain])
        left_out = {id(weight) for weight in without}
        for name, weight in model.named_parameters():
            if id(weight) not in left_out:
                self.add_tensor(name, weight)
        for name, buffer in model.named_buffers():
            self.add_tensor(name, buffer)
        return self

    @property
    def name(self) -> str:
        """Forty hexadecimal digits."""
        return str(self._digest.hexdigest())[:40]
