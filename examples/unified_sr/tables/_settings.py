"""What the tables know of a run's settings: the only place that reads them by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..checking import completed
from ..settings import EVALUATION


def setting_columns(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are columns of their own, and all of them as JSON text.

    Those that are newer than the run have their default, so that runs before and after can be told apart by the rest.
    """
    settings = completed(settings)
    return {
        "data": PurePath(settings["data.source"]).name,
        "model": PurePath(settings["model.name"]).name,
        "method": settings["method.name"],
        "split": settings.get("evaluation.split", "test"),  # of a method that is not known any more
        "seed": settings["seed"],
        "lr": settings["training.lr"],
        "item_lr": settings["training.item_lr"],
        "format": settings.get("model.format", "prompt"),
        "batch_size": settings["training.batch_size"],
        "negatives": settings["evaluation.negatives"],
        "settings": _text(shortened(settings)),
    }


def shortened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the folders of one machine: of an absolute path its last two parts.

    Example:
        >>> shortened({"general_text": "/home/somebody/wikitext2/valid.txt", "seed": 0})
        {'general_text': 'wikitext2/valid.txt', 'seed': 0}
    """
    return {
        key: "/".join(PurePath(value).parts[-2:]) if isinstance(value, str) and PurePath(value).is_absolute() else value
        for key, value in settings.items()
    }


def identity(columns: Mapping[str, Any]) -> str:
    """Return the name of a run: one of the same label and settings has the same one, and no other has it."""
    digest = hashlib.sha256(f"{columns['label']} {columns['settings']}".encode()).hexdigest()[:8]
    last = f"lr-{columns['lr']:g}" if columns["split"] == "valid" else f"seed-{columns['seed']}"
    return "/".join((columns["data"], columns["label"], last, digest))


def label_of(path: PurePath, settings: Mapping[str, Any]) -> str:
    """Return what a run is called: METHOD of a grid's METHOD/seed-SEED and METHOD/lr-RATE, otherwise the method."""
    in_grid = path.name in (f"seed-{settings['seed']}", f"lr-{settings['training.lr']:g}")
    return path.parent.name if in_grid else str(settings["method.name"])


def without(text: str, keys: Sequence[str] = ("seed",)) -> str:
    """Return the settings' JSON text without what may differ between the runs of one row of a table."""
    return _text({key: value for key, value in json.loads(text).items() if key not in keys})


def evaluated_differently(texts: Mapping[str, str]) -> str | None:
    """Return what keeps runs from being compared, if anything does.

    Args:
        texts: run -> its settings as JSON text.
    """
    settings = {run: json.loads(text) for run, text in texts.items()}
    sections = tuple(f"{section}." for section in EVALUATION)
    keys = dict.fromkeys(key for found in settings.values() for key in found if key.startswith(sections))
    for key in [key for key in keys if key != "data.source"]:  # which may lie elsewhere on another machine
        values = {found.get(key): run for run, found in settings.items()}
        if len(values) > 1:
            return ", ".join(f"{key}={value!r} in {run}" for value, run in values.items())
    return None


def difference(texts: Sequence[str], but: Sequence[str] = ("seed",), *, absent: bool = False) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all texts that have them: name -> one value a text, or ``None``.

    Args:
        texts: settings as JSON text.
        but: settings that are left out.
        absent: whether one is returned as well that some have and others have not.
    """
    settings = [json.loads(text) for text in texts]
    names = dict.fromkeys(name for found in settings for name in found if name not in but)
    varied = [
        name
        for name in names
        if len({_text(found[name]) for found in settings if name in found}) > 1
        or (absent and not all(name in found for found in settings))
    ]
    return {name: [found.get(name) for found in settings] for name in varied}


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False)
