"""General-domain text as token windows: what the null space is fitted on and perplexity is measured on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .model import LanguageModel, surrounding_tokens


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by text.

    Args:
        value: the exponential of the mean negative log-likelihood per predicted token.
        tokens: how many tokens were predicted.
    """

    value: float
    tokens: int


def token_windows(tokenizer: Any, text: str, *, tokens: int, window: int) -> list[Tensor]:
    """Cut windows out of a text, evenly spread over it and without overlap.

    Args:
        tokenizer: the language model's.
        text: any text.
        tokens: the most tokens of all windows together.
        window: tokens of a window; a text shorter than that gives one shorter window.

    Raises:
        ValueError: if the text has fewer than 16 tokens.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < 16:
        raise ValueError(f"the general text has {len(ids)} tokens, at least 16 are needed; pass a longer text")
    window = min(window, tokens, len(ids))
    available = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    count = min(len(available), max(1, tokens // window))
    return [available[index * len(available) // count] for index in range(count)]


def general_batches(
    language_model: LanguageModel, windows: list[Tensor], device: torch.device, size: int = 4
) -> Iterator[dict[str, Tensor]]:
    """Yield keyword arguments of a forward pass over the windows, ``size`` at a time.

    Before each window is what the tokenizer puts before a text, as in every prompt. An encoder reads the first half of
    a window and the decoder goes on with the second half.
    """
    prefix = torch.tensor(surrounding_tokens(language_model.tokenizer)[0], dtype=torch.long)
    for start in range(0, len(windows), size):
        ids = torch.stack(windows[start : start + size]).to(device)
        source, target = ids.tensor_split(2, dim=1) if language_model.encoder_decoder else (ids, None)
        read = {"input_ids": torch.cat([prefix.to(device).expand(len(ids), -1), source], dim=1)}
        yield read if target is None else {**read, "decoder_input_ids": _shifted(language_model, target)}


@torch.no_grad()
def perplexity(language_model: LanguageModel, windows: list[Tensor], device: torch.device) -> Perplexity:
    """Measure perplexity in fp32, one window at a time, from the language model's own vocabulary head.

    A decoder predicts every token of a window but the first, and none of what is before it; an encoder-decoder every
    token of the second half.

    Args:
        language_model: the intact model, or the same one after training.
        windows: of ``token_windows``.
        device: where the model is.
    """
    model = language_model.model.eval()
    total, count = 0.0, 0
    for window, batch in zip(windows, general_batches(language_model, windows, device, size=1), strict=True):
        logits = model(**batch).logits[0].float()
        if language_model.encoder_decoder:
            targets = window.tensor_split(2)[1].to(device)
        else:
            logits, targets = logits[-len(window) : -1], window[1:].to(device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return Perplexity(math.exp(min(total / count, 700.0)), count)


def _shifted(language_model: LanguageModel, target: Tensor) -> Tensor:
    start = torch.full_like(target[:, :1], language_model.model.config.decoder_start_token_id)
    return torch.cat([start, target[:, :-1]], dim=1)
