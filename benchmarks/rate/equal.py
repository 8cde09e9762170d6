"""Which rates learn as much as AdamW's, from the trials of the first grid of examples/unified_sr."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

TRIALS: Final = Path(__file__).parent / "results" / "trials.json"
"""Data -> method -> pairs of a rate and the training loss of search, mean of the last five of 30 steps."""

# Of q, k, v, o, gate, up and down in SmolLM2-135M: the inputs of the layer, along which GEMS has its bases, and the
# smaller side of the weight, along which GaLore has.
INPUTS: Final = (576, 576, 576, 576, 576, 576, 1536)
SMALLER: Final = (576, 192, 192, 576, 576, 576, 576)
# The data, AdamW's rate, the method, d of the layers, and how many columns count at rank 64: a task's 32 by a quarter.
ROWS: Final = (
    ("amazon-industrial", 2e-4, "galore", SMALLER, 64),
    ("amazon-industrial", 2e-4, "gems-no-null", INPUTS, 64 + 2 * 32 / 4),
    ("amazon-industrial", 2e-4, "gems", INPUTS, 64 + 2 * 32 / 4),
    ("amazon-industrial", 2e-4, "gems-no-task", INPUTS, 64),
    ("movielens", 1e-4, "gems", INPUTS, 64 + 2 * 32 / 4),
    ("movielens", 2e-4, "gems", INPUTS, 64 + 2 * 32 / 4),
)


def curve(data: str, method: str) -> list[tuple[float, float]]:
    """The rates of a method's trials, in order, and their losses; empty if there were none."""
    found = json.loads(TRIALS.read_text(encoding="utf-8"))[data].get(method, [])
    return sorted((rate, loss) for rate, loss in found)


def rate_at(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where the loss first falls to this value, with the loss linear in the logarithm of the rate between trials."""
    for (low, above), (high, below) in itertools.pairwise(points):
        if above >= loss >= below:
            return float(low * (high / low) ** ((above - loss) / (above - below)))
    return None


def table() -> str:
    """A row for each of `ROWS`."""
    lines = [
        "| data | AdamW's rate | its loss | method | rate with that loss | ratio | factor of `lr_scale` | left over |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for data, rate, method, sides, columns in ROWS:
        factors = [math.sqrt(d / columns) for d in sides]
        adamw = dict(curve(data, "adamw") + curve(data, "adamw-other-rates"))[rate]
        found = rate_at(curve(data, method), adamw)
        if found is None:
            lines.append(f"| {data} | {rate:.0e} | {adamw:.2f} | {method} | none of the trials | | | |")
            continue
        mean = math.prod(factors) ** (1 / len(factors))
        lines.append(
            f"| {data} | {rate:.0e} | {adamw:.2f} | {method} | {found:.1e} | {found / rate:.1f} | "
            f"{min(factors):.1f} to {max(factors):.1f} | {found / rate / mean:.1f} |"
        )
    return "\n".join(lines)
