"""``report.md`` of a folder of results: targets, one table a case, plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from .config import Case, Config
from .contenders import Key
from .derived import Ratio, Result
from .methods import METHODS, PROTECTED
from .plots import draw_plots
from .results import read_results
from .targets import check_targets

REFERENCES: Final = ("floor", "adamw", "lora")
_MEBIBYTE: Final = 2**20


def write_report(folder: Path) -> str:
    """Write ``report.md`` and the plots into the folder; the report's text."""
    config, raw = read_results(folder)
    results = {name: Result(entry) for name, entry in raw.items()}
    cases = [case for case in config.cases if case.name in results]
    plots = draw_plots(config, results, folder)
    sections = [
        "# Training benchmark\n",
        _environment(results),
        _targets(config, results),
        *(f"![{path.stem}]({path.name})\n" for path in plots),
        *(_case(config, case, results[case.name]) for case in cases),
        _unavailable(results),
        "## Methods\n\n" + "\n".join(f"* `{name}`: {METHODS[name].summary}" for name in _used(cases)) + "\n",
    ]
    unfinished = [case.name for case in config.cases if case.name not in results]
    if unfinished:
        sections.insert(1, f"Not measured yet: {', '.join(unfinished)}.\n")
    text = "\n".join(section for section in sections if section)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def _environment(results: Mapping[str, Result]) -> str:
    """Every environment there was: a resumed run may have several."""
    lines: dict[str, list[str]] = {}
    for name, result in results.items():
        found = dict(result.raw["environment"])
        packages = ", ".join(f"{package} {version}" for package, version in found.pop("packages").items() if version)
        found.pop("load_average")
        line = "; ".join(f"{key} {value}" for key, value in found.items())
        lines.setdefault(f"{line}; {packages}", []).append(name)
    if len(lines) == 1:
        return f"{next(iter(lines))}\n"
    return "\n".join(f"* {', '.join(names)}: {line}" for line, names in lines.items()) + "\n"


def _targets(config: Config, results: Mapping[str, Result]) -> str:
    outcomes = list(check_targets(config, results))
    if not outcomes:
        return ""
    rows = [
        [
            outcome.model,
            outcome.wording,
            f"{outcome.target.at_most:.2f}",
            "" if outcome.measured is None else f"{outcome.measured:.2f}",
            outcome.verdict,
        ]
        for outcome in outcomes
    ]
    centre = (
        f"At {config.centre.tokens} tokens a step and rank {config.centre.rank}; a ratio is the median over rounds."
    )
    return f"## Targets\n\n{centre}\n\n" + _table(["model", "target", "at most", "measured", ""], rows)


def _case(config: Config, case: Case, result: Result) -> str:
    references = [name for name in REFERENCES if name in case.methods]
    base = min(case.tasks, key=lambda tasks: abs(tasks - config.centre.tasks))
    several = len(case.tasks) > 1
    protected = any(key.method in PROTECTED for key in result.keys)
    header = [
        "method",
        *(["tasks"] if several else []),
        "step, s",
        *(f"/ {name}" for name in references),
        *([f"/ itself at {base}"] if several else []),
        *(["step / no null space"] if protected else []),
        "cold start",
        "refresh, worst",
        "refresh, mean",
        "state, MiB",
        "held, MiB",
        "peak, MiB",
        *(["peak / no null space", "mapped, MiB"] if protected else []),
    ]
    rows = []
    for key in result.keys:
        refresh = result.refresh_ratio(key)
        cold = result.cold_ratio(key)
        without = Key(PROTECTED.get(key.method, ""), key.tasks)
        rows.append(
            [
                f"`{key.method}`",
                *([str(key.tasks)] if several else []),
                f"{result.step_seconds(key):.3f}",
                *(_ratio(result.step_ratio(key, Key(name, key.tasks))) for name in references),
                *([_ratio(result.step_ratio(key, Key(key.method, base)))] if several else []),
                *([_ratio(result.step_ratio(key, without))] if protected else []),
                f"{cold:.2f}" if cold else "",
                f"{refresh.worst:.2f}" if refresh else "",
                f"{refresh.mean:.2f}" if refresh else "",
                _mebibytes(result.entry("steps", key)["state_bytes"]),  # type: ignore[index]
                _mebibytes(result.held_above_parameters(key)),
                _mebibytes(result.peak_above_parameters(key)),
                *(_protection(result, key, without) if protected else []),
            ]
        )
    tasks = ", ".join(map(str, case.tasks))
    load = result.raw["environment"]["load_average"]
    rounds = result.raw["settings"]["rounds"]
    title = f"## {case.model}: {case.tokens} tokens, rank {case.rank}, tasks {tasks}"
    note = (
        f"{rounds} rounds; load average when it began: {load}. Ratios: median [quartiles] within rounds. Held (between "
        "steps) and peak (during a step): memory above the parameters, without the file of a null space that is mapped."
    )
    return f"{title}\n\n{note}\n\n{_table(header, rows)}"


def _unavailable(results: Mapping[str, Result]) -> str:
    reasons = {name: reason for result in results.values() for name, reason in result.raw["unavailable"].items()}
    if not reasons:
        return ""
    return "## Unavailable\n\n" + "\n".join(f"* `{name}`: {reason}" for name, reason in reasons.items()) + "\n"


def _used(cases: list[Case]) -> list[str]:
    return [name for name in METHODS if any(name in case.methods for case in cases)]


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _protection(result: Result, key: Key, without: Key) -> list[str]:
    own, other = result.peak_above_parameters(key), result.peak_above_parameters(without)
    if own is None or other is None:
        return ["", ""]
    return [f"{own / other:.3f}", _mebibytes(result.entry("memory", key)["mapped_bytes"])]  # type: ignore[index]


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / _MEBIBYTE:.1f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
