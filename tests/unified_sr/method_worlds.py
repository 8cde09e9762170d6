"""What the tests of methods and of retention build on: a ranker of four items and one batch per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from examples.unified_sr.config import resolve
from examples.unified_sr.data import Item
from examples.unified_sr.general_domain import general_batches, token_windows
from examples.unified_sr.losses import Pass, passes_of
from examples.unified_sr.methods import METHODS, Setup, Updater
from examples.unified_sr.model import Batch, Collator, Ranker, load_language_model
from examples.unified_sr.precision import Precision

ITEMS = [Item(str(n), title) for n, title in enumerate(("red chair", "blue lamp", "glass", "spoon"))]
TEXT = "A language model must not forget what it knew about the world outside the catalogue. " * 40


def built(
    folder: str,
    method: str,
    *pairs: str,
    tokens: int = 256,
    before: Callable[[Ranker], object] = lambda ranker: None,
) -> tuple[Ranker, Updater]:
    """A method ready to train, with so many tokens of general text; ``before`` sees the ranker before the method."""
    language_model = load_language_model(folder)
    ranker = Ranker(language_model, ITEMS)
    before(ranker)
    own: tuple[str, ...] = ()
    if method.startswith("gems"):
        own = ("method.threshold=1.0",) if method == "gems-paper" else ("method.rank=4", "method.update_proj_gap=2")
    settings = resolve(pairs=[*own, *pairs], flags={"method.name": method, "training.steps": 2})
    windows = token_windows(language_model.tokenizer, TEXT, tokens=tokens, window=64)
    setup: Setup[Any] = Setup(
        ranker,
        settings,
        ("rec", "search"),
        lambda: general_batches(language_model, windows, torch.device("cpu")),
        lambda line: None,
    )
    build = METHODS[method].build
    assert build is not None
    return ranker, build(setup)


def batches(ranker: Ranker) -> dict[str, Batch]:
    first = ranker.first_item
    collate = Collator(0)
    return {
        "rec": collate([[40, first, 41], [first + 1, 42]], [(1,), (3,)], "rec"),
        "search": collate([[50, 51, first + 2]], [(0,)], "search"),
    }


def losses(ranker: Ranker) -> dict[str, Pass]:
    """A forward pass of its own for each task."""
    precision = Precision(torch.device("cpu"), None)
    return {task: passes_of(ranker, [batch], precision)[0] for task, batch in batches(ranker).items()}


SAMPLES = {"rec": 2, "search": 1}
