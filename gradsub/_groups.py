"""Parameter groups: what comes of them when they are added, and whether others have changed them since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsub._layout import Layout
from gradsub._lr_scale import asks
from gradsub._probe import PLAIN, Probes, Traits
from gradsub._settings import base_options, check_group
from gradsub.inner import decoupled_shrinkage
from gradsub.subspace import Layer

Groups = Sequence[dict[str, Any]]
Place = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...] | None]


def lay_out(
    group: dict[str, Any], position: int, layout: Layout, base: Optimizer, probes: Probes, lr_scale: str | None
) -> tuple[list[Layer], Traits]:
    """The group's layers, and what steps depend on.

    Raises:
        ValueError: an option is out of range, or the base optimizer cannot step what is decomposed.
    """
    check_group(group)
    known = (base_options(group), group["params"], base.state)
    decomposable = any(layout.may_decompose(parameter, group) for parameter in group["params"])
    traits = probes.traits(*known) if decomposable else PLAIN
    layers = layout.add_group(group, position)
    odd = probes.odd_size(*known) if layers and asks(group, lr_scale) else None
    if odd is not None:
        raise ValueError(
            "lr_scale='adamw' makes updates as large as those of whole weights, where the base optimizer's steps "
            f"have one size; those of {type(base).__name__} {odd}: leave lr_scale out (a gradient step bears the "
            "same rate in a subspace), or wrap torch.optim.AdamW, or Muon with adjust_lr_fn='match_rms_adamw'"
        )
    if layers:
        decoupled_shrinkage(traits, group)  # which says what it lacks before anything is changed
    sharded = next((layer.name for layer in layers if layer.splits_coordinates), None)
    if sharded is not None and not probes.rows_are_independent(*known):
        raise ValueError(
            f"base={type(base).__name__} looks at whole matrices, but {sharded} is sharded and each rank steps its "
            'own rows: wrap an elementwise optimizer such as torch.optim.AdamW, or pass side="output"'
        )
    return layers, traits


def check_group_count(groups: Groups, layers: Sequence[Sequence[Layer]], base: Optimizer, probes: Probes) -> None:
    """Raise a ValueError if the base optimizer cannot have as many groups as it is given."""
    both = [bool(mine) + (len(mine) < len(group["params"])) for group, mine in zip(groups, layers, strict=True)]
    group = next((group for group, mine in zip(groups, layers, strict=True) if mine), None)
    if group is not None:
        probes.check_group_count(base_options(group), group["params"], base.state, sum(both))


class Adopted:
    """The groups as the optimizer has taken them in."""

    def __init__(self) -> None:
        self._groups: list[tuple[list[Tensor], dict[str, Any]]] = []
        self._places: dict[Tensor, Place] = {}

    def add(self, group: Mapping[str, Any]) -> None:
        """Remember a group."""
        self._groups.append((list(group["params"]), {key: group[key] for key in ("rank", "task_rank", "subspace")}))
        self._places.update({parameter: _place(parameter) for parameter in group["params"]})

    def check(self, groups: Groups) -> None:
        """Raise if somebody else has put other parameters, or other ranks, into the groups.

        Raises:
            RuntimeError: what was adopted is no longer there.
        """
        if len(groups) != len(self._groups) or not all(
            len(group["params"]) == len(held) and all(map(is_, group["params"], held))
            for group, (held, _) in zip(groups, self._groups, strict=True)
        ):
            raise RuntimeError(
                "optimizer.param_groups holds other parameters than the optimizer was built with, and subspaces, "
                "hooks and state belong to those: freeze a parameter to leave it out, add some with "
                "optimizer.add_param_group(), and to replace or remove some call optimizer.close() and build a new "
                "optimizer"
            )
        for position, (group, (_, fixed)) in enumerate(zip(groups, self._groups, strict=True)):
            edited = {key: group[key] for key, value in fixed.items() if group[key] != value}
            if edited:
                raise RuntimeError(
                    f"param_groups[{position}] has {edited} now, it was built with {fixed}: bases have that many "
                    "columns from the first step to the last. Put it back; for other ranks build a new optimizer"
                )

    def converted(self) -> dict[Tensor, Place]:
        """The parameters that were converted, moved (``model.to(...)``) or resized since, and what they were before."""
        return {
            parameter: place
            for parameter, place in self._places.items()
            # In this order and without a call: it is asked of every parameter, at every task and step.
            if parameter.dtype is not place[0]
            or parameter.device != place[1]
            or parameter.shape != place[2]
            or (place[3] is not None and parameter.stride() != place[3])
        }

    def follow(self, parameter: Tensor) -> None:
        """Take a conversion for done."""
        self._places[parameter] = _place(parameter)


def _place(parameter: Tensor) -> Place:
    """What a conversion changes; the strides only where there is more than one memory format."""
    strides = parameter.stride() if parameter.ndim > 2 else None
    return parameter.dtype, parameter.device, parameter.shape, strides
