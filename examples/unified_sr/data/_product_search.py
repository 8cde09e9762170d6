"""The published queries and judgements of personalised product search on Amazon reviews.

Ai et al., "Learning a Hierarchical Embedding Model for Personalized Product Search", SIGIR 2017, publish for each of
their data sets ``query_text.txt.gz``, ``train.qrels.gz``, ``test.qrels.gz`` and ``train_review_id.txt.gz``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ._lines import read_lines

QUERIES, TRAIN_REVIEWS = "query_text.txt", "train_review_id.txt"
QRELS = {"train": "train.qrels", "test": "test.qrels"}


@dataclass(frozen=True)
class Benchmark:
    """Which reviews train, and by which queries each purchase is found.

    Args:
        folder: where it was read, for error messages.
        train_reviews: the numbers, from 0, of the training reviews in the review file.
        queries: part -> user -> item -> queries, in the order of the judgements.
    """

    folder: Path
    train_reviews: frozenset[int]
    queries: Mapping[str, Mapping[str, Mapping[str, list[str]]]]

    def check_reviews(self, count: int, purchases: Mapping[str, set[tuple[str, str]]]) -> None:
        """Check that the reviews are those that the benchmark was made from.

        Args:
            count: the number of reviews.
            purchases: part -> the pairs of user and item in it.

        Raises:
            ValueError: naming a review or purchase that is not there.
        """
        reason = "the reviews are not the file that these judgements were made from"
        if self.train_reviews and max(self.train_reviews) >= count:
            raise ValueError(f"{self.folder / TRAIN_REVIEWS} names line {max(self.train_reviews)} of {count}; {reason}")
        for part, users in self.queries.items():
            for user, items in users.items():
                for item in items:
                    if (user, item) not in purchases[part]:
                        raise ValueError(
                            f"{self.folder / QRELS[part]} judges the item {item!r} for user {user!r}, who has no such "
                            f"review in that part; {reason}"
                        )


def read_benchmark(folder: Path) -> Benchmark | None:
    """Read the four files, or return ``None`` where a folder has none of them.

    Raises:
        FileNotFoundError: if some of the four are missing.
        ValueError: naming the line that cannot be used.
    """
    names = (QUERIES, TRAIN_REVIEWS, *QRELS.values())
    found = {name: _plain_or_gz(folder, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if len(missing) == len(names):
        return None
    paths = {name: path for name, path in found.items() if path is not None}
    if missing:
        raise FileNotFoundError(
            f"{folder} holds {', '.join(paths)} but no {', '.join(missing)} (or .gz); the published judgements need all"
        )
    texts = [" ".join(line.split()) for _, line in read_lines(paths[QUERIES])]
    queries = {part: _read_qrels(paths[name], texts) for part, name in QRELS.items()}
    return Benchmark(folder, _read_numbers(paths[TRAIN_REVIEWS]), queries)


def _plain_or_gz(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read_numbers(path: Path) -> frozenset[int]:
    numbers = set()
    for line, text in read_lines(path):
        prefix, _, number = text.strip().partition("_")
        if prefix != "line" or not number.isdecimal():
            raise ValueError(f"{path}, line {line}: {text!r} is no review of the form line_NUMBER")
        numbers.add(int(number))
    return frozenset(numbers)


def _read_qrels(path: Path, texts: list[str]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for line, text in read_lines(path):
        fields = text.split()
        user, _, number = fields[0].rpartition("_") if len(fields) == 4 else ("", "", "")
        if not user or not number.isdecimal() or fields[3] not in ("0", "1"):
            raise ValueError(f"{path}, line {line}: {text!r} is no judgement of the form USER_QUERY 0 ITEM 0|1")
        if int(number) >= len(texts) or not texts[int(number)]:
            raise ValueError(f"{path}, line {line}: {QUERIES} has no query {number} ({len(texts)} lines, from 0)")
        if fields[3] == "1":
            found.setdefault(user, {}).setdefault(fields[2], []).append(texts[int(number)])
    return found
