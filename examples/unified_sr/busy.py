"""Whether other work keeps this machine busy, which is said where a run would seem to hang."""

from __future__ import annotations

import os

import torch


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def busy_notice(own: float = 0.0) -> str | None:
    """A sentence if more is running here than there are cores; None where there is not, or nobody can tell.

    Args:
        own: how many of what is running belong to this process: none before it has computed for a minute.
    """
    if not hasattr(os, "getloadavg"):
        return None
    load, available = os.getloadavg()[0], cores()
    if load - own <= available:
        return None
    return (
        f"this machine is busy: {load:.1f} processes or threads want to run on {available} cores (load average of the "
        "last minute), so expect this to take longer than elsewhere"
    )


def own_load() -> float:
    """What a process that computes without pause adds to the load average."""
    return float(torch.get_num_threads())
