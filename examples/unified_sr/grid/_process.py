"""One run in a process of its own: its memory is its own, and what kills it does not kill the grid."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..settings import Settings
from ._jobs import DIVERGED

TICK = 0.5
"""Seconds between two looks at a running process."""

_PACKAGE = __name__.rsplit(".", 2)[0]


def execute(
    settings: Settings, folder: Path, log: Path, watch: Callable[[], object], zero_shot: Path | None = None
) -> str | None:
    """Carry out a run and wait for it.

    Args:
        settings: of the run.
        folder: of its results.
        log: gets what it prints.
        watch: is called now and then meanwhile.
        zero_shot: a finished run whose measurement of the intact model holds for this one too.

    Returns:
        Why it failed, or ``None``.
    """
    # A server that has imported everything and computed nothing is forked for each run: without the imports' seconds,
    # and without the threads that make forking this process unsafe. Windows knows only fresh processes.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([f"{_PACKAGE}.grid", "transformers.modeling_utils", "matplotlib.figure"])
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_run, args=(settings, str(folder), str(log), zero_shot), daemon=True)
    process.start()
    try:
        while process.is_alive():
            process.join(TICK)
            watch()
    finally:
        process.terminate()
        process.join()
    if process.exitcode == 0:
        return None
    if process.exitcode is not None and process.exitcode < 0:
        number = -process.exitcode
        killed = f"the process was ended by the signal {number} ({signal.strsignal(number)})"
        return killed + ("; the machine may have run out of memory" if number == signal.SIGKILL else "")
    return _last_line(log)


def _run(settings: Settings, folder: str, log: str, zero_shot: Path | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        from ..run import run

        run(settings, folder, zero_shot=zero_shot)
    except FloatingPointError as error:
        Path(folder, DIVERGED).write_text(f"{error}\n", encoding="utf-8")
        _fail(error)
    except Exception as error:
        traceback.print_exc()
        _fail(error)


def _fail(error: Exception) -> None:
    sys.stdout.flush()
    print(f"\n{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(1)


def _end_with_parent() -> None:
    # A grid that was killed and started again would otherwise find the run still writing into its folder.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
