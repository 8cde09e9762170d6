"""From prompts and sequences of different lengths to padded tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    """Pads rows of tokens behind their end to a batch.

    Args:
        pad_id: the token that fills up; it is masked, so any valid id serves.
    """

    pad_id: int

    def __call__(self, prompts: Sequence[Sequence[int]], targets: Sequence[tuple[int, ...]], task: str = "") -> Batch:
        """Return the batch of some prompts, each of which predicts its targets behind its last token."""
        places = [[Place(len(prompt) - 1, task, target)] for prompt, target in zip(prompts, targets, strict=True)]
        return self.sequences(prompts, places)

    def sequences(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[Place]]) -> Batch:
        """Return the batch of some rows of tokens, each with places of its own."""
        if not rows or not all(rows):
            raise ValueError("prompts must be one or more non-empty token lists")
        ids = [torch.tensor(row) for row in rows]
        all_places = [(number, place) for number, own in enumerate(places) for place in own]
        return Batch(
            pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            torch.tensor([number for number, _ in all_places], dtype=torch.long),
            torch.tensor([place.position for _, place in all_places], dtype=torch.long),
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
