"""From prompts of different lengths to padded tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Padded prompts.

    Args:
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 where there is a token and 0 where there is padding.
        targets: for each prompt the indices of its relevant items.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: tuple[tuple[int, ...], ...]

    @property
    def position_ids(self) -> Tensor:
        """(B, T): tokens count from 0 wherever the padding is."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def last(self) -> Tensor:
        """(B,): the index of each prompt's last token, where the answer is predicted."""
        steps = torch.arange(1, self.attention_mask.shape[1] + 1, device=self.attention_mask.device)
        return (self.attention_mask * steps).argmax(dim=1)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.targets)


@dataclass(frozen=True)
class Collator:
    """Pads prompts to a batch.

    Args:
        pad_id: the token that fills up; it is masked, so any valid id serves.
        side: ``"right"`` or ``"left"``.
    """

    pad_id: int
    side: str = "right"

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {self.side!r}")

    def __call__(self, prompts: Sequence[Sequence[int]], targets: Sequence[tuple[int, ...]]) -> Batch:
        """Return the batch of some prompts and their targets."""
        if not prompts or not all(prompts):
            raise ValueError("prompts must be one or more non-empty token lists")
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            start = 0 if self.side == "right" else width - len(prompt)
            input_ids[row, start : start + len(prompt)] = torch.tensor(prompt)
            mask[row, start : start + len(prompt)] = 1
        return Batch(input_ids, mask, tuple(targets))


def length_buckets(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield groups of indices of similar length, so that little of a batch is padding.

    Args:
        lengths: the length of each prompt.
        budget: the most tokens of a batch, padding included; a single longer prompt is its own batch.
    """
    bucket: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if bucket and lengths[index] * (len(bucket) + 1) > budget:
            yield bucket
            bucket = []
        bucket.append(index)
    if bucket:
        yield bucket
