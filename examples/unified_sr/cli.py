"""The command line: ``python -m examples.unified_sr run|grid|bundle|pack|compare ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .beside import run_beside, summary
from .compare import compare
from .config import beside, resolve
from .grid import BUNDLE, GRACE, joining, read_grid, run_grid, write_bundle
from .interruption import UNFINISHED
from .methods import METHODS, defaults_of
from .processes import joined, launched
from .run import describe_result
from .settings import MethodSettings, Settings, known_settings
from .tables import pack

FLAGS = {
    "data": "data.source",
    "model": "model.name",
    "method": "method.name",
    "steps": "training.steps",
    "seed": "seed",
    "general-text": "evaluation.general_text",
}
"""Options of ``run`` that are short for settings."""

SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
"""An option that takes several values, and may stand several times."""

DESCRIPTION = "Search and recommendation as one conditional generation task of one language model."


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m examples.unified_sr", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands)
    _add_grid(commands)
    _add_bundle(commands)
    _add_pack(commands)
    _add_compare(commands)
    return parser


def _add_run(commands: Any) -> None:
    command = commands.add_parser(
        "run",
        help="train and evaluate one method",
        description="Train and evaluate one method. Later sources win: --config, --set, the other options.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--config", metavar="FILE.yaml", help="settings; see configs/")
    known = known_settings(MethodSettings)
    for flag, key in FLAGS.items():
        kind = known[key].annotation
        command.add_argument(
            f"--{flag}", dest=key, metavar=key, type=int if kind is int else str, help=known[key].description
        )
    command.add_argument("--out", metavar="RUN_DIR", help="default: runs/DATA/MODEL/METHOD/seed-SEED")
    command.add_argument("--set", metavar="KEY=VALUE", dest="pairs", **SEVERAL)
    command.set_defaults(carry_out=_run)


def _add_grid(commands: Any) -> None:
    command = commands.add_parser(
        "grid",
        help="train and evaluate many methods on many data sets and seeds",
        description="Carry out all runs of a grid that are not finished. Each goes to OUT/DATA/METHOD/seed-SEED; its "
        "learning rate is chosen on the validation split by trials in OUT/DATA/METHOD/lr-RATE.",
    )
    _add_grid_file(command)
    command.add_argument("--out", metavar="DIR", help="default: runs/ and the name of GRID.yaml")
    only = "run what matches, such as gems or 'movielens/*/seed-0', with its trials"
    command.add_argument("--only", metavar="PATTERN", help=only, **SEVERAL)
    command.add_argument("--dry-run", action="store_true", help="only say what would be run")
    command.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs side by side, which share the cores (default: 1)",
    )
    command.add_argument(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help="stop then: what runs writes a checkpoint and leaves, and the same command goes on",
    )
    command.add_argument(
        "--grace",
        type=float,
        default=GRACE,
        metavar="SECONDS",
        help=f"after the deadline, until what does not leave is ended (default: {GRACE:g})",
    )
    command.set_defaults(carry_out=_grid)


def _add_bundle(commands: Any) -> None:
    command = commands.add_parser(
        "bundle",
        help="pack a grid for a machine without a network",
        description="Write one archive with the code, models, data and texts of a grid, and its file with paths in the "
        f"archive. There: tar xf FILE; python -m examples.unified_sr grid --config {BUNDLE}/grid.yaml.",
    )
    _add_grid_file(command)
    command.add_argument("--out", metavar="FILE.tar[.gz|.xz]", required=True)
    packages = "installed packages that are missing there, for the same Python and platform"
    command.add_argument("--package", metavar="NAME", help=packages, **SEVERAL)
    command.add_argument(
        "--part-bytes", type=int, metavar="N", help="cut the archive into FILE.000, FILE.001 ... of at most N bytes"
    )
    command.set_defaults(carry_out=_bundle)


def _add_grid_file(command: argparse.ArgumentParser) -> None:
    config, data = "what to run; see configs/grids/main.yaml", "add a data set, or say where one lies"
    command.add_argument("--config", metavar="GRID.yaml", required=True, help=config)
    command.add_argument("--data", metavar="NAME=SOURCE", action="append", default=[], help=data)
    command.add_argument("--set", metavar="KEY=VALUE", dest="pairs", help="for all runs", **SEVERAL)


def _add_pack(commands: Any) -> None:
    command = commands.add_parser(
        "pack",
        help="finished runs as three Parquet files",
        description="Add finished runs to runs.parquet, steps.parquet and queries.parquet; a run of the same label, "
        "settings and seed is replaced. results/SCHEMA.md describes the columns.",
    )
    command.add_argument("runs", metavar="DIR", nargs="+", help="folders of runs, of a grid, or of packed runs")
    command.add_argument("--out", metavar="DIR", required=True, help="the folder of the three files")
    command.set_defaults(carry_out=_pack)


def _add_compare(commands: Any) -> None:
    command = commands.add_parser(
        "compare",
        help="tables, tests and plots of finished runs",
        description="Compare finished runs: mean and deviation over seeds, paired tests against the best baselines of "
        "each task, quality against retention. Writes comparison.md, .tex, summary.json and a plot a data set.",
    )
    command.add_argument("runs", metavar="DIR", nargs="+", help="folders of runs, of a grid, or of packed runs")
    command.add_argument("--out", metavar="DIR", help="default: DIR/compare of the first one")
    command.add_argument(
        "--baseline", metavar="METHOD", help="what to test against; default: the best ones that are no GEMS"
    )
    command.add_argument("--metric", default="ndcg@10", help="that is tested and drawn (default: ndcg@10)")
    command.add_argument(
        "--draw",
        metavar="METHOD",
        **SEVERAL,
        help="the methods in the plots, at most eight; default: the best of GEMS at any perplexity and within 2 %%, "
        "the best of four other methods, and for each task the best without a language model",
    )
    command.set_defaults(carry_out=_compare)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 if some runs of a grid failed; 2 after an error that the user can mend, which is printed without a
        traceback; 75 if a deadline left some runs of a grid unfinished and none failed; 130 if it was interrupted.
    """
    options = build_parser().parse_args(arguments)
    try:
        return int(options.carry_out(options))
    except (FloatingPointError, OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    flags = {key: getattr(options, key) for key in FLAGS.values()}
    settings = resolve(file=options.config, pairs=options.pairs, flags=flags)
    others = beside(options.config, pairs=options.pairs, flags=flags)
    with joined() as processes:
        folder = run_beside(settings, others, options.out or default_folder(settings))
        if processes.first:
            print(f"\n{summary(folder, others)}\n\n{describe_result(folder)}")
    return 0


def _grid(options: argparse.Namespace) -> int:
    if launched():
        raise ValueError("grid runs on one process: start it without a launcher, or each run by torchrun")
    grid = read_grid(options.config, data=options.data, pairs=options.pairs)
    out = Path(options.out or Path("runs") / Path(options.config).stem)
    outcome = run_grid(
        grid,
        out,
        only=options.only,
        dry_run=options.dry_run,
        parallel=options.jobs,
        deadline=options.deadline,
        grace=options.grace,
    )
    for name, reason in outcome.failed.items():
        print(f"failed: {name}: {reason} (see {out / name}.log)", file=sys.stderr)
    for name, state in outcome.left.items():
        print(f"left: {name}: {state}", file=sys.stderr)
    if not options.dry_run:
        left = f", {len(outcome.left)} left" if outcome.left else ""
        print(f"{len(outcome.done)} runs finished, {len(outcome.failed)} failed{left}; results in {out}")
    if outcome.left:
        why = "interrupted" if outcome.interrupted else "not finished"
        print(f"{why}; the same command goes on from the last checkpoints", file=sys.stderr)
    if outcome.interrupted:
        return 130
    return 1 if outcome.failed else UNFINISHED if outcome.left else 0


def _bundle(options: argparse.Namespace) -> int:
    parts = write_bundle(
        options.config,
        options.out,
        data=options.data,
        pairs=options.pairs,
        packages=options.package,
        part_bytes=options.part_bytes,
    )
    for part in parts:
        print(f"{part}: {part.stat().st_size:,} bytes")
    whole = Path(options.out).name
    unpack = f"tar xf {whole}" if len(parts) == 1 else f"{joining(parts)} && tar xf {whole}"
    print(f"there: {unpack} && python -m examples.unified_sr grid --config {BUNDLE}/grid.yaml --out runs/NAME")
    return 0


def _pack(options: argparse.Namespace) -> int:
    pack(options.runs, options.out)
    return 0


def _compare(options: argparse.Namespace) -> int:
    file = compare(
        options.runs,
        options.out or Path(options.runs[0]) / "compare",
        baseline=options.baseline,
        metric=options.metric,
        drawn=options.draw,
    )
    print(f"{file.read_text(encoding='utf-8')}\nwritten to {file.parent}")
    return 0


def default_folder(settings: Settings) -> Path:
    """Return where a run goes without ``--out``."""
    data, model = Path(settings.data.source).name, Path(settings.model.name).name
    return Path("runs") / data / model / settings.method.name / f"seed-{settings.seed}"


def _epilog() -> str:
    listed = known_settings(MethodSettings)
    lines = ["settings for --set and --config (default):", ""]
    lines += [f"  {key} ({_shown(field.default)}): {field.description}" for key, field in listed.items()]
    for name, method in METHODS.items():
        defaults = defaults_of(method)
        own = {key: field for key, field in known_settings(method.settings).items() if key not in listed}
        lines += ["", f"{name}: {method.summary}"]
        lines += [
            f"  {key} ({_shown(defaults.get(key, field.default))}): {field.description}" for key, field in own.items()
        ]
        lines += [f"  {key} ({_shown(value)})" for key, value in defaults.items() if key not in own]
        if method.variant_of is None:
            variants = [other for other in METHODS.values() if other.settings is method.settings]
            listed = listed | (own if len(variants) > 1 else {})
    return "\n".join(lines).replace("%", "%%")


def _shown(value: object) -> str:
    return yaml.safe_dump(value).splitlines()[0]
