"""The catalogue inside the embedding: frozen rows for words, trainable rows for items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Item


def token_name(item: int) -> str:
    """Return how prompts spell an item's token.

    Example:
        >>> token_name(7)
        '<item_7>'
    """
    return f"<item_{item}>"


def title_rows(weight: Tensor, titles: Sequence[Sequence[int]]) -> Tensor:
    """Return one row per title: the mean of the rows of its tokens, so that what the model knows reaches the items.

    Args:
        weight: (vocabulary, d), the rows of the language model's own tokens.
        titles: the token ids of each title; the mean of all rows stands in for a title without tokens.
    """
    rows = torch.empty(len(titles), weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        for number, ids in enumerate(titles):
            rows[number] = weight[list(ids)].mean(dim=0) if ids else weight.mean(dim=0)
    return rows


def title_ids(tokenizer: Any, items: Sequence[Item]) -> list[list[int]]:
    """Return the token ids of each item's title, without special tokens."""
    encoded: list[list[int]] = tokenizer([item.title for item in items], add_special_tokens=False)["input_ids"]
    return encoded


class ItemEmbedding(nn.Module):
    """An embedding whose first rows are the model's own, frozen, and whose further rows are trainable items.

    The item ``n`` has the token id ``base.num_embeddings + n``. The rows of the base stay one tensor with the
    vocabulary head where the model ties them, so the language model's logits are unchanged.

    Args:
        base: the model's own embedding; it is frozen.
        rows: (items, d), the initial rows of the items.
    """

    def __init__(self, base: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.base = base
        self.base.weight.requires_grad_(False)
        self.new_rows = nn.Parameter(rows.clone())
        self.num_embeddings = base.num_embeddings + len(rows)
        self.embedding_dim = base.embedding_dim
        self.padding_idx = base.padding_idx

    @property
    def weight(self) -> Tensor:
        """The model's own rows: what a tied vocabulary head shares."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look up word and item tokens."""
        first = self.base.num_embeddings
        is_item = ids >= first
        words: Tensor = self.base(ids.masked_fill(is_item, 0))
        items = nn.functional.embedding((ids - first).clamp(min=0), self.new_rows)
        scale = getattr(self.base, "embed_scale", None)  # some models multiply inside their embedding
        if scale is not None:
            items = items * scale
        return torch.where(is_item.unsqueeze(-1), items.to(words.dtype), words)
