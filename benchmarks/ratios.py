"""Ratios peer / ours out of pytest-benchmark's JSON: ``python -m benchmarks.ratios FILE`` prints and writes them.

Above 1, gradsub is faster. Where a case was also timed round-robin, that ratio is the one to trust; its quartiles
follow in brackets.
"""

import json
import platform
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from .alternate import OURS
from .settings import CONFIG, RESULTS

Row = dict[str, Any]


def environment(report: dict[str, Any]) -> Row:
    """What a reader needs to judge the numbers; nothing that names the machine itself."""
    machine = report["machine_info"]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": machine["system"],
        "cpu": machine["cpu"].get("brand_raw", machine["processor"]),
        "cores": machine["cpu"].get("count"),
        "threads": CONFIG["threads"] or torch.get_num_threads(),
        "device": "cpu",
    }


def rows(report: dict[str, Any]) -> list[Row]:
    """One row a case and peer, in the order of the report."""
    groups: dict[str, dict[str, Any]] = defaultdict(lambda: {"alone": {}, "alternating": None})
    for entry in report["benchmarks"]:
        extra = entry["extra_info"]
        if "alternating" in extra:
            groups[entry["group"]]["alternating"] = extra["alternating"]
        elif "contender" in extra:
            groups[entry["group"]]["alone"][extra["contender"]] = entry
    found = []
    for name, group in groups.items():
        alone, alternating = group["alone"], group["alternating"]
        if OURS not in alone:
            continue
        own = alone[OURS]
        for peer, entry in alone.items():
            if peer == OURS:
                continue
            row: Row = {
                "case": name,
                "peer": peer,
                "ours_ms": 1e3 * own["stats"]["median"],
                "peer_ms": 1e3 * entry["stats"]["median"],
                "ratio": entry["stats"]["median"] / own["stats"]["median"],
                "alternating": alternating["ratios"].get(peer) if alternating else None,
            }
            if "error" in own["extra_info"]:
                row |= {"ours_error": own["extra_info"]["error"], "peer_error": entry["extra_info"]["error"]}
            found.append(row)
    return found


def table(found: list[Row], surroundings: Row) -> str:
    """A Markdown table; error is relative to the best possible of that rank."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in surroundings.items()),
        "",
        "| case | peer | ours, ms | peer, ms | peer / ours | peer / ours, alternating | error ours / peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        paired = row["alternating"]
        cells = [
            row["case"],
            row["peer"],
            f"{row['ours_ms']:.2f}",
            f"{row['peer_ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{paired['median']:.2f} [{paired['low']:.2f}, {paired['high']:.2f}]" if paired else "",
            f"{row['ours_error']:.4f} / {row['peer_error']:.4f}" if "ours_error" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Print the table of one report and write ``results/ratios.md`` and ``results/ratios.json``."""
    if len(arguments) != 1:
        print("usage: python -m benchmarks.ratios FILE, a report of pytest --benchmark-json", file=sys.stderr)
        return 2
    report = json.loads(Path(arguments[0]).read_text())
    found, surroundings = rows(report), environment(report)
    if not found:
        print(f"{arguments[0]} holds no contender to compare with: run all of benchmarks/.", file=sys.stderr)
        return 1
    text = table(found, surroundings)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ratios.md").write_text(text)
    (RESULTS / "ratios.json").write_text(
        json.dumps({"environment": surroundings, "config": CONFIG, "rows": found}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
