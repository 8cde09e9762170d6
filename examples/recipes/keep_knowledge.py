"""Teach a language model one task of your own, and keep what it knows: gems against AdamW at the same task loss.

    .venv/bin/python -m examples.recipes.keep_knowledge    # SmolLM2 learns the genres of films
    .venv/bin/python -m examples.recipes.keep_knowledge --data mine.jsonl --model NAME_OR_PATH --general-text en.txt

Rows of ``--data`` have ``prompt`` and ``completion``, or ``text``; with a column ``task`` they may belong to several
tasks. What is interrupted goes on, and what is finished is shown again. docs/howto-keep-knowledge.md explains it.
"""

from __future__ import annotations

import os

# OpenMP's threads would spin while they wait for each other, which on a busy machine takes most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import copy
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.recipes.keep_knowledge_options import check_settings, parse, settings_of

if __name__ == "__main__":
    parse(None, __doc__)  # --help, or a wrong option, needs nothing of what is imported below in many seconds

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from examples.recipes.keep_knowledge_data import (
    QUESTIONS,
    Collate,
    answers,
    encode,
    film_rows,
    read_rows,
    right,
    split,
    task_loss,
)
from examples.unified_sr.busy import busy_notice
from examples.unified_sr.general_domain import general_batches, perplexity, token_windows
from examples.unified_sr.general_text import load_general_text
from examples.unified_sr.model import LanguageModel, load_language_model
from examples.unified_sr.precision import choose_precision
from examples.unified_sr.report import change, markdown_table
from examples.unified_sr.settings import ModelSettings
from gradsub import NullSpace, freeze_unprotected
from gradsub.integrations import GemsReportCallback, GemsTrainerMixin

WINDOW = 256
"""Tokens of general text that the model reads at once."""


class GemsTrainer(GemsTrainerMixin, Trainer):
    """The Trainer, whose optimizer is wrapped by gems."""


class Watch(TrainerCallback):
    """Measures the task's loss on held-out rows, and ends the training where it is low enough.

    Args:
        measure: the loss of the model.
        every: steps between two measurements.
        target: ends the training; None: all steps are taken.
    """

    def __init__(self, measure: Callable[[Any], float], every: int, target: float | None) -> None:
        self.measure, self.every, self.target = measure, every, target

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Measure if it is time."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        loss = self.measure(model)
        state.log_history.append({"step": state.global_step, "held_out_loss": loss})
        print(f"  step {state.global_step}: {loss:.3f} on held-out rows")
        if self.target is not None and loss <= self.target:
            control.should_training_stop = control.should_save = True


class Knowledge:
    """Measures a model: its task, general text, and ten questions.

    Args:
        language_model: the tokenizer's owner.
        text: general text that the null space was not fitted on.
        held_out: rows of the task that are not trained on.
        options: of the command line.
    """

    def __init__(self, language_model: LanguageModel, text: str, held_out: list[Any], options: Any) -> None:
        self.language_model, self.options = language_model, options
        tokenizer = language_model.tokenizer
        self.collate = Collate(tokenizer.pad_token_id or 0)
        self.batches = [self.collate(held_out[start : start + 32]) for start in range(0, len(held_out), 32)]
        self.windows = token_windows(tokenizer, text, tokens=options.perplexity_tokens, window=2 * WINDOW)
        self.precision = choose_precision(ModelSettings())

    def loss(self, model: Any) -> float:
        """Of the task, on held-out rows."""
        return task_loss(model, self.batches, self.precision.context)

    def of(self, model: Any) -> dict[str, Any]:
        """All of it."""
        like = LanguageModel("", model, self.language_model.tokenizer, False)
        tokens = self.options.answer_tokens
        said = answers(model, self.language_model.tokenizer, tokens) if tokens else []
        general = perplexity(like, self.windows, model.device)
        score = right(said) if said else None
        return {"loss": self.loss(model), "perplexity": general.value, "right": score, "answers": said}


def protect(language_model: LanguageModel, text: str, options: Any) -> NullSpace:
    """The directions that general text uses in each layer, collected once."""
    path = options.out / "null_space.safetensors"
    if not path.is_file():
        print(f"the null space of {options.general_tokens} tokens of general text is collected")
        windows = token_windows(language_model.tokenizer, text, tokens=options.general_tokens, window=WINDOW)
        model = language_model.model
        null_space = NullSpace(energy=options.energy)
        null_space.collect(model, general_batches(language_model, windows, model.device))
        null_space.save(path, statistics=False)
    return NullSpace.load(path)


def train(
    name: str,
    model: Any,
    rows: list[Any],
    knowledge: Knowledge,
    options: Any,
    lr: float,
    target: float | None,
    gems: Any,
) -> dict[str, Any]:
    """Train by gems, or by AdamW alone if ``gems`` is None, and measure; from the last checkpoint if there is one."""
    folder = options.out / name
    if (folder / "result.json").is_file():
        print(f"  {name} is finished: {folder / 'result.json'}")
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps if target is None else options.most_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=lr,
        lr_scheduler_type="constant_with_warmup",  # no end is planned where the task's loss decides
        warmup_steps=options.warmup,
        weight_decay=0.01,
        max_grad_norm=1.0,  # the mixin clips what the optimizer has captured
        use_cpu=knowledge.precision.device.type == "cpu",
        bf16=knowledge.precision.autocast is not None,
        logging_steps=10,
        save_steps=options.save_every,
        save_total_limit=1,
        seed=options.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=False,  # the bar has the time that is left
        report_to=[],
    )
    made: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": rows,
        "data_collator": knowledge.collate,
        "callbacks": [Watch(knowledge.loss, options.measure_every, target)],
    }
    if gems is None:
        trainer = Trainer(**made)
    else:
        made["callbacks"].append(GemsReportCallback())
        trainer = GemsTrainer(gems=gems, **made)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    steps = None if last is None else finished(last, arguments.max_steps, target)
    if last is not None:
        print(f"  {name} goes on from {last}" if steps is None else f"  {name} is trained: {last}")
    if last is None or steps is None:
        trainer.train(resume_from_checkpoint=last)
        steps = trainer.state.global_step
        # Under bf16 the Trainer has left autocast in the forward pass; the intact model was measured without.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    else:
        # Interrupted behind the last step: the Trainer would take one more.
        trained = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    found = {**knowledge.of(model), "lr": lr, "steps": steps}
    if gems is not None:
        trainer.save_model(str(options.out / "model"))
        knowledge.language_model.tokenizer.save_pretrained(options.out / "model")
    (folder / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def finished(checkpoint: str, most_steps: int, target: float | None) -> int | None:
    """The step of a checkpoint behind which there is nothing to train; None if there is."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    losses = [entry["held_out_loss"] for entry in state.log_history if "held_out_loss" in entry]
    reached = target is not None and bool(losses) and losses[-1] <= target
    return state.global_step if reached or state.global_step >= most_steps else None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, train by gems, train by AdamW to the same loss of the task, and print both."""
    options = parse(arguments, __doc__)
    if (notice := busy_notice()) is not None:
        print(notice)
    # What may be mistyped first: the model takes long to load.
    rows = film_rows() if options.data is None else read_rows(options.data)
    split(rows, options.held_out)
    fitted, unseen = load_general_text(options.general_text)
    check_settings(options)
    language_model = load_language_model(options.model)
    model, tokenizer = language_model.model.to(choose_precision(ModelSettings()).device), language_model.tokenizer
    trained, held_out = split(encode(rows, tokenizer, options.length), options.held_out)
    knowledge = Knowledge(language_model, unseen, held_out, options)
    print(f"{len(trained)} rows to train on, {len(held_out)} held out; for example: {rows[0]}")

    measured = options.out / "before.json"
    if not measured.is_file():
        print("the intact model is measured")
        measured.write_text(json.dumps(knowledge.of(model), indent=1) + "\n", encoding="utf-8")
    before = json.loads(measured.read_text(encoding="utf-8"))
    null_space = protect(language_model, fitted, options)
    frozen = freeze_unprotected(model, null_space)
    print(f"frozen, since no null space holds them: {len(frozen)} parameters, such as {', '.join(frozen[:3])}")
    intact = copy.deepcopy(model)  # with the same parameters frozen: AdamW trains what gems does

    tasks = tuple(dict.fromkeys(row["task"] for row in trained))
    gems = {
        "tasks": tasks,
        "rank": options.rank,
        "update_proj_gap": options.gap,
        "null_space": null_space,
        "lr_scale": "adamw",  # steps as large as AdamW's at the same rate
    }
    print(f"gems, {options.steps} steps")
    with warnings.catch_warnings():
        if options.quick:  # it is so by design, and said under the table
            warnings.filterwarnings("ignore", "null_space was collected on few tokens")
        after = train("gems", model, trained, knowledge, options, options.gems_lr, None, gems)
    print(f"AdamW, until it has the same loss of the task, {after['loss']:.3f}")
    plain = train("adamw", intact, trained, knowledge, options, options.lr, after["loss"], None)

    found = {"settings": settings_of(options), "before": before, "adamw": plain, "gems": after}
    (options.out / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if plain["loss"] > after["loss"]:
        print(f"AdamW did not reach the loss of gems within {plain['steps']} steps; raise --most-steps or --lr")
    print(f"\n{table(found)}\n")
    if options.quick:
        print(
            "The numbers of a quick run mean nothing, and so few tokens protect little: it shows that everything\n"
            "works. Leave out --quick for a result.\n"
        )
    if options.answer_tokens:
        print(f"{conversation(found)}\n")
    print(f"model:   {options.out / 'model'}")
    print(f"numbers: {options.out / 'result.json'}")
    return found


def table(found: dict[str, Any]) -> str:
    """The numbers of a finished run."""
    before, columns = found["before"], [found["adamw"], found["gems"]]
    cells = [["", "before", "AdamW", "gems"]]
    cells.append(["task loss on held-out rows", f"{before['loss']:.2f}", *(f"{x['loss']:.2f}" for x in columns)])
    cells.append(["perplexity of general text", *(f"{x['perplexity']:.2f}" for x in (before, *columns))])
    cells.append(["its change", "", *(change(before["perplexity"], x["perplexity"]) for x in columns)])
    if before["answers"]:
        right_words = (str(x["right"]) for x in (before, *columns))
        cells.append([f"right word in the answer, of {len(QUESTIONS)}", *right_words])
    cells.append(["learning rate", "", *(f"{x['lr']:g}" for x in columns)])
    cells.append(["steps", "0", *(str(x["steps"]) for x in columns)])
    return markdown_table(cells)


def conversation(found: dict[str, Any]) -> str:
    """Each question with the three models' answers, one under the other."""
    lines = []
    for number, (question, _) in enumerate(QUESTIONS):
        lines.append(question)
        for name in ("before", "adamw", "gems"):
            answer = found[name]["answers"][number]
            lines.append(f"  {name:<7} {answer if len(answer) <= 74 else answer[:74].rstrip() + ' ...'}".rstrip())
    return "\n".join(lines)


def command() -> int:
    """Run the program.

    Returns:
        its exit code: 0; 2 after an error that the user can mend, which is printed without a traceback.
    """
    try:
        main()
    except (FloatingPointError, OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
