"""Multiple-choice questions answered by likelihood: the choice that the model finds most likely behind the question."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model import LanguageModel, length_buckets, surrounding_tokens
from ._questions import Question


@dataclass(frozen=True)
class Accuracy:
    """How many questions were answered rightly.

    Args:
        normalised: for each question, whether the likeliest choice per character was right.
        raw: the same for the likeliest choice as a whole, which favours short ones.
    """

    normalised: tuple[bool, ...]
    raw: tuple[bool, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """For ``metrics.json``."""
        return {"multiple_choice": _mean(self.normalised), "multiple_choice_raw": _mean(self.raw)}

    @property
    def summary(self) -> dict[str, float]:
        """The same with standard errors, those of a share of independent questions."""
        return {
            "accuracy": _mean(self.normalised),
            "standard_error": _error(self.normalised),
            "accuracy_raw": _mean(self.raw),
            "standard_error_raw": _error(self.raw),
        }


@torch.no_grad()
def answer_questions(
    language_model: LanguageModel,
    questions: Sequence[Question],
    device: torch.device,
    *,
    budget: int,
    progress: Callable[[int], object] = lambda done: None,
) -> Accuracy:
    """Let the language model choose, in fp32 and with its own vocabulary head.

    A choice's score is the log-likelihood of its tokens behind ``Question: ...\\nAnswer:``, before which is what the
    tokenizer puts before a text; for an encoder-decoder that prompt is what the encoder reads. Normalised scores are
    divided by the choice's number of characters, as those of ``acc_norm`` of lm-evaluation-harness are. Equal scores go
    to the earlier choice.

    Args:
        language_model: the intact model, or the same one after training.
        questions: at least one.
        device: where the model is.
        budget: tokens of a batch, padding included.
        progress: is called with the number of choices done in each batch.
    """
    model = language_model.model.eval()
    encode = language_model.tokenizer
    prefix = torch.tensor(surrounding_tokens(encode)[0], dtype=torch.long)
    pairs = [
        (torch.cat([prefix, _ids(encode, f"Question: {question.text}\nAnswer:")]), _ids(encode, f" {choice}"))
        for question in questions
        for choice in question.choices
    ]
    scores = [0.0] * len(pairs)
    for bucket in length_buckets([len(prompt) + len(answer) for prompt, answer in pairs], budget):
        chosen = [pairs[index] for index in bucket]
        batch = _encoder_decoder(language_model, chosen) if language_model.encoder_decoder else _decoder(chosen)
        logits = model(**{key: ids.to(device) for key, ids in batch.items()}).logits
        for row, (index, (prompt, answer)) in enumerate(zip(bucket, chosen, strict=True)):
            first = 0 if language_model.encoder_decoder else len(prompt) - 1
            predicted = torch.log_softmax(logits[row, first : first + len(answer)].float(), dim=1)
            scores[index] = float(predicted.gather(1, answer.to(device)[:, None]).sum())
        progress(len(bucket))
    normalised, raw = [], []
    for question in questions:
        own, scores = scores[: len(question.choices)], scores[len(question.choices) :]
        raw.append(_first_best(own) == question.answer)
        per_character = [score / len(choice) for score, choice in zip(own, question.choices, strict=True)]
        normalised.append(_first_best(per_character) == question.answer)
    return Accuracy(tuple(normalised), tuple(raw))


def _decoder(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    whole = [torch.cat(pair) for pair in pairs]
    # Padding stands behind the tokens, where no token that counts can see it.
    return {"input_ids": pad_sequence(whole, batch_first=True), "attention_mask": _mask(whole)}


def _encoder_decoder(language_model: LanguageModel, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    prompts = [prompt for prompt, _ in pairs]
    start = torch.tensor([language_model.model.config.decoder_start_token_id])
    answers = [torch.cat([start, answer[:-1]]) for _, answer in pairs]
    return {
        "input_ids": pad_sequence(prompts, batch_first=True),
        "attention_mask": _mask(prompts),
        "decoder_input_ids": pad_sequence(answers, batch_first=True),
    }


def _mask(sequences: Sequence[Tensor]) -> Tensor:
    return pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _first_best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda index: (scores[index], -index))


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[bool]) -> float:
    return math.sqrt(_mean(values) * (1 - _mean(values)) / len(values))
