from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsub._optional import optional
from gradsub.null_space._covariance import Covariance
from gradsub.null_space._directions import Directions
from gradsub.null_space._fitted_on import FittedOn, belongs
from gradsub.null_space._scratch import Scratch
from gradsub.null_space._shared import SharedStatistics
from gradsub.null_space._sketch import Sketch
from gradsub.null_space._statistics import Statistics

FORMAT = "gradsub.NullSpace"
Kind = Covariance | Sketch | Directions
KINDS: dict[str, type[Kind]] = {each.kind: each for each in (Covariance, Sketch, Directions)}


class DamagedError(ValueError):
    """What is wrong with a file, without its name."""


def check_writable(scratch: Scratch) -> Path:
    """Raise an error if `write` could not make its file, before the hours in which its content is collected.

    Raises:
        OSError: there is no folder for it, or nothing can be put there.
        ImportError: safetensors is not installed.
    """
    _safetensors()
    return scratch.folder


def write(
    path: str | os.PathLike[str], settings: dict[str, Any], shared: SharedStatistics, fitted_on: FittedOn
) -> None:
    """Every distinct accumulator once, as a tensor with its numbers in the header, and which layer holds which.

    The file is written beside ``path`` and renamed, so that whatever interrupts it leaves the earlier file whole.
    """
    distinct = shared.distinct()
    keys = {id(statistics): key for key, statistics in distinct.items()}
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(settings),
        "statistics": json.dumps({key: statistics.state() for key, statistics in distinct.items()}),
        "layers": json.dumps({name: keys[id(statistics)] for name, statistics in shared.by_name.items()}),
        "versions": json.dumps(shared.versions),
        "normalized": json.dumps(
            {name: shared.normalized[name] for name in shared.by_name if name in shared.normalized}
        ),
    }
    files = _safetensors()
    target = Path(os.path.realpath(path))  # a link stays one
    with Scratch(target) as scratch:
        # One after the other: whole matrices are made of what is kept, and all of them would take as much again.
        tensors = {key: _stored(statistics, scratch) for key, statistics in distinct.items()}
        tensors.update(fitted_on.tensors(shared.by_name))
        written = scratch.folder / target.name
        try:
            files.torch.save_file(tensors, str(written), metadata)
        except files.SafetensorError as error:  # also where the disk is full
            raise OSError(f"path={os.fspath(path)!r} cannot be written ({error}): make room there") from error
        with written.open("rb+") as file:
            os.fsync(file.fileno())  # or a crash of the machine could leave the new name without the content
        written.replace(target)


def _stored(statistics: Statistics, scratch: Scratch) -> Tensor:
    kept = statistics.stored if isinstance(statistics, Directions) else None
    return scratch.put(statistics.tensor) if kept is None else kept


def read(path: str | os.PathLike[str], device: torch.device | str) -> tuple[dict[str, Any], SharedStatistics, FittedOn]:
    """What `write` was given.

    Raises:
        DamagedError: the file is not what `write` makes, or its statistics are none of real features.
    """
    files = _safetensors()
    try:
        with files.safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            return _read(file)
    except files.SafetensorError as error:
        raise DamagedError(f"is empty, truncated or no safetensors file ({error})") from error


def _read(file: Any) -> tuple[dict[str, Any], SharedStatistics, FittedOn]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise DamagedError("is no file of NullSpace.save")
    states = _mapping(metadata, "statistics")
    for state in states.values():
        _check_kind(state)  # first: a newer version's file may differ in all the rest
    settings, layers, versions = (_mapping(metadata, part) for part in ("settings", "layers", "versions"))
    keys = {key for key in file.keys() if not belongs(key)}  # noqa: SIM118
    if keys != set(states):
        different = sorted(keys ^ set(states))
        raise DamagedError(f"has statistics without their numbers, or the other way round: {different[:4]}")
    if set(layers.values()) != set(states) or set(versions) != set(layers):
        raise DamagedError(f"does not say which layers hold which statistics: {sorted(layers)[:4]}")
    shared = SharedStatistics()
    distinct = {key: _restored(key, state, file.get_tensor(key)) for key, state in states.items()}
    shared.by_name = {name: distinct[key] for name, key in layers.items()}
    if "normalized" in metadata:  # versions before 0.2 did not write it
        normalized = _mapping(metadata, "normalized")
        if not normalized.keys() <= layers.keys() or not all(type(was) is bool for was in normalized.values()):
            raise DamagedError(f"does not say of which layers features were normalized: {normalized!r}")
        shared.normalized = normalized
    shared.versions = {name: _whole_number(name, "version", version) for name, version in versions.items()}
    try:
        return settings, shared, FittedOn.of(file, layers)
    except ValueError as error:
        raise DamagedError(str(error)) from error


def _mapping(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata[part])
    except (KeyError, ValueError) as error:
        raise DamagedError(f"lacks its {part} in the header") from error
    if not isinstance(found, dict) or (part == "layers" and not all(isinstance(key, str) for key in found.values())):
        raise DamagedError(f"has no table of {part} in the header")
    return found


def _check_kind(state: Any) -> None:
    kind = state.get("kind") if isinstance(state, dict) else None
    if kind not in KINDS:
        raise DamagedError(
            f"holds statistics of kind {kind!r}, this version knows {sorted(KINDS)}: load it with the version that "
            "saved it"
        )


def _restored(name: str, state: dict[str, Any], tensor: Tensor) -> Kind:
    _whole_number(name, "count", state.get("count"))
    if tensor.dtype not in (torch.float32, torch.float64) or tensor.ndim != 2 or tensor.shape[1] == 0:
        raise DamagedError(
            f"has statistics of shape {tuple(tensor.shape)} and {tensor.dtype} for {name!r}: they are matrices of "
            "float64 or float32"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise DamagedError(f"has NaN or Inf in the statistics of {name!r}")
    try:
        return KINDS[state["kind"]].restore(tensor, state)
    except ValueError as error:
        raise DamagedError(f"has impossible statistics for {name!r}: {error}") from error


def _whole_number(name: str, what: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise DamagedError(f"has the {what} {value!r} for {name!r}: it is a whole number")
    return value


def _safetensors() -> Any:
    what = "saving and loading a NullSpace"
    optional("safetensors.torch", "safetensors", what)  # an attribute of the package from then on
    return optional("safetensors", "safetensors", what)
