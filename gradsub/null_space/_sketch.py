from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import widest
from gradsub.linalg._range_finder import exact_svd
from gradsub.null_space._statistics import Spectrum, Statistics


class Sketch:
    r"""Frequent Directions: at most ``capacity`` rows B whose B^T B stands for the features' A^T A.

    Rows are appended until the buffer is full. Then its squared singular values s_1^2 >= s_2^2 >= ... all lose
    s_(l+1)^2, which leaves l = capacity // 2 rows. Every such step takes at most its s_(l+1)^2 from any direction and
    at least l + 1 times as much from the trace, so with Delta, the sum of these losses,

        0 <= A^T A - B^T B <= Delta I   and   Delta <= ||A - A_k||_F^2 / (l + 1 - k)   for every k <= l,

    where A_k is the best approximation of rank k: features of rank l or less are held exactly. Delta is tracked, so
    the bound is known, not only promised. Losses add up when sketches merge, so the bound holds for merged sketches
    with the smallest l among them, and for any order of the rows.

    Precision: rows rest in the format of the first features, float32 at least (a relative rounding of 6e-8 a row and
    step); all decompositions are in the `widest` format. The steps use the Gram matrix of the buffer, whose error
    is 1e-16 of the largest eigenvalue of A^T A, as that of the exact covariance is; the eigenvectors come from an SVD.

    Source: Liberty, "Simple and deterministic matrix sketching", KDD 2013, arXiv 1206.0594; Ghashami et al., "Frequent
    Directions: simple and deterministic matrix sketching", arXiv 1501.01711.
    """

    kind = "sketch"

    def __init__(self, capacity: int, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(capacity, dimension, dtype=dtype, device=device)
        self._filled = 0
        self._energy = 0.0  # ||A||_F^2
        self._loss = 0.0  # Delta
        self.count = 0

    @classmethod
    def within(cls, budget: int, dimension: int, dtype: torch.dtype, device: torch.device) -> Sketch:
        """The largest sketch whose buffer takes no more than ``budget`` bytes."""
        dtype = torch.promote_types(dtype, torch.float32)
        row = dimension * dtype.itemsize
        if budget < 2 * row:
            raise ValueError(
                f"layer_memory_budget={budget} must hold at least two rows of {dimension} features: pass {2 * row} "
                "bytes or more (a hundred times that is useful), or None for exact statistics"
            )
        return cls(budget // row, dimension, dtype, device)

    @classmethod
    def restore(cls, tensor: Tensor, state: dict[str, Any]) -> Sketch:
        _check_rows(tensor, state)
        sketch = cls(state["capacity"], tensor.shape[1], tensor.dtype, tensor.device)
        sketch._append(tensor)
        sketch.count, sketch._energy, sketch._loss = state["count"], state["energy"], state["loss"]
        return sketch

    @property
    def dimension(self) -> int:
        return self._buffer.shape[1]

    @property
    def error(self) -> float:
        return self._loss / max(self.count, 1)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    @property
    def tensor(self) -> Tensor:
        return self._buffer[: self._filled].clone()

    @property
    def shape(self) -> tuple[int, int]:
        return self._filled, self.dimension

    @property
    def dtype(self) -> torch.dtype:
        return self._buffer.dtype

    def add(self, rows: Tensor) -> None:
        rows = rows.to(self._buffer)
        energy = float(torch.linalg.vector_norm(rows, dtype=widest(rows.device)).square())
        if not math.isfinite(energy):
            raise ValueError(f"features exceed the range of the sketch's {rows.dtype}: scale them down")
        self._append(rows)
        self._energy += energy
        self.count += rows.shape[0]

    def merge(self, other: Statistics) -> None:
        assert isinstance(other, Sketch)
        energy, loss, count = other._energy, other._loss, other.count
        self._append(other.tensor.to(self._buffer))
        self._energy += energy
        self._loss += loss
        self.count += count

    def copy(self) -> Sketch:
        return copy.deepcopy(self)

    def spectrum(self, quick: bool = False) -> Spectrum:
        held = self._buffer[: self._filled].to(widest(self._buffer.device))
        resolution = self.dimension * max(torch.finfo(held.dtype).eps, torch.finfo(self._buffer.dtype).eps ** 2)
        count = max(self.count, 1)
        if not self._filled:
            return Spectrum(held.new_zeros(1), held.new_zeros(self.dimension, 1), 0.0, 0.0, resolution)
        _, values, vectors = exact_svd(held)
        return Spectrum(values.square() / count, vectors, self.energy(), self.error, resolution)

    def energy(self, basis: Tensor | None = None) -> float:
        if basis is None:
            return self._energy / max(self.count, 1)
        held = self._buffer[: self._filled].to(widest(self._buffer.device))
        return float((held @ basis.to(held)).square().sum()) / max(self.count, 1)

    def state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "count": self.count,
            "capacity": self._buffer.shape[0],
            "energy": self._energy,
            "loss": self._loss,
        }

    def _append(self, rows: Tensor) -> None:
        while rows.shape[0]:
            if self._filled == self._buffer.shape[0]:
                self._shrink()
            taken = rows[: self._buffer.shape[0] - self._filled]
            self._buffer[self._filled : self._filled + taken.shape[0]] = taken
            self._filled += taken.shape[0]
            rows = rows[taken.shape[0] :]

    def _shrink(self) -> None:
        kept = self._buffer.shape[0] // 2
        wide = self._buffer.to(widest(self._buffer.device))
        values, vectors = torch.linalg.eigh(wide @ wide.mT)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        loss = values[kept]
        leading = values[:kept]
        leading = leading[leading > loss]
        factors = vectors[:, : leading.shape[0]] * (1.0 - loss / leading).sqrt()
        self._filled = leading.shape[0]
        self._buffer[: self._filled] = (factors.mT @ wide).to(self._buffer.dtype)
        self._loss += float(loss)


def _check_rows(rows: Tensor, state: dict[str, Any]) -> None:
    """Raise a ValueError unless these rows and numbers can be a sketch's."""
    capacity: Any = state.get("capacity")
    energy: Any = state.get("energy")
    if type(capacity) is not int or capacity < max(2, rows.shape[0]):
        raise ValueError(f"{rows.shape[0]} rows in a sketch of capacity {capacity!r}")
    for key, value in (("energy", energy), ("loss", state.get("loss"))):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
            raise ValueError(f"{key}={value!r} must be a finite number that is not negative")
    held = float(torch.linalg.vector_norm(rows, dtype=widest(rows.device)).square())
    if held > energy * (1.0 + 1e-3):
        raise ValueError(f"the rows hold more energy ({held:.6g}) than the features had ({energy:.6g})")
    if state["count"] == 0 and energy:
        raise ValueError("their energy is not zero, but no features were counted")
