"""What the backward pass that runs wants of a weight's gradient, and who gets what was computed in its place."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from gradsub.capture._generic import seen_by_others


class Wish(Enum):
    """What the backward pass that runs wants of a weight's gradient."""

    ALL_LEAVES = auto()  # accumulated, as that of every leaf: the probes' gradients go to the engine
    THIS_LEAF = auto()  # accumulated, into leaves that ``inputs=`` named; nobody names a probe
    WHOLE = auto()  # as it is, for `torch.autograd.grad` or a hook
    NOTHING = auto()


class _Engine:
    """What was found out of the engine's task that runs: to ask anew in every layer takes its time.

    Attributes:
        into_all: the last task found that accumulates into all leaves; of those that do not, no probe is executed.
    """

    into_all = -1


def wish_of(ctx: Any, weight: Tensor, place: int, probe_place: int) -> Wish:
    """What is wanted of the weight, which is at a place among the function's tensors, as one of its probes is."""
    if torch.compiler.is_compiling():
        return Wish.ALL_LEAVES
    if not weight.requires_grad:
        return Wish.NOTHING  # frozen since the forward pass
    task = torch._C._current_graph_task_id()
    if task != _Engine.into_all:
        nodes = ctx.next_functions
        if not torch._C._will_engine_execute_node(nodes[probe_place][0]):
            return _wish_of_some(weight, nodes[place][0])
        _Engine.into_all = task
    return Wish.WHOLE if seen_by_others(weight) else Wish.ALL_LEAVES


def _wish_of_some(weight: Tensor, node: Any) -> Wish:
    """The same in a backward pass for chosen tensors, by the node that accumulates into the weight."""
    try:
        if not torch._C._will_engine_execute_node(node):
            return Wish.NOTHING
    except RuntimeError:
        return Wish.WHOLE  # torch does not say it of leaves that `torch.autograd.grad` is asked for
    return Wish.WHOLE if seen_by_others(weight) else Wish.THIS_LEAF


def accumulates_into(weight: Tensor) -> bool:
    """Whether the backward pass that runs leaves something in the weight's ``.grad``."""
    if not weight.requires_grad:
        return False  # frozen since the forward pass
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:
        return False  # torch does not say it of leaves that `torch.autograd.grad` is asked for


class Arrivals:
    """Whether a probe may have a gradient: a hook of all of them, so that nobody has to look at each.

    Attributes:
        any: some came.
    """

    any = False

    def __call__(self, probe: Tensor) -> None:
        """One has come, from the engine or by `hand_over`."""
        self.any = True


def hand_over(wish: Wish, probe: Tensor, gradient: Tensor) -> Tensor | None:
    """To the engine, or to the probe itself."""
    if not torch.compiler.is_compiling():
        slot, task = probe.owner  # type: ignore[attr-defined]
        if (open_slot := slot()) is not None:
            open_slot.check_open(task)
    gradient = gradient if gradient.dtype == probe.dtype else gradient.to(probe.dtype)
    if wish is Wish.ALL_LEAVES:
        return gradient
    probe.grad = gradient if probe.grad is None else probe.grad + gradient
    probe.arrivals(probe)  # type: ignore[attr-defined]
    return None
