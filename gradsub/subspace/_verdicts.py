"""What the device decided in one step, for the host in the next: reading it then does not keep the device waiting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsub.subspace._block import Block


class Verdicts:
    """Which blocks' ``"usable"`` the host has not seen; the numbers travel while the next step is computed."""

    def __init__(self) -> None:
        self._blocks: dict[Block, None] = {}
        self._sent: list[tuple[Tensor, Any]] = []

    def expect(self, block: Block) -> None:
        """Its verdict changes in this step, or came with a checkpoint."""
        self._blocks[block] = None

    def send(self) -> None:
        """Let the verdicts of all that were expected travel to the host."""
        self._sent = []
        for block in self._blocks:
            here = block.stacks["usable"]
            if here.is_cpu:
                self._sent.append((here.clone(), None))
                continue
            there = torch.empty(here.shape, dtype=here.dtype, device="cpu", pin_memory=here.is_cuda)
            there.copy_(here, non_blocking=True)
            event = torch.Event(here.device)
            event.record()
            self._sent.append((there, event))

    def read(self) -> list[tuple[Block, Any]]:
        """The verdicts by block (L x S, an array), no longer expected; waits for the step in which they were sent."""
        if len(self._sent) != len(self._blocks):
            self.send()
        for _, event in self._sent:
            if event is not None:
                event.synchronize()
        found = [(block, values.numpy()) for block, (values, _) in zip(self._blocks, self._sent, strict=True)]
        self._blocks, self._sent = {}, []
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A copy reads from its own state.
        return {"_blocks": self._blocks, "_sent": []}
