"""A language model of transformers, and what is known of it before its weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsub.layers import select_layers

_WINDOW = 256


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Whatever another library raises of a user's files, as a ValueError that begins with ``what``.

    These are errors of any kind: of safetensors and tokenizers plain exceptions, of a configuration with wrong numbers
    anything that computing with them raises.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def check_device(name: str) -> None:
    """Raise a ValueError unless numbers can be put on the device, and read there."""
    try:
        torch.ones(1, dtype=torch.float32, device=name).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"--device {name!r} cannot be used here ({reason}): leave it out for the CPU") from error


@dataclass(frozen=True)
class LanguageModel:
    """A folder or a name on the hub; the weights are not loaded yet.

    Attributes:
        before: the special tokens that the tokenizer puts before every input.
        after: those that it puts after it. Directions that were fitted without them would leave the features of a token
            that all inputs begin with free.
        start: of an encoder-decoder, the token that the decoder's inputs begin with; else None.
    """

    name: str
    config: Any
    tokenizer: Any
    factory: Any
    before: Tensor
    after: Tensor
    start: int | None

    @classmethod
    def of(cls, name: str) -> LanguageModel:
        """Read its configuration and its tokenizer.

        Raises:
            ValueError: they cannot be read, or an encoder-decoder does not say how the decoder's inputs begin.
            ImportError: transformers is not installed.
        """
        try:
            import transformers
        except ImportError as error:
            raise ImportError(
                "collecting for a language model needs transformers: pip install 'gradsub[examples]'"
            ) from error
        with saying(f"--model {name!r} cannot be read"):
            config = transformers.AutoConfig.from_pretrained(name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            before, after = _around(tokenizer)
        if not getattr(config, "is_encoder_decoder", False):
            return cls(name, config, tokenizer, transformers.AutoModelForCausalLM, before, after, None)
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            raise ValueError("--model says in its config of no decoder_start_token_id: set it there")
        return cls(name, config, tokenizer, transformers.AutoModelForSeq2SeqLM, before, after, start)

    def length(self, window: int | None) -> int:
        """How many tokens of the text stand in one window, without the special ones around them.

        Raises:
            ValueError: the model has fewer positions than the window has tokens.
        """
        around, most = len(self.before) + len(self.after), self._number("max_position_embeddings")
        if most is not None and self.start is not None:
            most = 2 * most - around  # encoder and decoder have a half each
        if window is None:
            window = min(_WINDOW, most or _WINDOW)
        elif most is not None and window > most:
            raise ValueError(f"--window {window} is longer than --model has positions: pass {most} at most")
        return max(2, window - around)

    def check_layers(self, target_modules: str) -> None:
        """Raise a ValueError if no layer is meant."""
        try:
            with torch.device("meta"):
                model = self.factory.from_config(self.config)
        except Exception:
            return  # loading it says more, or goes another way
        select_layers(model, target_modules)

    def check_tokens(self, windows: Sequence[Tensor]) -> None:
        """Raise a ValueError if the model has no embedding for a token."""
        largest = max(int(ids.max()) for ids in (*windows, self.before, self.after) if len(ids))
        size = self._number("vocab_size")
        if size is not None and largest >= size:
            raise ValueError(
                f"--model {self.name!r} has a vocab_size of {size} in its config, and a tokenizer that makes the token "
                f"{largest}: take the two from the same model"
            )

    def load(self, dtype: torch.dtype, device: str) -> Any:
        """The model itself, in evaluation mode."""
        with saying(f"--model {self.name!r} cannot be loaded"):
            model = self.factory.from_pretrained(self.name, dtype=dtype).to(device).eval()
        model.config.use_cache = False  # keys and values of past tokens would only take memory
        return model

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the model for tokens (batch x length); of an encoder-decoder the encoder has half."""
        if self.start is None:
            return {"input_ids": self._whole(ids)}
        source, target = ids.tensor_split(2, dim=1)  # the decoder goes on where the encoder's half ends
        shifted = torch.cat([torch.full_like(target[:, :1], self.start), target[:, :-1]], dim=1)
        return {"input_ids": self._whole(source), "decoder_input_ids": shifted}

    def _whole(self, ids: Tensor) -> Tensor:
        before, after = (end.to(ids.device).expand(len(ids), -1) for end in (self.before, self.after))
        return torch.cat([before, ids, after], dim=1)

    def _number(self, option: str) -> int | None:
        """An option of the configuration's part that is about text; None if it says nothing, or that is no limit."""
        try:
            found = getattr(self.config.get_text_config(), option, None)
        except ValueError:  # there are several such parts
            return None
        return found if isinstance(found, int) and found > 0 else None


def _around(tokenizer: Any) -> tuple[Tensor, Tensor]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    start = next((at for at in range(len(special)) if plain and special[at : at + len(plain)] == plain), None)
    ends = ([], []) if start is None else (special[:start], special[start + len(plain) :])
    before, after = (torch.tensor(end, dtype=torch.int64, device="cpu") for end in ends)
    return before, after
