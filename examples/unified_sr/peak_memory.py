"""How much memory this process has taken at most, and how much is free."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import psutil
import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure anew, where the system can: on Linux, and on a GPU."""
    with contextlib.suppress(OSError):
        _RESET.write_text("5", encoding="ascii")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Return the bytes that this process has taken at most, since the last reset where there was one.

    Returns:
        ``resident``: in main memory, all of the process: Python, torch, data and model.
        ``device``: of torch's tensors on the GPU; ``None`` on a CPU.
    """
    return {
        "resident": _peak_resident(),
        "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free where the model computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _peak_resident() -> int:
    # getrusage keeps the maximum of the whole life of a process, also over a reset: Linux' own counter comes first.
    if _STATUS.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii"))):
        return 1024 * int(found[1])
    if (on_windows := getattr(psutil.Process().memory_info(), "peak_wset", None)) is not None:
        return int(on_windows)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
