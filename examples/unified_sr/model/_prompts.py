"""What the model reads before it answers with an item: few words, so that little is computed per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..data import Example, Turn
from ._items import token_name

HISTORY = "History:"
RECOMMEND = " Next:"
SEARCH = " Search:"
RESULT = " Result:"


def surrounding_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what a tokenizer puts before any text, such as a start token, and what behind it."""
    plain, whole = (tuple(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


@dataclass(frozen=True)
class Place:
    """A position of a sequence at which items are predicted.

    Args:
        position: index of the token whose hidden state predicts.
        task: whose loss this is.
        target: indices of the relevant items.
    """

    position: int
    task: str
    target: tuple[int, ...]


class PromptBuilder:
    """Turns examples into token ids.

    A recommendation reads ``History: <item_3> <item_8> Next:``, a search ``History: <item_3> <item_8> Search: comedy
    1990s Result:``; the answer is one item token behind the colon (for an encoder-decoder the first token of the
    decoder).

    Args:
        tokenizer: the language model's.
        first_item: the token id of item 0.
        encoder_decoder: whether the tokenizer's end token closes the prompt; a decoder alone must go on after it.
        max_history: the most recent items that are kept of a history.
        max_query_tokens: the first tokens that are kept of a query.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        first_item: int,
        encoder_decoder: bool,
        max_history: int = 20,
        max_query_tokens: int = 32,
    ) -> None:
        for name, value in (("max_history", max_history), ("max_query_tokens", max_query_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._tokenizer = tokenizer
        self._first_item = first_item
        self._max_history = max_history
        self._max_query_tokens = max_query_tokens
        self._words = lru_cache(maxsize=65536)(self._encode)
        self._prefix, closing = surrounding_tokens(tokenizer)
        self._suffix = closing if encoder_decoder else ()

    def __call__(self, example: Example) -> list[int]:
        """Return the prompt's token ids."""
        ids = list(self._prefix)
        history = example.history[-self._max_history :]
        if history:
            ids += [*self._words(HISTORY), *map(self._token, history)]
        if example.query:
            ids += self._words(SEARCH if history else SEARCH.strip())
            ids += self._query(example.query)
        ids += self._words(RESULT if example.query else RECOMMEND)
        return [*ids, *self._suffix]

    def row(self, row: Any) -> tuple[list[int], list[Place]]:
        """Return the token ids of an example that is trained on, and where its target is predicted."""
        ids = self(row)
        return ids, [Place(len(ids) - 1, row.task, row.target)]

    def text(self, example: Example) -> str:
        """Return the prompt as a reader sees it."""
        pieces: list[str] = []
        words: list[int] = []
        for token in self(example):
            if token < self._first_item:
                words.append(token)
                continue
            pieces += [self._tokenizer.decode(words), " "] if words else [" "]
            pieces.append(token_name(token - self._first_item))
            words = []
        return "".join([*pieces, self._tokenizer.decode(words)]).strip()

    def _token(self, item: int) -> int:
        return self._first_item + item

    def _query(self, query: str) -> tuple[int, ...]:
        return self._words(f" {query}")[: self._max_query_tokens]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class SequenceBuilder(PromptBuilder):
    """Turns a user's events, in order of time, into one sequence of token ids with a target at each of them.

    ``History: <item_3> Search: comedy 1990s Result: <item_8> <item_5>``: behind an item the next one is predicted as a
    recommendation, behind ``Result:`` as the answer to a query. An example's prompt is a sequence that
    ends where its own target is predicted: what was asked for in its history is part of it. Of several questions with
    one answer (``searches="every"``) a later one follows the earlier ones in training, and is a prompt without them.

    Args:
        tokenizer: the language model's, a decoder alone.
        first_item: the token id of item 0.
        max_history: the most recent items that are kept of a history.
        max_query_tokens: the first tokens that are kept of a query.
        each: whether each item of an event has a place of its own, instead of a share in the event's.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        first_item: int,
        max_history: int = 50,
        max_query_tokens: int = 32,
        each: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            first_item=first_item,
            encoder_decoder=False,
            max_history=max_history,
            max_query_tokens=max_query_tokens,
        )
        self._each = each

    def __call__(self, example: Example) -> list[int]:
        """Return the prompt's token ids: those of the history and, for a search, of the query."""
        asked = example.asked or ((),) * len(example.history)
        ids = [*self._prefix, *self._words(HISTORY)]
        for item, queries in list(zip(example.history, asked, strict=True))[-self._max_history :]:
            for query in queries:
                ids += self._question(query)
            ids.append(self._token(item))
        return ids + self._question(example.query) if example.query else ids

    def row(self, row: Any) -> tuple[list[int], list[Place]]:
        """The same of a window of a user's events."""
        return self.sequence(row.context, row.turns)

    def sequence(self, context: Sequence[int], turns: Sequence[Turn]) -> tuple[list[int], list[Place]]:
        """Return the token ids of some turns, and where their items are predicted.

        Args:
            context: items that precede the turns and are no targets.
            turns: in order of time; a recommendation needs an item before it.
        """
        ids = [*self._prefix, *self._words(HISTORY), *map(self._token, context)]
        places = []
        for turn in turns:
            targets = [(item,) for item in turn.items] if self._each else [turn.items]
            if "rec" in turn.tasks:
                places += [Place(len(ids) - 1, "rec", target) for target in targets]
            for query in turn.queries:
                ids += self._question(query)
                if "search" in turn.tasks:
                    places += [Place(len(ids) - 1, "search", target) for target in targets]
            ids += map(self._token, turn.items)
        return ids, places

    def _question(self, query: str) -> list[int]:
        return [*self._words(SEARCH), *self._query(query), *self._words(RESULT)]
