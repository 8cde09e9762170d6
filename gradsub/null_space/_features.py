from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradsub.null_space._streams import Streams, fits

Observe = Callable[[str, Tensor], None]
Hook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _rows(features: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """Features as (N, d) without the positions that ``mask`` calls padding, and whether it could be applied."""
    rows = features.reshape(-1, features.shape[-1])
    if mask is None:
        return rows, True
    if not fits(mask, features):
        return rows, bool(mask.all())
    return rows[mask.flatten().to(features.device)], True


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise ValueError(f"a batch is a tensor, a tuple or a mapping, found {type(batch).__name__}: wrap it in one")


def _version_of(tensor: Tensor) -> int:
    # Tensors of inference mode have no version; asking for it raises.
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def eager() -> Iterator[None]:
    """Whatever ``torch.compile`` has compiled, wherever in the model, runs as it was written.

    Compiled code that ran before does not call hooks that were registered since.
    """
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    with nullcontext() if stance is None else stance("force_eager"):
        yield


def observe_features(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], side: str, observe: Observe
) -> int:
    """Run ``batches`` through ``model`` and hand every layer's features to ``observe(name, (N, d))``; how many ran."""
    streams = Streams(None)
    one_stack = getattr(getattr(model, "config", None), "is_encoder_decoder", None) is False
    warned: set[str] = set()
    handles = []
    # Query, key and value projections receive the very same tensor: they are handed the very same rows, so that the
    # observer can reuse what it computed.
    latest: tuple[Tensor, int, Tensor] | None = None

    def rows_of(name: str, source: Tensor) -> Tensor:
        nonlocal latest
        version = _version_of(source)
        if latest is None or latest[0] is not source or latest[1] != version:
            mask, doubt = streams.mask(source)
            rows, masked = _rows(source, mask)
            if doubt is not None and doubt not in warned:
                warned.add(doubt)
                warnings.warn(doubt.format(name=name), stacklevel=2)
            if not masked:
                warnings.warn(
                    f"attention_mask {tuple(mask.shape) if mask is not None else ()} does not fit the features "
                    f"{tuple(source.shape)} of {name!r}: padding counts as data there; pass batches without padding",
                    stacklevel=2,
                )
            latest = source, version, rows
        return latest[2]

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            rows = rows_of(name, output if side == "output" else inputs[0] if inputs else next(iter(named.values())))
            if rows.shape[0]:  # an expert that no token was sent to has seen nothing
                observe(name, rows)

        return hook

    count = 0
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
        with torch.no_grad(), evaluating(model), eager():
            for batch in batches:
                streams, latest = Streams(batch, one_stack), None
                with streams.watching():
                    call(model, streams.batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        _reshard(model)
    return count


def _reshard(model: nn.Module) -> None:
    """After a forward pass without a backward pass, ``fully_shard`` leaves the outermost weights whole.

    Whoever then asked for the model's parameters would get tensors whose memory is released later.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if type(module).__name__.startswith("FSDP") and callable(reshard):
            reshard()


def unit_rows(features: Tensor) -> Tensor:
    """Each row divided by its norm; a row of zeros stays one."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    if bool(((norms > 1e-15) & (norms < 1e15)).all()):
        return torch.div(wide, norms)
    largest = wide.abs().amax(dim=1, keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1.0)  # squares of tiny or huge entries would leave the range
    return torch.nn.functional.normalize(wide, dim=1)
