"""Multiple-choice questions from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
