"""How much memory one operation on many layers asks for at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

MOST: Final = 1 << 22
"""Entries of a tensor that holds several layers: 16 MiB in float32.

The C library gives memory of more than 32 MiB back to the system when it is released, and the system hands it out again
page by page, cleared: at every step that took longer than what was computed in it.
"""


def pieces(members: Sequence[T], sizes: Sequence[int]) -> Iterator[list[T]]:
    """Divide the members, in order, so that no piece of several has more than `MOST` entries.

    Args:
        members: of one kind.
        sizes: entries of each.

    Example:
        >>> [len(piece) for piece in pieces(range(5), [1 << 20] * 5)]
        [4, 1]
    """
    piece: list[T] = []
    held = 0
    for member, size in zip(members, sizes, strict=True):
        if piece and held + size > MOST:
            yield piece
            piece, held = [], 0
        piece.append(member)
        held += size
    if piece:
        yield piece
