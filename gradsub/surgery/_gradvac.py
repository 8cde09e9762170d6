"""Gradient vaccine: pull the tasks' gradients to the similarity that they usually have."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import widen

from ._checks import check_gramian, check_interval
from ._cosines import cosines, visiting_order, weights_of


def gradvac(gramian: Tensor, *, target: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Every task turns towards the others until their cosine is the target; the weights of the sum.

    Task i starts from g'_i = g_i and meets the other tasks j one by one. Where φ = cos(g'_i, g_j) lies below the
    target φ̂_ij,

        g'_i <- g'_i + |g'_i| (φ̂ √(1-φ²) - φ √(1-φ̂²)) / (|g_j| √(1-φ̂²)) g_j

    which makes that cosine φ̂, and the common gradient is sum_i g'_i. A target of 0 is PCGrad. This function keeps no
    memory; the method of the paper, whose targets follow the observed cosines, is `GradVac`.

    An exactly opposed gradient (φ = -1) cannot be turned and vanishes. A target within about 1e-3 of a zero angle
    would take an unbounded multiple of g_j and counts as an angle of that size (1e-7 in float64). All tasks move at
    once, in K - 1 steps on the Gramian's device, and nothing waits for it. A zero gradient gets the weight 1. NaN or
    Inf anywhere gives NaN weights. Not differentiable.

    Args:
        gramian: G_ij = <g_i, g_j>, shape (K, K), squared unit of the gradients.
        target: φ̂, a cosine in [-1, 1] for all pairs, or a tensor (K, K) of them whose row i is task i's; its diagonal
            is ignored.
        generator: Source of each task's order of meetings; it matters from three tasks on. None: the cyclic order
            i + 1, i + 2, ... at every call.

    Returns:
        Weights, shape (K,), no unit, at least 1.

    Raises:
        ValueError: ``gramian`` is no real floating-point tensor of shape (K, K) with K >= 1, or ``target`` is out of
            range or of another shape.

    Example:
        >>> import torch
        >>> from gradsub.surgery import gradvac
        >>> gramian = torch.eye(2)
        >>> gradvac(gramian, target=0.6)
        tensor([1.7500, 1.7500])

    References:
        Wang, Tsvetkov, Firat, Cao, "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
        Multilingual Models", ICLR 2021, arXiv 2010.05874, equation 2.
    """
    check_gramian(gramian)
    tasks = gramian.shape[0]
    _check_target(target, tasks)
    order = visiting_order(tasks, generator, gramian.device)
    return _vaccinate(gramian, _as_targets(target, gramian), order).weights


class GradVac:
    """`gradvac` whose targets are moving averages of the cosines met so far, one per ordered pair of tasks.

    The targets start at 0 (the first call is PCGrad). At each meeting of g'_i with g_j, after the target has been used,

        φ̂_ij <- (1 - β) φ̂_ij + β φ_ij

    where φ_ij is the cosine before the correction. A pair with an absent task keeps its target, and a Gramian with NaN
    or Inf changes none. One object serves one Gramian: give each layer, or each group of layers, its own.

    Calling it never waits for the device. The order of the meetings comes from ``generator``, whose state is part of
    this object's.

    Args:
        beta: β, the share of the newest cosine, in [0, 1], per call. The paper trains with 0.01; 0.5 is the default of
            TorchJD and LibMTL.
        generator: As in `gradvac`.

    Raises:
        ValueError: ``beta`` is out of range; in a call, the Gramian has another number of tasks than before.

    Example:
        >>> import torch
        >>> from gradsub.surgery import GradVac
        >>> surgery = GradVac(beta=0.5)
        >>> surgery(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
        tensor([1., 1.])
        >>> surgery.targets
        tensor([[0.0000, 0.4000],
                [0.4000, 0.0000]])
        >>> surgery(torch.eye(2))
        tensor([1.4364, 1.4364])

    References:
        Wang, Tsvetkov, Firat, Cao, arXiv 2010.05874, Algorithm 1.
    """

    def __init__(self, *, beta: float = 0.5, generator: torch.Generator | None = None) -> None:
        check_interval("beta", beta, 0.0, 1.0)
        self.beta = float(beta)
        self.generator = generator
        self._targets = torch.zeros(0, 0, dtype=torch.float32, device="cpu")

    @property
    def targets(self) -> Tensor:
        """The targets φ̂, shape (K, K), cosines; shape (0, 0) before the first call."""
        return self._targets

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights, shape (K,), of the Gramian's tasks; then the targets move."""
        check_gramian(gramian)
        tasks = gramian.shape[0]
        self.expect(gramian)
        if self._targets.shape != gramian.shape:
            raise ValueError(
                f"gramian has {tasks} tasks, but the targets were learnt for {self._targets.shape[0]}: call reset() to "
                "start over, or use one GradVac object for each set of tasks."
            )
        order = visiting_order(tasks, self.generator, gramian.device)
        weights, met = _vaccinate(gramian, _as_targets(self._targets, gramian), order)
        self._targets = torch.lerp(self._targets.to(met), met, self.beta).where(met == met, self._targets.to(met))
        return weights

    def expect(self, gramian: Tensor) -> None:
        """Take the number of tasks from a Gramian before the first call, so that the state has its shape; learns
        nothing, and does nothing later.

        Raises:
            ValueError: ``gramian`` is none.
        """
        check_gramian(gramian)
        if self._targets.numel() == 0:
            self._targets = torch.zeros_like(widen(gramian))

    def reset(self) -> None:
        """Forget the targets; the next call sets the number of tasks anew."""
        self._targets = torch.zeros(0, 0, dtype=torch.float32, device="cpu")

    def state_dict(self) -> dict[str, Tensor]:
        """The state as plain tensors: a copy of ``targets``, and the generator's state if there is one."""
        state = {"targets": self._targets.clone()}
        return state if self.generator is None else {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the targets from a `state_dict`, and the generator's state if both have one.

        Raises:
            ValueError: it holds no square floating-point matrix of cosines under "targets".
        """
        targets = state_dict.get("targets")
        if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.shape[0] != targets.shape[1]:
            found = tuple(targets.shape) if isinstance(targets, Tensor) else targets
            raise ValueError(
                f"state_dict['targets'] must be a (K, K) tensor, got {found!r}: pass what state_dict() gave."
            )
        # A little above 1 by rounding at most; NaN is no cosine.
        if not bool((targets.abs() <= 1 + 1e-4).all()):
            raise ValueError("state_dict['targets'] must be cosines in [-1, 1]: pass what state_dict() gave.")
        if self.generator is not None and "generator" in state_dict:
            self.generator.set_state(state_dict["generator"].cpu())
        self._targets = widen(targets).clone()

    def __repr__(self) -> str:
        return f"GradVac(beta={self.beta})"


class _Vaccinated(NamedTuple):
    """The weights (K,), and the cosines that were met (K, K), NaN where a task is absent, alone or not finite."""

    weights: Tensor
    met: Tensor


def _check_target(target: float | Tensor, tasks: int) -> None:
    """Raise unless ``target`` is a cosine or a (tasks, tasks) tensor of them."""
    if not isinstance(target, Tensor):
        check_interval("target", target, -1.0, 1.0)
    elif tuple(target.shape) != (tasks, tasks) or not target.is_floating_point():
        raise ValueError(
            f"target must be a number or a floating-point tensor of shape {(tasks, tasks)}, like gramian, got shape "
            f"{tuple(target.shape)} of {target.dtype}: give one cosine per ordered pair of tasks."
        )


def _as_targets(target: float | Tensor, gramian: Tensor) -> Tensor:
    wide = widen(gramian)
    return torch.as_tensor(target, dtype=wide.dtype, device=wide.device).detach().expand(gramian.shape)


def _vaccinate(gramian: Tensor, targets: Tensor, order: Tensor) -> _Vaccinated:
    """Weights with the meetings given: ``order`` (K, K - 1), row i a permutation of the tasks other than i."""
    split = cosines(gramian)
    R = split.values
    eps = torch.finfo(R.dtype).eps
    # Row i: the coefficients of g'_i / |g_i| in the unit gradients.
    C = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    # Larger than the sine that rounding gives to parallel gradients: their task would otherwise grow by noise.
    smallest_sine = 4 * eps**0.5
    all_met = torch.full_like(R, torch.nan)
    for met in order.unbind(1):
        column = met[:, None]
        both = split.present & split.present[met]
        inner = (C * R[met]).sum(1)
        square = ((C @ R) * C).sum(1)
        # A gradient that cancelled to rounding noise has no direction.
        square = square.where(square > 4 * eps * C.abs().sum(1).square(), 0.0)
        length = square.sqrt()
        cosine = (inner / length.where(length > 0, 1.0)).where(length > 0, 0.0).clamp(-1, 1)
        target = targets.gather(1, column).squeeze(1)
        sine = (1 - cosine.square()).sqrt()
        target_sine = (1 - target.square()).clamp_min(0).sqrt().clamp_min(smallest_sine)
        step = length * (target * sine / target_sine - cosine)
        C = C.scatter_add(1, column, step.where(both & (cosine < target), 0.0).clamp_min(0)[:, None])
        all_met = all_met.scatter(1, column, cosine.where(both, torch.nan)[:, None])
    return _Vaccinated(weights_of(C, split, gramian), all_met + 0.0 * R.sum())
