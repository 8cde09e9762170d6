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

from gradsub.layers import check_targets
from gradsub.null_space._language_model import LanguageModel, check_device, saying
from gradsub.null_space._null_space import SIDES, NullSpace
from gradsub.null_space._scratch import Scratch

_STAGES = (4, 2, 1)  # the residual is measured after a quarter, a half and all of the tokens
_MORE = 0.1  # text is enough that leaves at most a tenth more than any amount of it would,
_LEAST = 1e-3  # or this share of the energy more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; what cannot be done is said in one line, with exit status 1."""
    chosen = _parser().parse_args(arguments)
    try:
        _collect(chosen)
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:  # torch's, where memory is short
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
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
    add("--window", type=int, help="tokens of one sequence (default: 256, or as many as the model has positions)")
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


def _check(chosen: argparse.Namespace) -> None:
    """Raise an error for arguments that are wrong whatever the model and the text are."""
    for name, least in (("window", 2), ("batch", 1), ("layers_at_once", 1)):
        value = getattr(chosen, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if chosen.statistics and chosen.layers_at_once is not None:
        raise ValueError("--statistics are not kept with --layers-at-once: leave one of them out")
    check_targets(chosen.target_modules)
    check_device(chosen.device)
    _check_out(chosen.out)


def _check_out(path: Path) -> None:
    """Raise an error unless a file can be written there: hours of work would be lost."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {str(path)!r}: there is no folder {str(path.absolute().parent)!r}")
    try:
        with Scratch(path) as scratch:
            _ = scratch.folder
    except OSError as error:
        raise OSError(f"--out {str(path)!r} cannot be written: {error.strerror}") from error


def _prepared(chosen: argparse.Namespace) -> tuple[LanguageModel, list[Tensor], list[Tensor]]:
    """The model, and windows of the text to fit on and to hold out; nothing of it takes long."""
    fit, fresh = _parts(_read(chosen.text))
    model = LanguageModel.of(chosen.model)
    length = model.length(chosen.window)
    if chosen.tokens is not None and chosen.tokens < length:
        raise ValueError(f"--tokens {chosen.tokens} must be at least {length}, which one --window holds")
    model.check_layers(chosen.target_modules)
    windows = _windows(model.tokenizer, fit, length, chosen.tokens)
    held_out = _windows(model.tokenizer, fresh, length, None)
    held_out = held_out[: max(1, len(windows) // 4)]
    model.check_tokens([*windows, *held_out])
    return model, windows, held_out


def _loaded(source: LanguageModel, chosen: argparse.Namespace, window: Tensor) -> Any:
    """The model itself, once it has run on a window."""
    model = source.load(getattr(torch, chosen.dtype), chosen.device)
    with saying(f"--model {chosen.model!r} cannot run on a window of {len(window)} tokens"), torch.no_grad():
        model(**source.inputs(window[None].to(chosen.device)))
    return model


def _collect(chosen: argparse.Namespace) -> None:
    _check(chosen)
    null_space = NullSpace(chosen.side, chosen.energy, chosen.threshold, chosen.max_rank, chosen.layer_memory_budget)
    normalize = chosen.threshold is None if chosen.normalize is None else chosen.normalize
    source, windows, held_out = _prepared(chosen)
    tokens = len(windows) * len(windows[0])
    print(f"{tokens} tokens to fit on, {len(held_out) * len(held_out[0])} held out", flush=True)
    model = _loaded(source, chosen, windows[0])

    def add(into: NullSpace, some: Sequence[Tensor], what: str, **options: Any) -> NullSpace:
        batches = _Batches(source, some, chosen.batch, chosen.device, what)
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
    """Keyword arguments of the model, ``size`` windows at a time, with a progress bar where tqdm is installed."""

    def __init__(self, model: LanguageModel, windows: Sequence[Tensor], size: int, device: str, what: str) -> None:
        self._model, self._windows, self._size, self._device, self._what = model, windows, size, device, what

    def __iter__(self) -> Any:
        starts: Iterable[int] = range(0, len(self._windows), self._size)
        try:
            from tqdm import tqdm
        except ImportError:
            print(f"{self._what} ...", file=sys.stderr, flush=True)
        else:
            starts = tqdm(starts, desc=self._what, unit="batch")
        for start in starts:
            ids = torch.stack(list(self._windows[start : start + self._size]))
            yield self._model.inputs(ids.to(self._device))


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
