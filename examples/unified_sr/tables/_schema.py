"""What each column of the three files is; ``results/SCHEMA.md`` is made of this."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

INTRODUCTION = """# What the Parquet files hold

`python -m examples.unified_sr pack` writes three files, which the column `run` joins. Null is what was not measured. A
run that failed or is not finished is in none of them. Names in braces stand for families of columns:

* `{task}`: rec or search;
* `{metric}`: such as ndcg@10;
* `{tasks}` and `{subspaces}`: two names with a bar between them;
* `{name}`: a parameter group, or a subspace.

Numbers of steps have four significant digits."""

_PLACES = {
    "{task}": r"(rec|search)",
    "{metric}": r"((gems_)?(hit|ndcg|mrr|map)@\d+)",
    "{tasks}": r"(\w+\|\w+)",
    "{subspaces}": r"(\w+\|\w+)",
    "{name}": r"([\w.]+)",
}


@dataclass(frozen=True)
class Column:
    """A column, or a family of columns.

    Args:
        name: with the places that stand for a task, a metric and so on, in braces.
        type: of its values.
        doc: what they are, with the unit; null is what was not measured.
    """

    name: str
    type: pa.DataType
    doc: str

    def fits(self, name: str) -> bool:
        """Whether a column of this name is one of these."""
        pattern = re.escape(self.name)
        for place, expression in _PLACES.items():
            pattern = pattern.replace(re.escape(place), expression)
        return re.fullmatch(pattern, name) is not None


_WORD, _NUMBER, _SMALL = pa.dictionary(pa.int32(), pa.string()), pa.float64(), pa.float32()
_COUNT, _TEXT = pa.int64(), pa.string()
_RUN = Column("run", _WORD, "name of the run: data, label, seed (of a trial: rate) and a hash of its settings")

COLUMNS: dict[str, tuple[Column, ...]] = {
    "runs": (
        _RUN,
        Column("data", _WORD, "data set"),
        Column("label", _WORD, "entry of the grid; outside of a grid the method"),
        Column("method", _WORD, "method"),
        Column("model", _WORD, "language model"),
        Column("split", _WORD, "evaluated examples: test, or valid for the trials by which rates were chosen"),
        Column("seed", _COUNT, "seed of the initialisation and the order of the data"),
        Column("lr", _NUMBER, "peak learning rate; null without training steps"),
        Column("item_lr", _NUMBER, "peak learning rate of the items' rows; null without training steps"),
        Column("format", _WORD, "prompt: a target an example; sequence: a target at each event of a user"),
        Column("batch_size", _COUNT, "examples of each task in a step, or sequences"),
        Column("negatives", _COUNT, "random items of the sampled metrics"),
        Column("settings", _TEXT, "all settings as JSON by section.key; of an absolute path the last two parts"),
        Column("selection", _TEXT, "how the grid chose the rate, as JSON; null outside of a grid or without a choice"),
        Column("trained_tasks", _WORD, "tasks that were trained, separated by commas"),
        Column("trained_parameters", _COUNT, "weights that were trained"),
        Column("steps", _COUNT, "steps that were taken"),
        Column("seconds", _NUMBER, "all phases together, s"),
        Column("seconds_training", _NUMBER, "the steps, s"),
        Column("seconds_per_step", _NUMBER, "median, s"),
        Column("examples_per_second", _NUMBER, "training examples, 1/s"),
        Column("tokens_per_second", _NUMBER, "tokens of training, 1/s"),
        Column("peak_resident", _COUNT, "peak memory of the process in training, bytes"),
        Column("peak_device", _COUNT, "peak memory of tensors on the GPU, bytes"),
        Column("protected", _NUMBER, "share of a layer's directions that is protected, mean over the layers"),
        Column("leak", _NUMBER, "||dW x|| / ||W x|| over inputs x of general text, mean over the layers"),
        Column("perplexity_before", _NUMBER, "of general text, intact model"),
        Column("perplexity", _NUMBER, "of general text, after training"),
        Column("multiple_choice_before", _NUMBER, "accuracy by scores per character, intact model"),
        Column("multiple_choice", _NUMBER, "accuracy by scores per character, after training"),
        Column("multiple_choice_raw_before", _NUMBER, "accuracy by whole scores, intact model"),
        Column("multiple_choice_raw", _NUMBER, "accuracy by whole scores, after training"),
        Column("multiple_choice_questions", _COUNT, "questions that were asked"),
        Column("device", _WORD, "GPU, or architecture of the CPU"),
        Column("cores", _COUNT, "cores of the machine"),
        Column("threads", _COUNT, "threads that computed"),
        Column("precision", _WORD, "of the matrix products"),
        Column("python", _WORD, "version"),
        Column("packages", _TEXT, "versions as JSON"),
        Column("revision", _WORD, "commit of this repository"),
        Column("uncommitted_changes", pa.bool_(), "whether the code differed from it"),
        Column("{task}_examples", _COUNT, "examples that were evaluated"),
        Column("{task}_evaluated_loss", _NUMBER, "cross-entropy of their targets after training, nats"),
        Column("{task}_{metric}", _NUMBER, "mean over the examples in full ranking, after training"),
        Column("{task}_{metric}_before", _NUMBER, "the same of the intact model"),
        Column("{task}_sampled_{metric}", _NUMBER, "the same among the target and random items, after training"),
        Column("{task}_sampled_{metric}_before", _NUMBER, "the same of the intact model"),
    ),
    "steps": (
        _RUN,
        Column("step", pa.int32(), "number of the step, from 1"),
        Column("seconds", _SMALL, "it took, s"),
        Column(
            "validation", _SMALL, "mean over the trained tasks of NDCG@10 on the validation split, where an epoch ends"
        ),
        Column("loss_{task}", _SMALL, "cross-entropy over the catalogue, nats"),
        Column("lr_{name}", _SMALL, "learning rate of a parameter group"),
        Column("cosine_{tasks}", _SMALL, "cosine of two tasks' gradients, all weights as one vector"),
        Column("cosines_{tasks}", _SMALL, "mean over the weights of the cosine in each of them"),
        Column("angles_{subspaces}_mean_cosine", _SMALL, "of the principal angles of two subspaces, mean over layers"),
        Column("angles_{subspaces}_smallest", _SMALL, "smallest principal angle, mean over layers, radians"),
        Column("gates_{task}", _SMALL, "weight of the task's subspace"),
        Column("energy_{name}", _SMALL, "share of the gradient's energy that a subspace keeps"),
    ),
    "queries": (
        _RUN,
        Column("task", _WORD, "task"),
        Column("query", _WORD, "the example: the task and the user's number"),
        Column("{metric}", _SMALL, "metric in full ranking, after training"),
    ),
}
"""File -> its columns. The keys are also the names of the files, with ``.parquet`` behind them."""


def column_of(table: str, name: str) -> Column:
    """Return what a column of a file is.

    Raises:
        ValueError: if no such column is known.
    """
    for column in COLUMNS[table]:
        if column.fits(name):
            return column
    raise ValueError(f"the table {table!r} has no column {name!r}; describe it in tables/_schema.py")


def schema_of(table: str, names: Iterable[str]) -> pa.Schema:
    """Return the schema of a file with these columns, in the order of ``COLUMNS``, then of the names.

    Raises:
        ValueError: as ``column_of``.
    """
    order = {column: place for place, column in enumerate(COLUMNS[table])}
    found = {name: column_of(table, name) for name in names}
    found |= {column.name: column for column in COLUMNS[table] if "{" not in column.name}
    return pa.schema([(name, found[name].type) for name in sorted(found, key=lambda name: (order[found[name]], name))])


def describe() -> str:
    """Return the schema as Markdown, which is the text of ``results/SCHEMA.md``."""
    parts = [INTRODUCTION]
    for table, columns in COLUMNS.items():
        rows = [f"| `{column.name}` | {_kind(column.type)} | {_plain(column.doc)} |" for column in columns]
        parts.append("\n".join([f"## {table}.parquet", "", "| column | type | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _kind(kind: pa.DataType) -> str:
    return "string" if pa.types.is_dictionary(kind) else str(kind)


def _plain(text: str) -> str:
    return text.replace("|", r"\|")
