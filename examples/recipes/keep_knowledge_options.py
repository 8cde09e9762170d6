"""The command line of `keep_knowledge`, and whether a folder's run was started with it; imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse(arguments: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """The options; ``--quick`` makes everything small that was not given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/keep-knowledge"), help="default: %(default)s")
    parser.add_argument("--data", help="JSON lines; default: film titles and their genres")
    parser.add_argument("--model", default="smollm2-135m", help="a name, or a folder made by save_pretrained()")
    parser.add_argument("--general-text", help="file of general English; default: prose out of Python's documentation")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything works")
    sizes = {
        "steps": (40, 4, "optimizer steps of gems"),
        "warmup": (6, 1, "steps in which the rate rises"),
        "most_steps": (120, 4, "of AdamW, if it does not reach the loss earlier"),
        "batch_size": (16, 4, "rows of a step"),
        "length": (128, 64, "most tokens of a row"),
        "held_out": (120, 8, "rows that are not trained on"),
        "general_tokens": (8192, 512, "of general text, for the null space"),
        "perplexity_tokens": (4096, 256, "of other general text, to measure on"),
        "measure_every": (5, 2, "steps between two measurements of the task's loss"),
        "save_every": (20, 2, "steps between two checkpoints"),
        # Of a few tokens no answer is right, and all three models give the same.
        "answer_tokens": (24, 0, "most tokens of an answer; 0: no questions are asked"),
        "rank": (64, 4, "directions that the task may use in each layer at a time"),
        "gap": (20, 2, "steps between two choices of these directions"),
    }
    for name, (default, quick, text) in sizes.items():
        told = f"{text} (default: {default}, quick: {quick})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=told)
    parser.add_argument("--energy", type=float, default=0.97, help="share of general text's activations to protect")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--gems-lr", type=float, help="of gems (default: 0.0006, quick: 0.0002)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, (default, quick, _) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else default)
    if options.gems_lr is None:
        # At a small rank lr_scale="adamw" multiplies each of few directions by much: three times the rate is too high.
        options.gems_lr = 2e-4 if options.quick else 6e-4
    return options


def settings_of(options: Any) -> dict[str, Any]:
    """What decides the numbers, as plain values."""
    return {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "out"
    }


def check_settings(options: Any) -> None:
    """Refuse a folder in which work was done with other settings; settings without work are replaced.

    Raises:
        ValueError: naming them.
    """
    file, own = options.out / "settings.json", settings_of(options)
    begun = file.is_file() and (options.out / "before.json").is_file()  # the first thing that is worth keeping
    if begun and (theirs := json.loads(file.read_text(encoding="utf-8"))) != own:
        changed = [key for key in own if theirs.get(key) != own[key]]
        raise ValueError(
            f"{options.out} holds a run with other settings ({', '.join(changed)}); pass another --out, or the same "
            "settings to go on"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
