"""One run on several processes, as torchrun and accelerate launch start them: who does what, and what is averaged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        index: from 0; the first one writes the files.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.index == 0

    def check_batch(self, size: int, accumulation: int) -> None:
        """Raise where a batch cannot be divided into equal parts.

        Raises:
            ValueError: naming ``batch_size`` and what to make of it.
        """
        if size % self.count or size // self.count < accumulation:
            raise ValueError(
                f"training.batch_size={size} cannot be divided among {self.count} processes with accumulation="
                f"{accumulation}: pass a multiple of {self.count} of at least {self.count * accumulation}"
            )

    def part(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's rows of a batch: as many neighbouring ones as the others have."""
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size]

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their mean over the processes."""
        if self.count == 1:
            return
        found = list(tensors)
        if not found:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in found])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(found, torch.split(flat, [tensor.numel() for tensor in found]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)

    def of_first(self, compute: Callable[[], T]) -> T:
        """What the first process computes; an error there is raised on all."""
        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [(compute(), None)]
            except Exception as raised:
                outcome = [(None, raised)]
        if self.count > 1:
            dist.broadcast_object_list(outcome, src=0)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]


def launched() -> bool:
    """Whether a launcher has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def current() -> Processes:
    """This process; alone unless ``joined`` is open."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that a launcher has started with this one, for as long as the block lasts."""
    if not launched() or dist.is_initialized():
        yield current()
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield current()
    finally:
        dist.destroy_process_group()
