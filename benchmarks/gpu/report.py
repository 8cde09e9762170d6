"""Runs as Markdown: a table a model, and the targets beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..two_tasks import DEFAULT_GAP

Run = Mapping[str, Any]
Record = Mapping[str, Any]


def find(run: Run, model: str, method: str, group: int | None = None) -> Record | None:
    """The first record of a method that has numbers, in a group or in any."""
    for record in run["records"]:
        if (record["model"], record["method"]) == (model, method) and group in (None, record["group"]) and record["ms"]:
            return record  # type: ignore[no-any-return]
    return None


def pair(run: Run, model: str, method: str, against: str) -> tuple[Record, Record] | None:
    """Both methods' records from one group, in which they took turns; None if there is none."""
    for record in run["records"]:
        if (record["model"], record["method"]) == (model, method) and record["ms"]:
            other = find(run, model, against, record["group"])
            if other is not None:
                return record, other
    return None


def time_ratio(own: Record, other: Record) -> float:
    """The median of the ratios within a round."""
    return statistics.median(mine / its for mine, its in zip(own["ms"], other["ms"], strict=False))


def gap_ratio(own: Record, other: Record, gap: int | None = None) -> float | None:
    """A gap with all its refreshes, of as many ordinary steps; None if the gap was not finished.

    Args:
        own: the refreshing method.
        other: the same without refreshes.
        gap: as if the refreshes were spread over so many steps; None: as measured.
    """
    if own["gap"] is None or len(own["ms"]) < own["gap"]:
        return None
    steps = own["gap"]
    refreshing, ordinary = sum(own["ms"][:steps]), sum(other["ms"][:steps])
    if gap is None:
        return float(refreshing / ordinary)
    return float(1 + (refreshing - ordinary) / (gap * ordinary / steps))


def measured(run: Run, target: Mapping[str, Any]) -> float | None:
    """The ratio that a target speaks of; None if it was not measured."""
    found = pair(run, target["model"], target["method"], target["against"])
    if found is None:
        return None
    own, other = found
    if target["measure"] == "peak":
        return own["peak_gib"] / other["peak_gib"] if own["peak_gib"] and other["peak_gib"] else None
    return time_ratio(own, other) if target["measure"] == "time" else gap_ratio(own, other)


def render(run: Run) -> str:
    """One run."""
    environment, config = run["environment"], run["config"]
    packages = environment["packages"]
    lines = [
        f"## {environment['accelerator']}, revision {(environment['revision'] or 'unknown')[:12]}",
        "",
        f"torch {packages['torch']}, transformers {packages['transformers']}. Two tasks of {config['rows']} x "
        f"{config['length']} tokens, rank {config['rank']}, bfloat16 autocast over float32 weights. Medians.",
        *(["", run["note"]] if run["note"] else []),
    ]
    for model in config["models"]:
        lines += ["", f"### {model}", "", *_table(run, model)]
    return "\n".join([*lines, "", "### Targets", "", *_targets(run)]) + "\n"


def render_all(runs: Sequence[Run]) -> str:
    """All runs, the latest first."""
    return "# Step time and peak memory on a GPU\n\n" + "\n".join(render(run) for run in reversed(runs))


def _table(run: Run, model: str) -> Iterator[str]:
    yield (
        "| method | ms a step | in `step()` | host, ms | host in `step()` | peak, GiB | of AdamW's time "
        "| of AdamW's peak | a gap, of as many ordinary steps | worst step, of an ordinary one | graphs | |"
    )
    yield "|---|" + "---:|" * 10 + "---|"
    for record in run["records"]:
        # What other methods are compared with stands in several groups, and in the table once.
        if record["model"] != model or (record["ms"] and find(run, model, record["method"]) is not record):
            continue
        reference = "adamw+compile" if record["graphs"] is not None else "adamw"
        paired = pair(run, model, record["method"], reference)
        ordinary = pair(run, model, record["method"], record["method"].removesuffix("-refresh"))
        adamw = find(run, model, reference)
        cells = [
            f"`{record['method']}`",
            *(_median(record[name]) for name in ("ms", "step_ms", "host_ms", "host_step_ms")),
            _number(record["peak_gib"], ".1f"),
            _number(time_ratio(*paired) if paired else None, ".2f"),
            _number(record["peak_gib"] / adamw["peak_gib"], ".2f")
            if adamw and record["peak_gib"] and adamw["peak_gib"]
            else "",
            *(_refreshes(*ordinary) if record["gap"] is not None and ordinary else ("", "")),
            _number(record["graphs"], "d"),
            record["note"],
        ]
        yield "| " + " | ".join(cells) + " |"


def _refreshes(own: Record, other: Record) -> tuple[str, str]:
    ratio = gap_ratio(own, other)
    if ratio is None:
        return "unfinished", ""
    worst = max(own["ms"]) / statistics.median(other["ms"])
    usual = gap_ratio(own, other, DEFAULT_GAP)
    return f"{ratio:.3f} at {own['gap']} steps, {usual:.3f} at {DEFAULT_GAP}", f"{worst:.2f}"


def _targets(run: Run) -> Iterator[str]:
    wording = {"time": "step time", "peak": "peak memory", "gap": "a gap with all its refreshes"}
    yield "| model | target | at most | measured | |"
    yield "|---|---|---:|---:|---|"
    for target in run["config"]["targets"]:
        value = measured(run, target)
        verdict = "not measured" if value is None else "hit" if value <= target["at_most"] else "missed"
        yield (
            f"| {target['model']} | {wording[target['measure']]} of `{target['method']}`, of `{target['against']}` "
            f"| {target['at_most']:g} | {_number(value, '.2f')} | {verdict} |"
        )


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
