"""What `keep_knowledge` trains and measures on: rows of a task, and ten questions that anybody can answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that does not count."""

QUESTIONS = (
    ("What is the capital of France?", ("paris",)),
    ("How many days are there in a week?", ("seven", "7")),
    ("What colour is the sky on a clear day?", ("blue",)),
    ("What is two plus two?", ("four", "4")),
    ("What is the opposite of hot?", ("cold",)),
    ("Who wrote Romeo and Juliet?", ("shakespeare",)),
    ("What do bees make?", ("honey", "wax")),
    ("What is frozen water called?", ("ice",)),
    ("Which planet do we live on?", ("earth",)),
    ("In which country is the city of Rome?", ("italy",)),
)
"""Each with the words of which a right answer has one."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a task's rows: JSON lines with ``prompt`` and ``completion``, or with ``text``; ``task`` names the task.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the line that is no such row.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the rows {str(path)!r} are no file; pass JSON lines with --data, or none")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from error
        texts = [row.get(key) for key in ("prompt", "completion", "text")] if isinstance(row, dict) else []
        if not (texts and (isinstance(texts[2], str) or all(isinstance(text, str) for text in texts[:2]))):
            raise ValueError(f"{path}, line {number} needs 'prompt' and 'completion', or 'text', got {line[:80]!r}")
        rows.append(row)
    return rows


def film_rows() -> list[dict[str, Any]]:
    """The built-in task: a film's genres from its title and year, out of the catalogue of MovieLens-100K.

    Raises:
        FileNotFoundError: if the package recbole, which carries it, is not installed.
    """
    from examples.unified_sr.data import movielens_folder, natural_title, read_atomic

    films = read_atomic(movielens_folder() / "ml-100k.item")
    rows = []
    for title, year, kinds in zip(*map(films.column, ("movie_title", "release_year", "class")), strict=True):
        genres = [genre for genre in kinds.split() if genre != "unknown"]
        if genres:
            prompt = f"Film: {natural_title(title)} ({year})\nGenres:"
            rows.append({"prompt": prompt, "completion": f" {', '.join(genres)}"})
    return rows


def split(rows: Sequence[Any], held_out: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Training and held-out rows: ``held_out`` of them, at most a quarter, chosen at random.

    Raises:
        ValueError: if there are fewer than eight rows.
    """
    if len(rows) < 8:
        raise ValueError(f"the task has {len(rows)} rows, at least 8 are needed; pass more with --data")
    order = np.random.default_rng(seed).permutation(len(rows))
    count = min(held_out, len(rows) // 4)
    return [rows[index] for index in sorted(order[count:])], [rows[index] for index in sorted(order[:count])]


def encode(rows: Sequence[Mapping[str, Any]], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Tokens and labels of each row, and its task; a prompt's tokens have no label, and the end of a row has one."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
        rest = tokenizer(row.get("completion", row.get("text")), add_special_tokens=not prompt)["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            prompt = prompt[:-1]
        rest = [*rest, *([] if rest and rest[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id])]
        tokens, labels = [*prompt, *rest], [*([IGNORED] * len(prompt)), *rest]
        encoded.append({"input_ids": tokens[:length], "labels": labels[:length], "task": row.get("task", "task")})
    return encoded


class Collate:
    """Pads rows on the right.

    Args:
        padding: the token that fills up; it has no label.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch."""
        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*value, *([fill] * (width - len(value)))] for value in values])

        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.padding),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }


@torch.no_grad()
def task_loss(model: Any, batches: Sequence[Mapping[str, Tensor]], context: Any) -> float:
    """The mean cross-entropy in nats of all labels of the batches."""
    mode, total, count = model.training, 0.0, 0
    model.eval()
    for batch in batches:
        moved = {key: value.to(model.device) for key, value in batch.items()}
        labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
        with context():
            total += float(model(**moved).loss) * labelled
        count += labelled
    model.train(mode)
    return total / count


@torch.no_grad()
def answers(model: Any, tokenizer: Any, tokens: int) -> list[str]:
    """What the model says to each of the questions, word by the likeliest word."""
    given = []
    for question, _ in QUESTIONS:
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            text = f"Question: {question}\nAnswer:"
        given.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    filler = tokenizer.pad_token_id or tokenizer.eos_token_id
    width = max(map(len, given))
    # On the left: every answer begins where its question ends.
    batch = torch.tensor([[filler] * (width - len(ids)) + ids for ids in given], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in given], device=model.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a token's products are so small that more threads only wait for each other
    said = model.eval().generate(
        batch, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=filler
    )
    torch.set_num_threads(threads)
    decoded = (tokenizer.decode(row[width:], skip_special_tokens=True) for row in said)
    return [" ".join(text.split()) for text in decoded]


def right(said: Sequence[str]) -> int:
    """How many of the answers hold a word that makes them right."""
    words = [{word.strip(".,;:!?*\"'()").lower() for word in answer.split()} for answer in said]
    return sum(bool(found & set(wanted)) for found, (_, wanted) in zip(words, QUESTIONS, strict=True))
