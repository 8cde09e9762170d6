"""The rows of the table: which contender steps, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..two_tasks import Method

REFERENCE: Final = "adamw"

# With a gap of 1 every layer is refreshed at every step; a refresh by sketches takes two.
METHODS: Final = {
    "adamw": Method("AdamW (fused), a pass a task", "adamw"),
    "adamw-one-batch": Method("AdamW (fused), one pass of both tasks' rows", "adamw", one_batch=True),
    "lora": Method("peft's LoRA of the same rank under AdamW (fused), a pass a task", "lora"),
    "adamw-clipped": Method("AdamW (fused), a pass a task, clipped by torch", "adamw", clipped=True),
    "gems": Method("an ordinary step, a pass a task", "gems"),
    "gems-null": Method("the same with a null space", "gems", protected=True),
    "gems-clipped": Method("an ordinary step, every task's gradient clipped", "gems", clipped=True),
    "gems-mixed": Method("an ordinary step, one pass of both tasks' rows", "gems", one_batch=True),
    "gems-svd": Method("all layers decompose their gradients", "gems", refresh="svd", gap=1),
    "gems-sketch": Method("all layers sketch", "gems", refresh="sketch", gap=1),
    "gems-null-svd": Method(
        "all layers decompose their gradients, with a null space", "gems", protected=True, refresh="svd", gap=1
    ),
    "gems-null-sketch": Method("all layers sketch, with a null space", "gems", protected=True, refresh="sketch", gap=1),
}


@dataclass(frozen=True)
class Row:
    """One kind of step.

    Args:
        name: of the row.
        method: of `METHODS`; rows of one method share a contender, whose steps they take in the order of the rows.
        summary: one line.
        against: the row whose operations are subtracted when the worst places are looked for.
        refreshes: whether all layers are refreshed in the step.
    """

    name: str
    method: str
    summary: str
    against: str
    refreshes: bool = False


def all_rows() -> list[Row]:
    """Every row, in the order of the table."""
    found = []
    for name, method in METHODS.items():
        if method.gap != 1:
            found.append(Row(name, name, method.summary, REFERENCE))
            continue
        ordinary = "gems-null" if method.protected else "gems"
        if method.refresh == "svd":
            found.append(Row(name, name, method.summary, ordinary, True))
        else:
            for number, which in enumerate(("first", "second"), start=1):
                found.append(Row(f"{name}-{number}", name, f"{method.summary}: {which} sketch", ordinary, True))
    return found
