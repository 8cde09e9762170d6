"""The tasks' conflict as each method reports it, against a direct computation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from method_worlds import built, losses

from examples.unified_sr.cli import main
from examples.unified_sr.methods import METHODS
from examples.unified_sr.methods._conflict import cosines, gramians
from gradsub.linalg import subspace_angles

pytestmark = pytest.mark.filterwarnings("ignore:.*rank.*:UserWarning", "ignore:.*protects all.*:UserWarning")
SINGLE = ("adamw-rec", "adamw-search")
WHOLE = ("adamw", "lora", "galore", "pcgrad", "cagrad", "gems-no-task")


@pytest.mark.parametrize("method", WHOLE)
def test_the_cosine_is_that_of_the_whole_gradients(model_folder: str, method: str) -> None:
    ranker, updater = built(model_folder, method)
    for _ in range(2):  # LoRA's first gradients of one half are zero
        updater.update([*losses(ranker).values()])
    weights = [w for name, w in ranker.named_parameters() if w.requires_grad and not name.endswith("_rows")]
    tasks = [torch.autograd.grad(loss.compute()[task], weights) for task, loss in losses(ranker).items()]
    whole = [torch.cat([gradient.flatten() for gradient in task]) for task in tasks]
    each = [
        float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
        for a, b in zip(*tasks, strict=True)
        if a.norm() > 1e-6 * whole[0].norm() and b.norm() > 1e-6 * whole[1].norm()
    ]
    updater.update([*losses(ranker).values()], measure=True)
    found = updater.diagnostics()
    assert found is not None
    expected = float(torch.cosine_similarity(whole[0], whole[1], dim=0))
    assert found.cosine == {"rec|search": pytest.approx(expected, abs=1e-4)}
    assert found.cosines == {"rec|search": pytest.approx(sum(each) / len(each), abs=1e-4)}


@pytest.mark.parametrize("method", ["adamw", "lora", "pcgrad", "gems", "gems-no-task"])
def test_measuring_changes_nothing(llama_folder: str, method: str) -> None:
    found = []
    for measure in (False, True):
        torch.manual_seed(0)  # of the adapters
        ranker, updater = built(llama_folder, method)
        for _ in range(3):
            values = updater.update([*losses(ranker).values()], measure=measure)
        found.append((values, {name: weight.detach().clone() for name, weight in ranker.named_parameters()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(weight, found[1][1][name]) for name, weight in found[0][1].items())


def test_an_unmeasured_step_reports_nothing_old(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "adamw")
    updater.update([*losses(ranker).values()], measure=True)
    updater.update([*losses(ranker).values()])
    assert updater.diagnostics() is None


def test_gems_reports_the_angles_of_its_bases(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "gems", "method.task_rank=3")
    updater.update([*losses(ranker).values()], measure=True)
    found = updater.diagnostics()
    assert found is not None
    assert set(found.angles) == {"shared|rec", "shared|search", "rec|search"}
    smallest, alignment = [], []
    for state in updater.optimizer.state.values():
        if "basis" in state:
            rec, search = state["basis"][:, 4:7], state["basis"][:, 7:10]
            kept = [basis[:, basis.norm(dim=0) > 0.5] for basis in (rec, search)]
            angles = subspace_angles(*kept)
            smallest.append(float(angles.min()))
            alignment.append(float(angles.cos().mean()))
    assert len(smallest) == 14
    expected = {"mean_cosine": sum(alignment) / 14, "smallest": sum(smallest) / 14}
    assert found.angles["rec|search"] == pytest.approx(expected, abs=1e-5)


def test_gems_measures_the_cosine_inside_the_shared_subspaces(llama_folder: str) -> None:
    """With subspaces of all directions and nothing protected that is the cosine of the whole gradients."""
    values = []
    for method, pairs in (
        ("gems-no-null", ("method.rank=40",)),
        ("gems-no-task", ("method.rank=40", "method.protect=false")),
    ):
        ranker, updater = built(llama_folder, method, *pairs)
        updater.update([*losses(ranker).values()], measure=True)
        found = updater.diagnostics()
        assert found is not None
        values.append((found.cosine["rec|search"], found.cosines["rec|search"]))
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_absent_gradients_have_no_cosine() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [0.0]])
    found = gramians([[one, None, other], [None, None, -other]])
    assert found.tolist() == [[[25, 0], [0, 0]], [[0, 0], [0, 0]], [[1, -1], [-1, 1]]]
    assert [cosines(each, ("a", "b")) for each in found] == [{}, {}, {"a|b": -1.0}]


@pytest.mark.parametrize("method", ["adamw", "gems"])
def test_report_steps_carry_the_conflict(method: str, llama_folder: str, data_folder: str, tmp_path: Path) -> None:
    line = ["run", "--data", data_folder, "--model", llama_folder, "--method", method, "--steps", "5"]
    own = ["method.rank=4", "method.null_space_tokens=128"] if method == "gems" else []
    small = [
        "training.report_every=2",
        "training.batch_size=4",
        "evaluation.perplexity_tokens=64",
        "evaluation.perplexity_window=32",
        "data.min_user_events=3",
    ]
    assert main([*line, "--out", str(tmp_path / "run"), "--set", *small, *own]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "diagnostics" in record] == [1, 2, 4, 5]
    for record in records:
        if "diagnostics" in record:
            found = record["diagnostics"]
            assert -1 <= found["cosine"]["rec|search"] <= 1
            assert (found["angles"] != {}) == (method == "gems")


def test_every_method_that_trains_is_covered_here() -> None:
    trained = {name for name, method in METHODS.items() if method.build is not None}
    assert trained == {*SINGLE, *WHOLE, "gems", "gems-paper", "gems-no-null", "gems-uniform", "gems-hypergradient"}
