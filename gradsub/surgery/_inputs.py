"""What a surgery may look at, and the base of those that look at losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import widest

from ._checks import check_gramian


@dataclass(frozen=True)
class SurgeryInputs:
    """What a surgery with ``needs_losses = True`` is called with; K tasks, all on one device.

    Attributes:
        gramian: (K, K) inner products of the weighted gradients w_k G_k inside the shared subspaces, summed over the
            layers: what every other surgery is called with. Zero rows at absent tasks.
        losses: (K,) each task's loss in this step, summed over its backward passes; NaN where none was seen.
        samples: (K,) how many samples each task contributed in this step; 0 at absent tasks.
    """

    gramian: Tensor
    losses: Tensor
    samples: Tensor


class Weighting(Protocol):
    """A surgery that looks at more than the Gramian: its ``needs_losses`` says so.

    State that a resume needs is saved with the optimizer's, where the object has `state_dict` and `load_state_dict`. If
    its shapes depend on the number of tasks, ``expect(gramian)`` tells it that number before the first step.
    """

    needs_losses: bool

    def __call__(self, inputs: SurgeryInputs) -> Tensor:
        """K weights of the weighted gradients w_k G_k; ones leave their sum as it is."""
        ...


Surgery: TypeAlias = Callable[[Tensor], Tensor] | Weighting
"""Anything that turns a Gramian (K, K) into weights (K,), or `SurgeryInputs` if it has ``needs_losses = True``."""


def needs_losses(surgery: Any) -> bool:
    """Whether a surgery is called with `SurgeryInputs`."""
    return bool(getattr(surgery, "needs_losses", False))


def weigh(surgery: Any, inputs: SurgeryInputs) -> Tensor:
    """What a surgery of either kind makes of these inputs.

    Raises:
        ValueError: weights of another shape than (K,).
    """
    weights: Tensor = surgery(inputs) if needs_losses(surgery) else surgery(inputs.gramian)
    if weights.shape != inputs.losses.shape:
        raise ValueError(
            f"surgery returned weights of shape {tuple(weights.shape)}, expected one a task: "
            f"{tuple(inputs.losses.shape)}"
        )
    return weights


class LossWeighting(ABC):
    """Weights from the tasks' losses and from what came before; nothing waits for the device.

    What is remembered are K numbers each of ``FIELDS``, all zero at first. They follow the device of the losses, and a
    task whose loss was not seen, or is not finite, keeps its own. Such a task has the weight 1.
    """

    FIELDS: ClassVar[tuple[str, ...]]
    needs_losses = True

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    @abstractmethod
    def _weigh(self, state: Mapping[str, Tensor], losses: Tensor, seen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights (K,), and the new state.

        Args:
            state: by field, (K,) each.
            losses: (K,) finite; 1 where nothing was seen.
            seen: (K,) booleans.
        """

    def __call__(self, inputs: SurgeryInputs) -> Tensor:
        """Weights, shape (K,), like the Gramian; then the state moves on."""
        self.expect(inputs.gramian)
        wide = widest(inputs.losses.device)
        state = {name: value.to(inputs.losses.device, wide) for name, value in self._state.items()}
        seen = inputs.losses.isfinite()
        losses = inputs.losses.detach().to(wide).where(seen, 1.0)
        if any(value.shape != losses.shape for value in state.values()):
            raise ValueError(
                f"losses has {len(losses)} tasks, but {type(self).__name__} has learnt those of "
                f"{len(next(iter(state.values())))}: call reset() to start over, or use one object for each optimizer"
            )
        weights, after = self._weigh(state, losses, seen)
        self._state = {name: value.where(seen, state[name]) for name, value in after.items()}
        return weights.where(seen, 1.0).to(inputs.gramian.dtype)

    def expect(self, gramian: Tensor) -> None:
        """Take the number of tasks from a Gramian before the first call; learns nothing, and does nothing later.

        Raises:
            ValueError: ``gramian`` is none.
        """
        check_gramian(gramian)
        if not self._state:
            zeros = torch.zeros(len(gramian), dtype=widest(gramian.device), device=gramian.device)
            self._state = {name: zeros.clone() for name in self.FIELDS}

    def reset(self) -> None:
        """Forget everything; the next call sets the number of tasks anew."""
        self._state = {}

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered, as plain tensors: a copy; empty before the first call."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: other keys, or values that are no finite numbers, one a task.
        """
        if state_dict and set(state_dict) != set(self.FIELDS):
            raise ValueError(f"state_dict has {sorted(state_dict)}, expected {sorted(self.FIELDS)}")
        for name, value in state_dict.items():
            if not isinstance(value, Tensor) or value.ndim != 1 or not bool(value.isfinite().all()):
                raise ValueError(f"state_dict[{name!r}] is {value!r}, expected one finite number a task")
        self._state = {name: state_dict[name].clone() for name in self.FIELDS if name in state_dict}
