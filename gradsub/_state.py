from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub._measure import PREVIOUS_STEP
from gradsub.inner import Inner
from gradsub.subspace import Layer, is_distributed, shards_of
from gradsub.update import ANCHOR, MASTER

INNER = "inner."
WEIGHING = ("surgery", "gate")


def is_weighing(key: str) -> bool:
    """Whether a key of a parameter's state is for the state of a callable that weighs the tasks."""
    return key.split(".")[0] in WEIGHING


def mirror(states: MutableMapping[Tensor, Any], parameter: Tensor, inner: Inner, proxies: Mapping[str, Tensor]) -> None:
    """Show the inner optimizer's state in the outer one's, by reference: ``inner.<subspace>.<key>``.

    Args:
        states: the outer states; a parameter without inner state gets none.
        parameter: the parameter.
        inner: the inner optimizer.
        proxies: what it steps for this parameter, by prefix; ``{"": parameter}`` for a plain one.
    """
    for prefix, proxy in proxies.items():
        found = inner.state_of(proxy)
        if found:
            states[parameter].update({f"{INNER}{prefix}{key}": value for key, value in found.items()})


def hand_down(state: Mapping[str, Any], inner: Inner, proxies: Mapping[str, Tensor]) -> None:
    """The inverse of `mirror`: after loading, the inner optimizer goes on from the outer one's state."""
    for prefix, proxy in proxies.items():
        start = f"{INNER}{prefix}"
        mine = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        # A task named "a" must not take what belongs to a task named "a.b".
        inner.load_state(proxy, {key: value for key, value in mine.items() if "." not in key})


def show_shards(
    saved: dict[str, Any], groups: Sequence[Mapping[str, Any]], layers: Mapping[Tensor, Layer]
) -> dict[str, Any]:
    """In a state dict, what is kept by row of a sharded weight as DTensors that lie like the weight.

    A distributed checkpoint then knows which part each rank has, and another number of ranks can go on from it.
    """
    saved = _copied(saved)
    for layer, held in _sharded(saved, groups, layers):
        assert layer.shards is not None
        for key, value in held.items():
            if _by_row(layer, key, value):
                held[key] = layer.shards.wrap(value)
    return saved


def take_shards(
    saved: dict[str, Any], groups: Sequence[Mapping[str, Any]], layers: Mapping[Tensor, Layer]
) -> dict[str, Any]:
    """The inverse of `show_shards`; whole tensors, saved where nothing was sharded, are cut to this rank's rows.

    Raises:
        ValueError: the state is sharded and the parameter is not.
    """
    saved = _copied(saved)
    order = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(order, group_parameters(groups), strict=False):
        held = saved["state"].get(index, {})
        if not is_distributed(parameter):
            if any(isinstance(value, Tensor) and is_distributed(value) for value in held.values()):
                raise ValueError(
                    f"state_dict: the state of parameter {index} is sharded, the parameter is not: load it through "
                    "torch.distributed.checkpoint, or save it with StateDictOptions(full_state_dict=True)"
                )
        elif parameter not in layers:
            shards = shards_of(parameter, f"parameter {index}")
            assert shards is not None
            for key, value in held.items():
                if isinstance(value, Tensor) and not is_distributed(value) and value.shape == parameter.shape:
                    held[key] = shards.wrap(shards.unwrap(value).clone())
    for layer, held in _sharded(saved, groups, layers):
        assert layer.shards is not None
        for key, value in held.items():
            if isinstance(value, Tensor) and (is_distributed(value) or _by_row(layer, key, value)):
                held[key] = layer.shards.unwrap(value)
    return saved


def _copied(saved: Mapping[str, Any]) -> dict[str, Any]:
    """With dictionaries of its own: those of a state dict may be the optimizer's."""
    return {**saved, "state": {index: dict(held) for index, held in saved["state"].items()}}


def _sharded(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], layers: Mapping[Tensor, Layer]
) -> Iterator[tuple[Layer, dict[str, Any]]]:
    order = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(order, group_parameters(groups), strict=False):
        layer = layers.get(parameter)
        if layer is not None and layer.shards is not None and index in saved["state"]:
            yield layer, saved["state"][index]


def _by_row(layer: Layer, key: str, value: Any) -> bool:
    """Whether the first axis of a layer's state is that of its weight's rows."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        return False
    return key == MASTER or (layer.splits_coordinates and (key.startswith((INNER, PREVIOUS_STEP)) or key == ANCHOR))


def group_parameters(groups: Sequence[Mapping[str, Any]]) -> list[torch.nn.Parameter]:
    """All parameters in the order in which a state dict counts them."""
    return [parameter for group in groups for parameter in group["params"]]
