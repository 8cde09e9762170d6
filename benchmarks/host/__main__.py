"""``python -m benchmarks.host`` measures, prints the report and writes ``host.json`` and ``host.md``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..training.environment import describe_environment
from .measure import measure
from .report import render

HERE = Path(__file__).parent


def main(arguments: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--note", default="", help="what a reader has to know, such as other work on the machine")
    chosen = parser.parse_args(arguments)
    config = json.loads(chosen.config.read_text(encoding="utf-8"))
    environment = {**describe_environment(), "threads": config["threads"]}
    result = {"environment": environment, "note": chosen.note, "config": config, **measure(config)}
    text = render(result)
    print(text)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "host.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (chosen.out / "host.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
