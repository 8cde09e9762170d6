"""Fine-tune a PyTorch model on one task or several with the optimizer you already use, in low-rank subspaces and
inside a null space that protects what the model knows.

The way of a gradient, and the module of each arrow: losses -> `capture` (per-task gradients) -> `subspace` (bases,
project, lift) -> `inner` (the wrapped optimizer) -> `null_space` (constraint) -> `update` (weights).
"""

from importlib.metadata import version as _version

from gradsub._unprotected import freeze_unprotected
from gradsub.gates import Gate, GateInputs, HypergradientGate
from gradsub.null_space import NullSpace
from gradsub.optimizer import GemsOptimizer, NonFiniteError
from gradsub.report import LayerReport, Report
from gradsub.summary import ParameterSummary, Summary

__all__ = [
    "Gate",
    "GateInputs",
    "GemsOptimizer",
    "HypergradientGate",
    "LayerReport",
    "NonFiniteError",
    "NullSpace",
    "ParameterSummary",
    "Report",
    "Summary",
    "freeze_unprotected",
    "linalg",
]

from gradsub import linalg

__version__ = _version("gradsub")
