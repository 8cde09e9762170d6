"""Rows name their tasks: where from, and what is said when they do not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset as Table
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening

from examples.recipes.problem import TASKS, build_model
from gradsub import GemsOptimizer
from gradsub.integrations._arguments import telling_rows_apart
from tests.integrations.trainers import GEMS, Ragged, Remembering, arguments, by_hand, distance


def train(folder: Path, data: Any, gems: Any = GEMS, rest: dict[str, Any] | None = None, **options: Any) -> Remembering:
    trainer = Remembering(build_model(), arguments(folder, **options), train_dataset=data, gems=gems, **(rest or {}))
    trainer.train()
    return trainer


class Streamed(IterableDataset[dict[str, Any]]):
    def __init__(self, rows: Ragged) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.rows[index] for index in range(len(self.rows)))


def tasks_of(trainer: Remembering) -> list[list[int]]:
    return [batch["task"].tasks for step in trainer.steps for batch in step]


def table(key: str = "task", **columns: Any) -> Table:
    rows = [{name: getattr(value, "tolist", lambda v=value: v)() for name, value in row.items()} for row in _rows(key)]
    return Table.from_list([{**row, **columns} for row in rows])


def _rows(key: str) -> list[dict[str, Any]]:
    data = Ragged(32, key)
    return [data[index] for index in range(len(data))]


@pytest.mark.parametrize("kind", ["map", "stream", "table", "indices"])
def test_unused_columns_are_dropped_but_not_the_task(kind: str, tmp_path: Path) -> None:
    data: Any = {"map": Ragged(32), "stream": Streamed(Ragged(32))}.get(kind) or table(note="unused")
    if kind == "indices":
        data = data.map(lambda row: {"task": TASKS.index(row["task"])})
    trainer = train(tmp_path, data, max_steps=2)
    assert sorted({task for tasks in tasks_of(trainer) for task in tasks}) == [0, 1]
    if kind == "stream":
        assert tasks_of(trainer)[0] == [0, 0, 0, 1]
    assert distance(trainer.model, build_model()) > 1e-3


def test_evaluation_takes_the_same_rows(tmp_path: Path) -> None:
    for keep in (True, False):
        options = arguments(tmp_path, remove_unused_columns=keep)
        trainer = Remembering(build_model(), options, train_dataset=Ragged(), eval_dataset=Ragged(8), gems=GEMS)
        assert trainer.evaluate()["eval_loss"] > 0
        assert trainer.predict(Ragged(8)).metrics["test_loss"] > 0


def test_another_column(tmp_path: Path) -> None:
    trainer = train(tmp_path, Ragged(32, "kind"), rest={"task_column": "kind"}, max_steps=1)
    assert [part["kind"].tasks for part in trainer.steps[0]] != []
    with pytest.raises(ValueError, match="the rows have no column 'task', which names their tasks"):
        train(tmp_path, Ragged(32, "kind"), max_steps=1)


def test_an_undeclared_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a row has the task 'rec': use a name of tasks=\('search', 'else'\)"):
        train(tmp_path, Ragged(32), {**GEMS, "tasks": ("search", "else")}, max_steps=8)


def test_rows_joined_to_a_sequence_are_refused(tmp_path: Path) -> None:
    collator = {"data_collator": DataCollatorWithFlattening()}
    data = Ragged(32)
    with pytest.raises(ValueError, match="a batch was made of 4 rows with a task each, but has 1 rows"):
        train(tmp_path, data, rest=collator, max_steps=1)
    one = train(tmp_path, table().remove_columns("task"), {**GEMS, "tasks": ("both",)}, collator, max_steps=2)
    assert distance(one.model, build_model()) > 1e-3


def test_small_layers_tell_rows_apart_unless_a_capture_is_named(tmp_path: Path) -> None:
    unnamed = {key: value for key, value in GEMS.items() if key != "capture"}
    trainer = train(tmp_path, Ragged(32), unnamed)
    assert distance(trainer.model, by_hand(trainer.steps, True)) < 1e-6
    with pytest.raises(ValueError, match='or capture="fused", so that the layers can tell the rows apart'):
        train(tmp_path, Ragged(32), {**unnamed, "capture": "auto"}, max_steps=1)


@pytest.mark.parametrize(("tasks", "capture"), [((), None), (("a",), None), (("a", "b"), "fused"), (None, "fused")])
def test_only_several_tasks_need_the_fused_capture(tasks: tuple[str, ...] | None, capture: str | None) -> None:
    given = {} if tasks is None else {"tasks": iter(tasks)}
    found = telling_rows_apart(given)
    assert found.get("capture") == capture
    assert found["tasks"] == (tasks if tasks is not None else ("search", "rec"))
    assert telling_rows_apart({"tasks": "ab"}) == {"tasks": "ab"}, "one string is refused by the optimizer"


def test_one_task_needs_no_column(tmp_path: Path) -> None:
    one = {**GEMS, "tasks": ("both",)}
    trainer = train(tmp_path, table().remove_columns("task"), one, gradient_accumulation_steps=2)
    assert distance(trainer.model, by_hand(trainer.steps, True, **one)) < 1e-6


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = build_model()
    optimizer = GemsOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model=model, **GEMS)
    trainer = Remembering(model, arguments(tmp_path), train_dataset=Ragged(), optimizers=(optimizer, None))
    trainer.train()
    assert distance(model, by_hand(trainer.steps, True)) < 1e-6
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    wrapped = Remembering(model, arguments(tmp_path), train_dataset=Ragged(), optimizers=(base, None), gems=GEMS)
    assert wrapped.create_optimizer() is wrapped.gems
    with pytest.raises(ValueError, match=r"gems= and a GemsOptimizer in optimizers="):
        Remembering(model, arguments(tmp_path), train_dataset=Ragged(), optimizers=(wrapped.gems, None), gems=GEMS)


def test_without_an_optimizer_of_gradsubs(tmp_path: Path) -> None:
    trainer = Remembering(build_model(), arguments(tmp_path), train_dataset=Ragged())
    with pytest.raises(ValueError, match="the Trainer's optimizer is SGD: pass gems="):
        trainer.train()


def test_losses_that_cannot_be_told_are_said_once(tmp_path: Path) -> None:
    class Silent(Remembering):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
            labels = inputs.pop("labels")
            logits = model(**inputs, logits_to_keep=1).logits  # fewer than there are labels
            return torch.nn.functional.cross_entropy(logits[:, 0], labels[:, -1])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Silent(build_model(), arguments(tmp_path), train_dataset=Ragged(), gems=GEMS)
        trainer.train()
    assert sum("the rows' losses are not to be found out" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Silent(build_model(), arguments(tmp_path), train_dataset=Ragged(), gems=GEMS, task_losses=False).train()


def test_what_replaces_the_parameters_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = arguments(tmp_path)
    monkeypatch.setattr(type(options), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs in one process"):
        Remembering(build_model(), options, train_dataset=Ragged(), gems=GEMS)


def test_a_column_of_another_meaning_does_not_matter_to_one_task(tmp_path: Path) -> None:
    one = {**GEMS, "tasks": ("both",)}
    trainer = train(tmp_path, Streamed(Ragged(32)), one, max_steps=2)
    assert distance(trainer.model, build_model()) > 1e-3


def test_rows_with_none_in_the_column(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(_rows("task")):
            yield {**row, "task": None if number == 2 else row["task"]}

    with pytest.raises(ValueError, match="1 of 4 rows of a batch have None in the column 'task': give each row one of"):
        train(tmp_path, list(rows()), max_steps=1, train_sampling_strategy="sequential")


def test_a_collator_for_evaluation_alone_sees_no_tasks(tmp_path: Path) -> None:
    class Two(Remembering):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.eval_data_collator = self.data_collator

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return super().get_eval_dataloader(eval_dataset)

        def _get_dataloader(self, *arguments: Any, is_training: bool = False, **options: Any) -> Any:
            kept = self.data_collator
            if not is_training:
                self.data_collator = self.eval_data_collator
            try:
                return super()._get_dataloader(*arguments, is_training=is_training, **options)
            finally:
                self.data_collator = kept

    trainer = Two(build_model(), arguments(tmp_path), train_dataset=Ragged(), eval_dataset=Ragged(8), gems=GEMS)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_trainer_that_compiles_has_as_few_graphs(tmp_path: Path) -> None:
    """The optimizer is made before the model is compiled, and knows of it all the same."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 8}
    options["train_sampling_strategy"] = "sequential"  # other numbers of rows are other graphs
    train(tmp_path, Ragged(32), {**GEMS, "refresh": "sketch"}, **options)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:none of the layers that target_modules names:UserWarning")
def test_several_tasks_without_a_trained_linear_layer_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """The vectors of IA3; there are neither matrices nor layers that could tell rows apart."""
    from peft import IA3Config, get_peft_model

    adapted = get_peft_model(build_model(), IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    trainer = Remembering(adapted, arguments(tmp_path), train_dataset=Ragged(), gems=GEMS)
    with pytest.raises(ValueError, match=r"none that is trained .* is a plain linear one .* use one task"):
        trainer.train()
