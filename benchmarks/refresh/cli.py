"""``python -m benchmarks.refresh collect FOLDER`` once, then ``python -m benchmarks.refresh judge FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    """Collect gradients, or judge the refreshes on collected ones and write ``results``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refresh", description=__doc__)
    parser.add_argument("what", choices=("collect", "judge"))
    parser.add_argument("folder", type=Path, help="where the gradients are (about 4 GB)")
    parser.add_argument("--steps", type=int, default=40, help="training steps to collect")
    parser.add_argument("--batch-size", type=int, default=24, help="examples a task and step")
    parser.add_argument("--rank", type=int, default=64, help="columns of the shared basis; a task's has half of it")
    parser.add_argument("--gap", type=int, default=10, help="steps between refreshes")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.what == "collect":
        from .collect import collect

        collect(chosen.folder, chosen.steps, chosen.batch_size)
        return 0
    from .judge import judge, table, write

    rows = judge(chosen.folder, chosen.rank, chosen.gap)
    text = table(rows, chosen.rank, chosen.gap)
    print(text)
    write(RESULTS, rows, text)
    return 0
