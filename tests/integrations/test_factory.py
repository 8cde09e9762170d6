"""`GemsFactory` in a plain Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from examples.recipes.problem import TASKS, Sentences, build_model
from gradsub import GemsOptimizer, NullSpace
from gradsub.integrations import GemsFactory, GemsReportCallback
from tests.integrations.trainers import GEMS, STEPS, Ragged, Remembering, arguments, by_hand, distance


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop", "adagrad"])
def test_the_base_is_what_the_arguments_name_with_the_trainers_groups(optim: str, tmp_path: Path) -> None:
    options = arguments(tmp_path, optim=optim, learning_rate=0.01, weight_decay=0.1)
    plain = Trainer(build_model(), options).create_optimizer()
    made = Trainer(build_model(), options, optimizer_cls_and_kwargs=(GemsFactory, {"args": options, "rank": 4}))
    optimizer = made.create_optimizer()
    assert isinstance(optimizer, GemsOptimizer)
    assert type(optimizer._inner.base) is type(plain)
    assert len(optimizer.param_groups) == len(plain.param_groups) == 2
    for mine, theirs in zip(optimizer.param_groups, plain.param_groups, strict=True):
        assert [p.shape for p in mine["params"]] == [p.shape for p in theirs["params"]]
        assert {key: mine[key] for key in theirs.keys() - {"params"}} == {
            key: theirs[key] for key in theirs.keys() - {"params"}
        }


def test_a_base_that_cannot_be_wrapped_is_refused(tmp_path: Path) -> None:
    options = arguments(tmp_path, optim="schedule_free_adamw")
    trainer = Trainer(build_model(), options, optimizer_cls_and_kwargs=(GemsFactory, {"args": options}))
    with pytest.raises((ValueError, ImportError)):
        trainer.create_optimizer()


def test_a_plain_trainer_keeps_a_null_space(tmp_path: Path) -> None:
    """No task is open: the shared subspace takes all gradients, and `max_grad_norm` clips them in `p.grad`."""
    model = build_model()
    general = [{"input_ids": Sentences(16, (0,))[index]["input_ids"][None]} for index in range(16)]
    null_space = NullSpace(energy=0.9)
    null_space.collect(model, general)
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    options = arguments(tmp_path, optim="adamw_torch", learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5)
    gems = {"args": options, "rank": 4, "null_space": null_space, "update_proj_gap": 2}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)  # the null space knows nothing of the others
    trainer = Trainer(model, options, train_dataset=Sentences(64, (1,)), optimizer_cls_and_kwargs=(GemsFactory, gems))
    trainer.add_callback(GemsReportCallback(trainer))
    trainer.train()
    moved = 0.0
    for name in null_space:
        change = model.get_submodule(name).weight.detach() - before[f"{name}.weight"]
        protected = null_space.basis(name).to(change)
        moved = max(moved, float(change.abs().max()))
        assert float((change @ protected).norm()) < 1e-4 * float(change.norm())
    assert moved > 1e-3
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == STEPS
    assert min(norms) > 0


def test_the_mixin_takes_the_factorys_optimizer(tmp_path: Path) -> None:
    options = arguments(tmp_path)
    kind: Any = (GemsFactory, {"args": options, **GEMS})
    trainer = Remembering(build_model(), options, train_dataset=Ragged(), optimizer_cls_and_kwargs=kind)
    trainer.train()
    assert trainer.gems.tasks == TASKS
    assert distance(trainer.model, by_hand(trainer.steps, True)) < 1e-6
    assert not torch.equal(trainer.model.lm_head.weight, build_model().lm_head.weight)
