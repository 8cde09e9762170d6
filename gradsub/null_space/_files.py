from __future__ import annotations

import json
import os
from typing import Any

import torch

from gradsub.null_space._covariance import Covariance
from gradsub.null_space._shared import SharedStatistics
from gradsub.null_space._sketch import Sketch

FORMAT = "gradsub.NullSpace"
KINDS: dict[str, type[Covariance] | type[Sketch]] = {Covariance.kind: Covariance, Sketch.kind: Sketch}


def write(path: str | os.PathLike[str], settings: dict[str, Any], shared: SharedStatistics) -> None:
    """Every distinct accumulator once, as a tensor with its numbers in the header, and which layer holds which."""
    distinct = shared.distinct()
    keys = {id(statistics): key for key, statistics in distinct.items()}
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(settings),
        "statistics": json.dumps({key: statistics.state() for key, statistics in distinct.items()}),
        "layers": json.dumps({name: keys[id(statistics)] for name, statistics in shared.by_name.items()}),
        "versions": json.dumps(shared.versions),
    }
    tensors = {key: statistics.tensor.contiguous() for key, statistics in distinct.items()}
    _safetensors().save_file(tensors, os.fspath(path), metadata)


def read(path: str | os.PathLike[str], device: torch.device | str) -> tuple[dict[str, Any], SharedStatistics]:
    """The settings and the statistics that `write` was given."""
    shared = SharedStatistics()
    with _safetensors().safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"path={os.fspath(path)!r} is no file of NullSpace.save")
        distinct: dict[str, Covariance | Sketch] = {}
        for key, state in json.loads(metadata["statistics"]).items():
            if state["kind"] not in KINDS:
                raise ValueError(
                    f"path={os.fspath(path)!r} holds statistics of kind {state['kind']!r}, this version knows "
                    f"{sorted(KINDS)}: load it with the version that saved it"
                )
            distinct[key] = KINDS[state["kind"]].restore(file.get_tensor(key), state)
        shared.by_name = {name: distinct[key] for name, key in json.loads(metadata["layers"]).items()}
        shared.versions = json.loads(metadata["versions"])
    return json.loads(metadata["settings"]), shared


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading a NullSpace needs safetensors: pip install 'gradsub[safetensors]'"
        ) from error

    class Files:
        save_file = staticmethod(safetensors.torch.save_file)
        safe_open = staticmethod(safetensors.safe_open)

    return Files
