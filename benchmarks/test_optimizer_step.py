"""One step of `GemsOptimizer` against torch's AdamW and galore-torch's GaLoreAdamW: same model, same losses."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace

from .alternate import OURS, alternate
from .settings import CONFIG
from .training.protection import ENERGY, features_of

STEP = CONFIG["step"]
TASKS = ("search", "rec")


@dataclass
class Contender:
    backward: Callable[[], None]
    step: Callable[[], None]

    def both(self) -> None:
        self.backward()
        self.step()


def _model() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in pairwise(STEP["widths"]):
        layers += [nn.Linear(inner, outer, bias=False), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _weights_and_data() -> tuple[nn.Sequential, dict[str, tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model()
        shape = STEP["examples_per_task"]
        data = {task: (torch.randn(shape, STEP["widths"][0]), torch.randn(shape, STEP["widths"][-1])) for task in TASKS}
    return model, data


def _gradsub(gap: int, protected: float = 0.0) -> Contender:
    model, data = _weights_and_data()
    null_space = _null_space(model, protected) if protected else None
    base = torch.optim.AdamW(model.parameters(), lr=STEP["lr"], weight_decay=STEP["weight_decay"])
    optimizer = GemsOptimizer(
        base, tasks=TASKS, rank=STEP["rank"], update_proj_gap=gap, model=model, null_space=null_space
    )

    def backward() -> None:
        for task, (x, y) in data.items():
            with optimizer.task(task, samples=len(x)):
                nn.functional.mse_loss(model(x), y).backward()

    return Contender(backward, _step_and_clear(optimizer))


def _protected(gap: int) -> Contender:
    return _gradsub(gap, STEP["protected"])


def _null_space(model: nn.Sequential, share: float) -> NullSpace:
    null_space = NullSpace(energy=ENERGY)
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            null_space.update(name, features_of(layer.in_features, share, generator))
    return null_space


def _plain(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer) -> Contender:
    def backward() -> None:
        for x, y in data.values():
            (nn.functional.mse_loss(model(x), y) / len(data)).backward()

    return Contender(backward, _step_and_clear(optimizer))


def _step_and_clear(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def _adamw(gap: int) -> Contender:
    del gap  # it has no subspace to refresh
    model, data = _weights_and_data()
    return _plain(model, data, torch.optim.AdamW(model.parameters(), lr=STEP["lr"], weight_decay=STEP["weight_decay"]))


def _galore(gap: int) -> Contender:
    galore = pytest.importorskip("galore_torch", exc_type=ImportError)
    model, data = _weights_and_data()
    group = {
        "params": list(model.parameters()),
        "rank": STEP["rank"],
        "update_proj_gap": gap,
        "scale": 1.0,
        "proj_type": "std",
    }
    optimizer = galore.GaLoreAdamW(
        [group], lr=STEP["lr"], weight_decay=STEP["weight_decay"], no_deprecation_warning=True
    )
    return _plain(model, data, optimizer)


MAKERS: dict[str, Callable[[int], Contender]] = {
    OURS: _gradsub,
    f"gradsub, null space of energy {ENERGY}": _protected,
    "torch AdamW": _adamw,
    "galore-torch": _galore,
}
NEVER = 10**6
GAPS = {"between refreshes": NEVER, "refresh at every step": 1}
WHOLE_GAP = f"backward+step, {STEP['update_proj_gap']} steps and their refresh, the mean"


def _rounds(gap: int) -> int:
    return STEP["rounds"] if gap == NEVER else STEP["refresh_rounds"]


def _warm(name: str, gap: int) -> Contender:
    contender = MAKERS[name](gap)
    for _ in range(2):  # the first step builds state and bases, whatever the gap
        contender.both()
    return contender


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("interval", GAPS)
@pytest.mark.parametrize("part", ["step", "backward+step"])
def test_step(benchmark: Any, part: str, interval: str, name: str) -> None:
    contender = _warm(name, GAPS[interval])
    benchmark.group = f"{part}, {interval}"
    benchmark.extra_info["contender"] = name
    rounds = _rounds(GAPS[interval])
    if part == "step":
        benchmark.pedantic(contender.step, setup=contender.backward, rounds=rounds)
    else:
        benchmark.pedantic(contender.both, rounds=rounds)


@pytest.mark.parametrize("interval", GAPS)
@pytest.mark.parametrize("part", ["step", "backward+step"])
def test_step_alternating(benchmark: Any, part: str, interval: str) -> None:
    contenders = {name: _warm(name, GAPS[interval]) for name in MAKERS}
    benchmark.group = f"{part}, {interval}"
    alone = part == "step"
    benchmark.extra_info["alternating"] = benchmark.pedantic(
        alternate,
        args=(
            {name: each.step if alone else each.both for name, each in contenders.items()},
            _rounds(GAPS[interval]),
            {name: each.backward for name, each in contenders.items()} if alone else None,
        ),
        rounds=1,
    )


@pytest.mark.parametrize("name", MAKERS)
def test_gap(benchmark: Any, name: str) -> None:
    contender = _warm(name, STEP["update_proj_gap"])
    benchmark.group = WHOLE_GAP
    benchmark.extra_info["contender"] = name
    benchmark.pedantic(contender.both, rounds=1, iterations=STEP["update_proj_gap"])


def test_gap_alternating(benchmark: Any) -> None:
    gap = STEP["update_proj_gap"]
    contenders = {name: _warm(name, gap) for name in MAKERS}
    benchmark.group = WHOLE_GAP
    benchmark.extra_info["alternating"] = benchmark.pedantic(
        alternate,
        args=({name: partial(_repeat, each.both, gap) for name, each in contenders.items()}, STEP["gap_rounds"]),
        kwargs={"warm_up": 0},
        rounds=1,
    )


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()
