"""Random token ids: the same rows for every method and every number of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of the model, and the tokens it should predict (rows x positions)."""

    inputs: dict[str, Tensor]
    targets: Tensor

    @property
    def rows(self) -> int:
        return len(self.targets)


def make_batches(problem: Problem, vocabulary: int, encoder_decoder: bool) -> list[Batch]:
    """One batch a task, of equal size.

    A decoder's row is ``sequence_length`` tokens. An encoder-decoder's row is a source and a target of
    ``sequence_length`` tokens each, and counts twice towards ``problem.tokens``.

    Raises:
        ValueError: the tokens do not make whole rows, or the rows cannot be split equally among the tasks.
    """
    row = problem.sequence_length * (2 if encoder_decoder else 1)
    rows, rest = divmod(problem.tokens, row)
    if rest or rows == 0 or rows % problem.tasks:
        raise ValueError(
            f"tokens={problem.tokens} make {problem.tokens / row:g} rows of {row}, which cannot be split equally among "
            f"tasks={problem.tasks}: take a multiple of {row * problem.tasks}"
        )
    whole = _sequence_to_sequence if encoder_decoder else _next_token
    generator = torch.Generator().manual_seed(problem.seed)
    batch = whole(rows, problem.sequence_length, vocabulary, generator)
    share = rows // problem.tasks
    return [_part(batch, slice(start, start + share)) for start in range(0, rows, share)]


def join(batches: Sequence[Batch]) -> Batch:
    """All rows as one batch, in the order of the tasks."""
    inputs = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    return Batch(inputs, torch.cat([batch.targets for batch in batches]))


def _part(batch: Batch, rows: slice) -> Batch:
    return Batch({name: values[rows] for name, values in batch.inputs.items()}, batch.targets[rows])


def _next_token(rows: int, length: int, vocabulary: int, generator: torch.Generator) -> Batch:
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    return Batch({"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous())


def _sequence_to_sequence(rows: int, length: int, vocabulary: int, generator: torch.Generator) -> Batch:
    source = torch.randint(vocabulary, (rows, length), generator=generator)
    target = torch.randint(vocabulary, (rows, length), generator=generator)
    shifted = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], dim=1)
    return Batch({"input_ids": source, "decoder_input_ids": shifted}, target)
