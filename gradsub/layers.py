"""Which layers of a model a method acts on, by peft's `target_modules` convention."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from torch import Tensor, nn

from gradsub._kinds import check_kind

__all__ = [
    "ALL_LINEAR",
    "is_linear",
    "is_transposed",
    "named_layers",
    "named_parameters",
    "other_matrices",
    "select_layers",
    "unwrap",
]

ALL_LINEAR: Final = "all-linear"


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as ``in_features x out_features``: GPT-2's ``Conv1D``.

    Recognised by name, so that the core needs no transformers.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether the module maps features by one 2-D weight matrix."""
    if isinstance(module, nn.Linear):
        return True
    return is_transposed(module) and isinstance(getattr(module, "weight", None), Tensor)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrapper of ``torch.compile``, data parallelism or checkpointing, which adds no name."""
    for attribute in ("_orig_mod", "_checkpoint_wrapped_module"):
        inside = getattr(model, attribute, None)
        if isinstance(inside, nn.Module):
            return unwrap(inside)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    return model


def named_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, as if no wrapper stood anywhere in between."""
    model = unwrap(model)
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None:
            yield from named_layers(child, f"{prefix}.{name}" if prefix else name)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names, as of `named_layers`."""
    for layer, module in named_layers(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{layer}.{name}" if layer else name, parameter


def check_targets(target_modules: str | Iterable[str]) -> None:
    """Raise a ValueError if no model could have such layers: a string that is no regular expression."""
    check_kind("target_modules", target_modules, Iterable, "a regular expression, or a collection of layers' names")
    if isinstance(target_modules, str):
        _pattern(target_modules)


def select_layers(model: nn.Module, target_modules: str | Iterable[str] = ALL_LINEAR) -> dict[str, nn.Module]:
    """The linear layers of ``model`` that ``target_modules`` names, in the model's order.

    Args:
        model: any module.
        target_modules: ``"all-linear"`` takes every linear layer but the output head (what
            ``model.get_output_embeddings()`` returns, where the model has it); any other string is a regular
            expression that the whole name must match; a collection of strings names modules by their full name or by
            its last components (``"q_proj"`` takes every layer whose name ends in ``.q_proj``).

    Raises:
        ValueError: nothing matches, and the message lists the layers there are; or a string is no regular expression.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        >>> list(select_layers(model)), list(select_layers(model, ["value"]))
        (['query', 'value'], ['value'])
    """
    check_targets(target_modules)
    linear = {name: module for name, module in named_layers(model) if is_linear(module)}
    if target_modules == ALL_LINEAR:
        head = _head(model)
        chosen = {name: module for name, module in linear.items() if module is not head}
    elif isinstance(target_modules, str):
        chosen = {name: module for name, module in linear.items() if _names(target_modules, name)}
    else:
        targets = tuple(target_modules)
        chosen = {name: module for name, module in linear.items() if _names(targets, name)}
        unmatched = [target for target in targets if not any(_names((target,), name) for name in chosen)]
        if unmatched and chosen:
            raise ValueError(f"target_modules: {unmatched} match no linear layer; {_listing(linear)}")
    if not chosen:
        raise ValueError(f"target_modules={target_modules!r} matches no linear layer of the model; {_listing(linear)}")
    return chosen


def other_matrices(model: nn.Module, target_modules: str | Iterable[str] = ALL_LINEAR) -> dict[str, nn.Parameter]:
    """Parameters with two dimensions or more that `select_layers` leaves out though ``target_modules`` names them.

    These are the matrices of modules that are no linear layer: fused experts, convolutions, recurrent layers, the joint
    projection of torch's attention. ``"all-linear"`` names every one but embeddings and the output head.
    """
    targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    head = _head(model)
    found: dict[str, nn.Parameter] = {}
    below: list[str] = []
    for layer, module in named_layers(model):
        if is_linear(module) or module is head or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            below.append(f"{layer}." if layer else "")
        if any(f"{layer}.".startswith(prefix) for prefix in below):
            continue  # also what a parametrized weight is computed from
        if targets == ALL_LINEAR or _names(targets, layer):
            own = {key: p for key, p in module._parameters.items() if p is not None and p.ndim > 1}
            found.update({f"{layer}.{key}" if layer else key: p for key, p in own.items()})
    return found


def _names(target_modules: str | Iterable[str], name: str) -> bool:
    if isinstance(target_modules, str):
        return _pattern(target_modules).fullmatch(name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _pattern(target_modules: str) -> re.Pattern[str]:
    try:
        return re.compile(target_modules)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"target_modules={target_modules!r} is no regular expression ({error}): write one that the whole name of a "
            f"layer matches (such as r'.*\\.q_proj'), {ALL_LINEAR!r}, or a list of names"
        ) from error


def _head(model: nn.Module) -> object:
    output = getattr(unwrap(model), "get_output_embeddings", None)
    return output() if callable(output) else None


def _listing(linear: dict[str, nn.Module]) -> str:
    names = list(linear)
    if not names:
        return "the model has no linear layer at all"
    return f"the linear layers are {names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def some(names: Collection[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    listed = ", ".join(list(names)[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")
