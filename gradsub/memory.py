"""What a decomposed layer costs in memory, as a formula; the tests hold the optimizer to it, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass

from gradsub.null_space._null_space import check_side
from gradsub.subspace import sketch_size

__all__ = ["LayerBytes", "layer_bytes"]


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer; with d the axis of the bases, o the other one, R = r + sum of r_k, and s bytes a number.

    Attributes:
        bases: s d R.
        moments: s o R for each moment of the base optimizer, and its step counts.
        protection: s k (d + o): the protected directions and what they held.
        bookkeeping: counts, gates, and what sketches remember: some hundred bytes.
        captured: s o (r + r_k) for every task, from its backward pass to the step.
        sketches: s d c for every task, in steps that renew a basis, with c = min(o, max(2 r, r + 64)).
    """

    bases: int
    moments: int
    protection: int
    bookkeeping: int
    captured: int
    sketches: int

    @property
    def state(self) -> int:
        """What is there between steps, and in a checkpoint."""
        return self.bases + self.moments + self.protection + self.bookkeeping


def layer_bytes(
    out_features: int,
    in_features: int,
    *,
    rank: int,
    task_rank: int | None = None,
    tasks: int = 2,
    side: str = "input",
    moments: int = 2,
    protected: int = 0,
    sketched: bool = True,
    itemsize: int = 4,
) -> LayerBytes:
    """The memory of a linear layer's training state under `GemsOptimizer`, besides the weight itself.

    Args:
        out_features: rows m of the weight.
        in_features: columns n of the weight.
        rank: r, columns of the shared basis; capped at min(m, n).
        task_rank: columns of each task's basis; None: ``max(1, rank // 2)``.
        tasks: how many.
        side: ``"input"`` or ``"output"``.
        moments: how many numbers the base optimizer keeps for each entry: 2 for Adam, 1 for momentum.
        protected: k, how many directions a null space protects in the layer.
        sketched: whether the bases are refreshed from sketches, as by default those of large layers at small ranks
            are. If not, the step of a refresh holds a whole gradient (s m n) for every task instead.
        itemsize: bytes of a number in the subspaces: 4, or 8 for float64 weights.

    Raises:
        ValueError: there is no such side.

    Example:
        >>> from gradsub.memory import layer_bytes
        >>> found = layer_bytes(576, 1536, rank=64)
        >>> found.state, found.captured
        (1376847, 442368)
        >>> 2 * 4 * 576 * 1536  # the moments of Adam on the whole weight
        7077888
    """
    check_side(side)
    most = min(out_features, in_features)
    own = max(1, rank // 2) if task_rank is None else task_rank
    widths = [min(rank, most), *[min(own, most)] * tasks]
    d, o = (in_features, out_features) if side == "input" else (out_features, in_features)
    counts = len(widths)
    # step, next_refresh and gate_memory; of sketches, their number, singular values and whether the last was usable.
    bookkeeping = 8 + 8 * counts + itemsize * tasks + (9 * counts + itemsize * sum(widths) if sketched else 0)
    return LayerBytes(
        bases=itemsize * d * sum(widths),
        moments=moments * itemsize * o * sum(widths) + (4 * counts if moments > 1 else 0),
        protection=itemsize * protected * (d + o),
        bookkeeping=bookkeeping,
        captured=itemsize * o * sum(widths[0] + width for width in widths[1:]),
        sketches=itemsize * d * sketch_size(widths[0], o) * tasks if sketched else 0,
    )
