"""Libraries are imported where they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gradsub.integrations


def test_without_transformers_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import gradsub.integrations
import gradsub.integrations.axolotl, gradsub.integrations.llamafactory
for name in gradsub.integrations.__all__:
    try:
        getattr(gradsub.integrations, name)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(gradsub.integrations.__all__)
    assert all("pip install 'gradsub[transformers]'" in line for line in lines)


def test_every_name_is_there() -> None:
    assert set(gradsub.integrations.__all__) <= set(dir(gradsub.integrations))
    with pytest.raises(AttributeError, match="has no attribute 'Gems'"):
        gradsub.integrations.Gems  # noqa: B018
