"""The settings of a run: typed fields with limits, the same for every method, to which a method adds its own."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any


def setting(
    default: Any, doc: str, *, minimum: float | None = None, above: float | None = None, maximum: float | None = None
) -> Any:
    """Declare a field of a settings class.

    Args:
        default: its default value.
        doc: one line that says what it means, with the unit.
        minimum: the least value allowed.
        above: a limit that the value must exceed.
        maximum: the greatest value allowed.
    """
    return field(default=default, metadata={"doc": doc, "minimum": minimum, "above": above, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every method understands; a method's own class adds to it and may change defaults."""

    data: str = setting("movielens-100k", "name of a data set, or a folder in a format of data/README.md")
    model: str = setting("smollm2-135m", "name of a language model, or a folder made by save_pretrained()")
    method: str = setting("gems", "name of the training method")
    steps: int = setting(100, "optimizer steps", minimum=0)
    epochs: int | None = setting(None, "passes over the task with most examples, in place of steps", minimum=1)
    early_stop: int | None = setting(
        None, "epochs without a better validation NDCG@10 after which training ends with the best weights", minimum=1
    )
    seed: int = setting(0, "of the initialisation and the order of the data", minimum=0)

    min_user_events: int = setting(5, "users with fewer events are removed", minimum=1)
    min_item_events: int = setting(5, "items with fewer events are removed", minimum=0)
    min_task_events: int = setting(0, "users with fewer events of one of the tasks are removed", minimum=0)
    item_counts: typing.Literal["events", "impressions"] = setting(
        "events", "what counts as an event of an item; impressions are also displays and recorded histories"
    )
    split: typing.Literal["source", "leave-one-out"] = setting(
        "source", "source takes the data's own split, where it has one, instead of leave-one-out"
    )
    histories: typing.Literal["recorded", "recorded-newest-first", "events"] = setting(
        "recorded", "recorded takes the histories that come with the data, where they do, and events the user's events"
    )
    searches: typing.Literal["half", "every"] = setting(
        "half", "data without recorded searches: half of the events become searches, or every event is one besides"
    )
    train_targets: typing.Literal["share", "each"] = setting(
        "share", "several targets of a training example share its weight, or each makes an example"
    )
    max_history: int = setting(10, "the most recent items of a prompt", minimum=1)
    max_query_tokens: int = setting(32, "tokens kept of a query", minimum=1)
    general_text: str | None = setting(None, "file of general-domain English; null takes text that Python brings along")

    format: typing.Literal["prompt", "sequence"] = setting(
        "prompt", "prompt has a target an example; sequence a target at each event of a user (decoders alone)"
    )
    train_tasks: str | None = setting(None, "tasks that are trained, separated by commas; null trains all")
    batch_size: int = setting(32, "examples per task and step, or sequences per step", minimum=1)
    accumulation: int = setting(
        1,
        "micro-batches that a task's batch is cut into; more than 1 saves memory",
        minimum=1,
    )
    gradient_checkpointing: bool = setting(
        False, "whether activations inside a block are computed again in the backward pass instead of kept"
    )
    lr: float = setting(1e-4, "peak learning rate of the model's weights", above=0)
    item_lr: float = setting(1e-3, "peak learning rate of the items' embedding rows", above=0)
    warmup: float = setting(0.05, "share of the steps in which the learning rates rise", minimum=0, maximum=1)
    weight_decay: float = setting(0.01, "decoupled weight decay of the weight matrices", minimum=0)
    grad_clip: float | None = setting(None, "largest norm of the gradient of all weights; null does not clip", above=0)
    autocast: typing.Literal["auto", "none", "bfloat16"] = setting(
        "auto", "precision of the matrix products; auto takes bfloat16 where this machine is faster with it"
    )
    device: typing.Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where to compute; auto takes a GPU if there is one"
    )

    eval_split: typing.Literal["test", "valid"] = setting("test", "examples evaluated; valid to choose settings by")
    eval_users: int = setting(0, "examples evaluated per task; 0 evaluates all", minimum=0)
    eval_seed: int = setting(0, "of the sample of evaluated users and the sampled negatives", minimum=0)
    eval_tokens: int = setting(2048, "tokens of a batch in evaluation", minimum=1)
    negatives: int = setting(99, "negatives of the sampled metrics", minimum=1)
    compat: typing.Literal["none", "gems"] = setting(
        "none", "gems adds NDCG and MAP as the released GEMS code defines them, over the retrieved relevant items"
    )
    perplexity_tokens: int = setting(4096, "tokens of general text on which perplexity is measured", minimum=16)
    perplexity_window: int = setting(512, "tokens that the model sees at once in it", minimum=8)
    leak_tokens: int = setting(
        512, "tokens of general text on which the change of each layer's output is measured; 0 measures none", minimum=0
    )
    multiple_choice: str | None = setting(None, "JSON file of multiple-choice questions; null asks none")
    multiple_choice_questions: int = setting(0, "questions asked, evenly spread over the file; 0 asks all", minimum=0)
    checkpoint_every: int = setting(25, "steps between two checkpoints of the training; 0 writes none", minimum=0)
    report_every: int = setting(5, "steps between two diagnostics of the optimizer", minimum=1)


def on_split(settings: Settings, split: typing.Literal["test", "valid"]) -> Settings:
    """The same run, evaluated on other examples."""
    return replace(settings, eval_split=split)


def kind_of(owner: type[Settings], name: str) -> Any:
    """Return the type that a field is declared with."""
    return typing.get_type_hints(owner)[name]


def checked(owner: type[Settings], name: str, value: Any) -> Any:
    """Return a field's value with its declared type, or say what is wrong with it.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    declared = next(item for item in fields(owner) if item.name == name)
    kind = kind_of(owner, name)
    converted = _convert(kind, value)
    if converted is _UNFIT:
        raise ValueError(f"the setting {name} must be {_describe(kind)}, got {value!r} ({declared.metadata['doc']})")
    _check_limits(declared, converted)
    return converted


_UNFIT = object()


def _convert(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else _UNFIT
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [_convert(option, value) for option in typing.get_args(kind) if option is not type(None)]
        return next((option for option in options if option is not _UNFIT), _UNFIT)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 6e-4, without a dot, as text.
        try:
            number = float(value)
        except ValueError:
            return _UNFIT
        return number if math.isfinite(number) else _UNFIT
    if kind is int and isinstance(value, bool):
        return _UNFIT
    return value if isinstance(value, kind) else _UNFIT


def _check_limits(declared: Field[Any], value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    limits = declared.metadata
    minimum, above, maximum = limits["minimum"], limits["above"], limits["maximum"]
    if minimum is not None and value < minimum:
        wanted = f"at least {minimum}"
    elif above is not None and value <= above:
        wanted = f"more than {above}"
    elif maximum is not None and value > maximum:
        wanted = f"at most {maximum}"
    else:
        return
    raise ValueError(f"the setting {declared.name} must be {wanted}, got {value!r} ({limits['doc']})")


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(kind))
    return names[kind]
