"""Multiple choice against one question at a time, and each layer's leak against a direct computation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_worlds import ITEMS, TEXT, built, losses
from torch import nn

from examples.unified_sr.cli import main
from examples.unified_sr.general_domain import general_batches, token_windows
from examples.unified_sr.methods import Updater
from examples.unified_sr.model import LanguageModel, Ranker, load_language_model
from examples.unified_sr.retention._leak import IntactLayers
from examples.unified_sr.retention._multiple_choice import Accuracy, Question, answer_questions, load_questions

pytestmark = pytest.mark.filterwarnings("ignore:.*rank.*:UserWarning")
CPU = torch.device("cpu")
QUESTIONS = [
    Question("Which of these is a colour?", ("wood", "a very dark blue", "glass"), 1),
    Question("What is a chair made of?", ("wood", "time"), 0),
    Question("Where do fish live?", ("in the desert", "on the moon", "in water", "fire"), 2),
    Question("Which one is hot?", ("ice", "steam"), 1),
]


def entry(question: Question, word: str = "Answer") -> dict[str, str]:
    choices = " ".join(f"{word}{number}: {choice}" for number, choice in enumerate(question.choices, start=1))
    labels = "/".join(f"{word.lower()}{number}" for number in range(1, len(question.choices) + 1))
    return {
        "instruction": f"Please choose the correct answer to the question: {question.text}\n\n{choices}\n\n"
        f"{word} format: {labels}",
        "input": "",
        "output": f"the correct answer is {word.lower()}{question.answer + 1}",
        "answer": f"{word.lower()}{question.answer + 1}",
    }


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["Answer", "Option", "Solution"])
def test_questions_are_read_as_they_were_written(word: str, tmp_path: Path) -> None:
    path = written(tmp_path / "questions.json", [entry(question, word) for question in QUESTIONS])
    assert load_questions(path) == QUESTIONS


def test_fewer_questions_are_spread_over_the_file(tmp_path: Path) -> None:
    many = [Question(f"Number {number}?", ("yes", "no"), number % 2) for number in range(10)]
    path = written(tmp_path / "questions.json", [entry(question) for question in many])
    assert load_questions(path, 3) == load_questions(path, 3) == [many[0], many[3], many[6]]
    assert load_questions(path, 10) == load_questions(path, 99) == load_questions(path, 0) == many


GOOD = entry(QUESTIONS[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({"a": 1}, "no list of questions"),
        ([], "no list of questions"),
        ([GOOD, {"instruction": "x"}], "entry 1: expected a JSON list of objects"),
        ([{**GOOD, "answer": "true"}], "entry 0: the answer 'true' is no word and number"),
        ([{**GOOD, "answer": "answer4"}], "the answer is 'answer4' where there are 3 choices"),
        ([{**GOOD, "instruction": "Which question: one?\n\nAnswer1: a"}], "two or more choices answer1: "),
        ([{**GOOD, "instruction": "Which question: one?\n\nAnswer1: a Answer3: b"}], "two or more choices answer1: "),
        ([{**GOOD, "instruction": "Which question: one?\n\nAnswer1: Answer2: b"}], "two or more choices answer1: "),
        ([{**GOOD, "instruction": "question:  Answer1: a Answer2: b"}], "no text between 'question:' and answer1"),
    ],
)
def test_what_is_no_question_is_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions(written(tmp_path / "questions.json", content))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_questions("none.json")


# --- answers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(language_model: LanguageModel, questions: list[Question]) -> Accuracy:
    """The slow twin: one choice at a time, one token of it at a time, without padding."""
    normalised, raw = [], []
    for question in questions:
        prompt = language_model.tokenizer(f"Question: {question.text}\nAnswer:", add_special_tokens=False)["input_ids"]
        scores = []
        for choice in question.choices:
            answer = language_model.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            score = 0.0
            for position, token in enumerate(answer):
                said = answer[:position]
                if language_model.encoder_decoder:
                    start = language_model.model.config.decoder_start_token_id
                    kwargs = {"input_ids": [prompt], "decoder_input_ids": [[start, *said]]}
                else:
                    kwargs = {"input_ids": [[*prompt, *said]]}
                logits = language_model.model(**{key: torch.tensor(ids) for key, ids in kwargs.items()}).logits
                score += float(torch.log_softmax(logits[0, -1], dim=0)[token])
            scores.append(score)
        raw.append(scores.index(max(scores)) == question.answer)
        per_character = [score / len(choice) for score, choice in zip(scores, question.choices, strict=True)]
        normalised.append(per_character.index(max(per_character)) == question.answer)
    return Accuracy(tuple(normalised), tuple(raw))


@pytest.mark.parametrize("budget", [1, 300])
def test_answers_equal_those_of_one_question_at_a_time(model_folder: str, budget: int) -> None:
    language_model = load_language_model(model_folder)
    # With each choice declared the right one in turn, being right tells which choice was taken.
    questions = [replace(one, answer=answer) for one in QUESTIONS for answer in range(len(one.choices))]
    done: list[int] = []
    found = answer_questions(language_model, questions, CPU, budget=budget, progress=done.append)
    assert found == one_by_one(language_model, questions)
    assert sum(done) == sum(len(question.choices) for question in questions)
    assert sum(found.raw) == sum(found.normalised) == len(QUESTIONS)


def test_the_items_rows_do_not_change_the_answers(model_folder: str) -> None:
    language_model = load_language_model(model_folder)
    intact = answer_questions(language_model, QUESTIONS, CPU, budget=200)
    Ranker(language_model, ITEMS)  # changes the model's embedding in place
    assert answer_questions(language_model, QUESTIONS, CPU, budget=200) == intact


def test_accuracy_comes_with_its_standard_error() -> None:
    found = Accuracy((True, True, True, False), (False, False, False, False))
    assert found.metrics == {"multiple_choice": 0.75, "multiple_choice_raw": 0.0}
    assert found.summary["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert found.summary["standard_error_raw"] == 0


# --- leak ------------------------------------------------------------------------------------------------------------


def built_and_recorded(
    folder: str, method: str, *pairs: str, tokens: int = 256
) -> tuple[Ranker, Updater, IntactLayers]:
    """As ``built``, with the layers recorded before the method touches them."""
    batches, kept = general(load_language_model(folder), tokens), []

    def record(ranker: Ranker) -> None:
        kept.append(IntactLayers(ranker.backbone, batches))

    ranker, updater = built(folder, method, *pairs, tokens=tokens, before=record)
    return ranker, updater, kept[0]


def general(language_model: LanguageModel, tokens: int = 256) -> list[dict[str, torch.Tensor]]:
    windows = token_windows(language_model.tokenizer, TEXT, tokens=tokens, window=64)
    return list(general_batches(language_model, windows, CPU, size=3))


def inputs_of_layers(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: found.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_leak_is_zero_without_change_and_else_that_of_a_direct_computation(model_folder: str) -> None:
    language_model = load_language_model(model_folder)
    model, batches = language_model.model, general(language_model)
    backbone = model if language_model.encoder_decoder else model.base_model
    intact = IntactLayers(backbone, batches)
    names = {name for name, module in backbone.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    assert intact.leak() == dict.fromkeys(names, 0.0)
    inputs = inputs_of_layers(backbone, batches)
    before = {name: backbone.get_submodule(name).weight.detach().clone() for name in names}
    torch.manual_seed(0)
    with torch.no_grad():
        for number, name in enumerate(sorted(names)):
            weight = backbone.get_submodule(name).weight
            weight.add_(0.01 * number * torch.randn_like(weight))
    found = intact.leak()
    for name in names:
        x = torch.cat([batch.flatten(0, 1) for batch in inputs[name]]).double()
        W0, W1 = before[name].double(), backbone.get_submodule(name).weight.detach().double()
        assert found[name] == pytest.approx(float((x @ (W1 - W0).T).norm() / (x @ W0.T).norm()), rel=1e-4, abs=1e-7)


def test_layers_that_read_the_same_tensor_share_it(llama_folder: str) -> None:
    language_model = load_language_model(llama_folder)
    kept = IntactLayers(language_model.model.base_model, general(language_model))._inputs
    q, k, o = (kept[f"layers.0.self_attn.{name}_proj"] for name in "qko")
    assert all(a is b for a, b in zip(q, k, strict=True))
    assert len(q) == 2
    assert not any(a is b for a in q for b in o)


def test_leak_of_adapters_is_that_of_the_merged_weight(llama_folder: str) -> None:
    ranker, updater, intact = built_and_recorded(llama_folder, "lora", "training.lr=1.0e-2")
    for _ in range(3):
        updater.update([*losses(ranker).values()])
    found = intact.leak()
    assert min(found.values()) > 0
    name = "layers.1.mlp.down_proj"
    layer = ranker.backbone.get_submodule(name)
    x = torch.cat(intact._inputs[name])
    with torch.no_grad():
        change = layer(x) - layer.base_layer(x)
        assert found[name] == pytest.approx(float(change.norm() / layer.base_layer(x).norm()), rel=1e-4)


def leak_after_training(folder: str, method: str, *pairs: str, tokens: int = 256) -> list[float]:
    ranker, updater, intact = built_and_recorded(folder, method, "training.lr=1.0e-2", *pairs, tokens=tokens)
    for _ in range(5):
        updater.update([*losses(ranker).values()])
    return list(intact.leak().values())


def test_the_null_space_keeps_the_leak_far_down(llama_folder: str) -> None:
    """The inputs of a random model spread over all directions, and still."""
    kept = leak_after_training(llama_folder, "gems", "method.energy=0.99")
    for method in ("gems-no-null", "adamw"):
        free = leak_after_training(llama_folder, method)
        assert sum(kept) < 0.2 * sum(free)
        assert max(kept) < 0.2 * max(free)


@pytest.mark.filterwarnings("ignore:null_space was collected on few tokens:UserWarning")
def test_what_is_protected_wholly_does_not_leak(llama_folder: str) -> None:
    """16 tokens span fewer directions than there are: all of them can be protected, and some are left to learn in."""
    kept = leak_after_training(llama_folder, "gems", "method.energy=1.0", tokens=16)
    free = leak_after_training(llama_folder, "gems-no-null", tokens=16)
    assert max(kept) < 1e-4
    assert min(free) > 1e-2


def test_a_run_writes_answers_and_leak(llama_folder: str, data_folder: str, tmp_path: Path) -> None:
    path = written(tmp_path / "questions.json", [entry(question) for question in QUESTIONS])
    small = [
        "training.batch_size=4",
        "evaluation.perplexity_tokens=64",
        "evaluation.perplexity_window=32",
        "data.min_user_events=3",
        "training.leak_tokens=64",
    ]
    line = ["run", "--data", data_folder, "--model", llama_folder, "--method", "adamw", "--steps", "2"]
    line += [
        "--set",
        *small,
        f"evaluation.multiple_choice={path}",
        "evaluation.multiple_choice_questions=3",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(line) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    summary = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    expected = answer_questions(load_language_model(llama_folder), load_questions(path, 3), CPU, budget=100)
    assert {key: metrics["zero_shot"]["general"][key] for key in expected.metrics} == expected.metrics
    assert summary["multiple_choice"]["questions"] == 3
    assert summary["multiple_choice"]["zero_shot"] == expected.summary
    assert summary["multiple_choice"]["final"]["accuracy"] == metrics["final"]["general"]["multiple_choice"]
    assert len(summary["leak"]) == 14
    assert all(0 < value < 1 for value in summary["leak"].values())
    (tmp_path / "none.json").write_text("[]")
    assert (
        main([*line[:-1], str(tmp_path / "other"), "--set", f"evaluation.multiple_choice={tmp_path / 'none.json'}"])
        == 2
    )
    assert not (tmp_path / "other").exists()
