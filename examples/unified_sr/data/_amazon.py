"""Amazon reviews with product metadata (McAuley et al., 2014, 2018 and 2023): a review stands for a purchase."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ._events import Event, Source, in_order, only
from ._lines import Record, read_records
from ._product_search import Benchmark, read_benchmark
from ._queries import category_paths, category_query, with_searches
from ._types import Item

_RECORDS = re.compile(r".+\.jsonl?(\.gz)?")
_METADATA = re.compile(r"meta(data)?(_.+)?\.jsonl?(\.gz)?")


@dataclass(frozen=True, slots=True)
class _Review:
    number: int  # of its line, from 0, as the published judgements count
    user: str
    item: str
    timestamp: float


def is_amazon(folder: Path) -> bool:
    """Tell whether a folder holds product metadata."""
    return any(_METADATA.fullmatch(path.name) for path in folder.iterdir())


def read_amazon(folder: Path, searches: str) -> Source:
    """Read the reviews, and the metadata of the products that they are of.

    Raises:
        FileNotFoundError: if the reviews, or some of the published judgements, are not there.
        ValueError: if a line cannot be used, or the files do not belong together.
    """
    path, catalogue = _files(folder)
    names: dict[str, str] = {}  # one text object a user or item, however often it occurs
    reviews = [_review(record, names) for record in read_records(path, literals=True)]
    benchmark = read_benchmark(folder)
    left_out = Counter({"reviews_without_metadata": 0, "repeated_metadata": 0})
    items, queries = _read_metadata(catalogue, {review.item for review in reviews}, left_out)
    if not items:
        raise ValueError(f"{catalogue} describes none of the products in {path}; take two files of the same category")
    known = {item.id for item in items}
    left_out["reviews_without_metadata"] = sum(review.item not in known for review in reviews)
    make = _searching(queries, searches) if benchmark is None else _judged(benchmark, reviews)
    events = (event for review in reviews if review.item in known for event in make(review))
    return Source(folder.resolve().name, in_order(events), items, left_out)


def _searching(queries: Mapping[str, Sequence[str]], searches: str) -> Callable[[_Review], Iterator[Event]]:
    def make(review: _Review) -> Iterator[Event]:
        event = Event(review.user, (review.item,), review.timestamp)
        return with_searches(event, queries[review.item], searches)

    return make


def _judged(benchmark: Benchmark, reviews: Sequence[_Review]) -> Callable[[_Review], Iterator[Event]]:
    def part(review: _Review) -> str:
        return "train" if review.number in benchmark.train_reviews else "test"

    purchases: dict[str, set[tuple[str, str]]] = {"train": set(), "test": set()}
    for review in reviews:
        purchases[part(review)].add((review.user, review.item))
    benchmark.check_reviews(reviews[-1].number + 1 if reviews else 0, purchases)

    def make(review: _Review) -> Iterator[Event]:
        event = Event(review.user, (review.item,), review.timestamp, split=part(review))
        queries = benchmark.queries[event.split].get(review.user, {}).get(review.item, [])
        return with_searches(event, queries, "every")

    return make


def _files(folder: Path) -> tuple[Path, Path]:
    found = sorted(path for path in folder.iterdir() if _RECORDS.fullmatch(path.name))
    metadata = [path for path in found if _METADATA.fullmatch(path.name)]
    reviews = [path for path in found if path not in metadata]
    needs = "Amazon reviews need one of each"
    return (
        only(folder, reviews, "review file NAME.json(l)[.gz]", needs),
        only(folder, metadata, "metadata file meta_NAME.json(l)[.gz]", needs),
    )


def _item_field(record: Record) -> str:
    # In the files of 2023 the variants of a product share their parent's metadata.
    return "parent_asin" if "parent_asin" in record.fields else "asin"


def _review(record: Record, names: dict[str, str]) -> _Review:
    user = record.text("user_id" if "user_id" in record.fields else "reviewerID")
    item = record.text(_item_field(record))
    time = record.number("timestamp" if "timestamp" in record.fields else "unixReviewTime")
    return _Review(record.line - 1, names.setdefault(user, user), names.setdefault(item, item), time)


def _read_metadata(
    path: Path, wanted: set[str], left_out: Counter[str]
) -> tuple[tuple[Item, ...], dict[str, tuple[str, ...]]]:
    items: dict[str, Item] = {}
    queries: dict[str, tuple[str, ...]] = {}
    for record in read_records(path, literals=True):
        name = record.text(_item_field(record))
        if name not in wanted:
            continue
        if name in items:
            left_out["repeated_metadata"] += 1
            continue
        try:
            made = [category_query(each) for each in category_paths(record.fields)]
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from error
        items[name] = Item(name, _title(record) or name)
        queries[name] = tuple(dict.fromkeys(query for query in made if query))
    return tuple(items.values()), queries


def _title(record: Record) -> str:
    title = record.fields.get("title") or ""
    if not isinstance(title, str):
        raise ValueError(f"{record.where}: 'title' is {title!r}; it must be text")
    return " ".join(html.unescape(title).split())
