from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub.inner import Inner
from gradsub.subspace import Layer

INNER = "inner."


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


def check_compatible(
    saved: Mapping[str, Any], params: Sequence[Tensor], state: Mapping[Tensor, Any], layers: Mapping[Tensor, Layer]
) -> None:
    """Raise before anything is loaded if a checkpoint comes from other tasks, ranks or shapes.

    Raises:
        ValueError: the message names the parameter and the difference.
    """
    order = [index for group in saved["param_groups"] for index in group["params"]]
    if len(order) != len(params):
        raise ValueError(
            f"state_dict has {len(order)} parameters, the optimizer has {len(params)}: load the same model"
        )
    for index, parameter in zip(order, params, strict=True):
        theirs = saved["state"].get(index)
        if theirs is None:
            continue
        layer = layers.get(parameter)
        name = layer.name if layer else f"parameter {index}"
        if (layer is not None) != ("basis" in theirs):
            raise ValueError(
                f"state_dict: {name} is {'a plain' if layer else 'a decomposed'} parameter there and "
                f"{'a decomposed' if layer else 'a plain'} one here: use the same rank, target_modules and subspace"
            )
        ours = state[parameter]
        _check_subspaces(name, theirs, ours)
        for key, value in ours.items():
            other = theirs.get(key)
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape != other.shape:
                raise ValueError(
                    f"state_dict: {key!r} of {name} has shape {tuple(other.shape)} there and {tuple(value.shape)} "
                    "here: use the same tasks, rank, task_rank and side"
                )


def _check_subspaces(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    def subspaces(state: Mapping[str, Any]) -> set[str]:
        return {
            key.removeprefix(INNER).rsplit(".", 1)[0] for key in state if key.startswith(INNER) and key.count(".") > 1
        }

    if subspaces(theirs) and subspaces(ours) and subspaces(theirs) != subspaces(ours):
        raise ValueError(
            f"state_dict: {name} has the subspaces {sorted(subspaces(theirs))} there and {sorted(subspaces(ours))} "
            "here: use the same tasks"
        )


def restore(
    saved: Mapping[str, Any], params: Sequence[Tensor], state: Mapping[Tensor, Any], earlier: Mapping[Tensor, Any]
) -> None:
    """Put the saved tensors back with the dtypes they had.

    torch casts what it loads to the parameter's dtype, which would round float32 moments of bfloat16 weights and turn
    counts into floats.

    Args:
        saved: the state dict that was loaded.
        params: the parameters in the order of the groups.
        state: what torch made of it.
        earlier: the state before, for the devices.
    """
    order = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(order, params, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                like = earlier.get(parameter, {}).get(key)
                device = like.device if isinstance(like, Tensor) else parameter.device if value.ndim else value.device
                state[parameter][key] = value.detach().to(device, copy=True)


def group_parameters(groups: Sequence[Mapping[str, Any]]) -> list[torch.nn.Parameter]:
    """All parameters in the order in which a state dict counts them."""
    return [parameter for group in groups for parameter in group["params"]]
