"""SASRec: a transformer over a user's items, trained by the cross-entropy over the catalogue at every position."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence


class SasRec(nn.Module):
    r"""Scores all items as the next one of a sequence.

    With the items' rows E, the positions' rows P and blocks of causal self-attention and a point-wise network, each
    behind a layer norm and beside a residual connection, h = blocks(sqrt(width) E[items] + P) and the scores are
    norm(h) E^T: the rows that are read are also those that are scored. Position p sees the items 0 ... p alone, so
    what pads a sequence behind its end changes nothing in front of it.

    Args:
        n_items: size of the catalogue.
        length: items of the longest sequence; of longer ones the last are read.
        width: of the rows and hidden states, a multiple of ``heads``.
        blocks: number of blocks.
        heads: of each attention.
        dropout: probability with which a hidden unit or an attended item is dropped in training.

    Raises:
        ValueError: if ``width`` is no multiple of ``heads``.

    Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781.
    """

    # RecBole's own SASRec is not used: it can be imported only with its trainer, that is with colorlog, tensorboard,
    # tabulate, plotly, texttable, thop and more, its pins (colorama==0.4.4, ray<=2.6.3) cannot be met beside the other
    # packages here, and it learns from one position of a sequence, at the cost of a forward pass for each target.
    def __init__(self, n_items: int, *, length: int, width: int, blocks: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), got {width}; pass width={heads * 16}")
        self.length = length
        self.items = nn.Embedding(n_items, width)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=width, dropout=dropout, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, blocks, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, sequences: Tensor) -> Tensor:
        """Return the hidden states (batch, positions, width) of item indices (batch, positions)."""
        count = sequences.shape[1]
        rows = self.items(sequences) * math.sqrt(self.items.embedding_dim) + self.positions.weight[:count]
        later = torch.ones(count, count, dtype=torch.bool, device=sequences.device).triu(1)
        states: Tensor = self.blocks(self.dropout(rows), mask=later, is_causal=True)
        return states

    def scores(self, states: Tensor) -> Tensor:
        """Return (..., items) of hidden states (..., width)."""
        return states @ self.items.weight.T

    @torch.no_grad()
    def rank(self, histories: Iterable[tuple[int, ...]]) -> Tensor:
        """Return the scores (histories, items) of what follows each history, in the CPU's memory.

        Raises:
            ValueError: if a history is empty.
        """
        kept = [torch.tensor(history[-self.length :]) for history in histories]
        if not all(map(len, kept)):
            raise ValueError("a history is empty: SASRec needs one item at least to say what is next")
        self.eval()
        device = self.items.weight.device
        states = self(pad_sequence(kept, batch_first=True).to(device))
        last = torch.tensor([len(history) - 1 for history in kept], device=device)
        return self.scores(states[torch.arange(len(kept), device=device), last]).cpu()


@dataclass(frozen=True)
class ItemSequence:
    """Items in the order of time.

    Args:
        items: their indices.
        learned: whether each of them is a target.
    """

    items: tuple[int, ...]
    learned: tuple[bool, ...]

    def rows(self) -> Tensor:
        """Return (items, 2): each item, and the same again as a target or -1."""
        items, learned = torch.tensor(self.items), torch.tensor(self.learned)
        return torch.stack([items, items.masked_fill(~learned, -1)], dim=1)


def windows(rows: Iterable[Tensor], length: int, generator: torch.Generator) -> list[Tensor]:
    """Cut sequences into windows of at most ``length`` + 1 items, each beginning with the last one of its predecessor.

    So each item but the first of a sequence is a target once. Where the cuts are is drawn anew in each call: no item
    always stands at the beginning of its window, where there is little to predict it from.

    Args:
        rows: of ``ItemSequence.rows``.
        length: of a window without its last target.
        generator: of the draw.
    """
    found = []
    for sequence in rows:
        count = len(sequence) - 1
        first = count if count <= length else 1 + int(torch.randint(length, (), generator=generator))
        bounds = [0, *range(first, count, length), count]
        cut = [sequence[start : end + 1] for start, end in itertools.pairwise(bounds)]
        found += [window for window in cut if (window[1:, 1] >= 0).any()]
    return found


def train_sasrec(
    model: SasRec,
    sequences: Iterable[ItemSequence],
    *,
    learning_rate: float,
    batch: int,
    max_epochs: int,
    patience: int,
    validate: Callable[[SasRec], float] | None,
    seed: int,
) -> list[float]:
    """Train by Adam and leave the model with the weights of its best epoch.

    The loss is the mean cross-entropy of the next item among all items, at every position of every window: the strong
    form of SASRec, which was published with one sampled negative instead (Klenitskiy and Vasilev, "Turning Dross Into
    Gold Loss", RecSys 2023, arXiv 2309.07602; Petrov and Macdonald, "gSASRec", RecSys 2023, arXiv 2308.07192).

    Args:
        model: to train.
        sequences: to learn.
        learning_rate: of Adam.
        batch: windows of a step.
        max_epochs: passes over all sequences at most.
        patience: epochs without a better value of ``validate`` after which training ends.
        validate: measures the model, higher is better; without it all epochs are run and the last weights stay.
        seed: of the order and the cuts; dropout draws from torch's own generator.

    Returns:
        What ``validate`` measured after each epoch.
    """
    device = model.items.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    rows = [sequence.rows() for sequence in sequences if any(sequence.learned[1:])]
    values: list[float] = []
    best = copy.deepcopy(model.state_dict())
    for _ in range(max_epochs if rows else 0):
        model.train()
        for inputs, targets in _batches(windows(rows, model.length, generator), batch, generator):
            real = (targets >= 0).to(device)
            loss = cross_entropy(model.scores(model(inputs.to(device))[real]), targets.to(device)[real])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if validate is None:
            continue
        values.append(validate(model))
        if values[-1] > max(values[:-1], default=-math.inf):
            best = copy.deepcopy(model.state_dict())
        elif len(values) - 1 - values.index(max(values)) >= patience:
            break
    if validate is not None:
        model.load_state_dict(best)
    return values


def _batches(cut: list[Tensor], batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffle windows and return inputs and targets; what pads the inputs has no target."""
    order = torch.randperm(len(cut), generator=generator).tolist()
    for start in range(0, len(order), batch):
        chosen = [cut[place] for place in order[start : start + batch]]
        inputs = pad_sequence([window[:-1, 0] for window in chosen], batch_first=True)
        yield inputs, pad_sequence([window[1:, 1] for window in chosen], batch_first=True, padding_value=-1)
