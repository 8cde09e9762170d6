from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub._measure import PREVIOUS_STEP
from gradsub.inner import Inner
from gradsub.subspace import Block, Layer, is_distributed, shards_of
from gradsub.update import ANCHOR, MASTER

INNER = "inner."
WEIGHING = ("surgery", "gate")


def is_weighing(key: str) -> bool:
    """Whether a key of a parameter's state is for the state of a callable that weighs the tasks."""
    return key.split(".")[0] in WEIGHING


def show_plain(states: MutableMapping[Tensor, Any], parameters: Iterable[Tensor], inner: Inner) -> None:
    """Show the base optimizer's state of parameters that it steps itself, by reference: ``inner.<key>``."""
    for parameter in parameters:
        for key, value in inner.state_of(parameter).items():
            if states[parameter].get(f"{INNER}{key}") is not value:
                states[parameter][f"{INNER}{key}"] = value


def show_block(states: MutableMapping[Tensor, Any], block: Block, tasks: Sequence[str], inner: Inner) -> None:
    """Show the base optimizer's state of a block's proxies in the layers' states: ``inner.<subspace>.<key>``.

    Of what has a place for each layer a layer's state shows its own; the rest, such as a count, is that of all. Only
    what the base optimizer has replaced since the last time is shown anew.
    """
    for prefix, proxies in prefixed(block, tasks):
        for place, proxy in enumerate(proxies):
            shape = inner.shape_of(proxy)
            for key, value in inner.state_of(proxy).items():
                name = f"{INNER}{prefix}{key}"
                if block.shown.get((name, place)) is value:
                    continue
                block.shown[name, place] = value
                if len(proxies) == len(block) > 1:
                    states[block.layers[place].parameter][name] = value
                    continue
                split = len(shape) == 3 and isinstance(value, Tensor) and value.shape == shape
                for row, layer in enumerate(block.layers):
                    states[layer.parameter][name] = value[row] if split else value


def prefixed(block: Block, tasks: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """The block's proxies, with what the names of their state in a layer's state begin with."""
    for subspace, name in enumerate(("shared", *tasks)):
        yield f"{name}.", block.proxies[subspace]


def loaded_inner(state: Mapping[str, Any], prefix: str, prefixes: Iterable[str]) -> dict[str, Any]:
    """What a parameter's state has of the base optimizer's state of one proxy."""
    start = f"{INNER}{prefix}"
    # A task named "a" must not take what belongs to a task named "a.b".
    longer = tuple(f"{INNER}{other}" for other in prefixes if other != prefix and other.startswith(prefix))
    return {
        key.removeprefix(start): value
        for key, value in state.items()
        if key.startswith(start) and not (longer and key.startswith(longer))
    }


def kind_of_loaded(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Hashable:
    """What the layers of a block have to have in common in a state that was loaded: all but tensors of a place each.

    Args:
        state: of one layer.
        shapes: of its coordinates, by prefix.
    """
    kind = []
    for prefix, shape in shapes.items():
        for key, value in sorted(loaded_inner(state, prefix, shapes).items()):
            if isinstance(value, Tensor) and value.shape == shape:
                kind.append((prefix, key, str(value.dtype)))
            else:
                kind.append((prefix, key, repr(value.tolist() if isinstance(value, Tensor) else value)))
    return tuple(kind)


def hand_down(states: Mapping[Tensor, Any], block: Block, tasks: Sequence[str], inner: Inner) -> None:
    """After loading, the base optimizer goes on from the layers' states, which have the same `kind_of_loaded`."""
    block.shown.clear()
    prefixes = [prefix for prefix, _ in prefixed(block, tasks)]
    for prefix, proxies in prefixed(block, tasks):
        found = [loaded_inner(states[layer.parameter], prefix, prefixes) for layer in block.layers]
        if len(proxies) == len(block) > 1:
            for proxy, mine in zip(proxies, found, strict=True):
                inner.load_state(proxy, mine)
            continue
        (proxy,) = proxies
        shape = inner.shape_of(proxy)
        stacked = len(shape) == 3
        inner.load_state(
            proxy,
            {
                key: torch.stack([mine[key] for mine in found])
                if stacked and isinstance(value, Tensor) and value.shape == shape[1:]
                else value
                for key, value in found[0].items()
            },
        )


def show_shards(
    saved: dict[str, Any], groups: Sequence[Mapping[str, Any]], layers: Mapping[Tensor, Layer]
) -> dict[str, Any]:
    """In a state dict, what is kept by row of a sharded weight as DTensors that lie like the weight.

    A distributed checkpoint then knows which part each rank has, and another number of ranks can go on from it. It
    reads into these tensors: what the layers of a block share here may differ there, so each has its own.
    """
    saved = _copied(saved)
    seen: set[int] = set()
    for mine in saved["state"].values():
        for key, value in mine.items():
            if isinstance(value, Tensor):
                mine[key] = value.clone() if id(value) in seen else value
                seen.add(id(value))
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
