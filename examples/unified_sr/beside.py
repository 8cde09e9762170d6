"""Several methods on the same data, steps and batches, and one table of them: what ``make demo`` is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from .config import read_config
from .processes import current
from .report import comparison_table, result_table
from .run import run
from .run_folder import CONFIG, RunFolder
from .settings import Settings

TABLE = "beside.md"
"""The file of the table, in the folder of the first method."""


def run_beside(
    settings: Settings,
    others: Mapping[str, tuple[Settings, str]],
    out: str | Path,
    say: Callable[[str], None] = print,
) -> RunFolder:
    """Carry out a run, and those that it is compared with in folders inside of its own.

    What is finished is not run again, and the intact model is measured once.

    Args:
        settings: of the run.
        others: of `examples.unified_sr.config.beside`: name -> settings, and a sentence for the table.
        out: the folder of the run; another method's is the folder of its name in it.
        say: prints a line to the user.
    """
    names = list(others)
    if names:
        say(f"1 of {1 + len(names)}: {settings.method.name}")
    folder = run(settings, out, say, further=names)
    for position, (name, (own, _)) in enumerate(others.items(), start=1):
        say(f"{1 + position} of {1 + len(names)}: {name}, with the same data, steps and batches")
        run(own, Path(out) / name, say, zero_shot=out, further=names[position:])
    if current().first and others:
        RunFolder(out).file(TABLE).write_text(summary(RunFolder(out), others) + "\n", encoding="utf-8")
    return folder


def summary(folder: RunFolder, others: Mapping[str, tuple[Settings, str]]) -> str:
    """The table of a finished run and of those beside it, with a sentence about each of these."""
    if not others:
        return result_table(folder)
    beside = [RunFolder(folder.path / name) for name in others]
    notes = [f"{name}: lr {own.training.lr:g}, {text}" for name, (own, text) in others.items()]
    own = read_config(folder.file(CONFIG))
    notes.append(f"{own['method.name']}: lr {own['training.lr']:g}")
    return "\n".join([comparison_table([*beside, folder]), "", *notes])
