"""``python -m benchmarks.rate learn --data DATA --out FILE``, then ``python -m benchmarks.rate report FILES``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    """Train and measure, or write ``results/rate.md`` from what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rate", description=__doc__)
    parts = parser.add_subparsers(required=True, dest="what")
    learn = parts.add_parser("learn", help="short trainings on one data set; a line of JSON a run is added to --out")
    learn.add_argument("--data", default="movielens-100k", help="a data set's name, or its folder")
    learn.add_argument("--text", help="a file of general text (default: what Python brings along)")
    learn.add_argument("--null-space", type=Path, required=True, help="its file, which is written if there is none")
    learn.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    learn.add_argument("--tokens", type=int, default=8192, help="of general text for the null space")
    learn.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4])
    learn.add_argument("--methods", nargs="+", help="some of them (default: all)")
    learn.add_argument("--steps", type=int, default=20)
    learn.add_argument("--batch-size", type=int, default=8, help="examples of each task and step")
    learn.add_argument("--measured", type=int, default=3, help="steps at the lowest rate whose sizes are measured")
    learn.add_argument("--threads", type=int, default=2)
    report = parts.add_parser("report", help="the table of one or more such files")
    report.add_argument("files", type=Path, nargs="+")
    chosen = parser.parse_args(arguments)
    if chosen.what == "report":
        from .report import table

        print(table(chosen.files))
        return 0
    from .learn import METHODS
    from .learn import learn as run
    from .world import World

    torch.set_num_threads(chosen.threads)
    world = World(chosen.data, chosen.text, chosen.batch_size)
    null_space = world.null_space(chosen.tokens, chosen.null_space)
    methods = list(METHODS if chosen.methods is None else chosen.methods)
    run(world, null_space, methods, chosen.rates, chosen.steps, chosen.measured, chosen.out)
    return 0
