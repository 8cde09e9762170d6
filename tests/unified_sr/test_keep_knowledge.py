"""The recipe `keep_knowledge`: it protects, compares at the same loss, goes on where it was, and its page is true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.recipes import keep_knowledge
from examples.recipes.keep_knowledge import Knowledge, Watch, command, main, parse, settings_of, table
from examples.recipes.keep_knowledge_data import IGNORED, QUESTIONS, encode, film_rows, read_rows, right, split
from examples.recipes.keep_knowledge_page import PAGE, RESULT, filled
from gradsub import NullSpace
from gradsub.layers import select_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant.*")


def task_file(folder: Path, tasks: tuple[str, ...] = ()) -> str:
    rows = [{"prompt": f"{number} is", "completion": " even" if number % 2 == 0 else " odd"} for number in range(40)]
    for number, row in enumerate(rows if tasks else []):
        row["task"] = tasks[number % len(tasks)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def line(model: str, data: str, out: Path, *more: str) -> list[str]:
    # The tiny model's layers are 24 wide, and all of that is in use.
    return ["--quick", "--model", model, "--data", data, "--out", str(out), "--energy", "0.8", *more]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def test_what_is_protected_stays_and_a_second_call_shows_the_same(
    llama_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = line(llama_folder, task_file(tmp_path), out)
    found = main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("on held-out rows\n") == 4, "steps 2 and 4 of both"
    assert found["gems"]["loss"] < found["before"]["loss"]
    assert found == json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert table(found) in printed
    assert "numbers of a quick run mean nothing" in printed
    assert not any(question in printed for question, _ in QUESTIONS), "a quick run asks none"

    before, after = weights(llama_folder), weights(out / "model")
    null_space = NullSpace.load(out / "null_space.safetensors")
    layers = {f"{name}.weight" for name in select_layers(AutoModelForCausalLM.from_pretrained(llama_folder))}
    assert {f"{name}.weight" for name in null_space} == layers
    for name, weight in before.items():
        change = after[name] - weight
        if name not in layers:
            assert not change.any(), f"{name} is frozen"
            continue
        basis = null_space.basis(name.removesuffix(".weight"))
        assert change.norm() > 0, name
        assert (change @ basis).norm() < 1e-4 * change.norm(), f"{name} answers protected inputs as before"

    assert main(arguments) == found
    again = capsys.readouterr().out
    assert table(found) in again
    assert "on held-out rows\n" not in again, "nothing was trained again"
    with pytest.raises(ValueError, match=r"other settings \(rank\); pass another --out"):
        main([*arguments, "--rank", "5"])


def test_adamw_stops_at_the_same_loss(llama_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = line(llama_folder, task_file(tmp_path), tmp_path / "out")
    found = main([*arguments, "--lr", "1e-2", "--most-steps", "40", "--measure-every", "1", "--answer-tokens", "2"])
    assert table(found) in (printed := capsys.readouterr().out)
    assert all(question in printed for question, _ in QUESTIONS)
    assert found["adamw"]["steps"] < 40
    assert found["adamw"]["loss"] <= found["gems"]["loss"]


def test_what_is_mistyped_is_said_before_the_model_loads_and_spoils_no_folder(
    llama_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", task_file(tmp_path)

    def said(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["keep_knowledge", *arguments])
        assert command() == 2
        written = capsys.readouterr().err
        assert written.startswith("error: ")
        assert written.count("\n") == 1
        return written

    with monkeypatch.context() as without_model:
        without_model.setattr(keep_knowledge, "load_language_model", None)
        assert "mien.jsonl" in said(*line(llama_folder, "mien.jsonl", out))
        assert "none.txt" in said(*line(llama_folder, data, out, "--general-text", "none.txt"))
    assert "nowhere" in said(*line("nowhere/at/all", data, out))
    main(line(llama_folder, data, out))
    capsys.readouterr()
    assert "other settings (model)" in said(*line("nowhere/at/all", data, out))


def test_help_needs_no_torch() -> None:
    block = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = ['x', '--help']; runpy.run_module("
    program = [sys.executable, "-c", f"{block}'examples.recipes.keep_knowledge', run_name='__main__')"]
    shown = subprocess.run(program, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert "--general-text" in shown


def test_an_interrupted_recipe_goes_on(
    llama_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = task_file(tmp_path)
    whole = main(line(llama_folder, data, tmp_path / "whole"))
    measured = Watch.on_step_end
    seen: list[int] = []

    def interrupt(self: Watch, args: Any, state: Any, control: Any, **rest: Any) -> None:
        seen.append(state.global_step)
        if len(seen) in (3, 9):  # in gems' step 3 and in AdamW's step 4, both behind the checkpoint of step 2
            raise KeyboardInterrupt
        measured(self, args, state, control, **rest)

    of, calls = Knowledge.of, []

    def broken(self: Knowledge, model: Any) -> dict[str, Any]:
        calls.append(model)
        if len(calls) == 2:  # behind the last step of gems
            raise KeyboardInterrupt
        return of(self, model)

    monkeypatch.setattr(Watch, "on_step_end", interrupt)
    monkeypatch.setattr(Knowledge, "of", broken)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            main(line(llama_folder, data, tmp_path / "broken"))
    found = main(line(llama_folder, data, tmp_path / "broken"))
    printed = capsys.readouterr().out
    for name in ("gems", "adamw"):
        assert printed.count(f"{name} goes on from {tmp_path / 'broken' / name / 'checkpoint-2'}\n") == 1
    assert seen == [1, 2, 3, 3, 4, 1, 2, 3, 4, 3, 4], "no step twice but those behind a checkpoint, and none too many"
    for name in ("before", "gems", "adamw"):
        assert found[name] == whole[name], "bit for bit"


def test_rows_may_belong_to_several_tasks(llama_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []
    wrap = keep_knowledge.GemsTrainer.create_optimizer

    def spy(self: Any, *arguments: Any) -> Any:
        optimizer = wrap(self, *arguments)
        made.append(self.gems.tasks)
        return optimizer

    monkeypatch.setattr(keep_knowledge.GemsTrainer, "create_optimizer", spy)
    found = main(line(llama_folder, task_file(tmp_path, ("small", "large")), tmp_path / "out"))
    assert made == [("small", "large")]
    assert found["gems"]["loss"] < found["before"]["loss"]


def test_rows_are_read_and_wrong_ones_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert read_rows(file) == [{"prompt": "a", "completion": "b"}, {"text": "c"}]
    for wrong in ("{", "[]", '{"prompt": "a"}', '{"text": 3}'):
        file.write_text(f'{{"text": "c"}}\n{wrong}\n', encoding="utf-8")
        with pytest.raises(ValueError, match="line 2"):
            read_rows(file)
    with pytest.raises(FileNotFoundError, match="--data"):
        read_rows(tmp_path / "none")
    with pytest.raises(ValueError, match="at least 8"):
        split([1] * 7, 3)


def test_rows_are_divided_once_and_prompts_have_no_label(llama_folder: str) -> None:
    from transformers import AutoTokenizer

    rows = film_rows()
    trained, held_out = split(rows, 100)
    assert len(held_out) == 100
    assert len(trained) + len(held_out) == len(rows)
    assert split(rows, 100) == (trained, held_out)
    assert len(split(rows, 10**6)[1]) == len(rows) // 4
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    encoded = encode([{"prompt": "ab", "completion": "cd"}, {"text": "abc", "task": "x"}], tokenizer, 4)
    assert [row["task"] for row in encoded] == ["task", "x"]
    first, second = encoded
    assert first["labels"] == [IGNORED, IGNORED, *first["input_ids"][2:]]
    assert second["labels"] == second["input_ids"]
    assert second["input_ids"][-1] == tokenizer.eos_token_id


def test_answers_are_right_by_their_words() -> None:
    said = ["It is Paris, of course.", "Seven.", "Blue", "2 + 2 = 4", "Warm", "I do not know", "honey!", "", "Mars", ""]
    assert right(said) == 5


def test_the_page_shows_what_a_run_printed() -> None:
    """docs/howto-keep-knowledge.md against the committed result of a run with the recipe's own settings."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert found["settings"] == settings_of(parse([])), "the recipe's defaults have changed since: run it again"
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page, found)
    other = {**found, "before": {**found["before"], "loss": 99.0}}
    assert page != filled(page, other)
