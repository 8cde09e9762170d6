"""What the weights did with protected inputs when they were collected: another model's weights are told from these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsub.layers import is_transposed

_ROWS = 4
_CHUNK = 1 << 24  # entries that are in float32 at a time
_PREFIX = "fitted on: "


class FittedOn:
    """Of every layer that a null space was collected on, a few random combinations of its weight.

    With S (4 x m) of random signs, S W (4 x n) is kept of W (m x n) for ``side="input"``, and S W^T (4 x m) for
    ``side="output"``. Training inside the null space changes W, but not W K, so not S W K either: a resumed run starts
    from other weights that protect the same. Weights of another model differ there. ||S X||^2 / 4 is on average
    ||X||^2 for any X.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def note(self, layers: Mapping[str, nn.Module], side: str) -> None:
        """Remember the weights of layers that were just collected, where they can be read."""
        for name, module in layers.items():
            weight = module._parameters.get("weight")
            if weight is not None and _readable(weight):
                self._kept[name] = combined(weight, (1 if side == "input" else 0) ^ is_transposed(module))

    def adopt(self, others: FittedOn) -> None:
        """Take over what another one remembers beyond this one."""
        self._kept = {**others._kept, **self._kept}

    def distance(self, name: str, weight: Tensor, axis: int, directions: Tensor, complement: bool) -> float | None:
        """How far W K is from what it was, as a share of the larger of both; None if that is not known.

        Args:
            weight: W as it is now.
            axis: of the weight, along which the directions lie.
            directions: K (d x k), or what K leaves.
            complement: whether it is the latter.
        """
        before = self._kept.get(name)
        if before is None or not _readable(weight) or weight.shape[axis] != before.shape[1]:
            return None
        now = combined(weight, axis)
        basis = directions.to("cpu", torch.float32)

        def inside(X: Tensor) -> float:
            along = X @ basis
            return float((X - along @ basis.mT if complement else along).norm())

        # What K leaves of the whole bounds the rest: of a head that started at zero, nothing but rounding is in K.
        most = max(inside(before), inside(now), 1e-3 * float(now.norm()))
        return inside(now - before) / most if most else 0.0

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What a file holds of it, for these layers."""
        return {f"{_PREFIX}{name}": self._kept[name] for name in names if name in self._kept}

    @classmethod
    def of(cls, file: Any, names: Iterable[str]) -> FittedOn:
        """What a file holds of these layers; earlier versions' hold nothing.

        Raises:
            ValueError: it is damaged.
        """
        found = cls()
        keys = set(file.keys())
        for name in names:
            if f"{_PREFIX}{name}" in keys:
                kept = file.get_tensor(f"{_PREFIX}{name}").to("cpu")
                if kept.dtype != torch.float32 or kept.ndim != 2 or not bool(torch.isfinite(kept).all()):
                    raise ValueError(f"has no finite float32 matrix of the weight of {name!r}")
                found._kept[name] = kept
        return found


def belongs(key: str) -> bool:
    """Whether a tensor of a file is one of `FittedOn`'s."""
    return key.startswith(_PREFIX)


def combined(weight: Tensor, axis: int) -> Tensor:
    """S X (4 x d) of the weight as a matrix X whose rows have d entries along ``axis``."""
    matrix = weight.detach() if axis else weight.detach().mT
    rows, columns = matrix.shape
    generator = torch.Generator(device="cpu").manual_seed(rows)
    signs = torch.randint(0, 2, (_ROWS, rows), generator=generator, dtype=torch.int8, device="cpu").mul_(2).sub_(1)
    found = torch.zeros(_ROWS, columns, dtype=torch.float32, device=weight.device)
    with torch.no_grad():
        for start in range(0, rows, step := max(1, _CHUNK // max(1, columns))):
            part = matrix[start : start + step].float()
            found += signs[:, start : start + step].to(part) @ part
    return found.cpu()


def _readable(weight: Tensor) -> bool:
    whole = not hasattr(weight, "device_mesh") and weight.device.type != "meta"
    return whole and weight.ndim == 2 and weight.is_floating_point() and weight.numel() > 0
