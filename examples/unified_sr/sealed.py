"""What a trial on the validation split scores on the test split: one closed file, opened for the chosen trial alone.

A trial and the run at the chosen rate with the trial's seed are one training. So a trial evaluates both splits; nobody
sees the second half before the rate is chosen, neither who chooses nor who reads the folder, and what no rate was
chosen for is never seen.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from .config import differences
from .run_folder import CONFIG, RunFolder, whole
from .settings import Settings

SEALED = "test.sealed.tar.gz"


def seal(folder: RunFolder, write: Callable[[RunFolder], None]) -> None:
    """Put a run folder into a file of another one; the file is there as a whole or not at all.

    Args:
        folder: where the file goes.
        write: writes the run folder.
    """
    partial = folder.file(f"{SEALED}.partial")
    with tempfile.TemporaryDirectory() as scratch:
        write(RunFolder(scratch))
        with tarfile.open(partial, "w:gz") as archive:
            for path in sorted(Path(scratch).iterdir()):
                archive.add(path, path.name)
    partial.replace(folder.file(SEALED))


def holds(folder: RunFolder, settings: Settings) -> bool:
    """Tell whether a folder has the closed results of a run with these very settings."""
    file = folder.file(SEALED)
    if not file.is_file():
        return False
    with tarfile.open(file) as archive:
        config = archive.extractfile(CONFIG)
        assert config is not None
        return not differences(yaml.safe_load(io.TextIOWrapper(config, encoding="utf-8")), settings)


def unseal(folder: RunFolder, out: Path) -> None:
    """Write the closed results of a folder to another one: that of a finished run."""
    with whole(out) as partial, tarfile.open(folder.file(SEALED)) as archive:
        archive.extractall(partial, filter="data")
