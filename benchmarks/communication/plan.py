"""Larger models and more ranks than this project has measured: memory, bytes and times from formulas alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gradsub.memory import layer_bytes

from .formula import Shape, data_parallel_bytes, gems_bytes, sketch_bytes

GIGA = 1e9


@dataclass(frozen=True)
class Decoder:
    """A decoder of the Llama family: its linear layers are trained, its embeddings are not.

    Args:
        name: for the table.
        hidden: width.
        intermediate: width of the feed-forward layer.
        layers: how many.
        key_value: width of the keys' and values' projections.
        vocabulary: tokens.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    key_value: int
    vocabulary: int = 32000

    def shapes(self) -> list[Shape]:
        """Of all trained weights, out_features x in_features."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)] * self.layers

    @property
    def trained(self) -> int:
        """Trained entries."""
        return sum(rows * columns for rows, columns in self.shapes())

    @property
    def frozen(self) -> int:
        """Embedding and head."""
        return 2 * self.vocabulary * self.hidden


SEVEN = Decoder("7B", hidden=4096, intermediate=11008, layers=32, key_value=4096)
SEVENTY = Decoder("70B", hidden=8192, intermediate=28672, layers=80, key_value=1024)


@dataclass(frozen=True)
class Assumptions:
    """What the plan assumes; none of it was measured here.

    Args:
        rank: r; a task's own subspace has half of it.
        tasks: K.
        gap: ``update_proj_gap``, steps.
        tokens: of one GPU in a step, all tasks together.
        flops: of one GPU in the matrix products, per second (40 % of an H100's 989e12).
        bandwidth: of one GPU's link to the others, bytes per second.
    """

    rank: int = 128
    tasks: int = 2
    gap: int = 200
    tokens: int = 8192
    flops: float = 4e14
    bandwidth: float = 5e10


@dataclass(frozen=True)
class Row:
    """One line of the plan: bytes and seconds of one GPU."""

    model: str
    gpus: int
    memory_adamw: float
    memory_gems: float
    memory_sharded: float
    sent_ddp: float
    sent_gems: float
    compute: float
    wire_ddp: float
    wire_gems: float


def plan(model: Decoder, gpus: int, given: Assumptions = Assumptions()) -> Row:
    """Memory without activations; weights, moments and subspaces in float32.

    An all-reduce in a ring sends 2 (G - 1) / G times its size from each of G GPUs. The time of a step is that of
    forward pass, input gradients and projections: 4 N P (1 + (R (m + n)) / (2 m n)) operations, with R = r + r_k.
    """
    shapes = model.shapes()
    layers = [layer_bytes(m, n, rank=given.rank, tasks=given.tasks) for m, n in shapes]
    weights = 4 * (model.trained + model.frozen)
    ring = 2 * (gpus - 1) / gpus
    ddp = ring * data_parallel_bytes(shapes)
    ordinary = gems_bytes(shapes, rank=given.rank, tasks=given.tasks)
    sketches = sketch_bytes(shapes, rank=given.rank, tasks=given.tasks)
    gems = ring * (ordinary + 2 * sketches / given.gap)
    joint = given.rank + given.rank // 2
    products = sum(4 * m * n + 2 * joint * (m + n) for m, n in shapes) + 4 * model.frozen / 2
    state = sum(layer.state for layer in layers)
    captured = sum(layer.captured for layer in layers)
    bases = sum(layer.bases for layer in layers)
    return Row(
        model=model.name,
        gpus=gpus,
        memory_adamw=weights + 12 * model.trained,
        memory_gems=weights + state + captured,
        memory_sharded=(weights + state - bases + captured) / gpus + bases,
        sent_ddp=ddp,
        sent_gems=gems,
        compute=given.tokens * products / given.flops,
        wire_ddp=ddp / given.bandwidth,
        wire_gems=gems / given.bandwidth,
    )


def rows(given: Assumptions = Assumptions()) -> Iterator[Row]:
    """Both models on 8 to 512 GPUs."""
    for model in (SEVEN, SEVENTY):
        for gpus in (8, 64, 512):
            yield plan(model, gpus, given)


def table() -> str:
    """The plan in Markdown."""
    head = (
        "| model | GPUs | AdamW, replicated (GB) | GEMS, replicated (GB) | GEMS, sharded (GB) | DDP sends (GB) "
        "| GEMS sends (GB) | compute (s) | DDP on the wire (s) | GEMS on the wire (s) |"
    )
    lines = [head, "|" + "---|" * 10]
    for row in rows():
        numbers = (row.memory_adamw, row.memory_gems, row.memory_sharded, row.sent_ddp, row.sent_gems)
        cells = [row.model, str(row.gpus), *(f"{value / GIGA:.1f}" for value in numbers)]
        cells += [f"{value:.2f}" for value in (row.compute, row.wire_ddp, row.wire_gems)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
