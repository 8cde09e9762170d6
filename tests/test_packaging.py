"""What an installation gives: light import, complete metadata, a wheel with the package and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
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
    assert {"examples", "benchmarks", "docs", "test", "release", "dev"} <= set(extras)
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


def test_without_extras_the_core_works_and_every_feature_names_its_extra() -> None:
    """The same program that `make check-wheel` runs in an empty environment."""
    command = [sys.executable, str(ROOT / "tests" / "without_extras.py"), "--hide"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "optional features name their extra" in result.stdout


def test_extras_that_errors_name_exist() -> None:
    named = {
        extra
        for path in (ROOT / "gradsub").rglob("*.py")
        for extra in re.findall(r"gradsub\[([a-z,-]+)\]", path.read_text(encoding="utf-8"))
    }
    assert named
    assert {part for extra in named for part in extra.split(",")} <= set(PROJECT["optional-dependencies"])


def test_everything_says_the_same_product() -> None:
    """One sentence: in the metadata, the citation, the package and on the site."""
    sentence = PROJECT["description"]

    def words(path: str) -> str:
        return " ".join((ROOT / path).read_text(encoding="utf-8").split())

    for path in ("README.md", "CITATION.cff", "mkdocs.yml", "docs/index.md", "gradsub/__init__.py"):
        assert sentence in words(path), path
    assert (gradsub.__doc__ or "").split("\n\n")[0].replace("\n", " ") == sentence


def test_the_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_one_version_everywhere() -> None:
    version = PROJECT["version"]
    assert f'version: "{version}"' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert version in headings[:2], "the changelog begins with this version, or with what comes after it"


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_that_exist_with_pinned_actions(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more says so itself
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}")), step
            assert set(re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))) <= targets


def test_the_pythons_of_the_classifiers_are_those_of_the_workflow() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    classified = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert set(classified) <= set(versions)
    assert min(versions, key=lambda text: int(text.partition(".")[2])) == PROJECT["requires-python"].removeprefix(">=")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built without a network."""
    pytest.importorskip("build", reason="building needs build of the release extra")
    # Built from a copy: setuptools leaves build/ and *.egg-info in the folder that it builds.
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools of the dev extra")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    for name in ("gradsub", "examples", "tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> Iterator[zipfile.ZipFile]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_sdist_holds_what_builds_the_wheel(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gradsub").rglob("*.py")}
    about = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "gradsub/py.typed"}
    build = {"pyproject.toml", "MANIFEST.in", "PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("gradsub.egg-info/")} == sources | about | build


def test_distributions_pass_the_index_check(built: Path) -> None:
    pytest.importorskip("twine", reason="the check is of the release extra")
    files = sorted(map(str, built.iterdir()))
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


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
