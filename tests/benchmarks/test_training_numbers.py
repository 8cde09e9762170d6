"""What the training benchmark derives and counts, against numbers known in advance."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from benchmarks.training.config import CONFIGS, Centre, Config, Target, load
from benchmarks.training.contenders import Key
from benchmarks.training.data import join, make_batches
from benchmarks.training.derived import Result
from benchmarks.training.memory import trace
from benchmarks.training.methods import METHODS, PROTECTED
from benchmarks.training.methods._training import tensor_bytes
from benchmarks.training.models import build_model, trained_layers
from benchmarks.training.problem import Problem
from benchmarks.training.protection import SHARES, fit
from benchmarks.training.targets import check_targets

OURS, PEER = Key("gems-fused", 2), Key("adamw", 2)


def entry(key: Key, **values: object) -> dict[str, object]:
    return {"method": key.method, "tasks": key.tasks, **values}


def test_ratios_are_formed_within_a_round() -> None:
    """The machine was ten times slower in the second round: no difference between the methods."""
    steps = [entry(OURS, seconds=[1.0, 10.0, 1.0]), entry(PEER, seconds=[2.0, 20.0, 2.0])]
    ratio = Result({"steps": steps}).step_ratio(OURS, PEER)
    assert (ratio.low, ratio.median, ratio.high) == (0.5, 0.5, 0.5)


def test_the_worst_refresh_is_a_place_in_the_cycle() -> None:
    """One disturbed step in three cycles is no refresh; one that is slow in all of them is."""
    refreshing = [1.0, 3.0, 1.0, 3.0, 9.0, 3.0]
    entries = [entry(OURS, gap=2, ordinary=[1.0] * 6, refreshing=refreshing)]
    ratio = Result({"refreshes": entries}).refresh_ratio(OURS)
    assert ratio.worst == 3.0
    assert ratio.mean == pytest.approx(20 / 6)


def outcomes(config: Config, case: dict[str, object]) -> list[str]:
    name = config.cases[0].name
    return [outcome.verdict for outcome in check_targets(config, {name: Result({"unavailable": {}, **case})})]


def test_targets() -> None:
    full = load(CONFIGS / "full.yaml")
    case = next(case for case in full.cases if case.rank == 64 and case.tasks == (2,) and case.tokens == 2048)
    targets = (
        Target("step", "gems-fused", 0.75, against="adamw"),
        Target("step", "gems-fused", 0.4, against="adamw"),
        Target("peak", "gems-fused", 1.0, against="adamw"),
        Target("step", "gems-fused", 1.0, against="lora"),
    )
    config = Config(1, 1, {case.model: {"architecture": case.model}}, (case,), Centre(2048, 64, 2), targets)
    steps = [entry(OURS, seconds=[1.0]), entry(PEER, seconds=[2.0])]
    memory = [
        entry(OURS, parameter_bytes=10, held_bytes=12, peak_bytes=30),
        entry(PEER, parameter_bytes=10, held_bytes=30, peak_bytes=35),
    ]
    assert outcomes(config, {"steps": steps, "memory": memory}) == [
        "hit, 33 % below",
        "missed by 25 %",
        "hit, 20 % below",
        "not measured: it was left out of the measurement",
    ]


def test_memory_counts_every_allocation_and_release() -> None:
    def prepare():
        kept = torch.zeros(250, 1000)  # 1 MB
        released = [torch.zeros(500, 1000)]  # 2 MB, allocated before the step and released in it

        def step() -> None:
            first = kept + kept  # at 1 + 2 + 1
            second = torch.cat([first, first, first])  # at 1 + 2 + 1 + 3
            released.clear()
            del first, second
            torch.zeros(1000, 1000)  # at 1 + 4, less than before

        return step

    memory = trace(prepare)
    assert memory.held == 3_000_000
    assert memory.peak == pytest.approx(7_000_000, abs=64)


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_all_numbers_of_tasks_see_the_same_rows(encoder_decoder: bool) -> None:
    whole = join(make_batches(Problem(512, 4, 1, 16), 50, encoder_decoder))
    split = make_batches(Problem(512, 4, 4, 16), 50, encoder_decoder)
    assert [batch.rows for batch in split] == [4 if encoder_decoder else 8] * 4
    assert torch.equal(join(split).targets, whole.targets)
    assert all(torch.equal(join(split).inputs[name], values) for name, values in whole.inputs.items())
    processed = sum(values.numel() for values in whole.inputs.values())
    assert processed == 512


def test_rows_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks=3.*multiple of 48"):
        make_batches(Problem(64, 4, 3, 16), 50, False)


def test_shared_tensors_count_once() -> None:
    tensor = torch.zeros(10)
    assert tensor_bytes({"a": tensor, "b": [tensor, {"c": torch.zeros(5)}], "d": 3}) == 60


def test_the_commands_are_documented() -> None:
    from benchmarks.training import cli

    text = (CONFIGS.parent / "README.md").read_text()
    assert all(f"`{name}`" in text for name in ("run", "report", "profile"))
    assert "report | profile" in inspect.getdoc(cli)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("name", "inputs"), [("t5", 2 * 4 + 2 * 6 + 1), ("llama", 2 * 4)])
def test_null_spaces_have_the_shares_and_layers_with_one_input_one_of_them(name: str, inputs: int, side: str) -> None:
    config = load(CONFIGS / "quick.yaml")
    model = build_model(config.models[name], 0)
    (batch,) = make_batches(Problem(32, 4, 1, sequence_length=16), model.config.vocab_size, name == "t5")
    null_space, size = fit(model, batch.inputs, side, seed=0)
    layers = trained_layers(model)
    assert set(null_space) == set(layers)
    wanted = [share for _, share in SHARES]
    for layer, module in layers.items():
        width = module.weight.shape[1 if side == "input" else 0]
        nearest = min(abs(null_space.protected_fraction(layer) - share) for share in wanted)
        assert null_space.basis(layer).shape[0] == width
        assert nearest <= 0.5 / width + 1e-9
    distinct = null_space._shared.distinct().values()
    assert len(distinct) == (inputs if side == "input" else len(layers))
    assert sum(each.stored.nbytes for each in distinct) < size < 2**20
    assert "forward" not in vars(model)  # what fitting borrowed is given back


def test_what_is_measured_with_a_null_space_is_measured_without() -> None:
    assert len(PROTECTED) == 4
    assert set(PROTECTED.values()) <= set(METHODS)
    for path in CONFIGS.glob("*.yaml"):
        for case in load(path).cases:
            for listed in (case.methods, case.memory):
                assert all(PROTECTED[name] in listed for name in listed if name in PROTECTED), (path, case.name)
    for case in load(CONFIGS / "full.yaml").cases:  # and the other way round
        assert {*PROTECTED.values()} & {*case.methods} == {PROTECTED[m] for m in case.methods if m in PROTECTED}


def test_a_case_may_have_rounds_of_its_own_and_the_command_overrides_both(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "config.yaml"
    raw = yaml.safe_load((CONFIGS / "quick.yaml").read_text(encoding="utf-8"))
    raw["cases"][1]["rounds"] = 7
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    config = load(path)
    assert [config.settings(case)["rounds"] for case in config.cases[:2]] == [raw["rounds"], 7]
    config = load(path, rounds=2)
    assert {config.rounds_of(case) for case in config.cases} == {2}
    raw["cases"][1]["rounds"] = 0
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rounds=0 has to be a positive whole number"):
        load(path)
