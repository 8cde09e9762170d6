"""The low-rank subspaces of each weight: bases, projection, lift, and what follows a change of basis."""

from gradsub.subspace._bank import SHARED, SKETCHES, Rows, SubspaceBank
from gradsub.subspace._basis import dominant_basis, lift, orthonormality, project
from gradsub.subspace._block import Block, make_blocks, pieces
from gradsub.subspace._layer import Layer
from gradsub.subspace._moments import MOMENT_RULES, carry_moments
from gradsub.subspace._protected import Protected
from gradsub.subspace._schedule import check_steps_taken, sketch_size
from gradsub.subspace._shards import Shards, is_distributed, local, sharded_over, shards_of

__all__ = [
    "MOMENT_RULES",
    "SHARED",
    "SKETCHES",
    "Block",
    "Layer",
    "Protected",
    "Rows",
    "Shards",
    "SubspaceBank",
    "carry_moments",
    "check_steps_taken",
    "dominant_basis",
    "is_distributed",
    "lift",
    "local",
    "make_blocks",
    "orthonormality",
    "pieces",
    "project",
    "sharded_over",
    "shards_of",
    "sketch_size",
]
