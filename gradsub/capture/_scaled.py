from __future__ import annotations

from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from gradsub.subspace import is_distributed

# Between a scaler and the optimizer there may be an optimizer's wrapper, and the wrappers that torch, schedulers and
# accelerate put around `step`.
_NEAR = 4
_FAR = 12


def scaler_reading(frame: FrameType | None, optimizer: Any) -> dict[str, Any] | None:
    """What a `GradScaler` keeps of this optimizer, if it is reading ``param_groups`` in order to divide gradients.

    Args:
        frame: who reads.
        optimizer: what is read, unless the scaler was given a wrapper of it.
    """
    for _ in range(_NEAR):
        if frame is None:
            break
        if "unscale" in frame.f_code.co_name:
            names = frame.f_locals
            scaler = names.get("self")
            if isinstance(scaler, GradScaler):
                return scaler._per_optimizer_states[id(names.get("optimizer", optimizer))]
        frame = frame.f_back
    return None


def scaler_stepping(frame: FrameType | None) -> bool:
    """Whether the step is taken by a `GradScaler` that is at work.

    Args:
        frame: who called `step`.
    """
    for _ in range(_FAR):
        if frame is None:
            break
        if "step" in frame.f_code.co_name:
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, GradScaler):
                return scaler.is_enabled()
        frame = frame.f_back
    return False


def leaves(gradients: Sequence[Tensor], sharded: Tensor | None) -> list[Tensor]:
    """Leaves that have these gradients in ``.grad``, for whoever looks there: what is done to those is done to these.

    Args:
        gradients: the gradients.
        sharded: a weight that lies on several ranks, if there is one: then all gradients are shown as lying on these
            ranks, since torch takes them together, and no operation takes both kinds.
    """
    shown = []
    for gradient in gradients:
        if sharded is not None and not is_distributed(gradient):
            from torch.distributed.tensor import DTensor, Replicate

            mesh = sharded.device_mesh  # type: ignore[attr-defined]
            gradient = DTensor.from_local(gradient, mesh, [Replicate()] * mesh.ndim, run_check=False)
        leaf = gradient.detach()
        leaf.grad = gradient
        shown.append(leaf)
    return shown


class Unscaling:
    """Whether the gradients of this step were divided by the scale of the loss already, and by which factor.

    Attributes:
        done: whether they were.
    """

    def __init__(self) -> None:
        self.done = False
        self._scaler: dict[str, Any] | None = None
        self._factor: Tensor | None = None

    def begin(self, scaler: dict[str, Any], device: torch.device) -> Tensor:
        """A one that is to be divided like the gradients.

        Args:
            scaler: what a `GradScaler` keeps of the optimizer.
            device: of the gradients.
        """
        self.done, self._scaler = True, scaler
        if self._factor is None:
            self._factor = torch.ones((), dtype=torch.float32, device=device)
        return self._factor

    def take(self) -> Tensor | None:
        """What has become of the one (0-dim), once."""
        factor, self._factor = self._factor, None
        return factor

    @property
    def skipped(self) -> bool:
        """Whether the scaler has taken its step without the optimizer's: it had found Inf."""
        return self._scaler is not None and self._scaler["stage"] is OptState.STEPPED

    def reset(self) -> None:
        """The step is over."""
        self.done, self._scaler, self._factor = False, None, None
