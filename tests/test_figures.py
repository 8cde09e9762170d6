"""The pictures of the documentation are what their commands draw."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "_figures" / "tradeoff.py"
PICTURE = ROOT / "docs" / "assets" / "tradeoff.svg"


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
