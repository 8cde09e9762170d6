"""The methods by name."""

import copy
from typing import Any, Final

from ._cagrad import cagrad
from ._dwa import DWA
from ._famo import FAMO
from ._gradvac import GradVac
from ._inputs import Surgery
from ._mgda import mgda
from ._pcgrad import pcgrad
from ._sum import sum_weights
from ._uncertainty import UncertaintyWeighting
from ._upgrad import upgrad

SURGERIES: Final[dict[str, Surgery]] = {
    "sum": sum_weights,
    "pcgrad": pcgrad,
    "gradvac": GradVac(),
    "mgda": mgda,
    "cagrad": cagrad,
    "upgrad": upgrad,
    "famo": FAMO(),
    "dwa": DWA(),
    "uncertainty": UncertaintyWeighting(),
}
"""The methods with their default settings, by name."""


def resolve_surgery(surgery: str | Surgery) -> Any:
    """The method of that name with its default settings, or the callable itself.

    Any callable from a Gramian (K, K) to weights (K,) will do: ``functools.partial(cagrad, c=0.2)``, a function of your
    own, or one of TorchJD's Gramian weightings, such as ``torchjd.aggregation.MGDAWeighting()``; those of them that
    draw random numbers use the global generator. Of a TorchJD aggregator it is the weighting that it has. An object
    with ``needs_losses = True`` is called with `SurgeryInputs` instead. By name, a method with memory is a new object
    at every call, and "pcgrad" and "gradvac" meet the tasks in cyclic order: bind a ``generator`` for a random one.

    Args:
        surgery: A key of ``SURGERIES``, or a callable.

    Raises:
        ValueError: there is no method of that name, the object cannot be called, or it is an aggregator of TorchJD's
            that looks at the gradients themselves.

    Example:
        >>> import torch
        >>> from gradsub.surgery import resolve_surgery
        >>> resolve_surgery("mgda")(torch.eye(2))
        tensor([0.5000, 0.5000])
        >>> resolve_surgery(lambda gramian: gramian.diagonal().rsqrt())(4 * torch.eye(2))
        tensor([0.5000, 0.5000])
    """
    if isinstance(surgery, str) and surgery in SURGERIES:
        # A copy of a function is the function itself; a copy of a stateful method keeps two users' targets apart.
        method = copy.deepcopy(SURGERIES[surgery])
        if hasattr(method, "reset"):
            method.reset()
        return method
    if isinstance(surgery, str) or not callable(surgery):
        raise ValueError(
            f"surgery={surgery!r} must be one of {sorted(SURGERIES)} or a callable from a (K, K) Gramian to (K,) "
            "weights: pass one of these."
        )
    return _unwrapped(surgery)


def _unwrapped(surgery: Any) -> Any:
    """The surgery, or TorchJD's weighting of an aggregator, which would take a Gramian for gradients.

    Raises:
        ValueError: an aggregator that has none of a Gramian.
    """
    weighting = getattr(surgery, "gramian_weighting", None)
    if callable(weighting):
        return weighting
    aggregates = any(base.__name__ == "Aggregator" for base in type(surgery).__mro__)
    if aggregates:
        raise ValueError(
            f"surgery={type(surgery).__name__}() aggregates gradients, but a surgery sees their Gramian alone: pass a "
            "weighting of a Gramian, such as torchjd.aggregation.UPGradWeighting()"
        )
    return surgery
