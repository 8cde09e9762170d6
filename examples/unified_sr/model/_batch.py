"""From prompts and sequences of different lengths to padded tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._prompts import Place


@dataclass(frozen=True)
class Batch:
    """Padded rows of tokens, and P places in them at which items are predicted.

    Args:
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 where there is a token and 0 where there is padding.
        rows: (P,) the row of each place.
        columns: (P,) the column of the token whose hidden state predicts.
        targets: for each place the indices of its relevant items.
        tasks: for each place the task whose loss it is.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: tuple[tuple[int, ...], ...]
    tasks: tuple[str, ...]

    @property
    def position_ids(self) -> Tensor:
        """(B, T): tokens count from 0 wherever the padding is."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def starts_together(self) -> bool:
        """Whether every row begins at the first column, so that padding only follows."""
        return bool(self.attention_mask[:, 0].all())

    @property
    def samples(self) -> Mapping[str, int]:
        """How many places each task has, in the order in which tasks occur."""
        return Counter(self.tasks)

    @property
    def tokens(self) -> int:
        """How many tokens there are without padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            rows=self.rows.to(device),
            columns=self.columns.to(device),
        )


@dataclass(frozen=True)
class Collator:
    """Pads rows of tokens to a batch.

    Args:
        pad_id: the token that fills up; it is masked, so any valid id serves.
        side: ``"right"`` or ``"left"``.
    """

    pad_id: int
    side: str = "right"

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {self.side!r}")

    def __call__(self, prompts: Sequence[Sequence[int]], targets: Sequence[tuple[int, ...]], task: str = "") -> Batch:
        """Return the batch of some prompts, each of which predicts its targets behind its last token."""
        places = [[Place(len(prompt) - 1, task, target)] for prompt, target in zip(prompts, targets, strict=True)]
        return self.sequences(prompts, places)

    def sequences(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[Place]]) -> Batch:
        """Return the batch of some rows of tokens, each with places of its own."""
        if not rows or not all(rows):
            raise ValueError("prompts must be one or more non-empty token lists")
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        starts = [0 if self.side == "right" else width - len(row) for row in rows]
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            input_ids[number, start : start + len(row)] = torch.tensor(row)
            mask[number, start : start + len(row)] = 1
        all_places = [(number, place) for number, own in enumerate(places) for place in own]
        return Batch(
            input_ids,
            mask,
            torch.tensor([number for number, _ in all_places], dtype=torch.long),
            torch.tensor([starts[number] + place.position for number, place in all_places], dtype=torch.long),
            tuple(place.target for _, place in all_places),
            tuple(place.task for _, place in all_places),
        )


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
