"""Tiny models, a tiny tokenizer and a small data folder for the application's tests."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Third-party imports that warn are made here, once, so that the suite's -W error need not know of them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft  # noqa: F401
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = ("red", "blue", "green", "wood", "steel", "glass")
THINGS = ("chair", "lamp", "table", "spoon", "shelf")


def make_tokenizer(*, closing: bool) -> Any:
    """One token a byte; ``closing`` appends the end token, as T5's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*specials, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if closing:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": 260, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        config = transformers.T5Config(
            d_model=24, d_ff=32, d_kv=6, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0, **common
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=kind == "llama",
        initializer_range=0.2,
        bos_token_id=1,
        **common,
    )
    return transformers.LlamaForCausalLM(config)


def save_model(kind: str, folder: Path) -> str:
    make_model(kind).save_pretrained(folder)
    make_tokenizer(closing=kind == "t5").save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, and far slower where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="package")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Null spaces are kept in a folder of the tests, also by the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("untied", tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(params=["llama", "untied", "t5"])
def model_folder(request: pytest.FixtureRequest) -> str:
    folder: str = request.getfixturevalue(f"{request.param}_folder")
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """RecBole atomic files: 24 users, 30 items, searches by the first word of the title."""
    folder = tmp_path_factory.mktemp("shop")
    titles = [f"{word} {thing}" for word in WORDS for thing in THINGS]
    lines = ["item_id:token\ttitle:token_seq", *(f"i{number}\t{title}" for number, title in enumerate(titles))]
    (folder / "shop.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw = random.Random(0)
    rows = ["user_id:token\titem_id:token\ttimestamp:float\tquery:token_seq"]
    for user in range(24):
        favourite = user % len(WORDS)
        for time in range(12):
            item = favourite * len(THINGS) + draw.randrange(len(THINGS)) if draw.random() < 0.5 else draw.randrange(30)
            query = titles[item].split()[0] if time % 2 else ""
            rows.append(f"u{user}\ti{item}\t{time}\t{query}")
    (folder / "shop.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(folder)
