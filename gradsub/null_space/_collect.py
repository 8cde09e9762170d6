from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Observe = Callable[[str, Tensor], None]
Side = str
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


def _mask_of(batch: object) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _rows(features: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """Features as (N, d) without the positions that ``mask`` calls padding, and whether it could be applied.

    Some models flatten batch and tokens before a layer: the mask is flattened likewise.
    """
    rows = features.reshape(-1, features.shape[-1])
    if mask is None:
        return rows, True
    if features.shape[:-1] != mask.shape and (features.ndim != 2 or features.shape[0] != mask.numel()):
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


def observe_features(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], side: Side, observe: Observe
) -> int:
    """Run ``batches`` through ``model`` and hand every layer's features to ``observe(name, (N, d))``; how many ran."""
    mask: Tensor | None = None
    handles = []
    # Query, key and value projections receive the very same tensor: they are handed the very same rows, so that the
    # observer can reuse what it computed.
    latest: tuple[Tensor, int, Tensor] | None = None

    def rows_of(name: str, source: Tensor) -> Tensor:
        nonlocal latest
        version = _version_of(source)
        if latest is None or latest[0] is not source or latest[1] != version:
            rows, masked = _rows(source, mask)
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
            source = output if side == "output" else inputs[0] if inputs else next(iter(named.values()))
            observe(name, rows_of(name, source))

        return hook

    count = 0
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                mask, latest = _mask_of(batch), None
                call(model, batch)
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
    largest = wide.abs().amax(dim=1, keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1.0)  # squares of tiny or huge entries would leave the range
    return torch.nn.functional.normalize(wide, dim=1)
