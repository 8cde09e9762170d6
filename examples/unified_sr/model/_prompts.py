"""What the model reads before it answers with an item: few words, so that little is computed per example."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..data import Example
from ._items import token_name

HISTORY = "History:"
RECOMMEND = " Next:"
SEARCH = " Search:"
RESULT = " Result:"


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
        plain, special = self._encode("a"), tuple(tokenizer("a")["input_ids"])
        start = next((at for at in range(len(special)) if special[at : at + len(plain)] == plain), 0)
        self._prefix = special[:start]
        self._suffix = special[start + len(plain) :] if encoder_decoder else ()

    def __call__(self, example: Example) -> list[int]:
        """Return the prompt's token ids."""
        ids = list(self._prefix)
        history = example.history[-self._max_history :]
        if history:
            ids += [*self._words(HISTORY), *(self._first_item + item for item in history)]
        if example.query:
            ids += self._words(SEARCH if history else SEARCH.strip())
            ids += self._words(f" {example.query}")[: self._max_query_tokens]
        ids += self._words(RESULT if example.query else RECOMMEND)
        return [*ids, *self._suffix]

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

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
