"""Null spaces of given sizes, fitted to synthetic features and kept in a file, as a user would keep one."""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from gradsub import NullSpace

from .models import trained_layers

ENERGY: Final = 0.97

_TIMES: Final = 5  # fewer tokens would be too few for so many directions, of which an optimizer warns

# What SmolLM2 has of protected directions at that energy, with normalised tokens of 44 thousand: (pattern, share).
SHARES: Final = (
    (r"(gate_proj|up_proj|wi)$", 0.77),
    (r"(down_proj|DenseReluDense\.wo)$", 0.75),
    (r"", 0.55),  # query, key, value and output projections
)


def fit(model: nn.Module, inputs: Mapping[str, Tensor], side: str, seed: int) -> tuple[NullSpace, int]:
    """A null space that protects `SHARES` of every layer's directions, mapped into memory, and the bytes of its file.

    The features have random orthonormal directions, of which the share holds just ``ENERGY``. Layers that receive one
    tensor when the model is called with ``inputs`` have the same features. The methods of a process share the file.
    """
    layers = trained_layers(model)
    groups = _by_input(model, layers, inputs) if side == "input" else [[name] for name in layers]
    widths = tuple(layers[group[0]].weight.shape[1 if side == "input" else 0] for group in groups)
    key = (tuple(map(tuple, groups)), widths, side, seed)
    path = Path(_folder().name) / f"{len(_FILES)}.safetensors"
    if key not in _FILES:
        null_space = NullSpace(side=side, energy=ENERGY)
        generator = torch.Generator().manual_seed(seed)
        for group, width in zip(groups, widths, strict=True):
            features = features_of(width, _share(group[0]), generator)
            if side == "input":
                with _each_layer_alone(model, [layers[name] for name in group]):
                    null_space.collect(model, [features], group, normalize=False)
            else:
                null_space.update(group[0], features)
        null_space.save(path, statistics=False)
        _FILES[key] = path
    return NullSpace.load(_FILES[key]), _FILES[key].stat().st_size


_FILES: Final[dict[tuple[object, ...], Path]] = {}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def _share(name: str) -> float:
    return next(share for pattern, share in SHARES if re.search(pattern, name))


def features_of(width: int, share: float, generator: torch.Generator) -> Tensor:
    """Rows (5 d x d) whose covariance has two eigenvalues; the directions of the larger one hold just `ENERGY`."""
    protected = round(share * width)
    # One direction fewer would hold too little, by about as much as all hold too much.
    held = min(ENERGY * (1 + 0.5 / protected), (1 + ENERGY) / 2)
    eigenvalues = torch.full((width,), (1 - held) / (width - protected))
    eigenvalues[:protected] = held / protected
    rows = (width * eigenvalues).sqrt().diag()
    for _ in range(3):  # reflections: as random as needed, and cheaper than a decomposition
        v = nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        rows -= 2 * torch.outer(rows @ v, v)
    return rows.repeat(_TIMES, 1)


def _by_input(model: nn.Module, layers: Mapping[str, nn.Linear], inputs: Mapping[str, Tensor]) -> list[list[str]]:
    """The layers' names, those together that receive one tensor."""
    received: list[tuple[Tensor, str]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: received.append((given[0], name)))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    received.sort(key=lambda each: id(each[0]))  # all are still alive, so that no two share an id
    return [[name for _, name in group] for _, group in itertools.groupby(received, key=lambda each: id(each[0]))]


@contextmanager
def _each_layer_alone(model: nn.Module, layers: list[nn.Linear]) -> Iterator[None]:
    """The model's forward pass hands its input to these layers and does nothing else."""

    def forward(features: Tensor) -> None:
        for layer in layers:
            layer(features)

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward
