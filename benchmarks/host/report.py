"""The table, the targets and the worst places, from a result file."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from .rows import REFERENCE

Result = Mapping[str, Any]


def operations(result: Result, row: str) -> int:
    """Of the whole step."""
    found = result["rows"][row]
    return int(found["passes"]["operations"] + found["step"]["operations"])


def operations_per_refresh(result: Result, row: str) -> float:
    """How many more operations than an ordinary step, a refreshed layer."""
    ordinary = result["rows"][row]["against"]
    return (operations(result, row) - operations(result, ordinary)) / result["layers"]


def time_ratio(result: Result, row: str) -> float:
    """Host time of the whole step, of the reference's: the median of the ratios within a round."""
    pairs = zip(_seconds(result, row), _seconds(result, REFERENCE), strict=True)
    return statistics.median(own / other for own, other in pairs)


def measured(result: Result, row: str, measure: str) -> float:
    """What a target speaks of: ``passes`` (operations, of the reference's), ``step`` (operations), ``time`` (of the
    reference's) or ``refresh`` (operations more, a layer).
    """
    if measure == "passes":
        rows = result["rows"]
        return float(rows[row]["passes"]["operations"] / rows[REFERENCE]["passes"]["operations"])
    if measure == "step":
        return float(result["rows"][row]["step"]["operations"])
    return time_ratio(result, row) if measure == "time" else operations_per_refresh(result, row)


def check_targets(result: Result) -> Iterator[tuple[str, str, float, float]]:
    """Row, measure, the most it may be and what it is, for every target of the config."""
    for target in result["config"]["targets"]:
        for row in target["rows"]:
            yield row, target["measure"], target["at_most"], measured(result, row, target["measure"])


def render(result: Result) -> str:
    """Everything in Markdown."""
    environment = result["environment"]
    config = result["config"]
    lines = [
        f"{result['layers']} linear layers, {config['rows']} x {config['length']} tokens a task, rank {config['rank']}"
        f", {environment['threads']} thread; torch {environment['packages']['torch']}, {environment['cpu']}, revision "
        f"{(environment['revision'] or 'unknown')[:12]}, load {environment['load_average']} when it began.",
        *([result["note"]] if result["note"] else []),
        "",
        *_table(result),
        "",
        *_targets(result),
        "",
        *_worst(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(result: Result) -> Iterator[str]:
    yield (
        "| a step | operations in the passes | of AdamW's | in `step()` | passes (ms) | `step()` (ms) "
        "| time of AdamW's | operations more, a refreshed layer |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    reference = result["rows"][REFERENCE]["passes"]["operations"]
    for name, row in result["rows"].items():
        passes, step = row["passes"], row["step"]
        cells = [
            f"`{name}`: {row['summary']}",
            f"{passes['operations']:,}",
            f"{passes['operations'] / reference:.2f}",
            f"{step['operations']:,}",
            f"{1e3 * statistics.median(passes['seconds']):.0f}",
            f"{1e3 * statistics.median(step['seconds']):.1f}",
            f"{time_ratio(result, name):.2f}",
            f"{operations_per_refresh(result, name):.1f}" if row["refreshes"] else "",
        ]
        yield "| " + " | ".join(cells) + " |"


def _targets(result: Result) -> Iterator[str]:
    wording = {
        "passes": "operations of the passes, of AdamW's",
        "step": "operations of `step()`",
        "time": "host time of the step, of AdamW's",
        "refresh": "operations more than an ordinary step, a refreshed layer",
    }
    yield "| target | row | at most | measured | |"
    yield "|---|---|---:|---:|---|"
    for row, measure, at_most, value in check_targets(result):
        digits = ".2f" if measure in ("passes", "time") else ",.0f"
        verdict = "hit" if value <= at_most else "missed"
        yield f"| {wording[measure]} | `{row}` | {at_most:g} | {value:{digits}} | {verdict} |"


def _worst(result: Result) -> Iterator[str]:
    for name, worst in result["worst"].items():
        yield f"### `{name}`: where it does more than `{result['rows'][name]['against']}`"
        yield ""
        for title, kind in (("operations", "names"), ("functions of gradsub that ask for them", "places")):
            for part in ("passes", "step"):
                places = worst[f"{kind}, {part}"]
                if places:
                    listed = ", ".join(f"`{place}` {more:,.0f}" for place, _, more in places)
                    yield f"* {title}, {'passes' if part == 'passes' else '`step()`'}: {listed}"
        listed = ", ".join(f"`{place}` {more:.1f}" for place, _, more in worst["functions"])
        yield f"* own time of python functions (ms more a step, slowed by being watched): {listed}"
        yield ""


def _seconds(result: Result, row: str) -> list[float]:
    found = result["rows"][row]
    return [sum(pair) for pair in zip(found["passes"]["seconds"], found["step"]["seconds"], strict=True)]
