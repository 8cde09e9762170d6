"""The low-rank subspaces of each weight: bases, projection, lift, and what follows a change of basis."""

from gradsub.subspace._bank import SHARED, BasisChanged, SubspaceBank
from gradsub.subspace._basis import dominant_basis, lift, project, sketch
from gradsub.subspace._layer import Layer
from gradsub.subspace._moments import MOMENT_RULES, carry_moments
from gradsub.subspace._schedule import sketch_size

__all__ = [
    "MOMENT_RULES",
    "SHARED",
    "BasisChanged",
    "Layer",
    "SubspaceBank",
    "carry_moments",
    "dominant_basis",
    "lift",
    "project",
    "sketch",
    "sketch_size",
]
