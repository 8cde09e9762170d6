"""All rows take turns in one process; then one step of each is counted, and a few are watched."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsub import NullSpace

from ..alternate import quiet_collector
from ..two_tasks import Contender, Workload
from .rows import METHODS, all_rows
from .watch import Operations, count, own_milliseconds

_WATCHED_STEPS = 3


def workload(config: Mapping[str, Any]) -> Workload:
    """What the config describes."""

    def protect(model: nn.Module) -> NullSpace:
        # Fewer tokens than directions: what they leave is room for the bases, and differs from layer to layer.
        tokens = torch.arange(config["protected_tokens"]) % config["model"]["vocab_size"]
        return NullSpace(energy=config["energy"]).collect(model, [tokens[None]], normalize=True)

    return Workload(config["model"], config["rows"], config["length"], config["rank"], protect)


def measure(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every row's operations and seconds, and where most of them are.

    Raises:
        RuntimeError: a row in which all layers should be refreshed left some as they were.
    """
    torch.set_num_threads(config["threads"])
    given = workload(config)
    contenders = {name: Contender(method, given) for name, method in METHODS.items()}
    seconds = _take_turns(contenders, config["warm_up"], config["rounds"])
    operations = _count(contenders)
    functions = _watch(contenders)
    rows = all_rows()
    return {
        "layers": len(contenders["gems"].weights),
        "rows": {
            row.name: {
                "summary": row.summary,
                "against": row.against,
                "refreshes": row.refreshes,
                **{
                    part: {
                        "operations": operations[row.name][part].names.total(),
                        "seconds": [taken[part] for taken in seconds[row.name]],
                    }
                    for part in ("passes", "step")
                },
            }
            for row in rows
        },
        "worst": {
            row.name: {
                **{
                    f"{kind}, {part}": _most(
                        getattr(operations[row.name][part], kind),
                        getattr(operations[row.against][part], kind),
                        config["worst_places"],
                    )
                    for kind in ("names", "places")
                    for part in ("passes", "step")
                },
                "functions": _most(functions[row.name], functions[row.against], config["worst_places"]),
            }
            for row in rows
            if METHODS[row.method].optimizer == "gems"
        },
    }


def _take_turns(contenders: Mapping[str, Contender], warm_up: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    rows = all_rows()
    found: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    with quiet_collector() as collect:
        for turn in range(warm_up + rounds):
            for row in rows:
                contender = contenders[row.method]
                collect()
                start = time.perf_counter()
                contender.passes()
                between = time.perf_counter()
                contender.step()
                end = time.perf_counter()
                if turn >= warm_up:
                    found[row.name].append({"passes": between - start, "step": end - between})
    return found


def _count(contenders: Mapping[str, Contender]) -> dict[str, dict[str, Operations]]:
    found = {}
    for row in all_rows():
        contender = contenders[row.method]
        before = _bases(contender) if row.refreshes else []
        found[row.name] = {"passes": count(contender.passes), "step": count(contender.step)}
        after = _bases(contender) if row.refreshes else []
        same = sum(bool(torch.equal(old, new)) for old, new in zip(before, after, strict=True))
        if same:
            raise RuntimeError(f"{row.name}: {same} of {len(before)} layers kept their bases, all should be refreshed")
    return found


def _bases(contender: Contender) -> list[Tensor]:
    return [contender.optimizer.state[weight]["basis"].clone() for weight in contender.weights]


def _watch(contenders: Mapping[str, Contender]) -> dict[str, Counter[str]]:
    """Own milliseconds of python's functions: the least of a few steps, since other work only adds to them."""
    least: dict[str, Counter[str]] = {}
    for _ in range(_WATCHED_STEPS):
        for row in all_rows():
            contender = contenders[row.method]
            found = own_milliseconds(contender.whole_step)
            least[row.name] = least[row.name] & found if row.name in least else found
    return least


def _most(found: Counter[str], other: Counter[str], length: int) -> list[tuple[str, float, float]]:
    """Name, how much there is, and how much more than in the other row; only what is more."""
    more = Counter({name: value - other[name] for name, value in found.items()})
    return [(name, round(found[name], 3), round(excess, 3)) for name, excess in more.most_common(length) if excess > 0]
