"""The settings of a run in five sections: typed, limited and documented fields, checked by pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from pydantic.fields import FieldInfo
from typing_extensions import TypeVar


def _number(value: Any) -> Any:
    """YAML 1.1 reads 6e-4, without a dot, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number)]
"""A finite number in any spelling of YAML."""


class Section(BaseModel):
    """Settings that belong together; nothing else gets in, nothing is converted, and nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSettings(Section):
    """What is read, filtered and split: with `evaluation`, what a result is about."""

    source: str = Field("movielens-100k", description="name of a data set, or a folder in a format of data/README.md")
    min_user_events: int = Field(5, ge=1, description="users with fewer events are removed")
    min_item_events: int = Field(5, ge=0, description="items with fewer events are removed")
    min_task_events: int = Field(0, ge=0, description="users with fewer events of one of the tasks are removed")
    item_counts: Literal["events", "impressions"] = Field(
        "events", description="what counts as an event of an item; impressions are also displays and recorded histories"
    )
    split: Literal["source", "leave-one-out"] = Field(
        "source", description="source takes the data's own split, where it has one, instead of leave-one-out"
    )
    histories: Literal["recorded", "recorded-newest-first", "events"] = Field(
        "recorded",
        description="recorded takes the histories that come with the data, where they do, and events the user's events",
    )
    searches: Literal["half", "every"] = Field(
        "half",
        description="data without recorded searches: half of the events become searches, or every event is one besides",
    )


class ModelSettings(Section):
    """Which language model, what it reads, and how it computes."""

    name: str = Field("smollm2-135m", description="name of a language model, or a folder made by save_pretrained()")
    format: Literal["prompt", "sequence"] = Field(
        "prompt",
        description="prompt has a target an example; sequence a target at each event of a user (decoders alone)",
    )
    max_history: int = Field(10, ge=1, description="the most recent items of a user that are read")
    max_query_tokens: int = Field(32, ge=1, description="tokens kept of a query")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to compute; auto takes a GPU if there is one"
    )
    autocast: Literal["auto", "none", "bfloat16"] = Field(
        "auto", description="precision of the matrix products; auto takes bfloat16 where this machine is faster with it"
    )
    inference_tokens: int = Field(2048, ge=1, description="tokens of a batch where nothing is trained")


class TrainingSettings(Section):
    """What every method shares in training; a method may have defaults of its own."""

    steps: int = Field(100, ge=0, description="optimizer steps")
    epochs: int | None = Field(
        None, ge=1, description="passes over the task with most examples, or over all sequences, in place of steps"
    )
    early_stop: int | None = Field(
        None,
        ge=1,
        description="epochs without a better validation NDCG@10 after which training ends with the best weights",
    )
    tasks: str | None = Field(None, description="tasks that are trained, separated by commas; null trains all")
    targets: Literal["share", "each"] = Field(
        "share", description="several targets of a training event share its weight, or each makes an example"
    )
    title_searches: int = Field(
        0, ge=0, description="times an epoch that each item is searched for by its title, besides the events"
    )
    batch_size: int = Field(32, ge=1, description="examples per task and step, or sequences per step")
    accumulation: int = Field(
        1, ge=1, description="micro-batches that a task's batch is cut into; more than 1 saves memory"
    )
    gradient_checkpointing: bool = Field(
        False, description="whether activations inside a block are computed again in the backward pass instead of kept"
    )
    lr: Number = Field(1e-4, gt=0, description="peak learning rate of the model's weights")
    item_lr: Number = Field(1e-3, gt=0, description="peak learning rate of the items' embedding rows")
    warmup: Number = Field(0.05, ge=0, le=1, description="share of the steps in which the learning rates rise")
    weight_decay: Number = Field(0.01, ge=0, description="decoupled weight decay of the weight matrices")
    grad_clip: Number | None = Field(
        None, gt=0, description="largest norm of the gradient of all weights; null does not clip"
    )
    checkpoint_every: int = Field(25, ge=0, description="steps between two checkpoints; 0 writes none")
    report_every: int = Field(5, ge=1, description="steps between two diagnostics of the optimizer")
    leak_tokens: int = Field(
        512,
        ge=0,
        description="tokens of general text on which training's change of each layer's output is measured; 0: none",
    )


class EvaluationSettings(Section):
    """What is measured, and on what."""

    split: Literal["test", "valid"] = Field("test", description="examples evaluated; valid to choose settings by")
    users: int = Field(0, ge=0, description="examples evaluated per task; 0 evaluates all")
    seed: int = Field(0, ge=0, description="of the sample of evaluated users and the sampled negatives")
    negatives: int = Field(99, ge=1, description="negatives of the sampled metrics")
    compat: Literal["none", "gems"] = Field(
        "none",
        description="gems adds NDCG and MAP as the released GEMS code defines them, over the retrieved relevant items",
    )
    general_text: str | None = Field(
        None,
        description="file of general-domain English, a third of it held out from null spaces; null takes Python's own",
    )
    perplexity_tokens: int = Field(4096, ge=16, description="tokens of general text on which perplexity is measured")
    perplexity_window: int = Field(512, ge=8, description="tokens that the model sees at once in it")
    multiple_choice: str | None = Field(None, description="JSON file of multiple-choice questions; null asks none")
    multiple_choice_questions: int = Field(
        0, ge=0, description="questions asked, evenly spread over the file; 0 asks all"
    )


class MethodSettings(Section):
    """A method's name; the settings class of a method adds what it alone has."""

    name: str = Field("gems", description="name of the training method")


M = TypeVar("M", bound=MethodSettings, default=MethodSettings, covariant=True)


class Settings(Section, Generic[M]):
    """All settings of a run, of which ``method`` is the method's own class."""

    seed: int = Field(0, ge=0, description="of the initialisation and the order of the data")
    data: DataSettings
    model: ModelSettings
    method: SerializeAsAny[M]
    training: TrainingSettings
    evaluation: EvaluationSettings


class DatasetSettings(DataSettings):
    """All that identifies a data set: its section, and what those of the model and of training say about examples."""

    max_history: int = Field(20, ge=1, description="the most recent items of a user that an example has")
    train_targets: Literal["share", "each"] = Field(
        "share", description="several targets of a training event share its weight, or each makes an example"
    )

    @classmethod
    def of(cls, settings: Settings[Any]) -> DatasetSettings:
        """Return those of a run."""
        model, training = settings.model, settings.training
        return cls(**dict(settings.data), max_history=model.max_history, train_targets=training.targets)


EVALUATION = ("data", "evaluation")
"""The sections in which runs must agree for their numbers to mean the same."""


def sections(method: type[MethodSettings] = MethodSettings) -> dict[str, type[Section]]:
    """Return the sections by name, of which ``method`` is of the method's own class."""
    found = {name: field.annotation for name, field in Settings.model_fields.items()} | {"method": method}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


def known_settings(method: type[MethodSettings] = MethodSettings) -> dict[str, FieldInfo]:
    """Return all settings by ``section.key`` with their declarations."""
    top = {name: field for name, field in Settings.model_fields.items() if name not in sections()}
    return top | {
        f"{name}.{key}": field for name, kind in sections(method).items() for key, field in kind.model_fields.items()
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings as one mapping by ``section.key``.

    Example:
        >>> flatten({"seed": 1, "training": {"lr": 0.1}, "method.rank": 2})
        {'seed': 1, 'training.lr': 0.1, 'method.rank': 2}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flatten(value, f"{name}.")
        elif value is not None or name not in sections():  # YAML reads an empty section as null
            found[name] = value
    return found
