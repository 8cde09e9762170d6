from __future__ import annotations

from typing import Any

import pytest
import torch
from method_worlds import TEXT, batches, built, losses

from examples.unified_sr.general_domain import general_batches, token_windows
from examples.unified_sr.methods import METHODS
from examples.unified_sr.model import Collator, load_language_model

# On a model this small the published rank is the whole space, and the published threshold protects whole layers.
pytestmark = pytest.mark.filterwarnings("ignore:.*rank.*:UserWarning", "ignore:.*protects all.*:UserWarning")
TRAINED = [name for name, method in METHODS.items() if method.build is not None]


@pytest.mark.parametrize("method", TRAINED)
def test_frozen_weights_stay_and_trained_weights_move(model_folder: str, method: str) -> None:
    ranker, updater = built(model_folder, method)
    before = {name: weight.detach().clone() for name, weight in ranker.named_parameters()}
    for _ in range(2):
        values = updater.update([*losses(ranker).values()])
    assert set(values) == {"rec", "search"}
    moved = {name for name, weight in ranker.named_parameters() if not torch.equal(weight, before[name])}
    trained = {name for name, weight in ranker.named_parameters() if weight.requires_grad}
    assert moved <= trained
    assert any(name.endswith("new_rows") for name in moved)
    assert len(moved) > 2
    assert not any("embed_tokens.base" in name or "shared.base" in name or "lm_head" in name for name in trained)


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_has_its_own_rate_for_the_items(llama_folder: str, method: str) -> None:
    _, updater = built(llama_folder, method, "training.lr=0.5", "training.item_lr=0.25")
    rates = {group["name"].split(".")[-1]: group["lr"] for group in updater.optimizer.param_groups}
    assert rates["items"] == 0.25
    assert rates["matrices"] == 0.5
    decays = {group["name"].split(".")[-1]: group["weight_decay"] for group in updater.optimizer.param_groups}
    assert decays["items"] == 0


def test_half_batches_give_the_gradient_of_the_mixed_batch(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "adamw")
    seen: dict[str, torch.Tensor] = {}

    def look() -> None:
        seen.update({name: w.grad.clone() for name, w in ranker.named_parameters() if w.grad is not None})

    updater.optimizer.step = look  # type: ignore[method-assign,assignment]
    updater.update([*losses(ranker).values()])
    parts = batches(ranker)
    mixed = Collator(0)(
        [[40, ranker.first_item, 41], [ranker.first_item + 1, 42], [50, 51, ranker.first_item + 2]],
        (*parts["rec"].targets, *parts["search"].targets),
    )
    ranker.zero_grad()
    ranker.loss(mixed).backward()
    for name, weight in ranker.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(seen[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_clipped_where_asked(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "adamw", "training.grad_clip=1.0e-3")
    norms: list[float] = []

    def look() -> None:
        found = [weight.grad.norm() for weight in ranker.parameters() if weight.grad is not None]
        norms.append(float(torch.stack(found).norm()))

    updater.optimizer.step = look  # type: ignore[method-assign,assignment]
    updater.update([*losses(ranker).values()])
    assert norms[0] == pytest.approx(1e-3, rel=1e-2)


def test_gems_leaves_vectors_alone_unless_told(t5_folder: str) -> None:
    ranker, updater = built(t5_folder, "gems")
    names = {name for name, weight in ranker.named_parameters() if weight.requires_grad}
    assert not any("norm" in name or "relative_attention_bias" in name for name in names)
    assert any("frozen" in note for note in updater.notes)
    ranker, _ = built(t5_folder, "gems", "method.train_others=true")
    names = {name for name, weight in ranker.named_parameters() if weight.requires_grad}
    assert any("norm" in name for name in names)
    assert any("relative_attention_bias" in name for name in names)


def test_what_gems_does_not_decompose_may_have_a_rate_of_its_own(llama_folder: str) -> None:
    _, updater = built(
        llama_folder, "gems", "method.train_others=true", "method.others_lr=2.0e-5", "training.lr=1.0e-3"
    )
    rates = {group["name"]: group["lr"] for group in updater.optimizer.param_groups}
    assert rates["linear.matrices"] == 1e-3
    assert rates["other.vectors"] == 2e-5
    assert any("plain AdamW, at the peak rate 2e-05; no null space protects them" in note for note in updater.notes)
    _, updater = built(llama_folder, "gems", "method.train_others=true", "training.lr=1.0e-3")
    assert {group["lr"] for group in updater.optimizer.param_groups if group["name"] != "items"} == {1e-3}
    with pytest.raises(ValueError, match=r"method\.others_lr=2e-05 has nothing to train: set method.train_others"):
        built(llama_folder, "gems", "method.others_lr=2.0e-5")


@pytest.mark.parametrize("folder", ["llama_folder", "t5_folder"])
def test_what_gems_does_not_decompose_may_be_protected_too(folder: str, request: pytest.FixtureRequest) -> None:
    """Vectors move, but not along the gradients that general text has for them."""
    folder = request.getfixturevalue(folder)
    pairs = ["method.train_others=true", "method.others_lr=1.0e-2", "method.energy=0.9"]
    ranker, updater = built(folder, "gems", *pairs, "method.protect_others=true")
    vectors = {name: weight for name, weight in ranker.backbone.named_parameters() if weight.ndim == 1}
    before = {name: weight.detach().clone() for name, weight in vectors.items()}
    for _ in range(3):
        updater.update([*losses(ranker).values()])
    assert vectors
    for name, weight in vectors.items():
        K = updater.optimizer.state[weight]["protected"]
        change = weight.detach() - before[name]
        assert K.shape[0] == weight.numel()
        assert float(change.norm()) > 1e-3
        assert float((K.mT @ change).norm()) < 1e-4 * float(change.norm())
    others = sum(len(g["params"]) for g in updater.optimizer.param_groups if g["name"].startswith("other"))
    free = sum("relative_attention_bias" in name for name, _ in ranker.named_parameters())  # matrices
    assert others - free == len(vectors)
    said = f"the null space of general text's gradients protects {len(vectors)} of the {others}."
    assert any(note.endswith(said) for note in updater.notes)
    with pytest.raises(
        ValueError, match=r"method\.protect_others=True asks for train_others and protect, found train_o"
    ):
        built(folder, "gems", "method.protect_others=true")
    with pytest.raises(ValueError, match="protect=False: set both to true"):
        built(folder, "gems-no-null", "method.train_others=true", "method.protect_others=true")


def test_gems_protects_normalized_features_unless_told_otherwise(llama_folder: str) -> None:
    shares = []
    for pairs in ([], ["method.normalize=false"]):
        _, updater = built(llama_folder, "gems", *pairs)
        optimizer: Any = updater.optimizer
        shares.append([layer.dimension - layer.free for layer in optimizer._blocks.layers.values()])
    assert shares[0] != shares[1]


def test_gems_reports_what_the_plots_need(llama_folder: str) -> None:
    ranker, updater = built(llama_folder, "gems")
    updater.update([*losses(ranker).values()])
    found = updater.diagnostics()
    assert found is not None
    assert set(found.cosines) == {"rec|search"}
    assert sum(found.gates.values()) == pytest.approx(1)
    assert set(found.energy) == {"shared", "rec", "search"}
    assert len(found.protected) == 14
    assert all(0 < fraction < 1 for fraction in found.protected.values())


def test_gems_protects_general_text_better_than_adamw(llama_folder: str) -> None:
    """At the same rates the layers' weights move in both, and the answers to general text hardly in one."""
    change = {}
    for method in ("gems", "adamw"):
        ranker, updater = built(
            llama_folder, method, "training.lr=1.0e-2", *(["method.energy=0.99"] if method == "gems" else [])
        )
        language_model = load_language_model(llama_folder)
        windows = token_windows(language_model.tokenizer, TEXT, tokens=256, window=64)
        for _ in range(5):
            updater.update([*losses(ranker).values()])
        with torch.no_grad():
            shift = [
                (ranker.lm(**batch).logits - language_model.model(**batch).logits).norm()
                for batch in general_batches(language_model, windows, torch.device("cpu"))
            ]
        change[method] = float(torch.stack(shift).norm())
    assert change["gems"] < 0.3 * change["adamw"]


def test_gems_needs_one_criterion(llama_folder: str) -> None:
    with pytest.raises(ValueError, match=r"exactly one of energy and threshold.*energy=0\.95 and threshold=0\.01"):
        built(llama_folder, "gems", "method.threshold=0.01")
    with pytest.raises(ValueError, match="exactly one of energy and threshold"):
        built(llama_folder, "gems", "method.energy=null")
