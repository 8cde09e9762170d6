"""Null spaces that were fitted before, so that the runs of a grid fit one for each model, text and criterion.

They lie in the folder ``null_spaces`` of ``$GRADSUB_CACHE``, or of ``gradsub`` in the user's folder for caches. An
empty ``GRADSUB_CACHE`` keeps none. A file may be deleted at any time: it is fitted again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsub import NullSpace

from .alone import alone
from .fingerprints import Fingerprint
from .processes import current

_VERSION = 1
"""To be raised when the same model, text and settings come to another null space."""


def folder() -> Path | None:
    """Where null spaces are kept, or None if they are not."""
    chosen = os.environ.get("GRADSUB_CACHE")
    if chosen is None:
        chosen = os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gradsub")
    return Path(chosen) / "null_spaces" if chosen else None


def fingerprint(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    *,
    without: Collection[nn.Parameter] = (),
) -> str:
    """What a null space depends on, as a name: the model's configuration and weights, every token and the settings.

    Args:
        model: is read, not its name, which another version may have.
        batches: the keyword arguments of its forward passes.
        settings: plain values.
        without: weights that no batch reads.
    """
    found = Fingerprint().add([_VERSION, dict(settings)]).add_model(model, without)
    for batch in batches:
        for key in sorted(batch):
            found.add_tensor(key, batch[key])
    return found.name


def fitted_once(key: str, fit: Callable[[], NullSpace], device: torch.device, say: Callable[[str], None]) -> NullSpace:
    """The null space of this name, from its file or else fitted and filed; on all processes the same.

    Runs side by side fit it once: one does, the others wait. One that was just fitted is read from its file too, so
    that all runs go on alike, bit for bit.

    Args:
        key: of `fingerprint`.
        fit: makes it, on all processes together.
        device: where it is put.
        say: prints a line to the user.
    """
    place, processes = folder(), current()
    if place is None:
        return fit()
    path = place / f"{key}.safetensors"

    def read() -> NullSpace | None:
        found = _load(path, device, say)
        return found if all(processes.gather(found is not None)) else None

    # Read without the lock where it is there: of several processes of one run only the first could hold it.
    with contextlib.ExitStack() as held:
        if processes.first and not path.is_file():
            held.enter_context(alone(place.parent / "locks" / f"{key}.lock", "null space", say))
        processes.wait()
        found = read()
        if found is not None:
            say(f"null space: as fitted before, {path}")
            return found
        null_space = fit()
        if processes.first:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                null_space.save(path, statistics=False)
            except OSError as error:
                say(f"null space: cannot be kept for other runs ({error})")
        processes.wait()
        found = read()
        return null_space if found is None else found


def _load(path: Path, device: torch.device, say: Callable[[str], None]) -> NullSpace | None:
    if not path.is_file():
        return None
    try:
        return NullSpace.load(path, device)
    except (OSError, ValueError) as error:
        say(f"null space: fitted again, because its file cannot be used ({error})")
        return None
