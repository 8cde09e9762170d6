"""Use gradsub where nothing but its core dependencies is installed: `make check-wheel` in an empty environment.

Everything of the core works, and each optional feature stops with an error that names the extra to install. In the
environment of the tests, `python tests/without_extras.py --hide` hides what an empty environment would lack.
"""

from __future__ import annotations

import importlib.metadata as metadata
import io
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

CORE = ("torch", "numpy", "scipy", "gradsub")


def hide(names: set[str]) -> None:
    """From now on these modules are not found, as if they were not installed."""
    find = PathFinder.find_spec

    def find_others(fullname: str, *arguments: Any) -> Any:
        return None if fullname.partition(".")[0] in names else find(fullname, *arguments)

    PathFinder.find_spec = find_others  # type: ignore[method-assign]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def beyond_the_core() -> set[str]:
    """The modules of all installed distributions but those that the core's own dependencies bring along."""
    todo, core = list(CORE), set[str]()
    while todo:
        name = normalised(todo.pop())
        if name in core:
            continue
        core.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # a dependency of another platform
            continue
        matches = (re.match(r"[A-Za-z0-9._-]+", line) for line in required if "extra ==" not in line)
        todo += [match[0] for match in matches if match]
    owners = metadata.packages_distributions()
    return {name for name, distributions in owners.items() if core.isdisjoint(map(normalised, distributions))}


def core_works() -> None:
    import torch

    from gradsub import GemsOptimizer, NullSpace, freeze_unprotected

    model = torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Tanh(), torch.nn.Linear(80, 80))
    null_space = NullSpace(energy=0.5).collect(model, [torch.randn(512, 80)])
    freeze_unprotected(model, null_space)
    for surgery in ("sum", "pcgrad", "cagrad", "mgda", "gradvac"):
        base = torch.optim.AdamW(model.parameters())
        optimizer = GemsOptimizer(base, tasks=("a", "b"), rank=4, model=model, null_space=null_space, surgery=surgery)
        for _ in range(2):
            for task in optimizer.tasks:
                with optimizer.task(task):
                    model(torch.randn(4, 80)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert str(optimizer.report())


def save_a_null_space() -> None:
    import torch

    from gradsub import NullSpace

    null_space = NullSpace()
    null_space.update("layer", torch.randn(8, 4))
    with tempfile.TemporaryDirectory() as folder:
        null_space.save(Path(folder) / "null_space.safetensors")


def load_a_null_space() -> None:
    from gradsub import NullSpace

    NullSpace.load(__file__)


def collect_by_command() -> None:
    from gradsub.null_space._command import main

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("words to read\n" * 1000)
        with redirect_stderr(io.StringIO()) as said:
            failed = main(["collect", "--model", folder, "--text", str(text), "--out", str(Path(folder) / "out")])
    if failed:  # a command says what is wrong and ends
        raise ImportError(said.getvalue())


def trained_once() -> Any:
    import torch

    from gradsub import GemsOptimizer

    model = torch.nn.Linear(80, 80)
    optimizer = GemsOptimizer(torch.optim.AdamW(model.parameters()), tasks=("a",), rank=4, model=model)
    with optimizer.task("a"):
        model(torch.randn(4, 80)).square().mean().backward()
    optimizer.step()
    return optimizer


def report_as_a_frame() -> None:
    trained_once().report().to_pandas()


def draw_a_report() -> None:
    from gradsub import plots

    history = plots.History()
    history.add(trained_once().report())
    plots.losses(history)


def train_with_the_trainer() -> None:
    from gradsub.integrations import GemsTrainerMixin

    assert GemsTrainerMixin


FEATURES: dict[Callable[[], None], str] = {
    save_a_null_space: "safetensors",
    load_a_null_space: "safetensors",
    collect_by_command: "examples",
    report_as_a_frame: "pandas",
    draw_a_report: "plots",
    train_with_the_trainer: "transformers",
}


def said_by(feature: Callable[[], None]) -> str:
    """The error for a package that is missing."""
    try:
        feature()
    except ImportError as error:
        return str(error)
    return "nothing, as if it were installed"


def main(arguments: list[str]) -> None:
    if "--hide" in arguments:
        hide(beyond_the_core())
    core_works()
    for feature, extra in FEATURES.items():
        found = said_by(feature)
        if f"gradsub[{extra}]" not in found:
            raise AssertionError(f"{feature.__name__} does not name its extra {extra}, it says: {found}")
    print(f"the core works alone, {len(FEATURES)} optional features name their extra")


if __name__ == "__main__":
    main(sys.argv[1:])
