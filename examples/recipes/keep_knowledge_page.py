"""Writes what a run of `keep_knowledge` printed into its page, and the run's numbers beside the recipe.

.venv/bin/python -m examples.recipes.keep_knowledge_page runs/keep-knowledge
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from examples.recipes.keep_knowledge import conversation, table

ROOT = Path(__file__).resolve().parents[2]
RESULT, PAGE = ROOT / "examples/recipes/results/keep_knowledge.json", ROOT / "docs/howto-keep-knowledge.md"


def filled(page: str, found: dict[str, Any]) -> str:
    """The page with a run's table and answers between their marks."""
    for name, text in (("table", table(found)), ("answers", f"```text\n{conversation(found)}\n```")):
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    found = json.loads((Path(sys.argv[1]) / "result.json").read_text(encoding="utf-8"))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
