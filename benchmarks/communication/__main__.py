"""``python -m benchmarks.communication count`` measures and writes the result files; ``plan`` prints the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from ..training.config import CONFIGS
from . import plan
from .count import RANKS, count
from .formula import data_parallel_bytes, gems_bytes, sketch_bytes

RESULTS = Path(__file__).parent / "results"


def measure(rank: int, tasks: int, spec: dict[str, Any]) -> dict[str, Any]:
    """What was counted, beside what the formulas say."""
    found = count(spec, rank, tasks)
    shapes = found.pop("shapes")
    found["formula"] = {
        "data_parallel": data_parallel_bytes(shapes),
        "gems": gems_bytes(shapes, rank=rank, tasks=tasks),
        "sketches": sketch_bytes(shapes, rank=rank, tasks=tasks),
    }
    return {"rank": rank, "tasks": tasks, **found}


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """The counts in Markdown."""
    lines = [
        f"Bytes that one of {RANKS} ranks handed to the all-reduce in a step, two tasks, float32, all linear layers "
        "trained. An ordinary step, one that sketches every layer (two in every `update_proj_gap` steps), and DDP.",
        "",
        "The null space protects 55 to 77 % of the directions. Nothing of it is sent: each rank has read it.",
        "",
        "| model | rank | DDP (MB) | GEMS (MB) | of DDP | with sketches (MB) | of DDP |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, found in results.items():
        for each in found:
            for kind, told in (("gems", ""), ("gems_null", ", null space")):
                ddp, sketching, ordinary = each["data_parallel"], each[kind][1], each[kind][-1]
                lines.append(
                    f"| {model}{told} | {each['rank']} | {ddp / 1e6:.1f} | {ordinary / 1e6:.1f} | {ordinary / ddp:.2f} "
                    f"| {sketching / 1e6:.1f} | {sketching / ddp:.2f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("count", "plan"))
    if parser.parse_args().command == "plan":
        print(plan.table())
        return
    models = yaml.safe_load((CONFIGS / "full.yaml").read_text(encoding="utf-8"))["models"]
    results = {name: [measure(rank, 2, spec) for rank in (32, 64, 128)] for name, spec in models.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "communication.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "communication.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
