"""The command that fits a null space to a language model of transformers, on a text file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsub.null_space._null_space import SIDES, NullSpace

_STAGES = (4, 2, 1)  # the residual is measured after a quarter, a half and all of the tokens
_MORE = 0.1  # text is enough that leaves at most a tenth more than any amount of it would,
_LEAST = 1e-3  # or this share of the energy more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; what cannot be done is said in one line, with exit status 1."""
    chosen = _parser().parse_args(arguments)
    try:
        _collect(chosen)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gradsub.null_space", description=__doc__)
    collect = parser.add_subparsers(required=True, metavar="collect").add_parser(
        "collect",
        help="fit a null space to a model and save it",
        description="Every eighth part of the text is held out: it shows how much of fresh text's energy stays free.",
    )
    add = collect.add_argument
    add("--model", required=True, help="a folder made by save_pretrained(), or a name on the hub")
    add("--text", required=True, type=Path, help="a UTF-8 text file of general-domain text")
    add("--out", required=True, type=Path, help="the safetensors file to write")
    add("--side", choices=SIDES, default="input")
    add("--energy", type=float, help="share of the energy to protect (default: 0.95, unless a threshold is given)")
    add("--threshold", type=float, help="protect the directions above this eigenvalue instead")
    add("--max-rank", type=int, help="at most this many directions a layer")
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="whether every token counts the same, however long its features (default: yes, unless a threshold is "
        "given, which is an absolute eigenvalue)",
    )
    add("--tokens", type=int, help="how many tokens to fit on (default: all that the text has)")
    add("--window", type=int, default=256, help="tokens of one sequence (default: %(default)s)")
    add("--batch", type=int, default=4, help="sequences of one forward pass (default: %(default)s)")
    add("--target-modules", default="all-linear", help="'all-linear' or a regular expression (default: %(default)s)")
    add("--layer-memory-budget", type=int, help="bytes of one layer's statistics (default: exact statistics)")
    add("--layers-at-once", type=int, help="so many layers in one pass over the text: memory is that of these alone")
    add("--device", default="cpu", help="where the model runs (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model's weights")
    add(
        "--statistics",
        action="store_true",
        help="save the statistics too, so that more can be collected; the file is several times as large",
    )
    return parser


def _collect(chosen: argparse.Namespace) -> None:
    for name, least in (("window", 2), ("batch", 1)):
        if getattr(chosen, name) < least:
            raise ValueError(f"--{name} {getattr(chosen, name)} must be at least {least}")
    if chosen.tokens is not None and chosen.tokens < chosen.window:
        raise ValueError(f"--tokens {chosen.tokens} must be at least --window {chosen.window}")
    if chosen.statistics and chosen.layers_at_once is not None:
        raise ValueError("--statistics are not kept with --layers-at-once: leave one of them out")
    if not chosen.out.absolute().parent.is_dir():
        raise ValueError(f"--out {str(chosen.out)!r}: there is no folder {str(chosen.out.absolute().parent)!r}")
    if chosen.out.is_dir():
        raise ValueError(f"--out {str(chosen.out)!r} is a folder: name a file in it")
    null_space = NullSpace(chosen.side, chosen.energy, chosen.threshold, chosen.max_rank, chosen.layer_memory_budget)
    normalize = chosen.threshold is None if chosen.normalize is None else chosen.normalize
    fit, fresh = _parts(_read(chosen.text))
    model, tokenizer = _load(chosen.model, getattr(torch, chosen.dtype), chosen.device)
    # With what the tokenizer puts around them windows are as long as asked for, and no longer than a model takes.
    length = max(2, chosen.window - sum(map(len, _around(tokenizer))))
    windows = _windows(tokenizer, fit, length, chosen.tokens)
    held_out = _windows(tokenizer, fresh, length, None)
    held_out = held_out[: max(1, len(windows) // 4)]
    tokens = len(windows) * len(windows[0])
    print(f"{tokens} tokens to fit on, {len(held_out) * len(held_out[0])} held out", flush=True)

    def add(into: NullSpace, some: Sequence[Tensor], what: str, **options: Any) -> NullSpace:
        batches = _Batches(model, tokenizer, some, chosen.batch, chosen.device, what)
        options = {"target_modules": chosen.target_modules, **options}
        return into.collect(model, batches, normalize=normalize, **options)

    if chosen.layers_at_once is not None:
        add(null_space, windows, "collecting", layers_at_once=chosen.layers_at_once, out=chosen.out)
        shares, names = {}, list(null_space)
        for start in range(0, len(names), chosen.layers_at_once):
            group = names[start:][: chosen.layers_at_once]
            others = add(NullSpace(chosen.side), held_out, "held-out text", target_modules=group)
            shares.update(null_space.residual_energy(others))
        _say([(tokens, sum(shares.values()) / len(shares))], shares)
    else:
        others = add(NullSpace(chosen.side), held_out, "held-out text")
        measured: list[tuple[int, float]] = []
        start, shares = 0, {"": 1.0}
        for divisor in dict.fromkeys(max(1, len(windows) // stage) for stage in _STAGES):
            add(null_space, windows[start:divisor], f"collecting {divisor * len(windows[0])} tokens")
            start = divisor
            shares = null_space.residual_energy(others)
            measured.append((divisor * len(windows[0]), sum(shares.values()) / len(shares)))
        _say(measured, shares)
        own = [1.0 - null_space._protection(name).energy for name in null_space]
        print(Trend.of(measured, max(0.0, sum(own) / len(own))).sentence())
        null_space.save(chosen.out, statistics=chosen.statistics)
    free = [1.0 - null_space.protected_fraction(name) for name in null_space]
    print(f"{chosen.out}: {len(free)} layers, {sum(free) / len(free):.1%} of their directions are free to train")


def _say(measured: Sequence[tuple[int, float]], shares: dict[str, float]) -> None:
    for tokens, share in measured:
        print(f"{tokens:>9} tokens leave {share:.2%} of fresh text's energy free")
    worst = max(shares, key=lambda name: shares[name])
    print(f"most is left in {worst}: {shares[worst]:.2%}")


@dataclass(frozen=True)
class Trend:
    """How the energy that fresh text leaves free falls, with every doubling of the tokens, towards what must stay free.

    With any number of tokens it comes down to what the text that was fitted on leaves, 1 - ``energy`` or a little less.

    Attributes:
        tokens: those of the last measurement.
        share: what they leave of fresh text.
        floor: what they leave of the text that was fitted on.
        ratio: by which a doubling changes the difference of the two; None if that is not known.
    """

    tokens: int
    share: float
    floor: float
    ratio: float | None

    @classmethod
    def of(cls, measured: Sequence[tuple[int, float]], floor: float) -> Trend:
        """From pairs of tokens and shares, each with about twice the tokens of the one before."""
        tokens, share = measured[-1]
        before = measured[-2][1] - floor if len(measured) > 1 else 0.0
        return cls(tokens, share, floor, max(0.0, share - floor) / before if before > 0.0 else None)

    def enough(self) -> int | None:
        """The tokens that leave a tenth more of fresh text than of their own at most; None: that cannot be told."""
        tokens, above = self.tokens, self.share - self.floor
        while above > max(_MORE * self.floor, _LEAST):
            if self.ratio is None or self.ratio >= 1.0 or tokens > 1000 * self.tokens:
                return None
            tokens, above = 2 * tokens, above * self.ratio
        return tokens

    def sentence(self) -> str:
        """For the user."""
        enough = self.enough()
        if enough is None:
            return f"{self.tokens} tokens are too few to tell how many would be enough: pass at least twice as many"
        known = "are enough" if enough <= self.tokens else "would be enough"
        return f"about {enough} tokens {known}: any number would leave {self.floor:.2%}"


class _Batches:
    """Keyword arguments of the model, ``size`` windows at a time, with a progress bar where tqdm is installed.

    Each window stands in what the tokenizer puts around every input; of an encoder-decoder the encoder's half.
    """

    def __init__(
        self, model: Any, tokenizer: Any, windows: Sequence[Tensor], size: int, device: str, what: str
    ) -> None:
        self._windows, self._size, self._device, self._what = windows, size, device, what
        self._around = _around(tokenizer)
        config = model.config
        self._start = None
        if getattr(config, "is_encoder_decoder", False):
            self._start = config.decoder_start_token_id
            if self._start is None:
                raise ValueError("--model says in its config of no decoder_start_token_id: set it there")

    def __iter__(self) -> Any:
        starts: Iterable[int] = range(0, len(self._windows), self._size)
        try:
            from tqdm import tqdm
        except ImportError:
            print(f"{self._what} ...", file=sys.stderr, flush=True)
        else:
            starts = tqdm(starts, desc=self._what, unit="batch")
        for start in starts:
            ids = torch.stack(list(self._windows[start : start + self._size])).to(self._device)
            if self._start is None:
                yield {"input_ids": self._whole(ids)}
            else:  # the decoder goes on where the encoder's half ends
                source, target = ids.tensor_split(2, dim=1)
                shifted = torch.cat([torch.full_like(target[:, :1], self._start), target[:, :-1]], dim=1)
                yield {"input_ids": self._whole(source), "decoder_input_ids": shifted}

    def _whole(self, ids: Tensor) -> Tensor:
        before, after = (end.to(ids.device).expand(len(ids), -1) for end in self._around)
        return torch.cat([before, ids, after], dim=1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {str(path)!r} is not UTF-8 text ({error}): convert it first") from error


def _parts(text: str) -> tuple[str, str]:
    """The text to fit on, and every eighth line, which is held out; of few lines, every eighth sentence."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 8:
        lines = [piece for line in lines for piece in re.split(r"(?<=[.!?])\s+", line) if piece]
    if len(lines) < 8:
        raise ValueError(f"--text has {len(lines)} lines or sentences, at least 8 are needed: one is held out of eight")
    return "\n".join(line for i, line in enumerate(lines) if i % 8 != 7), "\n".join(lines[7::8])


def _windows(tokenizer: Any, text: str, length: int, tokens: int | None) -> list[Tensor]:
    """Sequences of one length, spread evenly over the text."""
    numbers = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    if len(ids) < 2:
        raise ValueError(f"--text has too few tokens: {len(ids)} in one of its two parts")
    length = min(length, len(ids))
    found = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    count = len(found) if tokens is None else max(1, min(len(found), tokens // length))
    # Neighbours come in different stages, so that the trend shows the amount of text and not its subject.
    order = torch.randperm(count, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu").tolist()
    return [found[index * len(found) // count] for index in order]


def _around(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The special tokens before and after every input, such as that of the beginning of a text.

    Directions that were fitted without them would leave the features of a token that all inputs begin with free.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    start = next((at for at in range(len(special)) if plain and special[at : at + len(plain)] == plain), None)
    ends = ([], []) if start is None else (special[:start], special[start + len(plain) :])
    before, after = (torch.tensor(end, dtype=torch.int64, device="cpu") for end in ends)
    return before, after


def _load(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "collecting for a language model needs transformers: pip install 'gradsub[examples]'"
        ) from error
    config = transformers.AutoConfig.from_pretrained(name)
    seq2seq = getattr(config, "is_encoder_decoder", False)
    factory = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model: Any = factory.from_pretrained(name, dtype=dtype)
    model = model.to(device).eval()
    model.config.use_cache = False  # keys and values of past tokens would only take memory
    return model, transformers.AutoTokenizer.from_pretrained(name)
