"""General-domain English: what the model must not forget, and what shows whether it did.

The text is cut into blocks of whole paragraphs, and every third block is held out: both parts then cover the same
subjects, and no paragraph is in both, since a paragraph that occurs twice is kept once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_CHARACTERS = 2_000
"""Shorter texts say too little to fit a null space on and to measure a perplexity on."""

BLOCK_CHARACTERS = 2_000
"""Length of a block, as far as whole paragraphs allow; a short text has shorter ones, so that it has a dozen."""

_INDENTED_CODE = re.compile(r"::=|>>>|\.\.\. |[{}<>=|\\]|\w\(\)? *:$")
_TOKENISED = re.compile(r" @[-,.]@ |<unk>")
_HEADING = re.compile(r"(= ?)+[^=]+( ?=)+")
_TOKENISED_SENTENCE_END = re.compile(r"(?<= [.!?]) +(?=[A-Z\"<])")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def load_general_text(path: str | Path | None = None) -> tuple[str, str]:
    """Return two disjoint texts: about two thirds to fit the null space on, one third held out for perplexity.

    The split is the same in every run. Paragraphs are separated by blank lines in the result.

    Args:
        path: a UTF-8 text file of at least ``MIN_CHARACTERS`` characters, best of some 100,000. Text tokenised like
            WikiText (`` @-@ ``, blanks before commas, ``<unk>``) is detokenised: language models are not made for it.
            ``None`` takes the prose of the language reference in Python's own ``pydoc_data.topics``: English that
            every machine has, though of one subject, so pass text of your own where you have it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, or too short after cleaning.
    """
    if path is None:
        from pydoc_data.topics import topics

        source = "pydoc_data.topics"
        paragraphs = _distinct(_topic_paragraphs(topics[name] for name in sorted(topics)))
    else:
        source = str(path)
        paragraphs = _distinct(_paragraphs(_read(Path(path))))
    total = sum(map(len, paragraphs))
    if total < MIN_CHARACTERS:
        raise ValueError(
            f"{source} holds {total} characters of text after cleaning, at least {MIN_CHARACTERS} are needed; pass a "
            "longer text"
        )
    parts: tuple[list[str], list[str]] = ([], [])
    for number, block in enumerate(_blocks(paragraphs, min(BLOCK_CHARACTERS, total // 12))):
        parts[number % 3 == 2].extend(block)
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def detokenise(line: str) -> str:
    """Undo the tokenisation of a WikiText line; sentences with a word replaced by ``<unk>`` are left out.

    Example:
        >>> detokenise('It weighs 1 @,@ 500 kg ( 3 @.@ 3 lb ) ; " it \\'s a well @-@ known fish " . A <unk> is not .')
        'It weighs 1,500 kg (3.3 lb); "it\\'s a well-known fish".'
    """
    # Without the word a sentence would be no English any more, and the model is asked how likely English it is.
    line = " ".join(part for part in _TOKENISED_SENTENCE_END.split(line) if "<unk>" not in part)
    line = re.sub(r"\s*@([-,.])@\s*", r"\1", line)
    # A quotation whose other mark went with a dropped sentence cannot be told apart from the next one.
    line = re.sub(r'" ([^"]*?) ?"', r'"\1"', line) if line.count('"') % 2 == 0 else line.replace('"', " ")
    line = re.sub(r"(?<=[0-9]) ([–:]) (?=[0-9])", r"\1", line)
    line = re.sub(r" ’ (?=s\b)", "’", line)
    line = re.sub(r"\( +", "(", line)
    line = re.sub(r"\[ +", "[", line)
    line = re.sub(r" +([,.;:!?)\]%]|'(?:s|m|d|re|ve|ll|t)\b|n't\b)", r"\1", line)
    line = re.sub(r"([$£€]) +(?=[0-9])", r"\1", line)
    line = re.sub(r"s ' (?=\w)", "s' ", line)
    return " ".join(line.split())


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"the general text {str(path)!r} is no file; pass a UTF-8 text file, or none")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def _paragraphs(text: str) -> list[str]:
    if _TOKENISED.search(text):
        # One paragraph a line; headings are lines like " = = History = = ".
        lines = (line.strip() for line in text.split("\n"))
        return [detokenise(line) for line in lines if not _HEADING.fullmatch(line)]
    # A text without blank lines, or all in one line, must still come apart.
    found: list[str] = []
    for separator in (re.compile(r"\n\s*\n"), re.compile(r"\n"), _SENTENCE_END):
        found = [" ".join(piece.split()) for piece in separator.split(text)]
        if sum(map(bool, found)) >= 12:
            break
    return found


def _topic_paragraphs(topics: Iterable[str]) -> Iterator[str]:
    for topic in topics:
        for piece in re.split(r"\n\s*\n", topic):
            text = re.sub(r"^\s*(?:[*-]|[0-9]+\.) ", "", piece)
            text = re.sub(r"(?<=[a-z])-\n\s*(?=[a-z])", "-", text)
            text = _without_markup(" ".join(text.split()))
            if _is_prose(text) and not (piece.startswith("   ") and _INDENTED_CODE.search(text)):
                yield text


def _is_prose(text: str) -> bool:
    words = text.split()
    plain = sum(word.strip("\"'*“”‘’.,;:()").isalpha() for word in words)
    return (
        len(words) >= 12 and text[-1] in '.)"' and "::=" not in text and ">>>" not in text and plain >= 0.8 * len(words)
    )


def _without_markup(text: str) -> str:
    text = re.sub(r"\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}", r"\1", text)
    text = re.sub(r" ?\[[0-9]+\]", "", text)
    return re.sub(r"^(?:Note|See also|Changed in version [0-9.]+|Added in version [0-9.]+): ?", "", text).strip()


def _distinct(paragraphs: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(paragraph for paragraph in paragraphs if paragraph))


def _blocks(paragraphs: Iterable[str], length: int) -> Iterator[list[str]]:
    block: list[str] = []
    for paragraph in paragraphs:
        block.append(paragraph)
        if sum(map(len, block)) >= length:
            yield block
            block = []
    if block:
        yield block
