"""The sizes of a language model that its memory follows from; read off a model without weights as well."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gradsub.layers import is_transposed, select_layers

from ..feeds import Pool
from ..model import LanguageModel

SAMPLE = 256
"""Rows of a stream that are measured."""


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Args:
        out_features: its outputs.
        in_features: its inputs.
        per_token: whether it reads every token of the prompt; layers of a decoder that answers with one token do not.
    """

    out_features: int
    in_features: int
    per_token: bool

    @property
    def weights(self) -> int:
        """The number of its weights, without bias."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelShape:
    """A language model's sizes.

    Args:
        weights: all of them, embedding and vocabulary head included.
        layers: the linear layers that methods train.
        others: weights that full fine-tuning trains besides, such as norms and biases.
        blocks: how many blocks read the prompt.
        width: of the hidden states.
        tied: whether the head is the embedding.
    """

    weights: int
    layers: tuple[Layer, ...]
    others: int
    blocks: int
    width: int
    tied: bool


def shape_of(language_model: LanguageModel) -> ModelShape:
    """Read the sizes off a model, which may lie on torch's meta device."""
    model = language_model.model
    backbone = model if language_model.encoder_decoder else model.base_model
    reader = model.get_encoder() if language_model.encoder_decoder else backbone
    reads = {id(module) for module in reader.modules()}
    found = select_layers(backbone)
    layers = tuple(_layer(module, id(module) in reads) for module in found.values())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    vocabulary = {id(weight): weight.numel() for part in (embedding, head) for weight in part.parameters()}
    weights = sum(weight.numel() for weight in model.parameters())
    return ModelShape(
        weights=weights,
        layers=layers,
        others=weights - sum(vocabulary.values()) - sum(layer.weights for layer in layers),
        blocks=_blocks(reader),
        width=embedding.embedding_dim,
        tied=tied,
    )


@dataclass(frozen=True)
class RowSize:
    """What a row of a batch holds, on average over the largest stream.

    Args:
        tokens: of the row.
        targets: predicted in it.
    """

    tokens: float
    targets: float


def row_size(pools: Mapping[str, Pool], measure: Callable[[Any], tuple[int, int]]) -> RowSize:
    """Return the mean size of the rows of a training batch, from a sample of each stream.

    Args:
        pools: what is trained on.
        measure: tokens and targets of a row.
    """
    means = []
    for pool in pools.values():
        sizes = [measure(row) for row in pool.epoch(np.random.default_rng(0))[:SAMPLE]]
        means.append(RowSize(*map(statistics.fmean, zip(*sizes, strict=True))))
    return max(means, key=lambda size: size.tokens)


def _layer(module: nn.Module, per_token: bool) -> Layer:
    rows, columns = module.weight.shape  # type: ignore[misc]
    outputs, inputs = (columns, rows) if is_transposed(module) else (rows, columns)
    return Layer(int(outputs), int(inputs), per_token)


def _blocks(module: nn.Module) -> int:
    """The entries of the outermost lists of modules."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    return sum(_blocks(child) for child in module.children())
