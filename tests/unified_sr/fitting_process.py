"""A process that needs a null space; a module of its own, which imports little."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from examples.unified_sr.null_space_cache import fitted_once
from gradsub import NullSpace


def fit(cache: str, out: str, dying: bool) -> None:
    """Ask the cache for a null space, and leave in a folder what came of it."""
    os.environ["GRADSUB_CACHE"] = cache

    def make() -> NullSpace:
        Path(out, f"{os.getpid()}.fit").touch()
        if dying:
            os._exit(1)
        time.sleep(0.3)  # long enough for the others to come to the lock
        torch.manual_seed(os.getpid())
        return NullSpace(energy=0.5).collect(torch.nn.Sequential(torch.nn.Linear(4, 3)), [torch.randn(5, 4)])

    said: list[str] = []
    found = fitted_once("key", make, torch.device("cpu"), said.append)
    Path(out, f"{os.getpid()}.said").write_text("\n".join(said), encoding="utf-8")
    torch.save(found.basis("0"), Path(out, f"{os.getpid()}.pt"))
