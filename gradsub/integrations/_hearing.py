"""The loss of each row, from what a model's forward pass returns anyway."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from gradsub.integrations._collator import IGNORED

# Entries of logits that are looked at together: 64 MB in float32.
_CHUNK = 1 << 24


@torch.no_grad()
def row_losses(outputs: Any, labels: Tensor | None, shifted: bool) -> Tensor | None:
    """(B,) each row's mean loss over its labels, in float32; None where it cannot be told from the outputs.

    Args:
        outputs: with ``logits`` (B, T, V) or (B, V), or with ``log_probs`` (B, T) of the labels, 0 where ignored.
        labels: (B, T) or (B,) integers.
        shifted: the logits at t predict the label at t + 1.
    """
    if labels is None or labels.is_floating_point():
        return None
    known = _entry(outputs, "log_probs")
    if isinstance(known, Tensor) and known.ndim == 2 and labels.ndim == 2 and len(known) == len(labels):
        counted = labels[:, labels.shape[1] - known.shape[1] :] != IGNORED
        return -known.float().sum(1) / counted.to(known.device).sum(1).clamp_min(1)
    logits = _entry(outputs, "logits")
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        return None
    labels = labels.to(logits.device)
    if labels.ndim == 1:
        return cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
    if labels.ndim != 2:
        return None
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    tokens = max(1, _CHUNK // (len(labels) * logits.shape[-1]))
    total = torch.zeros(len(labels), dtype=torch.float32, device=logits.device)
    for start in range(0, labels.shape[1], tokens):
        some, theirs = logits[:, start : start + tokens], labels[:, start : start + tokens]
        total += cross_entropy(some.float().mT, theirs, reduction="none", ignore_index=IGNORED).sum(1)
    return total / (labels != IGNORED).sum(1).clamp_min(1)


def _entry(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)


class Pairing:
    """Whether a model's loss pairs a logit with the next label: what its loss and its logits say of it.

    Attributes:
        shifted: what was found out; None as long as nothing was.
    """

    def __init__(self) -> None:
        self.shifted: bool | None = None
        self._looks = _LOOKS

    @torch.no_grad()
    def look(self, outputs: Any, labels: Any, items: Tensor | int | None) -> None:
        """Compare the loss among these outputs with that of either pairing, which waits for the device.

        It is asked until it can be told, or until the loss is neither: then it holds something else as well.

        Args:
            outputs: of the model, with ``loss``.
            labels: (B, T) integers.
            items: what the model was told to divide its loss by; None: its own number of labels.
        """
        loss, more = _entry(outputs, "loss"), _entry(outputs, "aux_loss")
        if self.shifted is not None or not self._looks or more is not None:
            return
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and isinstance(labels, Tensor) and labels.ndim == 2):
            return
        self._looks -= 1
        sums = [_total(outputs, labels, shifted) for shifted in (False, True)]
        if any(found is None for found in sums):
            self._looks = 0
            return
        pairs = [pair for pair in sums if pair is not None]
        means = [torch.stack([total / count, total / (count if items is None else items)]) for total, count in pairs]
        off = (torch.stack(means) / loss.detach().float().reshape(()) - 1).abs().amin(1).tolist()
        near = max(_NEAR, torch.finfo(loss.dtype).eps)
        if min(off) > near:
            self._looks = 0
        elif max(off) > 4 * near:
            self.shifted = off[1] < off[0]


# A loss that is a mean over labels is met so closely; two pairings of random labels differ by a hundredth.
_NEAR = 5e-5
# Batches that are looked at: more than one where the pairings' losses are too close to tell which is the model's.
_LOOKS = 16


def _total(outputs: Any, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor] | None:
    """The sum of the losses of all labels, and their number."""
    losses = row_losses({"logits": _entry(outputs, "logits")}, labels, shifted)
    if losses is None:
        return None
    counts = ((labels[:, 1:] if shifted else labels) != IGNORED).sum(1).to(losses.device)
    return losses @ counts.to(losses.dtype), counts.sum()


class Ear:
    """Hears what a model returns."""

    def __init__(self) -> None:
        self._listener: Callable[[Any], None] | None = None
        self._heard: tuple[nn.Module, RemovableHandle] | None = None

    @contextmanager
    def listening(self, model: nn.Module, listener: Callable[[Any], None]) -> Iterator[None]:
        """Have what the first forward pass in here returns told to the listener."""
        if self._heard is None or self._heard[0] is not model:
            if self._heard is not None:
                self._heard[1].remove()
            self._heard = model, model.register_forward_hook(_Hook(self))
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def hear(self, outputs: Any) -> None:
        """The model has returned these."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener(outputs)


class _Hook:
    """Of a model that outlives its Trainer; copies and pickles of the model do not take it along."""

    def __init__(self, ear: Ear) -> None:
        self._ear = weakref.ref(ear)

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        ear = self._ear()
        if ear is not None:
            ear.hear(outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Deaf, ()


class _Deaf:
    """What a `_Hook` is in a copy."""

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        return None
