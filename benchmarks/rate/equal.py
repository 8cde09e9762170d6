"""Which rates learn as much as AdamW's, from the trials that are committed in examples/unified_sr/results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

RUNS: Final = Path(__file__).parents[2] / "examples" / "unified_sr" / "results"
STEPS: Final = 30
LAST: Final = 5

# The data, AdamW's rate, the method, and the factor that `lr_scale="adamw"` is: for d = 576, and for down_proj, 1536.
ROWS: Final = (
    ("amazon-industrial", 2e-4, "galore", (3.0, 3.0)),
    ("amazon-industrial", 2e-4, "gems-no-null", (2.68, 4.38)),
    ("amazon-industrial", 2e-4, "gems", (2.68, 4.38)),
    ("amazon-industrial", 2e-4, "gems-no-task", (3.0, 4.90)),
    ("movielens", 1e-4, "gems", (2.68, 4.38)),
    ("movielens", 2e-4, "gems", (2.68, 4.38)),
)


def curve(data: str, method: str) -> list[tuple[float, float]]:
    """The rates of a method's trials, in order, and the training loss of search in their last steps."""
    found = []
    for run in (RUNS / data).glob(f"{method}/lr-*/steps.jsonl"):
        records = [json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()]
        if len(records) == STEPS:
            loss = math.fsum(record["loss"]["search"] for record in records[-LAST:]) / LAST
            found.append((float(run.parent.name.removeprefix("lr-")), loss))
    return sorted(found)


def rate_at(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where the loss first falls to this value, with the loss linear in the logarithm of the rate between trials."""
    for (low, above), (high, below) in zip(points, points[1:], strict=False):
        if above >= loss >= below:
            return float(low * (high / low) ** ((above - loss) / (above - below)))
    return None


def table() -> str:
    """A row for each of `ROWS`."""
    lines = [
        "| data | AdamW's rate | its loss | method | rate with that loss | ratio | factor of `lr_scale` | left over |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for data, rate, method, (most, down) in ROWS:
        adamw = dict(curve(data, "adamw") + curve(data, "adamw-other-rates"))[rate]
        found = rate_at(curve(data, method), adamw)
        if found is None:
            lines.append(f"| {data} | {rate:.0e} | {adamw:.2f} | {method} | none of the trials | | | |")
            continue
        mean = most ** (6 / 7) * down ** (1 / 7)
        lines.append(
            f"| {data} | {rate:.0e} | {adamw:.2f} | {method} | {found:.1e} | {found / rate:.1f} | "
            f"{most:.1f} to {down:.1f} | {found / rate / mean:.1f} |"
        )
    return "\n".join(lines)
