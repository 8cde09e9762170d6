"""The command line: ``python -m benchmarks.training run | report | profile``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import CONFIGS, load
from .parts import PARTS, measure_here
from .profiling import profile_step
from .report import write_report
from .run import run

RESULTS = Path(__file__).parent / "results"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure every case that has no result file yet, then report")
    _add_config(command)
    command.add_argument("--out", type=Path, help="folder of the result files; default: results/NAME of the config")
    command.add_argument("--only", default="*", metavar="PATTERN", help="measure the cases whose name matches")
    command = commands.add_parser("report", help="table, targets and plots of a folder of results")
    command.add_argument("results", type=Path)
    command = commands.add_parser("profile", help="which operators and python functions a step spends its time in")
    _add_config(command)
    command.add_argument("--case", help="name of a case; default: the config's first")
    command.add_argument("--method", default="gems-fused")
    command.add_argument("--out", type=Path, help="folder of the text; default: results/NAME of the config")
    command = commands.add_parser("measure", help="one part of one case, in this process (what run starts)")
    command.add_argument("case")
    command.add_argument("part", choices=PARTS)
    command.add_argument("out", type=Path)
    _add_config(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 if a case failed; 2 after an error that the user can mend, which is printed without a traceback.
    """
    options = build_parser().parse_args(arguments)
    try:
        return {"run": _run, "report": _report, "profile": _profile, "measure": _measure}[options.command](options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    out = options.out or RESULTS / options.config.stem
    failed = run(options.config, out, options.rounds, options.only)
    if any(out.glob("*.json")):
        print(f"\n{write_report(out)}")
    if failed:
        print(f"error: {failed} failed; the same command measures them again", file=sys.stderr)
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> int:
    print(write_report(options.results))
    return 0


def _profile(options: argparse.Namespace) -> int:
    config = load(options.config, options.rounds)
    case = config.case(options.case) if options.case else config.cases[0]
    print(profile_step(config, case, options.method, options.out or RESULTS / options.config.stem))
    return 0


def _measure(options: argparse.Namespace) -> int:
    config = load(options.config, options.rounds)
    measured = measure_here(config, config.case(options.case), options.part)
    options.out.write_text(json.dumps(measured), encoding="utf-8")
    return 0


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, default=CONFIGS / "full.yaml", metavar="FILE.yaml")
    command.add_argument("--rounds", type=int, help="instead of the config's")
