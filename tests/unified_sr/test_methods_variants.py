"""Single tasks, surgery, GaLore and the ablations of GEMS: each is what its name says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from method_worlds import SAMPLES, batches, built, losses
from torch import Tensor, nn

from examples.unified_sr.checkpoint import Checkpoint
from examples.unified_sr.cli import main
from examples.unified_sr.config import differences, resolve
from examples.unified_sr.losses import Pass
from examples.unified_sr.methods import METHODS, Updater
from examples.unified_sr.methods._gems import GemsSettings
from examples.unified_sr.model import Ranker
from examples.unified_sr.settings import flatten
from examples.unified_sr.training import tasks_to_train

pytestmark = pytest.mark.filterwarnings("ignore:.*rank.*:UserWarning")
SMALL = [
    "training.batch_size=4",
    "evaluation.perplexity_tokens=128",
    "evaluation.perplexity_window=64",
    "training.leak_tokens=0",
    "data.min_user_events=3",
]


def ran(out: Path, method: str, model: str, data: str) -> tuple[dict[str, dict[str, float]], list[dict[str, float]]]:
    line = ["run", "--data", data, "--model", model, "--method", method, "--steps", "3", "--out", str(out)]
    assert main([*line, "--set", *SMALL]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    return metrics["final"], [step["loss"] for step in steps]


def with_other_queries(data: str, folder: Path) -> str:
    folder.mkdir()
    for file in Path(data).iterdir():
        lines = file.read_text(encoding="utf-8").splitlines()
        if file.suffix == ".inter":
            rows = [line.rsplit("\t", 1) for line in lines]
            lines = [lines[0], *(f"{head}\t{query and 'qqq ' + query}" for head, query in rows[1:])]
        (folder / file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def test_a_single_task_never_sees_the_other_tasks_examples(llama_folder: str, data_folder: str, tmp_path: Path) -> None:
    """Other queries change every search example and no recommendation: what was trained on the latter stays."""
    other = with_other_queries(data_folder, tmp_path / "other")
    alone, alone_losses = ran(tmp_path / "a", "adamw-rec", llama_folder, data_folder)
    again, again_losses = ran(tmp_path / "b", "adamw-rec", llama_folder, other)
    assert alone_losses == again_losses
    assert alone["rec"] == again["rec"]
    assert alone["search"] != again["search"]
    _, joint_losses = ran(tmp_path / "c", "adamw", llama_folder, data_folder)
    # The same examples in the same order as in joint training: before any step the losses are equal.
    assert alone_losses[0] == {"rec": joint_losses[0]["rec"]}
    assert alone_losses[2]["rec"] != joint_losses[2]["rec"]


def test_the_tasks_to_train_are_those_of_the_data() -> None:
    assert tasks_to_train(None, ["rec", "search"]) == ("rec", "search")
    with pytest.raises(ValueError, match="names 'serach', but the data's tasks are rec, search"):
        tasks_to_train("rec,serach", ["rec", "search"])


def opposed(ranker: Ranker) -> dict[str, Pass]:
    """Losses whose gradients oppose each other: the second task also unlearns the first."""
    found = losses(ranker)

    def search() -> dict[str, Tensor]:
        return {"search": found["search"].compute()["search"] - 2 * found["rec"].compute()["rec"]}

    return {"rec": found["rec"], "search": Pass({"search": 1}, search)}


def gradients_of(ranker: Ranker, loss: Pass) -> dict[str, Tensor]:
    names = [name for name, weight in ranker.named_parameters() if weight.requires_grad]
    weights = [weight for weight in ranker.parameters() if weight.requires_grad]
    return dict(zip(names, torch.autograd.grad(next(iter(loss.compute().values())), weights), strict=True))


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for name, value in gradients.items() if "new_rows" not in name])


def stepped_on(ranker: Ranker, updater: Updater, found: dict[str, Pass]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def look() -> None:
        seen.update({name: w.grad.clone() for name, w in ranker.named_parameters() if w.grad is not None})

    updater.optimizer.step = look  # type: ignore[method-assign,assignment]
    updater.update([*found.values()])
    return seen


def test_pcgrad_steps_on_the_gradient_of_its_definition(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "pcgrad")
    found = opposed(ranker)
    parts = {
        task: {name: SAMPLES[task] / 3 * value for name, value in gradients_of(ranker, found[task]).items()}
        for task in found
    }
    a, b = flat(parts["rec"]), flat(parts["search"])
    assert a @ b < 0
    expected = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    seen = stepped_on(ranker, updater, found)
    torch.testing.assert_close(flat(seen), expected, rtol=1e-4, atol=1e-6)
    (items,) = [name for name in seen if "new_rows" in name]
    torch.testing.assert_close(seen[items], parts["rec"][items] + parts["search"][items], rtol=1e-4, atol=1e-6)


def test_without_conflict_pcgrad_is_adamw(llama_folder: str) -> None:
    seen = []
    for method in ("pcgrad", "adamw"):
        ranker, updater = built(llama_folder, method)
        same = losses(ranker)["rec"]
        twin = Pass({"search": 2}, lambda same=same: {"search": same.compute()["rec"]})  # type: ignore[misc]
        seen.append(stepped_on(ranker, updater, {"rec": same, "search": twin}))
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient, seen[1][name], msg=name)


def test_cagrad_stays_near_the_mean_and_helps_the_worst_task(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "cagrad", "method.radius=0.4")
    found = opposed(ranker)
    parts = [SAMPLES[task] / 3 * flat(gradients_of(ranker, found[task])) for task in found]
    mixed = parts[0] + parts[1]
    step = flat(stepped_on(ranker, updater, found))
    assert (step - mixed).norm() == pytest.approx(0.4 * float(mixed.norm()), rel=1e-3)
    assert min(part @ step for part in parts) > min(part @ mixed for part in parts)


def test_cagrad_without_a_ball_is_adamw(llama_folder: str) -> None:
    seen = []
    for method, *pairs in (("cagrad", "method.radius=0"), ("adamw",)):
        ranker, updater = built(llama_folder, method, *pairs)
        seen.append(stepped_on(ranker, updater, opposed(ranker)))
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient, seen[1][name], msg=name)


@pytest.mark.parametrize("method", ["galore", "cagrad", "gems-no-task", "gems-hypergradient"])
def test_a_checkpoint_continues_a_method_exactly(llama_folder: str, tmp_path: Path, method: str) -> None:
    def advanced(ranker: Ranker, updater: Updater, steps: int) -> None:
        for _ in range(steps):
            updater.update([*losses(ranker).values()])

    pairs = ("method.rank=4", "method.update_proj_gap=3") if method == "galore" else ()
    whole, straight = built(llama_folder, method, *pairs)
    advanced(whole, straight, 4)
    first, updater = built(llama_folder, method, *pairs)
    advanced(first, updater, 2)
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    checkpoint.save(2, first, updater.optimizer, schedule_of(updater), {})
    resumed, updater = built(llama_folder, method, *pairs)
    assert checkpoint.restore(resumed, updater.optimizer, schedule_of(updater))[0] == 2
    advanced(resumed, updater, 2)
    weights = dict(resumed.named_parameters())
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, weights[name]), name


def schedule_of(updater: Updater) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(updater.optimizer, lambda step: 1.0)


def change_of_layers(folder: str, method: str, *pairs: str) -> dict[str, Tensor]:
    ranker, updater = built(folder, method, "training.weight_decay=0", *pairs)
    layers = {name: m for name, m in ranker.backbone.named_modules() if isinstance(m, nn.Linear)}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    updater.update([*losses(ranker).values()])
    return {name: layer.weight.detach() - before[name] for name, layer in layers.items()}


@pytest.mark.parametrize(
    ("method", "pairs", "rank"),
    [
        ("galore", ("method.rank=4",), 4),
        ("gems-no-task", ("method.task_rank=2",), 4),
        ("gems", ("method.task_rank=2",), 8),
    ],
)
def test_the_first_step_has_the_rank_of_the_subspaces(
    llama_folder: str, method: str, pairs: tuple[str, ...], rank: int
) -> None:
    """One shared subspace of rank 4, and with tasks two more of rank 2."""
    ranks = [
        int(torch.linalg.matrix_rank(dW, rtol=1e-4)) for dW in change_of_layers(llama_folder, method, *pairs).values()
    ]
    assert max(ranks) == rank


def test_ablations_change_one_thing(llama_folder: str) -> None:
    _, full = built(llama_folder, "gems")
    notes = {
        "gems-no-task": "`task_subspaces: false`",
        "gems-no-null": "`protect: false`",
        "gems-uniform": "uniform gate",
        "gems-hypergradient": "hypergradient gate",
    }
    for method, note in notes.items():
        ranker, updater = built(llama_folder, method)
        assert any(note in text for text in updater.notes)
        assert not any(note in text for text in full.notes)
        for _ in range(3):
            updater.update([*losses(ranker).values()], measure=True)
        found = updater.diagnostics()
        assert found is not None
        if method == "gems-uniform":
            assert found.gates == pytest.approx({"rec": 0.5, "search": 0.5})
        if method == "gems-no-null":
            assert set(found.protected.values()) == {0.0}


def test_hypergradient_gates_move(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "gems-hypergradient", "training.lr=1.0e-2")
    gates = []
    for _ in range(4):
        updater.update([*losses(ranker).values()])
        found = updater.diagnostics()
        assert found is not None
        gates.append(found.gates["rec"])
    assert gates[0] == pytest.approx(0.5)
    assert len({round(gate, 6) for gate in gates}) > 1


def test_gems_clips_where_asked(llama_folder: str) -> None:
    norms = []
    for pairs in ((), ("training.grad_clip=1.0e-3",)):
        ranker, updater = built(llama_folder, "gems", *pairs)
        updater.update([*losses(ranker).values()])
        gramian = updater.optimizer.report().gramian  # type: ignore[attr-defined]
        norms.append(max(math.sqrt(gramian[task, task]) for task in SAMPLES))
    assert norms[1] < 1.001e-3 < norms[0]


def test_batches_of_one_task_have_no_conflict(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "adamw-rec")
    assert set(batches(ranker)) == {"rec", "search"}
    updater.update([losses(ranker)["rec"]], measure=True)
    assert updater.diagnostics() is None


def test_a_variant_follows_the_section_of_its_original(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(
        "methods:\n  gems: {training.lr: 2.0e-3, method: {rank: 7, protect: true, gate: heuristic}}\n"
        "  gems-no-null: {method: {rank: 9}}\n  adamw: {training: {lr: 3.0e-3, tasks: null}}\n",
        encoding="utf-8",
    )
    found = {
        name: resolve(file=file, flags={"method.name": name}) for name, method in METHODS.items() if method.variant_of
    }
    for name, settings in found.items():
        assert settings.training.lr == (2e-3 if name.startswith("gems") else 3e-3)
    gems = {name: settings for name, settings in found.items() if isinstance(settings.method, GemsSettings)}
    assert {name: settings.method.rank for name, settings in gems.items()} == dict.fromkeys(gems, 7) | {
        "gems-no-null": 9
    }
    # What a variant is about is not taken from the original.
    assert [settings.method.protect for settings in gems.values()].count(False) == 1
    assert gems["gems-uniform"].method.gate == "uniform"
    assert found["adamw-rec"].training.tasks == "rec"
    assert resolve(file=file, flags={"method.name": "gems-paper"}).training.lr == 5e-4
    for name, settings in found.items():
        original = resolve(file=file, flags={"method.name": METHODS[name].variant_of})
        changed = {text.partition(":")[0] for text in differences(flatten(original.model_dump()), settings)}
        assert len(changed - {"method.name", "method.radius", "method.rank"}) <= 1, changed
