from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradsub._sums import sum_over
from gradsub.capture import MIXED, Held
from gradsub.distributed._agreement import Agreement, agree, check_replicas
from gradsub.distributed._ranks import Ranks
from gradsub.distributed._reduction import complete_sharded, merge_plain, reduce_captured, reduce_outside
from gradsub.linalg._arithmetic import widest
from gradsub.subspace import Layer, SubspaceBank, is_distributed, sharded_over


class Exchange:
    """Between capture and step: makes of every rank's gradients those of all; nothing while there is one rank.

    Args:
        model: if it is a ``DistributedDataParallel``, it averages gradients from outside tasks itself.
        parameters: all that the optimizer has, also those that come later.
    """

    def __init__(
        self,
        process_group: Any,
        model: nn.Module | None,
        tasks: int,
        names: Callable[[Tensor], str],
        parameters: Sequence[Tensor],
    ) -> None:
        self._parameters = parameters
        self._ranks = Ranks(process_group)
        self._tasks = tasks
        self._wrapper = data_parallel(model)
        self._names = names
        self._checked = False
        self._done = False

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """What is captured in here is summed by `reduce` and by nobody else.

        Raises:
            RuntimeError: the gradients of this step were summed already.
        """
        if self._done:
            raise RuntimeError(
                "a task after the ranks have summed this step's gradients (by reduce() or clip_grad_norm_()): call "
                "step() or zero_grad() first"
            )
        # Its graph may have been declared static since.
        wrapper = data_parallel(self._wrapper)
        with nullcontext() if wrapper is None else wrapper.no_sync():
            yield

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._ranks.size

    def anywhere(self, flag: Tensor) -> bool:
        """Whether the flag is set on any rank; waits for the device."""
        flag = flag.detach().to(torch.float32, copy=True)
        if self.size > 1:
            self._ranks.sum_([flag])
        return bool(flag != 0)

    @property
    def sharded(self) -> bool:
        """Whether ranks hold different parts of a weight."""
        return any(is_distributed(parameter) for parameter in self._parameters)

    def in_common(self, values: Tensor) -> Tensor:
        """Sums over the ranks of what each computed from its parts of sharded weights; else the values themselves.

        Raises:
            RuntimeError: the weights are sharded over different ranks.
        """
        groups: list[Any] = []
        for parameter in self._parameters:
            groups += [group for group in sharded_over(parameter) if all(group is not other for other in groups)]
        if not groups:
            return values
        if len(groups) > 1:
            raise RuntimeError(
                "weights are sharded over different ranks, so their gradients have no common norm and no common check: "
                'shard all along one dimension of one mesh, or pass nonfinite="ignore" and do not clip'
            )
        values = values.clone()
        sum_over(groups[0], [values])
        return values

    def check_nothing_kept_back(self) -> None:
        """Raise if weights are sharded, once a task's backward pass has left no gradient."""
        if self.sharded:
            raise RuntimeError(
                "no gradient arrived in a task whose backward pass ran: fully_shard kept it back, and would hand it to "
                "the next task; leave gradient synchronisation on (set_requires_gradient_sync(True)), also when "
                "accumulating"
            )

    def check_open(self) -> None:
        """Raise if gradients arrive from outside tasks that the ranks would not average any more.

        Raises:
            RuntimeError: the gradients of this step were summed already.
        """
        if self._done and self._wrapper is None and self._ranks.size > 1:
            raise RuntimeError(
                "a backward pass after the ranks have summed this step's gradients (by reduce() or clip_grad_norm_()): "
                "call it before, or call step() or zero_grad() first"
            )

    def reset(self) -> None:
        """The step is over."""
        self._done = False

    def reduce(
        self,
        held: Held,
        samples: Mapping[int, float],
        mixed: float,
        losses: Mapping[int, Tensor],
        merge: bool,
        rounding: float,
        bank: SubspaceBank,
        layers: Mapping[Tensor, Layer],
    ) -> Agreement | None:
        """Sum over the ranks, once a step; every rank has to come here.

        Args:
            held: what was captured; replaced by that of all ranks.
            mixed: rows of mixed batches.
            merge: whether the tasks' gradients of parameters without subspaces are only needed as a sum.
            rounding: epsilon of the coarsest format in which a gradient was computed.
            bank: tells what is due, and so what the others have captured.
            layers: the parameters that are decomposed.

        Returns:
            what all ranks have; None if this rank is alone, or if it is done already.
        """
        if self._done:
            return None
        if self._ranks.size == 1 and not self.sharded:
            return None
        if self.sharded:
            complete_sharded(layers, held.by_parameter())
        if self._ranks.size == 1:
            self._done = True
            return None
        if self.sharded:
            self._check_alike({**samples, MIXED: mixed})
        parameters = [parameter for parameter in self._parameters if not is_distributed(parameter)]
        if not self._checked and parameters:
            check_replicas(self._ranks, parameters, self._names)
            self._checked = True
        # A wrapper has averaged what arrived outside of tasks.
        bare = self._wrapper is None
        outside = [p for p in parameters if p.grad is not None] if bare else []
        for parameter in outside:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise ValueError(
                    f"the gradient of {self._names(parameter)} is sparse, and sparse gradients are not summed over "
                    "ranks: build the embedding with sparse=False"
                )
        agreement = agree(
            self._ranks,
            self._parameters[0].device,
            parameters,
            held,
            {**samples, MIXED: mixed},
            losses,
            outside,
            self._tasks,
            rounding,
        )
        if merge and parameters:
            agreement = merge_plain(held.single, parameters, layers, agreement)
        reduce_captured(self._ranks, bank, parameters, layers, held, agreement)
        reduce_outside(self._ranks, agreement)
        self._done = True
        return agreement

    def _check_alike(self, samples: Mapping[int, float]) -> None:
        """`fully_shard` weighs the ranks equally, which is right for equal numbers of samples only."""
        counts = [samples.get(task, 0.0) for task in (*range(self._tasks), MIXED)]
        device = self._parameters[0].device
        least, greatest = self._ranks.extremes(torch.tensor(counts, dtype=widest(device), device=device))
        if not torch.equal(least, greatest):
            raise RuntimeError(
                "under fully_shard every rank needs the same number of samples of every task, since it averages the "
                f"ranks with equal weights; this rank has {counts[:-1]} of tasks 0 to {self._tasks - 1} and "
                f"{counts[-1]} in mixed batches"
            )


def data_parallel(model: nn.Module | None) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` around a model, also inside of ``torch.compile``'s wrapper.

    Raises:
        ValueError: its graph was declared static.
    """
    while model is not None and not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        model = inner if isinstance(inner, nn.Module) else None
    if model is not None and model.static_graph:
        raise ValueError(
            "model is a DistributedDataParallel with static_graph=True, which cannot be silent inside of tasks, as "
            "torch has no no_sync() for static graphs: wrap the model with static_graph=False"
        )
    return model
