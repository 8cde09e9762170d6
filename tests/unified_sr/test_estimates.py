"""Estimates are held to what models, optimizers and autograd really take."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.unified_sr import time_left
from examples.unified_sr.cli import main
from examples.unified_sr.config import resolve
from examples.unified_sr.data import Example, Item
from examples.unified_sr.feeds import Pool
from examples.unified_sr.grid._forecast import Cost
from examples.unified_sr.losses import Pass
from examples.unified_sr.memory import (
    RowSize,
    estimate_memory,
    free_memory,
    peak_memory,
    reset_peak_memory,
    row_size,
)
from examples.unified_sr.methods import Setup, method_named
from examples.unified_sr.methods._mixed import MixedLossUpdater
from examples.unified_sr.model import Collator, PromptBuilder, Ranker, load_language_model
from examples.unified_sr.settings import TrainingSettings

ITEMS = [Item(str(n), f"title {n}") for n in range(7)]
ROWS = [Example("rec", "u", tuple(range(6)), "", (6,), 0.0, f"r{n}") for n in range(8)]
CPU = torch.device("cpu")


def world(folder: str, method: str, *pairs: str) -> tuple[Ranker, Any, Any]:
    """A ranker, the updater of a method on it, and a batch of the task rec."""
    language_model = load_language_model(folder)
    ranker = Ranker(language_model, ITEMS)
    prompts = PromptBuilder(
        language_model.tokenizer, first_item=ranker.first_item, encoder_decoder=language_model.encoder_decoder
    )
    settings = resolve(pairs=pairs, flags={"method.name": method})
    build = method_named(method).build
    assert build is not None
    updater = build(Setup(ranker, settings, ("rec", "search"), lambda: iter(()), print))
    return ranker, updater, Collator(0)([prompts(row) for row in ROWS], [row.target for row in ROWS], "rec")


def estimated(ranker: Ranker, updater: Any, tokens: float = 20.0, autocast: bool = False, **training: Any) -> Any:
    settings = TrainingSettings(batch_size=8, **training)
    return estimate_memory(ranker, updater.optimizer, settings, RowSize(tokens, 1.0), tasks=2, autocast=autocast)


def held(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("method", "pairs"),
    [
        ("adamw", ()),
        ("lora", ("method.rank=4",)),
        ("gems", ("method.rank=4", "method.protect=false")),
        ("gems-no-task", ("method.rank=4", "method.protect=false")),
    ],
)
def test_gradients_and_moments_are_counted_exactly(
    method: str, pairs: tuple[str, ...], model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker, updater, batch = world(model_folder, method, *pairs)
    found, before = estimated(ranker, updater), held(updater.optimizer)
    apart: list[int] = []
    if isinstance(updater, MixedLossUpdater):
        combine = updater._combine

        def watched(parts: Any, measure: bool) -> None:
            kept = (gradient for part in parts.values() for gradient in part if gradient is not None)
            apart.append(sum(gradient.numel() * gradient.element_size() for gradient in kept))
            combine(parts, measure)

        monkeypatch.setattr(updater, "_combine", watched)
    passes = [Pass({task: 8}, lambda task=task: {task: ranker.loss(batch)}) for task in ("rec", "search")]  # type: ignore[misc]
    updater.update(passes, measure=True)
    # Adam's step counters are left out.
    assert found.moments == pytest.approx(held(updater.optimizer) - before, rel=0.01)
    if method != "gems":
        assert apart == [found.gradients]


@pytest.mark.parametrize(("method", "checkpointing"), [("adamw", False), ("adamw", True), ("lora", False)])
def test_activations_are_of_the_right_size(method: str, checkpointing: bool, model_folder: str) -> None:
    ranker, updater, batch = world(model_folder, method)
    ranker.train()
    if checkpointing:
        ranker.recompute_activations()
    weights = {weight.data_ptr() for weight in ranker.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = ranker.loss(batch)
    tokens = batch.input_ids.shape[1]
    found = estimated(ranker, updater, float(tokens), gradient_checkpointing=checkpointing).activations
    del loss
    # A block that is computed again holds its activations then, which the hooks of the forward pass do not see.
    assert (0.2 if checkpointing else 0.5) * found < sum(saved.values()) < 2 * found


def test_what_saves_memory_lowers_the_estimate(llama_folder: str) -> None:
    ranker, updater, _ = world(llama_folder, "adamw")
    plain = estimated(ranker, updater).activations
    assert estimated(ranker, updater, accumulation=4).activations == pytest.approx(plain / 4)
    assert estimated(ranker, updater, gradient_checkpointing=True).activations < plain
    assert (
        estimated(ranker, updater, tokens=200.0, autocast=True).activations
        < estimated(ranker, updater, 200.0).activations
    )
    own = ("method.rank=4", "method.protect=false", "method.capture=fused")
    inside = estimated(*world(llama_folder, "gems", *own)[:2])
    outside = estimated(*world(llama_folder, "gems", *own, "method.side=output")[:2])
    assert inside.activations < outside.activations == plain
    assert str(inside).startswith("about 0.0 GiB (gradients 0.00, moments 0.00")


def test_rows_are_measured_on_a_sample_of_the_longest_stream() -> None:
    pools = {"rec": Pool("rec", ROWS * 200), "search": Pool("search", [replace(ROWS[0], history=(1,))])}
    seen: list[Example] = []
    found = row_size(pools, lambda row: seen.append(row) or (len(row.history), 2))  # type: ignore[func-returns-value]
    assert found == RowSize(6.0, 2.0)
    assert len(seen) == 257


def test_a_run_costs_what_the_like_of_it_cost() -> None:
    summary = {
        "seconds": {"loading": 20.0, "preparation": 4.0, "zero-shot evaluation": 10.0, "final evaluation": 14.0},
        "evaluated": {"rec": 50, "search": 70},
        "throughput": {"seconds_per_step": 5.0},
    }
    cost = Cost.of(summary)
    assert (cost.fixed, cost.per_step, cost.per_query) == (24.0, 5.0, 0.1)
    assert cost.seconds(steps=10, queries=120) == pytest.approx(24 + 50 + 24)
    untrained = Cost.of({**summary, "throughput": {}, "seconds": {"loading": 20.0, "zero-shot evaluation": 12.0}})
    assert (untrained.per_step, untrained.per_query) == (0.0, 0.1)
    assert Cost.typical([cost, cost, untrained]) == Cost(24.0, 5.0, 0.1)
    assert doctest.testmod(time_left).failed == 0
    assert doctest.testmod(time_left).attempted


def test_peak_memory_sees_what_is_gone() -> None:
    before = peak_memory(CPU)["resident"]
    block = torch.ones(50_000_000)
    peak = peak_memory(CPU)["resident"]
    assert before is not None
    assert peak is not None
    assert peak > block.numel() * 4
    del block
    assert peak_memory(CPU)["resident"] == pytest.approx(peak, rel=0.01)
    assert peak_memory(CPU)["device"] is None
    if Path("/proc/self/clear_refs").exists():
        reset_peak_memory(CPU)
        after = peak_memory(CPU)["resident"]
        assert after is not None
        assert after < peak - 100_000_000
    assert free_memory(CPU) > 0


def test_a_run_says_beforehand_what_it_takes(
    llama_folder: str, data_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [
        "training.batch_size=4",
        "evaluation.perplexity_tokens=64",
        "evaluation.perplexity_window=64",
        "data.min_user_events=3",
    ]
    line = ["run", "--data", data_folder, "--model", llama_folder, "--method", "adamw", "--steps", "5"]
    assert main([*line, "--out", str(tmp_path / "run"), "--set", *small]) == 0
    printed = capsys.readouterr().out
    assert "memory: training takes about 0.0 GiB (gradients 0.00, moments 0.00, activations" in printed
    assert "an estimate" in printed
    assert "for 2 further steps of" in printed
    summary = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert summary["peak_memory"]["resident"] > 2**27
    assert "Peak memory of the process" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
