"""One run in a process of its own: its memory is its own, and what kills it does not kill the grid."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from ..interruption import INTERRUPTION, UNFINISHED, Interrupted
from ..settings import Settings
from ..zero_shot import Shared
from ._jobs import DIVERGED

TICK = 0.5
"""Seconds between two looks at a running process."""

_PACKAGE = __name__.rsplit(".", 2)[0]


class Running:
    """A run in a process of its own, which begins at once.

    Args:
        settings: of the run.
        folder: of its results.
        log: gets what it prints.
        measured: where runs side by side keep what they measure of the intact model.
        sealing: whether a run on the validation split also leaves its evaluation on the test split.
        threads: that compute; ``None`` leaves the choice to torch.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        log: Path,
        *,
        measured: Shared | None = None,
        sealing: bool = False,
        threads: int | None = None,
    ) -> None:
        # A server that has imported everything and computed nothing is forked for each run: without the imports'
        # seconds, and without the threads that make forking this process unsafe. Windows knows only fresh processes.
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload([f"{_PACKAGE}.grid", "transformers.modeling_utils", "matplotlib.figure"])
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._told = False
        self._process = context.Process(
            target=_run,
            args=(dict(os.environ), settings, str(folder), str(log), measured, sealing, threads),
            daemon=True,
        )
        self._process.start()

    @property
    def sentinel(self) -> int:
        """What ``multiprocessing.connection.wait`` waits for."""
        return int(self._process.sentinel)

    @property
    def over(self) -> bool:
        """Whether the process has ended."""
        return not self._process.is_alive()

    def stop(self) -> None:
        """Ask it to write a checkpoint and leave."""
        self._told = True
        self._process.terminate()

    def kill(self) -> None:
        """End it at once; its last checkpoint remains."""
        self._told = True
        self._process.kill()
        self._process.join()

    @property
    def stopped(self) -> bool:
        """Whether it ended before its time because it was told to."""
        codes = (UNFINISHED, -signal.SIGTERM, -getattr(signal, "SIGKILL", signal.SIGTERM))
        return self._told and self.over and self._process.exitcode in codes

    @property
    def failure(self) -> str | None:
        """Why it failed, once it is over, or ``None``."""
        self._process.join()
        code = self._process.exitcode
        if code == 0:
            return None
        if code is not None and code < 0:
            killed = f"the process was ended by the signal {-code} ({signal.strsignal(-code)})"
            return killed + ("; the machine may have run out of memory" if -code == signal.SIGKILL else "")
        if code == UNFINISHED:
            return "the process was stopped by somebody else; the same command goes on from its checkpoint"
        return _last_line(self._log)


def execute(settings: Settings, folder: Path, log: Path) -> str | None:
    """Carry out a run, wait for it, and return why it failed, or ``None``; the arguments are those of ``Running``."""
    running = Running(settings, folder, log)
    try:
        while not running.over:
            multiprocessing.connection.wait([running.sentinel], TICK)
    finally:
        if not running.over:
            running.kill()
    return running.failure


def _run(
    environment: dict[str, str],
    settings: Settings,
    folder: str,
    log: str,
    measured: Shared | None,
    sealing: bool,
    threads: int | None,
) -> None:
    # The server's environment is that of the process in which it was started, at that time.
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        INTERRUPTION.listen()
        if threads is not None:
            # The server has loaded OpenMP already, which no longer reads the variable; others that start do.
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
        from ..run import run

        run(settings, folder, measured=measured, sealing=sealing)
    except Interrupted:
        print("\nstopped as asked; the same command goes on from the last checkpoint", flush=True)
        sys.exit(UNFINISHED)
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
