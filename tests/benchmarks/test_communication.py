"""What the ranks send is what the formulas say, and the plan in the docs is what the formulas give."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.communication import plan
from benchmarks.communication.__main__ import measure

ROOT = Path(__file__).resolve().parent.parent.parent
SPEC = {
    "architecture": "llama",
    "vocab_size": 32,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(("rank", "tasks"), [(4, 2), (6, 3)])
def test_counted_bytes_are_those_of_the_formulas(rank: int, tasks: int) -> None:
    found = measure(rank, tasks, SPEC)
    assert found["data_parallel"] == found["formula"]["data_parallel"]
    for kind in ("gems", "gems_null"):
        _, sketching, *_, ordinary = found[kind]
        assert ordinary == found["formula"]["gems"]
        assert sketching == found["formula"]["gems"] + found["formula"]["sketches"]


def test_the_plan_in_the_docs_is_up_to_date() -> None:
    assert plan.table() in (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    counted = (ROOT / "benchmarks" / "communication" / "results" / "communication.md").read_text(encoding="utf-8")
    assert counted.partition("\n\n")[2].strip() in (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
