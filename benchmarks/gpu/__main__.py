"""``python -m benchmarks.gpu`` measures on this machine's GPU, reports and appends the run to ``runs.json``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..training.environment import describe_environment
from .measure import measure
from .report import render, render_all

HERE = Path(__file__).parent


def main(arguments: Sequence[str]) -> int:
    """Measure and write; every finished group is on disk at once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a miniature on the CPU: whether it runs, no numbers")
    parser.add_argument("--config", type=Path, help="another config.json")
    parser.add_argument("--out", type=Path, help="folder of runs.json and runs.md (default: results; for --smoke none)")
    parser.add_argument("--note", default="", help="what a reader has to know")
    parser.add_argument("--revision", help="what is measured, where the project lies without its git history")
    parser.add_argument("--report", action="store_true", help="only write runs.md again from runs.json")
    chosen = parser.parse_args(arguments)
    out = chosen.out or (None if chosen.smoke else HERE / "results")
    if chosen.report:
        if out is None:
            parser.error("--report needs --out where --smoke is given: there are no results of it")
        print(_write(out, _read(out)))
        return 0
    if not chosen.smoke and not torch.cuda.is_available():
        print(
            "There is no CUDA device here, and this benchmark measures one. `--smoke` runs a miniature on the CPU; "
            "`python -m benchmarks.host` counts what a step costs the host, for which no GPU is needed.",
            file=sys.stderr,
        )
        return 2
    device = "cpu" if chosen.smoke else "cuda"
    config = json.loads((chosen.config or HERE / ("smoke.json" if chosen.smoke else "config.json")).read_text("utf-8"))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    environment = _environment(device)
    environment["revision"] = chosen.revision or environment["revision"]
    run = {"environment": environment, "note": chosen.note, "config": config, "records": []}
    earlier = _read(out) if out is not None else []
    for records in measure(config, device, lambda text: print(text, file=sys.stderr, flush=True)):
        run["records"] += records
        if out is not None:
            _write(out, [*earlier, run])
    print(render(run))
    return 0


def _environment(device: str) -> dict[str, Any]:
    found = describe_environment()
    if device == "cpu":
        return {**found, "accelerator": "no GPU"}
    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "accelerator": properties.name,
        "accelerator_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _read(out: Path) -> list[dict[str, Any]]:
    path = out / "runs.json"
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def _write(out: Path, runs: list[dict[str, Any]]) -> str:
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / "runs.json.unfinished"
    unfinished.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, out / "runs.json")
    text = render_all(runs)
    (out / "runs.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
