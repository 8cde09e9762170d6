"""Surgeries of TorchJD's."""

from typing import Any


def unwrapped(surgery: Any) -> Any:
    """The surgery, or of an aggregator its weighting: given a Gramian, an aggregator would take it for gradients.

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
