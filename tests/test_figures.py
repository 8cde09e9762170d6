"""The pictures of the documentation are what their commands draw."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from unified_sr.run_files import write_grid

from examples.unified_sr.tables import pack

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "_figures" / "tradeoff.py"
PICTURE = ROOT / "docs" / "assets" / "tradeoff.svg"
RESULTS = ROOT / "examples" / "unified_sr" / "results" / "runs.parquet"


@pytest.mark.skipif(not RESULTS.is_file(), reason="no results are committed")
def test_the_tradeoff_is_drawn_from_the_committed_results(tmp_path: Path) -> None:
    """The command itself, on a copy of nothing but what it reads, so that it cannot lean on the committed picture."""
    copy = tmp_path / "docs" / "_figures" / SCRIPT.name
    copy.parent.mkdir(parents=True)
    copy.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "docs" / "assets").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    subprocess.run([sys.executable, str(copy)], check=True, capture_output=True)
    drawn = (tmp_path / "docs" / "assets" / PICTURE.name).read_text(encoding="utf-8")
    assert drawn == PICTURE.read_text(encoding="utf-8"), "run python docs/_figures/tradeoff.py"


def test_the_tradeoff_shows_each_language_model_of_any_results(tmp_path: Path) -> None:
    """The command on a copy of the application whose results are others."""
    copy = tmp_path / "docs" / "_figures" / SCRIPT.name
    copy.parent.mkdir(parents=True)
    copy.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "docs" / "assets").mkdir()
    application = tmp_path / "examples" / "unified_sr"
    application.mkdir(parents=True)
    for path in (ROOT / "examples" / "unified_sr").iterdir():
        if path.name != "results":
            (application / path.name).symlink_to(path)
    pack([write_grid(tmp_path / "runs")], application / "results", say=lambda line: None)
    subprocess.run([sys.executable, str(copy)], check=True, capture_output=True)
    picture = ElementTree.parse(tmp_path / "docs" / "assets" / PICTURE.name)
    texts = [text.text for text in picture.findall(".//{*}text")]
    assert {"GEMS", "AdamW", "LoRA", "MovieLens-100K"} <= set(texts)
    assert not {"bm25", "BM25"} & set(texts), "it has no language model"
    assert len([circle for circle in picture.findall(".//{*}circle") if circle.get("r") == "6"]) == 3


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "assets").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_have_colours_for_both_schemes(path: Path) -> None:
    """Every colour is a rule of the style sheet, which has other ones for dark pages; a title says what is shown."""
    text = path.read_text(encoding="utf-8")
    picture = ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    assert picture.find("{*}title") is not None
    for element in picture.iter():
        for name in ("fill", "stroke"):
            assert element.get(name, "none") == "none", f"{element.tag} has a colour of its own"
