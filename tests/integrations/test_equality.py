"""A Trainer with the mixin takes the steps of a plain loop over one large batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback

from examples.recipes.problem import LENGTH, TASKS, build_model
from gradsub.integrations._hearing import Pairing
from tests.integrations.trainers import GEMS, Ragged, Remembering, arguments, by_hand, distance


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "batches"])
@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_batches_are_one_large_batch(parts: int, tokens: bool, tmp_path: Path) -> None:
    """Also where a batch has rows of one task only, and the tasks' shares differ between batches."""
    options = arguments(tmp_path, gradient_accumulation_steps=parts, per_device_train_batch_size=3)
    trainer = Remembering(build_model(), options, train_dataset=Ragged(), gems=GEMS)
    trainer.model_accepts_loss_kwargs = tokens
    trainer.train()
    if parts > 1:
        present = [[frozenset(batch["task"].tasks) for batch in step] for step in trainer.steps]
        assert any(len(set(kinds)) > 1 for kinds in present)
    expected = by_hand(trainer.steps, tokens)
    assert distance(trainer.model, expected) < 1e-6
    assert distance(trainer.model, build_model()) > 2e-2


@pytest.mark.parametrize("parts", [1, 2])
def test_max_grad_norm_clips_what_was_captured(parts: int, tmp_path: Path) -> None:
    options = arguments(tmp_path, gradient_accumulation_steps=parts, max_grad_norm=0.3)
    trainer = Remembering(build_model(), options, train_dataset=Ragged(), gems=GEMS)
    trainer.train()
    assert distance(trainer.model, by_hand(trainer.steps, True, 0.3, separate=False)) < 1e-6
    assert distance(trainer.model, by_hand(trainer.steps, True, separate=False)) > 1e-3
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 4
    assert min(norms) > 0.3  # those before clipping


def test_max_grad_norm_clips_gradients_of_no_task(tmp_path: Path) -> None:
    """With SGD nothing moves by more than the rate times the bound."""
    moved = {}
    for bound in (0.0, 0.05):
        options = arguments(tmp_path, max_grad_norm=bound, optim="sgd", learning_rate=0.1, max_steps=1, warmup_steps=0)
        trainer = Remembering(build_model(), options, train_dataset=Ragged(), gems={"tasks": (), "rank": 8})
        trainer.train()
        pairs = zip(trainer.model.parameters(), build_model().parameters(), strict=True)
        moved[bound] = sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5
    assert 0 < moved[0.05] <= 0.1 * 0.05 * (1 + 1e-5) < moved[0.0]


def test_the_gate_knows_the_tasks_losses(tmp_path: Path) -> None:
    """The heuristic gate weighs them: without them it is another one."""
    trainers = []
    for told in (True, False):
        model = build_model()
        options = arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = Remembering(model, options, train_dataset=Ragged(), gems=GEMS, task_losses=told)
        trainer.train()
        trainers.append(trainer)
    expected = by_hand(trainers[0].steps, True)
    told, untold = (distance(trainer.model, expected) for trainer in trainers)
    assert told < 1e-6
    assert untold > 2e-5


DECODER = {"is_decoder": True, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
BART = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4}),
    "BertLMHeadModel": ("BertConfig", {**DECODER, "num_attention_heads": 4}),
    "BartForCausalLM": ("BartConfig", {**BART, "encoder_layers": 1, "encoder_attention_heads": 4}),
    "LlamaForCausalLM": ("LlamaConfig", {**DECODER, "num_attention_heads": 4}),
    "T5ForConditionalGeneration": ("T5Config", T5),
}


def small(name: str) -> Any:
    """A model without dropout, since the losses are computed again."""
    torch.manual_seed(0)
    config, options = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(vocab_size=64, **options))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


class Losses(TrainerCallback):
    """What the gate has heard at each step."""

    def __init__(self) -> None:
        self.heard: list[dict[str, float]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.heard.append(options["optimizer"].optimizer.report().losses)


def heard(name: str, folder: Path, **options: Any) -> tuple[Remembering, list[dict[str, float]]]:
    """At a rate of zero, so that the losses can be computed again afterwards."""
    losses = Losses()
    arguments_ = arguments(folder, learning_rate=0.0, per_device_train_batch_size=6, **options)
    trainer = Remembering(small(name), arguments_, train_dataset=Ragged(), gems=GEMS, callbacks=[losses])
    trainer.train()
    return trainer, losses.heard


def own_losses(trainer: Remembering, step: int) -> dict[str, float]:
    """The model's own loss of each task's rows."""
    batches = trainer.steps[step]
    inputs, labels = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels"))
    tasks = torch.tensor([task for batch in batches for task in batch["task"].tasks])
    with torch.no_grad():
        return {
            name: float(trainer.model(input_ids=inputs[tasks == task], labels=labels[tasks == task])["loss"])
            for task, name in enumerate(TASKS)
            if (tasks == task).any()
        }


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_gate_hears_is_the_models_own_loss(name: str, parts: int, tmp_path: Path) -> None:
    """Whichever label the model pairs with a logit: the Trainer goes by its class, which tells it wrongly for three."""
    trainer, losses = heard(name, tmp_path, gradient_accumulation_steps=parts)
    for step, found in enumerate(losses):
        assert found == pytest.approx(own_losses(trainer, step), rel=1e-5)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_smoothed_labels_are_paired_as_the_trainer_pairs_them(name: str, tmp_path: Path) -> None:
    trainer, losses = heard(name, tmp_path, label_smoothing_factor=0.1)
    for step, found in enumerate(losses):
        assert found == pytest.approx(own_losses(trainer, step), rel=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("told", [False, True], ids=["own", "items"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pairing_is_found_once(shifted: bool, told: bool, dtype: torch.dtype) -> None:
    labels = torch.randint(0, 9, (4, LENGTH))
    logits = torch.randn(4, LENGTH, 9) + torch.nn.functional.one_hot(labels, 9)
    paired = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    total = torch.nn.functional.cross_entropy(paired[0].mT, paired[1], reduction="sum")
    items = 3 * labels.numel() if told else None
    loss = (total / (paired[1].numel() if items is None else items)).to(dtype)
    pairing = Pairing()
    pairing.look({"logits": logits, "loss": loss}, labels, items)
    assert pairing.shifted is shifted
    pairing.look({"logits": logits, "loss": total}, labels, items)
    assert pairing.shifted is shifted, "it is decided"


def test_a_loss_of_another_kind_decides_nothing_and_is_not_asked_about_again() -> None:
    logits, labels = torch.randn(4, LENGTH, 9), torch.randint(0, 9, (4, LENGTH))
    own = torch.nn.functional.cross_entropy(logits.mT, labels)
    pairing = Pairing()
    pairing.look({"logits": logits, "loss": own, "aux_loss": torch.ones(())}, labels, None)
    pairing.look({"logits": logits}, labels, None)
    assert pairing.shifted is None, "what a router adds is not known, and there may be no loss at all"
    pairing.look({"logits": logits, "loss": own + 0.1}, labels, None)
    pairing.look({"logits": logits, "loss": own}, labels, None)
    assert pairing.shifted is None


def test_a_batch_whose_pairings_have_the_same_loss_leaves_it_open() -> None:
    labels = torch.randint(0, 9, (4, LENGTH))
    pairing = Pairing()
    pairing.look({"logits": torch.zeros(4, LENGTH, 9), "loss": torch.tensor(9.0).log()}, labels, None)
    assert pairing.shifted is None
    logits = torch.randn(4, LENGTH, 9)
    pairing.look({"logits": logits, "loss": torch.nn.functional.cross_entropy(logits.mT, labels)}, labels, None)
    assert pairing.shifted is False
