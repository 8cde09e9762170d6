"""The command line: ``python -m examples.unified_sr run ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .config import resolve
from .methods import METHODS
from .report import result_table
from .run import describe_result, run
from .settings import Settings

DESCRIPTION = "Search and recommendation as one conditional generation task of one language model."


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m examples.unified_sr", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "run",
        help="train and evaluate one method",
        description="Train and evaluate one method. Later sources win: --config, --set, the other options.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--config", metavar="FILE.yaml", help="settings; see configs/")
    command.add_argument("--data", metavar="NAME_OR_DIR", help="movielens-100k, or a folder with RecBole atomic files")
    command.add_argument("--model", metavar="NAME_OR_PATH", help="smollm2-135m, a hub name, or a local folder")
    command.add_argument("--method", help=", ".join(METHODS))
    command.add_argument("--steps", type=int, help="optimizer steps")
    command.add_argument("--seed", type=int)
    command.add_argument("--general-text", metavar="FILE", help="general-domain English; Python's own without it")
    command.add_argument("--out", metavar="RUN_DIR", help="default: runs/DATA/MODEL/METHOD/seed-SEED")
    command.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], dest="pairs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, or 2 after an error that the user can mend, which is printed without a traceback.
    """
    options = build_parser().parse_args(arguments)
    flags = {key: getattr(options, key) for key in ("data", "model", "method", "steps", "seed", "general_text")}
    try:
        settings = resolve(file=options.config, pairs=options.pairs, flags=flags)
        folder = run(settings, options.out or default_folder(settings))
    except (FloatingPointError, OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{result_table(folder)}\n\n{describe_result(folder)}")
    return 0


def default_folder(settings: Settings) -> Path:
    """Return where a run goes without ``--out``."""
    data, model = Path(settings.data).name, Path(settings.model).name
    return Path("runs") / data / model / settings.method / f"seed-{settings.seed}"


def _epilog() -> str:
    shared = {item.name for item in fields(Settings)}
    lines = ["settings for --set and --config (default):", ""]
    lines += [f"  {item.name} ({item.default}): {item.metadata['doc']}" for item in fields(Settings)]
    for method in METHODS.values():
        own = [item for item in fields(method.settings) if item.name not in shared]
        lines += [
            "",
            f"{method.name}: {method.summary}",
            *(f"  {x.name} ({x.default}): {x.metadata['doc']}" for x in own),
        ]
    return "\n".join(lines).replace("%", "%%")
