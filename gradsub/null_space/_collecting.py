from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsub.distributed import Ranks
from gradsub.layers import some
from gradsub.null_space._content import Content
from gradsub.null_space._features import observe_features, unit_rows
from gradsub.null_space._gradients import Loss, observe_gradients
from gradsub.null_space._ranks import OwnBatches, SharedBatches, merged_over_ranks
from gradsub.null_space._shared import Steps

_NO_BATCH = "batches is empty: collect needs at least one batch of general-domain data"


def collect_into(
    content: Content,
    model: nn.Module,
    batches: Iterable[Any],
    ranks: Ranks,
    shard: bool,
    collect: Callable[[Content, OwnBatches], int],
) -> None:
    """Let ``collect`` add what batches show to the content, on every rank with its part, which ends with all of it."""
    if ranks.size == 1:
        before = set(content.shared.by_name)
        try:
            if not collect(content, OwnBatches(batches)):
                raise ValueError(_NO_BATCH)
        except BaseException:
            # Or the same batches would count twice when they are collected again.
            content.shared.drop(set(content.shared.by_name) - before)
            raise
        return
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    mine = SharedBatches(ranks, batches, device) if shard else OwnBatches(batches)
    increment, failure = content.like(), None
    try:
        collect(increment, mine)
    except Exception as error:
        failure = error
    increment.shared = merged_over_ranks(ranks, increment.shared, device, mine.dealt, failure)
    if not increment.shared.by_name:
        raise ValueError(_NO_BATCH)
    content.merge(increment)


def collect_features(
    into: Content, batches: OwnBatches, *, model: nn.Module, layers: Mapping[str, nn.Module], side: str, normalize: bool
) -> int:
    """Run the batches and take in the layers' features of those that count; how many ran."""
    latest: tuple[Tensor, Tensor, Steps] | None = None

    def observe(name: str, features: Tensor) -> None:
        nonlocal latest
        if not batches.counts:
            return
        if latest is None or latest[0] is not features:
            latest = features, unit_rows(features) if normalize else features, []
        into.add(name, *latest[1:])
        into.shared.normalized[name] = normalize

    return observe_features(model, layers, batches, side, observe)


def collect_gradients(into: Content, batches: OwnBatches, *, model: nn.Module, loss: Loss) -> int:
    """Run the batches and take in the vectors' gradients of those that count; how many ran."""
    increment = into.like()

    def observe(name: str, gradients: Tensor) -> None:
        if batches.counts:
            increment.add(name, gradients, [])

    count, left_out = observe_gradients(model, batches, loss, observe)
    increment.shared.drop(left_out)
    if left_out:
        listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(left_out.items()))
        warnings.warn(
            f"no gradients are collected for {listed}. Nothing protects these; freeze them if they are to stay",
            stacklevel=4,
        )
    into.merge(increment)
    return count


def check_groups(layers_at_once: int, batches: Iterable[Any]) -> None:
    """Raise a ValueError unless batches can be run through once for every group of so many layers."""
    if type(layers_at_once) is not int or layers_at_once < 1:
        raise ValueError(f"layers_at_once={layers_at_once!r} must be a positive integer, or None for all layers")
    if iter(batches) is batches:
        raise ValueError(
            f"batches are a {type(batches).__name__}, which can be run through once, and layers_at_once="
            f"{layers_at_once} runs them for every group of layers: pass a list"
        )


def check_seen(content: Content, names: list[str], known: set[str]) -> None:
    """Name the layers that no features have reached so far, those in ``known`` not again; a ValueError if none did."""
    unseen = [name for name in names if name not in content.shared.by_name]
    if len(unseen) == len(names):
        raise ValueError(
            f"none of the targeted layers ({some(names)}) saw any features: the model does not call them, or all "
            "positions are masked; choose other target_modules, or pass other batches"
        )
    new = [name for name in unseen if name not in known]
    known.update(new)
    if new:
        warnings.warn(
            f"{some(new, 12)} saw no features, so nothing of them is protected: the model goes around them (as "
            "torch's attention does around its out_proj), or no token was sent there; pass more batches, freeze "
            "them, or leave them out of target_modules",
            stacklevel=3,
        )
