"""``python -m gradsub.null_space collect`` on a tiny Llama and a tiny T5."""

from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gradsub import NullSpace
from gradsub.null_space._command import Trend, main

# Third-party imports that warn are made here, once, so that the suite's -W error need not know of them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = tuple("abcdefghijklmnopqrstuvwxyz")


POSITIONS = 40
BART = {"layers": 1, "ffn_dim": 24, "attention_heads": 2}


def saved(folder: Path, kind: str, **more: Any) -> str:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1} | more
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS, **sizes)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    elif kind == "bart":
        names = {"d_model": 16, **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in BART.items()}}
        config = transformers.BartConfig(
            max_position_embeddings=POSITIONS, decoder_start_token_id=1, forced_eos_token_id=None, **names, **sizes
        )
        transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    elif kind == "roberta":
        config = transformers.RobertaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            is_decoder=True,
            max_position_embeddings=POSITIONS,
            **sizes,
        )
        transformers.RobertaForCausalLM(config).save_pretrained(folder)
    elif kind == "t5":
        config = transformers.T5Config(
            d_model=16, d_ff=24, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0, **sizes
        )
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=1,
            **sizes,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["llama", "t5"])
def model(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"), "llama")


def written(path: Path, lines: int = 200, separator: str = "\n") -> str:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(WORDS), (lines, 12), generator=generator).tolist()
    path.write_text(separator.join(" ".join(WORDS[i] for i in line) + "." for line in chosen), encoding="utf-8")
    return str(path)


def run(model: str, text: str, out: Path, *options: str) -> int:
    return main(["collect", "--model", model, "--text", text, "--out", str(out), "--window", "16", *options])


@pytest.mark.parametrize("options", [[], ["--statistics"], ["--energy", "0.8", "--no-normalize"], ["--side", "output"]])
def test_it_makes_a_null_space_and_says_whether_it_was_enough(tmp_path, model, options, capsys):
    assert run(model, written(tmp_path / "text.txt"), tmp_path / "null.safetensors", *options) == 0
    said = capsys.readouterr().out
    assert said.count("of fresh text's energy free") == 3
    assert "any number would leave" in said or "too few to tell" in said
    assert "are free to train" in said
    null_space = NullSpace.load(tmp_path / "null.safetensors")
    names = dict(transformers.AutoModel.from_pretrained(model).named_modules())
    assert {name.removeprefix("model.") for name in null_space} <= set(names)
    assert all(0 < null_space.protected_fraction(name) <= 1 for name in null_space)
    kind = "exact" if options == ["--statistics"] else "directions"
    assert {null_space._statistics(name).kind for name in null_space} == {kind}


def test_it_collects_what_the_library_collects(tmp_path, llama):
    text = written(tmp_path / "text.txt")
    assert run(llama, text, tmp_path / "null.safetensors", "--energy", "0.9", "--statistics", "--batch", "3") == 0
    found = NullSpace.load(tmp_path / "null.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    lines = [line for i, line in enumerate(Path(text).read_text().split("\n")) if i % 8 != 7]
    ids = torch.tensor(tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"])
    batch = ids[: len(ids) // 16 * 16].view(-1, 16)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    expected = NullSpace(energy=0.9).collect(model, [{"input_ids": batch}], normalize=True)
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(found.eigenvalues(name), expected.eigenvalues(name), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("separator", [" ", "\n\n"])
def test_any_layout_of_text_and_groups_of_layers(tmp_path, llama, separator, capsys):
    text = written(tmp_path / "text.txt", separator=separator)
    assert run(llama, text, tmp_path / "null.safetensors", "--layers-at-once", "7", "--tokens", "640") == 0
    in_groups = capsys.readouterr().out
    assert "640 tokens to fit on" in in_groups
    assert len(NullSpace.load(tmp_path / "null.safetensors")) == 14
    # What all of the tokens leave of fresh text is the same number, whatever the groups.
    assert run(llama, text, tmp_path / "whole.safetensors", "--tokens", "640") == 0
    whole = capsys.readouterr().out
    said = [line for line in in_groups.splitlines() if "640 tokens leave" in line or "most is left in" in line]
    assert len(said) == 2
    assert all(line in whole for line in said)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--energy", "2"], "energy=2.0"),
        (["--energy", "0.9", "--threshold", "0.1"], "exclude each other"),
        (["--tokens", "3"], "--tokens 3"),
        (["--window", "1"], "--window 1"),
        (["--target-modules", "nothing"], "nothing"),
        (["--target-modules", "("], "target_modules='(' is no regular expression"),
        (["--layers-at-once", "0"], "--layers-at-once 0 must be at least 1"),
        (["--layers-at-once", "-1"], "--layers-at-once -1"),
        (["--window", "2049"], "--window 2049 is longer than --model has positions: pass 2048 at most"),
        (["--device", "cuda:99"], "--device 'cuda:99' cannot be used here"),
        (["--device", "meta"], "--device 'meta' cannot be used here"),
        (["--device", "nonsense"], "--device 'nonsense' cannot be used here"),
        (["--layers-at-once", "2", "--statistics"], "leave one of them out"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--out", "missing/null.safetensors"], "no folder"),
        (["--out", 250 * "n"], "cannot be written: File name too long"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_in_a_line_before_weights_are_read(tmp_path, llama, options, match, capsys):
    text, model = written(tmp_path / "text.txt"), tmp_path / "model"
    shutil.copytree(llama, model)
    (model / "model.safetensors").unlink()
    assert run(str(model), text, tmp_path / "null.safetensors", *options) == 1
    assert match in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == {Path(text), model}


def refused(model: str, tmp_path: Path, capsys: Any, *options: str) -> str:
    """The one line in which a model is refused."""
    assert run(model, written(tmp_path / "text.txt"), tmp_path / "null.safetensors", *options) == 1
    assert not (tmp_path / "null.safetensors").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize("content", ["half", "", "[]", "\0", "{}"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_none_of_a_model_are_said_in_a_line(tmp_path, llama, file, content, capsys):
    shutil.copytree(llama, tmp_path / "model")
    whole = (tmp_path / "model" / file).read_bytes()
    (tmp_path / "model" / file).write_bytes(whole[: len(whole) // 2] if content == "half" else content.encode())
    if (file, content) == ("tokenizer_config.json", "{}"):
        return  # all that it says may be left out
    assert str(tmp_path / "model") in refused(str(tmp_path / "model"), tmp_path, capsys)


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_size": "x"}, {"hidden_size": 32}, {"num_key_value_heads": 0}, {"vocab_size": 40}, {"model_type": "none"}],
    ids=str,
)
def test_a_configuration_of_another_model_is_said_in_a_line(tmp_path, llama, wrong, capsys):
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    assert str(tmp_path / "model") in refused(str(tmp_path / "model"), tmp_path, capsys)


def test_a_tokenizer_of_another_model_is_said_in_a_line(tmp_path, capsys):
    model = saved(tmp_path / "model", "llama", vocab_size=8)
    assert "a vocab_size of 8 in its config, and a tokenizer that makes the token 27" in refused(
        model, tmp_path, capsys
    )


@pytest.mark.parametrize(("kind", "most"), [("gpt2", POSITIONS), ("bart", 2 * POSITIONS)])
def test_a_window_is_no_longer_than_the_model_has_positions(tmp_path, kind, most, capsys):
    model, text, out = saved(tmp_path / "model", kind), written(tmp_path / "text.txt"), tmp_path / "null.safetensors"
    line = ["collect", "--model", model, "--text", text, "--out", str(out)]
    assert main([*line, "--window", str(most)]) == 0
    said = capsys.readouterr().out
    assert main(line) == 0  # 256 is what is taken of a model with more
    assert capsys.readouterr().out == said
    out.unlink()
    assert f"pass {most} at most" in refused(model, tmp_path, capsys, "--window", str(most + 1))


def test_a_model_that_takes_fewer_tokens_than_it_says_is_said_in_a_line(tmp_path, capsys):
    model = saved(tmp_path / "model", "roberta", pad_token_id=1)  # its first position is the third
    assert run(model, written(tmp_path / "text.txt"), tmp_path / "null.safetensors") == 0
    (tmp_path / "null.safetensors").unlink()
    last = refused(model, tmp_path, capsys, "--window", str(POSITIONS))
    assert f"cannot run on a window of {POSITIONS} tokens: " in last


def test_too_little_memory_is_said_in_a_line(tmp_path, llama, monkeypatch, capsys):
    def full(*args: Any, **options: Any) -> NullSpace:
        raise torch.OutOfMemoryError("there is none left")

    monkeypatch.setattr(NullSpace, "collect", full)
    assert refused(llama, tmp_path, capsys) == "error: there is none left"


def test_text_that_is_too_short_or_no_text(tmp_path, llama, capsys):
    for content, match in ((b"one line", "at least 8"), (b"\xff\xfe\xfa", "UTF-8")):
        (tmp_path / "text.txt").write_bytes(content)
        assert run(llama, str(tmp_path / "text.txt"), tmp_path / "null.safetensors") == 1
        assert match in capsys.readouterr().err


def test_without_transformers_the_extra_is_named(tmp_path, llama, monkeypatch, capsys):
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run(llama, written(tmp_path / "text.txt"), tmp_path / "null.safetensors") == 1
    assert "gradsub[examples]" in capsys.readouterr().err


def test_transformers_is_imported_only_when_it_is_used():
    code = "import sys, gradsub.null_space._command; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = subprocess.run(
        [sys.executable, "-m", "gradsub.null_space", "collect", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "--model" in shown


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.6])
@pytest.mark.parametrize("floor", [0.0, 0.01, 0.03])
def test_the_trend_finds_how_many_tokens_are_enough(ratio, floor):
    def left(doublings: int) -> float:
        return floor + 0.05 * ratio**doublings

    enough = Trend.of([(1000 * 2**j, left(j)) for j in range(3)], floor).enough()
    needed = next(j for j in range(2, 60) if left(j) - floor <= max(0.1 * floor, 1e-3) * (1 + 1e-9))
    assert enough == 1000 * 2**needed


@pytest.mark.parametrize("shares", [[0.1], [0.1, 0.1], [0.1, 0.12, 0.13], [0.1, 0.02, 0.09]])
def test_without_a_trend_more_text_is_asked_for(shares):
    trend = Trend.of([(1000 * 2**j, share) for j, share in enumerate(shares)], 0.03)
    assert trend.enough() is None
    assert "too few" in trend.sentence()


@pytest.mark.parametrize("shares", [[0.03], [0.1, 0.032], [0.1, 0.02]])
def test_fresh_text_that_leaves_no_more_than_the_other_is_enough(shares):
    trend = Trend.of([(1000 * 2**j, share) for j, share in enumerate(shares)], 0.03)
    assert trend.enough() == 1000 * 2 ** (len(shares) - 1)
    assert "are enough" in trend.sentence()


def test_every_window_begins_as_every_input_does(tmp_path, llama, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    shutil.copytree(llama, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen: list[torch.Tensor] = []
    collect = NullSpace.collect

    def watched(self: NullSpace, model: Any, batches: Any, *args: Any, **options: Any) -> NullSpace:
        seen.extend(batch["input_ids"] for batch in batches)
        return collect(self, model, batches, *args, **options)

    monkeypatch.setattr(NullSpace, "collect", watched)
    assert run(str(tmp_path / "model"), written(tmp_path / "text.txt"), tmp_path / "null.safetensors") == 0
    assert {ids.shape[1] for ids in seen} == {16}
    assert all(bool((ids[:, 0] == tokenizer.bos_token_id).all()) for ids in seen)
    assert not any(bool((ids[:, 1:] == tokenizer.bos_token_id).any()) for ids in seen)


def test_a_folder_to_write_is_refused_before_anything_is_loaded(tmp_path, capsys):
    assert run("no such model", written(tmp_path / "text.txt"), tmp_path) == 1
    assert "is a folder: name a file in it" in capsys.readouterr().err
