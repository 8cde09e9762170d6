"""Tables of what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .equal import table as committed

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def table(files: Sequence[Path]) -> str:
    """The losses of all runs in the files, the sizes of the first updates, and the rates of the first grid's trials."""
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    steps = len(rows[0]["loss"]["search"])
    lines = [
        f"## Training loss in the last five of {steps} steps, from the same weights on the same batches",
        "",
        "| data | rate | method | `scale` | search | rec | perplexity of general text |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row["data"], row["rate"])):
        before, after = row["perplexity"]
        lines.append(
            f"| {row['data']} | {row['rate']:.0e} | {row['method']} | {row['scale']:.2f} "
            f"| {row['last']['search']:.3f} | {row['last']['rec']:.3f} | {after:.1f} ({after / before - 1:+.1%}) |"
        )
    lines += [
        "",
        "## The first updates: root mean square over rate, mean of the layers of a kind",
        "",
        "| data | rate | method | " + " | ".join(KINDS) + " |",
        "|---|---:|---|" + "---:|" * len(KINDS),
    ]
    for key, form in (("rms / rate", "{:.2f}"), ("first-order decrease / rate, a step", "{:.0f}")):
        if not key.startswith("rms"):
            lines += [
                "",
                "## The first updates: -<G, dW> over rate and step, summed over the layers of a kind",
                "",
                "| data | rate | method | " + " | ".join(KINDS) + " | all |",
                "|---|---:|---|" + "---:|" * (len(KINDS) + 1),
            ]
        for row in sorted(rows, key=lambda row: (row["data"], row["rate"])):
            if not row["sizes"]:
                continue
            found = [row["sizes"][kind][key] for kind in KINDS]
            found += [] if key.startswith("rms") else [sum(found)]
            cells = " | ".join(form.format(value) for value in found)
            lines.append(f"| {row['data']} | {row['rate']:.0e} | {row['method']} | {cells} |")
    lines += [
        "",
        "## Rates with the same loss of search after 30 steps, in the trials of the first grid of examples/unified_sr",
        "",
        committed(),
    ]
    return "\n".join(lines) + "\n"
