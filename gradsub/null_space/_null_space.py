from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradsub.layers import ALL_LINEAR, select_layers
from gradsub.null_space._collect import observe_features
from gradsub.null_space._covariance import Covariance, gram
from gradsub.null_space._criterion import Criterion

SIDES = ("input", "output")


def check_side(side: str) -> str:
    """``side`` itself, or a ValueError that names the two there are."""
    if side not in SIDES:
        raise ValueError(f"side={side!r} must be 'input' or 'output'")
    return side


class NullSpace:
    r"""The directions that general-domain data uses in each layer, built incrementally.

    For every layer the uncentred covariance C = E[x x^T] of its features is summed over all batches; x is the layer's
    input for ``side="input"`` and its output for ``side="output"``. The leading eigenvectors K (d x k) of C are the
    protected directions; the null space is their orthogonal complement, with the projector P = I - K K^T. An update
    dW (m x n) inside it satisfies dW K = 0 for ``side="input"``: the layer answers every protected input as before; and
    K^T dW = 0 for ``side="output"``: no input can move the protected part of the output.

    Args:
        side: ``"input"`` (features are layer inputs, d = in_features) or ``"output"`` (d = out_features, as published).
        energy: share in (0, 1] of the features' mean square tr(C) that the protected directions hold at least; the
            smallest such k is taken. 0.95 when no criterion is given.
        threshold: absolute eigenvalue, in squared feature units: directions with a smaller eigenvalue are free
            (published: 2e-2). Excludes ``energy``.
        max_rank: at most this many protected directions a layer; alone, without the others, exactly that many (as far
            as the features have rank).

    Raises:
        ValueError: an argument is outside its range, or ``energy`` and ``threshold`` are both given.

    Example:
        >>> import torch
        >>> from gradsub import NullSpace
        >>> null_space = NullSpace(side="input", energy=1.0)
        >>> null_space.update("layer", torch.eye(4)[:2])        # two inputs to protect, in a layer with four
        >>> null_space.basis("layer").shape
        torch.Size([4, 2])
        >>> null_space.protected_fraction("layer")
        0.5

    Source: GEMS (arXiv 2601.09496) protects outputs by an absolute threshold; protecting inputs is the guarantee of
    GPM (arXiv 2103.09762) and AlphaEdit (arXiv 2410.02355).
    """

    def __init__(
        self,
        side: str = "input",
        energy: float | None = None,
        threshold: float | None = None,
        max_rank: int | None = None,
    ) -> None:
        self.side = check_side(side)
        if energy is None and threshold is None and max_rank is None:
            energy = 0.95
        self.criterion = Criterion(energy, threshold, max_rank)
        self._covariances: dict[str, Covariance] = {}
        self._bases: dict[str, Tensor] = {}

    def collect(
        self, model: nn.Module, batches: Iterable[Any], target_modules: str | Iterable[str] = ALL_LINEAR
    ) -> NullSpace:
        """Add what ``batches`` show of every targeted layer, in one pass for all layers; call again to add more.

        The model runs in evaluation mode without gradients, and every module's mode is restored.

        Args:
            model: the model whose layers are protected; layers are named as in ``model.named_modules()``.
            batches: each is a tensor (``model(batch)``), a tuple (``model(*batch)``) or a mapping (``model(**batch)``).
                A mapping's ``attention_mask`` (batch x tokens) keeps padding out of the statistics.
            target_modules: ``"all-linear"``, a regular expression, or names; see `gradsub.layers.select_layers`.

        Returns:
            itself, so that ``NullSpace().collect(model, batches)`` reads as one expression.

        Raises:
            ValueError: no layer matches, there is no batch, or a feature is NaN or Inf (the layer is named).
        """
        layers = select_layers(model, target_modules)
        latest: tuple[Tensor, Tensor] | None = None

        def observe(name: str, features: Tensor) -> None:
            nonlocal latest
            if latest is None or latest[0] is not features:
                latest = features, gram(_checked(name, features))
            self._add(name, latest[1], features.shape[0])

        if observe_features(model, layers, batches, self.side, observe) == 0:
            raise ValueError("batches is empty: collect needs at least one batch of general-domain data")
        return self

    def update(self, name: str, features: Tensor) -> None:
        """Add features (N x d) of the layer ``name``; leading dimensions are flattened.

        Raises:
            ValueError: the features are not at least 2-D, are empty, hold NaN or Inf, or their width d differs from
                what the layer had before.
        """
        if features.ndim < 2 or features.numel() == 0:
            raise ValueError(f"features of {name!r} must be (N, d) and not empty, found {tuple(features.shape)}")
        rows = features.detach().reshape(-1, features.shape[-1])
        self._add(name, gram(_checked(name, rows)), rows.shape[0])

    def _add(self, name: str, product: Tensor, count: int) -> None:
        dimension = product.shape[0]
        covariance = self._covariances.get(name)
        if covariance is None:
            covariance = self._covariances[name] = Covariance.empty(dimension, product.device)
        elif covariance.dimension != dimension:
            raise ValueError(
                f"features of {name!r} have width {dimension}, but the layer had {covariance.dimension} before: "
                "pass features of the same layer and side"
            )
        covariance.add(product, count)
        self._bases.pop(name, None)

    def basis(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The protected directions K (d x k) of the layer ``name``: orthonormal columns, strongest first.

        Args:
            name: the layer.
            dtype: of the result; the directions are computed in float64 wherever the device has it.

        Raises:
            KeyError: nothing was collected for the layer; the message lists the layers there are.
        """
        if name not in self._bases:
            values, vectors = self._covariance(name).eigh()
            self._bases[name] = vectors[:, : self.criterion.count(values)].contiguous()
        return self._bases[name].to(dtype)

    def eigenvalues(self, name: str) -> Tensor:
        """Eigenvalues (d,) of the layer's covariance, largest first, in squared feature units."""
        return self._covariance(name).eigh()[0]

    def protected_fraction(self, name: str) -> float:
        """k / d: the share of the layer's directions that no update may use."""
        dimension, count = self.basis(name).shape
        return count / dimension

    def _covariance(self, name: str) -> Covariance:
        if name not in self._covariances:
            raise KeyError(f"no features were collected for {name!r}; there are {sorted(self._covariances)}")
        return self._covariances[name]

    def __contains__(self, name: object) -> bool:
        return name in self._covariances

    def __iter__(self) -> Iterator[str]:
        return iter(self._covariances)

    def __len__(self) -> int:
        return len(self._covariances)

    def __repr__(self) -> str:
        chosen = {key: value for key, value in vars(self.criterion).items() if value is not None}
        criterion = ", ".join(f"{key}={value}" for key, value in chosen.items())
        return f"NullSpace(side={self.side!r}, {criterion}, layers={len(self)})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics and the criterion as a safetensors file, so that `load` can go on collecting.

        Raises:
            ImportError: safetensors is not installed.
        """
        tensors = {name: covariance.total.contiguous() for name, covariance in self._covariances.items()}
        metadata = {
            "format": "gradsub.NullSpace",
            "side": self.side,
            "criterion": json.dumps(vars(self.criterion)),
            "counts": json.dumps({name: covariance.count for name, covariance in self._covariances.items()}),
        }
        _safetensors().save_file(tensors, os.fspath(path), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> NullSpace:
        """Read what `save` wrote.

        Args:
            path: the safetensors file.
            device: where the statistics are put.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the file holds something else.
        """
        with _safetensors().safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "gradsub.NullSpace":
                raise ValueError(f"path={os.fspath(path)!r} is no file of NullSpace.save")
            loaded = cls(metadata["side"], **json.loads(metadata["criterion"]))
            for name, count in json.loads(metadata["counts"]).items():
                loaded._covariances[name] = Covariance(file.get_tensor(name), count)
        return loaded


def _checked(name: str, features: Tensor) -> Tensor:
    if features.is_complex():
        raise ValueError(f"features of {name!r} are complex: only real features are supported")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"features of {name!r} hold NaN or Inf: check the model and the batch before collecting")
    return features


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading a NullSpace needs safetensors: pip install 'gradsub[safetensors]'"
        ) from error

    class Files:
        save_file = staticmethod(safetensors.torch.save_file)
        safe_open = staticmethod(safetensors.safe_open)

    return Files
