"""What an installation gives: light import, complete metadata, a wheel with the package and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

import gradsub

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distribution_of(requirement: str) -> str:
    """The normalised name in a requirement: 'PyYAML>=6' -> 'pyyaml'."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_import_brings_nothing_beyond_torch_numpy_and_the_standard_library() -> None:
    code = (
        "import sys, json, torch; before = set(sys.modules); import gradsub;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    brought = set(json.loads(output.splitlines()[-1]))
    # Namespace hooks of editable installs are no import of gradsub's.
    brought = {name for name in brought if not name.startswith("__editable__")}
    assert "gradsub" in brought
    assert brought - {"gradsub", "torch", "numpy"} - set(sys.stdlib_module_names) == set()


def test_every_public_name_exists() -> None:
    assert gradsub.__all__
    assert len(gradsub.__all__) == len(set(gradsub.__all__))
    for name in gradsub.__all__:
        assert getattr(gradsub, name) is not None
    assert {"GemsOptimizer", "NullSpace"} <= set(gradsub.__all__)


def test_version_is_the_installed_distributions() -> None:
    assert gradsub.__version__ == importlib.metadata.version("gradsub") == PROJECT["version"]


def test_package_is_typed() -> None:
    assert files("gradsub").joinpath("py.typed").is_file()


def test_core_needs_torch_numpy_and_scipy_alone() -> None:
    assert {distribution_of(requirement) for requirement in PROJECT["dependencies"]} == {"torch", "numpy", "scipy"}


def test_every_extra_is_present() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"examples", "benchmarks", "docs", "test", "dev"} <= set(extras)
    assert set(extras) == set(importlib.metadata.metadata("gradsub").get_all("Provides-Extra") or ())


def test_everything_installable_is_pinned() -> None:
    """An unpinned requirement would make `make test` depend on the day; an unpinned torch on gigabytes of CUDA."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {distribution_of(line) for line in lines if "==" in line}
    wanted = {
        distribution_of(requirement)
        for requirements in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
        for requirement in requirements
    }
    assert wanted - {"gradsub"} <= pinned


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    # Built from a copy: setuptools leaves build/ and *.egg-info in the folder that it builds.
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools of the dev extra")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("gradsub", "examples", "tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True)
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gradsub").rglob("*.py")}
    info = f"gradsub-{PROJECT['version']}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == sources | {"gradsub/py.typed"}
    assert f"{info}licenses/LICENSE" in names


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(f"gradsub-{PROJECT['version']}.dist-info/METADATA").decode()
    required = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist: " in line]
    core = {distribution_of(line) for line in required if "extra ==" not in line}
    assert core == {"torch", "numpy", "scipy"}
    assert "License-Expression: Apache-2.0" in metadata
