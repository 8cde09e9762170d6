"""What trains although no null space holds it: found, and frozen by one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradsub._coverage import Coverage
from gradsub._effective import own_weight
from gradsub._kinds import check_kind
from gradsub.layers import ALL_LINEAR, is_linear, named_layers, named_parameters, select_layers, some
from gradsub.null_space import NullSpace
from gradsub.subspace import shards_of

__all__ = ["freeze_unprotected"]


class Use(NamedTuple):
    """A module that has a parameter of its own, under all its names, and what it calls the parameter."""

    module: nn.Module
    key: str
    names: list[str]


def uses_of(model: nn.Module) -> dict[Tensor, list[Use]]:
    """Every parameter, and the modules that have it."""
    found: dict[Tensor, dict[tuple[int, str], Use]] = defaultdict(dict)
    for name, module in named_layers(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[parameter].setdefault((id(module), key), Use(module, key, [])).names.append(name)
    return {parameter: list(uses.values()) for parameter, uses in found.items()}


def known_everywhere(uses: Iterable[Use], knows: Callable[[str], bool]) -> bool:
    """Whether each use of a weight is a linear layer that the null space knows.

    An embedding that lends its weight to the output head moves with the head, and its rows are nobody's inputs.
    """
    return all(use.key == "weight" and is_linear(use.module) and any(map(knows, use.names)) for use in uses)


def embeds_alone(uses: Collection[Use]) -> bool:
    """Whether a weight is looked up by rows, and nothing else."""
    return bool(uses) and all(isinstance(use.module, nn.Embedding) and use.key == "weight" for use in uses)


def freeze_unprotected(
    model: nn.Module,
    null_space: NullSpace,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    *,
    new_tokens: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
) -> list[str]:
    """Freeze every parameter through which training could change what ``null_space`` protects elsewhere.

    What stays trainable is what `GemsOptimizer` moves inside of its null space alone: weights of targeted linear layers
    that the null space knows, in each place where they are used, and the norm weights and biases of
    `NullSpace.collect_gradients`. Embeddings, other norms and biases, output heads, adapters, convolutions and layers
    that were not collected are frozen. So is an embedding whose weight the output head shares. Call it before
    `GemsOptimizer` wraps the base optimizer, and again in a resumed run: checkpoints hold no ``requires_grad``.

    Args:
        model: the model to train; ``requires_grad`` is set to False, and ``.grad`` to None, of what is frozen.
        null_space: what was collected on it.
        target_modules: as passed to `GemsOptimizer`; what that leaves out takes plain steps, so it is frozen.
        new_tokens: ids of tokens that general text does not contain, such as those that were added. Their rows of the
            input embedding are trainable, also if it was frozen before; all other rows rest, bit for bit, in any
            optimizer built with this ``null_space``, which remembers them (`NullSpace.save` does not). A mapping gives
            the ids for each embedding by its name, where the model has several and does not say which reads the tokens.

    Returns:
        the names of the parameters that it froze, in the model's order.

    Raises:
        TypeError: ``null_space`` is none.
        ValueError: the null space holds no weight of the model; or ``new_tokens`` names a row or an embedding that is
            not there, or one whose weight another module shares, where new rows would be new outputs. Nothing is
            frozen then.

    Example:
        >>> import torch, gradsub
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
        >>> null_space = gradsub.NullSpace(energy=0.5).collect(model, [torch.arange(8)])
        >>> gradsub.freeze_unprotected(model, null_space, new_tokens=[8])
        ['1.weight', '1.bias', '2.bias']
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    if not isinstance(null_space, NullSpace):
        raise TypeError(
            f"null_space must be a NullSpace, found {type(null_space).__name__}: collect one with "
            "NullSpace(...).collect(model, batches); without a null space nothing is protected, so nothing is frozen"
        )
    uses = uses_of(model)
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in named_parameters(model):
        names[parameter].append(name)
    free = _free_rows(model, uses, names, new_tokens)
    targets = select_layers(model, target_modules)
    weights = [weight for weight in map(own_weight, targets.values()) if weight is not None and weight.ndim > 1]
    held: set[Tensor] = {weight for weight in weights if known_everywhere(uses[weight], null_space.__contains__)}
    if not held:
        raise ValueError(
            f"null_space knows {some(list(null_space), 4)}, but none of the layers that target_modules names "
            f"({some(list(targets), 4)}): collect it on this model, or pass the target_modules of the optimizer"
        )
    held |= {parameter for parameter in names if _known_vector(parameter, names[parameter], null_space)}
    new_rows = {_parameter(names, name) for name in free}
    trained = [parameter for parameter in names if parameter.requires_grad or parameter in new_rows]
    stays = held | new_rows
    frozen = {parameter for parameter in trained if parameter not in stays}
    _freeze(frozen)
    # Only now is it seen which layers answer with something else than what is held.
    given = [parameter for parameter in trained if parameter in held]
    coverage = Coverage(model, given, held, {p: called[0] for p, called in names.items()}, targets)
    layers = dict(named_layers(model))
    for name in null_space:
        if name in targets and coverage.loose(name, null_space.side == "input") is not None:
            around = layers[coverage.adapter(name) or name]
            frozen.update(p for p in around.parameters() if p.requires_grad)
    if not any(p.requires_grad and p not in frozen and p.ndim > 1 for p in held):
        for each in frozen:
            each.requires_grad_(True)
        raise ValueError(
            "null_space holds no weight of the model that trains: what it knows is frozen already, or answers with "
            "something else than its weight (adapters, parametrizations). Train the layers themselves"
        )
    _freeze(frozen)
    for rows in new_rows:
        rows.requires_grad_(True)  # a call without new_tokens, or the user, may have frozen the whole embedding
    null_space._free_rows.update(free)
    return [names[parameter][0] for parameter in trained if parameter in frozen]


def _freeze(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None  # or the next step would still take it


def _known_vector(parameter: Tensor, names: Iterable[str], null_space: NullSpace) -> bool:
    if parameter.ndim != 1 or not any(name.removesuffix(".weight") in null_space for name in names):
        return False
    try:
        shards_of(parameter, "a vector")
    except ValueError:
        return False  # tensor-parallel: not protected
    return True


def _parameter(names: Mapping[Tensor, list[str]], name: str) -> Tensor:
    return next(parameter for parameter, called in names.items() if name in called)


def _free_rows(
    model: nn.Module,
    uses: Mapping[Tensor, Collection[Use]],
    names: Mapping[Tensor, list[str]],
    new_tokens: Iterable[int] | Mapping[str, Iterable[int]] | None,
) -> dict[str, Tensor]:
    """By the parameter's name, the rows (V) that may move."""
    if new_tokens is None:
        return {}
    layers = dict(named_layers(model))
    chosen = new_tokens if isinstance(new_tokens, Mapping) else {_reads_tokens(model, layers): new_tokens}
    found = {}
    for name, ids in chosen.items():
        module = layers.get(name)
        if not isinstance(module, nn.Embedding) or own_weight(module) is None:
            raise ValueError(f"new_tokens names {name!r}, which is no embedding of the model with a weight of its own")
        others = [use for use in uses[module.weight] if not isinstance(use.module, nn.Embedding)]
        if others:
            raise ValueError(
                f"new_tokens: the weight of {name!r} is also that of {some(others[0].names)}, so new rows would be new "
                "outputs for general text as well: give the head a weight of its own, or leave new_tokens out, which "
                "freezes both"
            )
        rows = torch.as_tensor(list(ids), dtype=torch.long, device="cpu")
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= module.num_embeddings:
            raise ValueError(
                f"new_tokens must be ids from 0 to {module.num_embeddings - 1} of {name!r}, found "
                f"{some([str(int(row)) for row in rows])}: resize the embedding before"
            )
        free = torch.zeros(module.num_embeddings, dtype=torch.bool, device="cpu")
        free[rows] = True
        found[names[module.weight][0]] = free
    return found


def _reads_tokens(model: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    embeddings = {name: module for name, module in layers.items() if isinstance(module, nn.Embedding)}
    asked = getattr(layers[""], "get_input_embeddings", None)
    try:
        told = asked() if callable(asked) else None
    except NotImplementedError:
        told = None
    among = [name for name, module in embeddings.items() if module is told] or list(embeddings)
    if len({id(embeddings[name]) for name in among}) != 1:
        raise ValueError(
            f"new_tokens: the model does not say which of its embeddings ({some(among, 8) or 'it has none'}) reads the "
            "tokens: pass {name: ids}"
        )
    return among[0]
