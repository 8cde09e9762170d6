"""Multiple-choice questions answered by likelihood: the choice that the model finds most likely behind the question."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model import LanguageModel, length_buckets, surrounding_tokens

EXPECTED = (
    'expected a JSON list of objects with "instruction" ("...question: TEXT Answer1: ... Answer2: ... Answer format: '
    '...") and "answer" ("answer2")'
)


@dataclass(frozen=True)
class Question:
    """A question with one right answer.

    Args:
        text: the question.
        choices: the possible answers, as they would be written.
        answer: the index of the right one.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


def load_questions(path: str | Path, count: int = 0) -> list[Question]:
    """Read questions in the format of the commonsense sets that come with LLM-Adapters (ARC, OpenBookQA, ...).

    Args:
        path: a JSON list of objects. ``"answer"`` is a word and a number, such as ``"answer2"``; ``"instruction"`` ends
            in the choices, each behind that word and its number (``Answer1: ...``), and a line ``Answer format: ...``.
        count: how many to take, evenly spread over the file, so the same ones in every run; 0 takes all.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such list, naming the first entry that cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the questions {str(path)!r} are no file; pass a JSON file, or null to ask none")
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {EXPECTED}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of questions; {EXPECTED}")
    questions = [_parse(entry, f"{path}, entry {number}") for number, entry in enumerate(entries)]
    taken = min(count, len(questions)) or len(questions)
    return [questions[index * len(questions) // taken] for index in range(taken)]


def _parse(entry: Any, where: str) -> Question:
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("instruction", "answer")):
        raise ValueError(f"{where}: {EXPECTED}, got {entry!r:.200}")
    label = re.fullmatch(r"([a-z]+)([1-9][0-9]*)", entry["answer"].strip().lower())
    if label is None:
        raise ValueError(f"{where}: the answer {entry['answer']!r} is no word and number; {EXPECTED}")
    word = re.escape(label[1])
    body = re.split(rf"\b{word} format:", entry["instruction"], flags=re.IGNORECASE)[0]
    head, *rest = re.split(rf"\b{word}([0-9]+):", body, flags=re.IGNORECASE)
    numbers, choices = rest[::2], [" ".join(choice.split()) for choice in rest[1::2]]
    if numbers != [str(number) for number in range(1, len(numbers) + 1)] or len(choices) < 2 or not all(choices):
        raise ValueError(
            f"{where}: two or more choices {label[1]}1: ..., {label[1]}2: ... are needed, got {body!r:.200}"
        )
    if int(label[2]) > len(choices):
        raise ValueError(f"{where}: the answer is {entry['answer']!r} where there are {len(choices)} choices")
    text = " ".join(head.rpartition("question:")[2].split())
    if not text:
        raise ValueError(f"{where}: there is no text between 'question:' and {label[1]}1; {EXPECTED}")
    return Question(text, tuple(choices), int(label[2]) - 1)


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
        raw.append(bool(np.argmax(own) == question.answer))
        per_character = [score / len(choice) for score, choice in zip(own, question.choices, strict=True)]
        normalised.append(bool(np.argmax(per_character) == question.answer))
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


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[bool]) -> float:
    return math.sqrt(_mean(values) * (1 - _mean(values)) / len(values))
