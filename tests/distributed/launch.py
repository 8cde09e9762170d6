"""Run a function on several ranks of a gloo group on this machine."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Ranks are forked from a server that has imported everything once: a fresh interpreter would take seconds each.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed.tensor", "gradsub", "tests.distributed.launch"])


def launch(work: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """What ``work(rank, *arguments)`` returns on every rank.

    Raises:
        AssertionError: with the traceback of the first rank that failed.
    """
    outcomes = try_launch(work, ranks, folder, *arguments, timeout=timeout)
    failed = {rank: outcome for rank, (kind, outcome) in enumerate(outcomes) if kind != "returned"}
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
    return [outcome for _, outcome in outcomes]


def try_launch(
    work: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, timeout: float = 120.0
) -> list[tuple[str, Any]]:
    """Of every rank ``("returned", value)``, ``("raised", traceback)`` or ``("died", exit code)``."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        _CONTEXT.Process(target=_run, args=(work, rank, ranks, folder, timeout, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout + 30)
        if process.is_alive():
            process.kill()
            process.join()
    outcomes: list[tuple[str, Any]] = []
    for rank, process in enumerate(processes):
        file = folder / f"outcome-{rank}"
        outcomes.append(pickle.loads(file.read_bytes()) if file.exists() else ("died", process.exitcode))
    return outcomes


def _run(
    work: Callable[..., Any], rank: int, ranks: int, folder: Path, timeout: float, arguments: tuple[Any, ...]
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        outcome = ("returned", work(rank, *arguments))
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    unfinished = folder / f"unfinished-{rank}"
    unfinished.write_bytes(pickle.dumps(outcome))
    unfinished.rename(folder / f"outcome-{rank}")
    if outcome[0] == "returned":
        dist.destroy_process_group()
    else:
        # Destroying a group whose other members still wait would wait as well.
        os._exit(1)
