from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub._measure import PREVIOUS_STEP
from gradsub.inner import Inner
from gradsub.subspace import SKETCHES, Block, Layer, is_distributed, shards_of
from gradsub.update import ANCHOR, MASTER, PROTECTED

INNER = "inner."
NULL_SPACE = frozenset({ANCHOR, PROTECTED})


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


def loaded_inner(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What a state that was loaded has of the base optimizer's state of one proxy."""
    start = f"{INNER}{prefix}"
    mine = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    # A task named "a" must not take what belongs to a task named "a.b".
    return {key: value for key, value in mine.items() if "." not in key}


def kind_of_loaded(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Hashable:
    """What the layers of a block have to have in common in a state that was loaded: all but tensors of a place each.

    Args:
        state: of one layer.
        shapes: of its coordinates, by prefix.
    """
    kind = []
    for prefix, shape in shapes.items():
        for key, value in sorted(loaded_inner(state, prefix).items()):
            if isinstance(value, Tensor) and value.shape == shape:
                kind.append((prefix, key, str(value.dtype)))
            else:
                kind.append((prefix, key, repr(value.tolist() if isinstance(value, Tensor) else value)))
    return tuple(kind)


def hand_down(states: Mapping[Tensor, Any], block: Block, tasks: Sequence[str], inner: Inner) -> None:
    """After loading, the base optimizer goes on from the layers' states, which have the same `kind_of_loaded`."""
    block.shown.clear()
    for prefix, proxies in prefixed(block, tasks):
        found = [loaded_inner(states[layer.parameter], prefix) for layer in block.layers]
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


def check_compatible(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Any],
    layers: Mapping[Tensor, Layer],
) -> None:
    """Raise before anything is loaded if a checkpoint comes from other tasks, ranks, shapes or another optimizer.

    Raises:
        ValueError: the message names the parameter and the difference.
    """
    params = group_parameters(groups)
    order = [index for group in saved["param_groups"] for index in group["params"]]
    if len(order) != len(params):
        raise ValueError(
            f"state_dict has {len(order)} parameters, the optimizer has {len(params)}: load the same model"
        )
    for theirs, ours in zip(saved["param_groups"], groups, strict=False):
        for option in ("tasks", "side"):
            there, here = theirs.get(option, ours[option]), ours[option]
            if list(there) != list(here):
                raise ValueError(f"state_dict: {option} is {there!r} there and {here!r} here: use the same")
    for index, parameter in zip(order, params, strict=True):
        layer = layers.get(parameter)
        name = layer.name if layer else f"parameter {index}"
        _check_parameter(name, saved["state"].get(index, {}), state.get(parameter, {}), decomposed=layer is not None)


def _check_parameter(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], decomposed: bool) -> None:
    if decomposed != ("basis" in theirs):
        there, here = ("a plain", "a decomposed") if decomposed else ("a decomposed", "a plain")
        raise ValueError(
            f"state_dict: {name} is {there} parameter there and {here} one here: save it from a GemsOptimizer with the "
            "same rank, target_modules and subspace options"
        )
    # What is protected may be more, or less, than it was then.
    for key in (key for key in ours if key in theirs and key not in NULL_SPACE):
        value, other = ours[key], theirs[key]
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape != other.shape:
            raise ValueError(
                f"state_dict: {key!r} of {name} has shape {tuple(other.shape)} there and {tuple(value.shape)} here: "
                "use the same tasks, rank, task_rank, side and null space"
            )
    inner_theirs, inner_ours = ({key for key in keys if key.startswith(INNER)} for keys in (theirs, ours))
    # Some optimizers have no state before their first step, on either side.
    if inner_theirs and inner_ours and inner_theirs != inner_ours:
        raise ValueError(
            f"state_dict: the base optimizer's state of {name} differs in {sorted(inner_theirs ^ inner_ours)}: wrap "
            "the same optimizer with the same options"
        )
    missing = {key for key in ours if not key.startswith(INNER)} - theirs.keys() - NULL_SPACE - SKETCHES
    if missing:
        raise ValueError(f"state_dict: {name} lacks {sorted(missing)}: use the same gate and master_weights")


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


def restore(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Any],
    earlier: Mapping[Tensor, Any],
) -> None:
    """Put the saved tensors back with the dtypes they had, where their parameters are now.

    torch casts what it loads to the parameter's dtype, which would round float32 moments of bfloat16 weights and turn
    counts into floats. Counts stay on the host, but for those of a fused or capturable optimizer.

    Args:
        saved: the state dict that was loaded.
        groups: the optimizer's parameter groups.
        state: what torch made of it.
        earlier: the state before.
    """
    order = [index for group in saved["param_groups"] for index in group["params"]]
    options = [group for group in groups for _ in group["params"]]
    for index, group, parameter in zip(order, options, group_parameters(groups), strict=True):
        on_device = group.get("fused") or group.get("capturable")
        for key, value in saved["state"].get(index, {}).items():
            if not isinstance(value, Tensor):
                continue
            like = earlier.get(parameter, {}).get(key)
            if key not in ("next_refresh", "sketches") and (value.ndim or (on_device and key.startswith(INNER))):
                device = parameter.device
            else:
                device = like.device if isinstance(like, Tensor) else value.device
            state[parameter][key] = value.detach().to(device, copy=True)


def group_parameters(groups: Sequence[Mapping[str, Any]]) -> list[torch.nn.Parameter]:
    """All parameters in the order in which a state dict counts them."""
    return [parameter for group in groups for parameter in group["params"]]
