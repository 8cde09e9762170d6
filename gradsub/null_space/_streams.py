from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_UNSEEN = (
    "the batch is padded, but of the features of {name!r} and others it cannot be told what they are computed from (by "
    "a kernel of its own, as Liger's?): padding counts as data there; collect without such kernels, or pass batches "
    "without padding"
)
_NO_DECODER_MASK = (
    "the batch is padded, but has no decoder_attention_mask: the decoder's padding counts as data in {name!r} and "
    "others; pass that mask (batch x tokens), or batches without padding"
)
_MASKS: Final = {"attention_mask": "tokens", "decoder_attention_mask": "targets"}


def fits(mask: Tensor, features: Tensor) -> bool:
    """Whether the mask has the features' positions; some models flatten batch and tokens before a layer."""
    return features.shape[:-1] == mask.shape or (features.ndim == 2 and features.shape[0] == mask.numel())


class Streams:
    """Which positions of a batch are padding, for each stream of positions that runs through the model.

    An encoder and a decoder have positions and a mask each, and both may be padded to one length: the shape of features
    does not tell whose they are. What they were computed from does. The decoder's features depend on the decoder's
    inputs, all others do not; the encoder's states, which cross-attention reads, are among the others. Features that
    depend on no input of either mask, as those of an image, have no padding.

    Args:
        batch: what the model is called with. The keys of a mapping are those of transformers: ``attention_mask`` and
            ``decoder_attention_mask`` (batch x tokens), ``decoder_...`` and ``labels`` for the decoder's inputs.
        one_stack: whether the model says that it has no decoder beside an encoder: no feature is made of ``labels``
            then, and nothing has to be followed on their account.
    """

    def __init__(self, batch: Any, one_stack: bool = False) -> None:
        self.batch = batch
        self._one_stack = one_stack
        self._masks: dict[str, Tensor] = {}
        self._traced: _Traced | None = None
        self._padded = False
        if not isinstance(batch, Mapping):
            return
        masks = {stream: batch.get(key) for key, stream in _MASKS.items()}
        self._masks = {s: mask.bool() for s, mask in masks.items() if isinstance(mask, Tensor) and mask.ndim == 2}
        labels = None if one_stack else batch.get("labels")
        self._padded = any(not bool(mask.all()) for mask in self._masks.values()) or (
            isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels < 0).any())
        )
        if self._padded and not all(self._of(key, value) == "tokens" for key, value in self._inputs(batch)):
            # Copies, because labels may be the very tensor of the inputs.
            self.batch = {key: pytree.tree_map_only(Tensor, torch.clone, value) for key, value in batch.items()}
            self._traced = _Traced()
            for key, value in self._inputs(self.batch):
                self._traced.add(value, self._of(key, value))

    def watching(self) -> AbstractContextManager[Any]:
        """The context in which the model has to run."""
        return nullcontext() if self._traced is None else self._traced

    def mask(self, features: Tensor) -> tuple[Tensor | None, str | None]:
        """True at the positions that are no padding, or None if none are; and why padding may count, if it may."""
        if self._traced is None:
            return self._masks.get("tokens"), None
        streams = self._traced.of(features)
        if not streams:
            # A kernel that is no operation of torch has written them into memory that was made from nothing.
            return None, _UNSEEN if any(fits(mask, features) for mask in self._masks.values()) else None
        stream = "targets" if "targets" in streams else "tokens"
        missing = self._padded and stream == "targets" and stream not in self._masks
        return (self._masks.get(stream) if stream in streams else None), _NO_DECODER_MASK if missing else None

    def _inputs(self, batch: Mapping[Any, Any]) -> Iterable[tuple[str, Tensor]]:
        for key, value in batch.items():
            if key not in _MASKS:
                yield from ((str(key), leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))

    def _of(self, key: str, value: Tensor) -> str:
        if key == "labels":
            return "tokens" if self._one_stack else "targets"
        if key.startswith("decoder_"):
            return "targets"
        mask = self._masks.get("tokens")
        return "tokens" if mask is None or value.shape[:2] == mask.shape else "other"


class _Traced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tensors through every operation: what was computed from which inputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams: dict[int, frozenset[str]] = {}

    def add(self, tensor: Tensor, stream: str) -> None:
        """Say which stream an input belongs to."""
        self._streams[_memory(tensor)] = frozenset({stream})

    def of(self, tensor: Tensor) -> frozenset[str]:
        """The streams that a tensor depends on."""
        return self._streams.get(_memory(tensor), frozenset())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        streams = frozenset[str]().union(*map(self.of, given))
        for made in pytree.tree_leaves(result):
            if isinstance(made, Tensor):
                # Also where there is nothing to note: the memory may have been that of a tensor that is gone.
                self._streams[_memory(made)] = streams
        return result


def _memory(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    return int(tensor.untyped_storage()._cdata)
