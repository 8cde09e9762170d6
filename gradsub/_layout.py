from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gradsub._effective import own_weight
from gradsub._guard import Guard, called
from gradsub._left_out import smaller_side
from gradsub._unprotected import uses_of
from gradsub.capture import can_fuse
from gradsub.layers import is_transposed, named_parameters, select_layers, some
from gradsub.null_space import NullSpace
from gradsub.subspace import Layer, Shards, is_distributed, local, shards_of

# Numbers of entries: up to here a weight's whole gradient costs less than the bookkeeping that avoids it, in every step
# and, since an exact decomposition is cheap as well, at a refresh.
_NOT_WORTH_FUSING = 1 << 12
_NOT_WORTH_SKETCHING = 1 << 16


@dataclass(frozen=True)
class _Target:
    """A weight that the model names: by all its names, in which modules, and how it is stored."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    transposed: bool
    tied: bool


class Layout:
    """Decides which parameters are trained inside subspaces, and knows what they are called.

    Args:
        model: names the layers; without it the parameters' own names serve, where the base optimizer has them.

    Attributes:
        given: whether each of the base optimizer's parameters is in a group with subspace=True.
    """

    def __init__(
        self,
        side: str,
        tasks: int,
        null_space: NullSpace | None,
        model: nn.Module | None,
        target_modules: str | Iterable[str],
        master_weights: bool = False,
        capture: str = "auto",
        refresh: str = "auto",
        protection: str = "auto",
        anchor: bool = False,
    ) -> None:
        self.side = side
        self._master_weights = master_weights
        self._capture = capture
        self._refresh = refresh
        self._tasks = tasks
        self._model = model
        self.targets: dict[Tensor, _Target] | None = None
        self.computed: list[str] = []
        self.given: dict[Tensor, bool] = {}
        self.names: dict[Tensor, str] = {}
        self.count = 0
        self._warned: set[str] = set()
        self._shards: Shards | None = None
        self.uses = {} if model is None else uses_of(model)
        self.guard = Guard(null_space, side, model, self.uses, self.names, protection, anchor)
        if model is not None:
            self.targets, self.computed = _targets(model, target_modules)
            for name, parameter in named_parameters(model):
                self.names.setdefault(parameter, name)

    @property
    def compiled(self) -> bool:
        """Whether the model, or a part of it, is run through `torch.compile`."""
        modules = [] if self._model is None else list(self._model.modules())
        return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules)

    def name(self, parameter: Tensor) -> str:
        """What reports and errors call a parameter."""
        return called(parameter, self.names)

    def add_group(self, group: Mapping[str, Any], position: int) -> list[Layer]:
        """The layers among a parameter group's parameters; the others take the plain inner step."""
        layers: list[Layer] = []
        full_rank: list[str] = []
        for place, parameter in enumerate(group["params"]):
            index, self.count = self.count, self.count + 1
            names = group.get("param_names")
            self.names.setdefault(parameter, names[place] if names else f"param_groups[{position}][{place}]")
            self.given[parameter] = group["subspace"]
            self.check_dtype(parameter)
            known = self.guard.knows(parameter)
            too_small = parameter.ndim >= 2 and parameter.numel() > 0 and group["rank"] >= smaller_side(parameter)
            if not self._decomposed(parameter, group, known):
                if group["subspace"] and too_small and self.targets is None:
                    full_rank.append(self.name(parameter))
                if known and parameter.ndim == 1:
                    self._add_vector(parameter)
                elif not known:
                    self.guard.add_resting(parameter)
                continue
            if too_small:
                full_rank.append(self.name(parameter))
            layers.append(self._layer(parameter, group, index))
        self._warn_full_rank(full_rank, group["rank"])
        return layers

    def _add_vector(self, parameter: Tensor) -> None:
        try:
            shards_of(parameter, self.name(parameter))
        except ValueError as error:
            self._warn("distributed vector", f"{error}. It is not protected; freeze it if it is to stay")
            return
        self.guard.add_vector(parameter)

    def _decomposed(self, parameter: Tensor, group: Mapping[str, Any], protected: bool) -> bool:
        if not self.may_decompose(parameter, group):
            return False
        return self.targets is not None or protected or smaller_side(parameter) > group["rank"]

    def may_decompose(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a parameter is one to decompose, if it is large enough."""
        if not group["subspace"] or parameter.ndim < 2 or not parameter.is_floating_point() or not parameter.numel():
            return False
        if self.targets is None:
            return self.guard.resting(parameter) is None
        return parameter in self.targets

    def _layer(self, parameter: Tensor, group: Mapping[str, Any], index: int) -> Layer:
        target = (self.targets or {}).get(parameter)
        axis = 1 if self.side == "input" else 0
        if target is not None and target.transposed:
            axis = 1 - axis
        self._check_memory(parameter)
        shards = shards_of(parameter, self.name(parameter))
        self._check_mesh(parameter, shards)
        layer = Layer(
            name=target.names[0] if target else self.name(parameter).removesuffix(".weight"),
            parameter=parameter,
            index=index,
            axis=axis,
            widths=self.widths(parameter, group),
            shards=shards,
        )
        layer.sketched = self._sketched(layer)
        self.guard.add_layer(layer)
        return layer

    def widths(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
        """The ranks of a weight's subspaces under a group's options: the shared one first, then one a task."""
        most = smaller_side(parameter)
        task_rank = group["task_rank"] if group["task_rank"] is not None else max(1, group["rank"] // 2)
        return (min(group["rank"], most), *([min(task_rank, most)] * self._tasks))

    def _check_memory(self, parameter: Tensor) -> None:
        here = local(parameter)
        if any(size > 1 and stride == 0 for size, stride in zip(here.shape, here.stride(), strict=True)):
            raise ValueError(
                f"{self.name(parameter)} is expanded (strides {here.stride()}), so several of its entries share one "
                "number, which cannot take several updates: pass a .clone() of it as the parameter"
            )

    def _check_mesh(self, parameter: Tensor, shards: Shards | None) -> None:
        if shards is None or shards.group is None:
            return
        if self._shards is not None and self._shards.group is not shards.group:
            raise ValueError(
                f"{self.name(parameter)} is sharded over other ranks than the layers before it: shard all decomposed "
                "weights along one dimension of one mesh, or give this one subspace=False"
            )
        self._shards = shards

    def _sketched(self, layer: Layer) -> bool:
        """Whether bases come from sketches: by default where the whole gradient is not there and would cost more."""
        parameter = layer.parameter
        if is_distributed(parameter):
            if self._refresh == "svd":
                raise ValueError(
                    f"refresh='svd' decomposes whole gradients, but {self.name(parameter)} is sharded and no rank has "
                    'one: pass "auto" or "sketch"'
                )
            return True
        if self._refresh != "auto":
            return self._refresh == "sketch"
        if parameter.numel() <= _NOT_WORTH_SKETCHING or self.fused(parameter) is None:
            return False
        # A backward pass takes m n products for each row of the whole gradient, c (m + n) for each of its sketch.
        m, n = layer.whole_shape
        return layer.sketch_size * (m + n) < m * n

    def refuse_mixed(self) -> NoReturn:
        """Raise a ValueError: no layer can tell the rows of a batch apart."""
        if self._model is not None and self._capture == "fused":
            raise ValueError(
                "mixed(...) needs layers that tell the rows of a batch apart, and none that is trained and decomposed "
                "is a plain linear one (torch.nn.Linear or transformers' Conv1D, with that class's forward pass): "
                "train such a layer, use one task, or call optimizer.task() for each task in a loop of your own"
            )
        raise ValueError(
            'mixed(...) needs model= and layers large enough for the fused capture, or capture="fused", so that '
            "the layers can tell the rows apart: pass them, or use task() for each task"
        )

    @functools.cached_property
    def _replicates(self) -> bool:
        modules = () if self._model is None else self._model.modules()
        return any(isinstance(module, nn.DataParallel) for module in modules)

    def fused(self, parameter: Tensor) -> tuple[list[nn.Module], bool] | None:
        """The modules whose forward pass captures the weight's gradient, and whether they store it transposed.

        None where autograd's gradient is taken: without a model, of a small weight, of a sharded one (which the module
        does not have during its forward pass), or of one that something else uses too.
        """
        target = (self.targets or {}).get(parameter)
        if target is None or self._capture == "generic" or is_distributed(parameter):
            return None
        if self._replicates:
            return None  # its replicas would run the forward pass of the layer that they were copied from
        if self._capture == "auto" and parameter.numel() <= _NOT_WORTH_FUSING:
            return None
        if target.tied:
            self._warn(
                "tied",
                f"{target.names[0]} shares its weight with another module: its whole gradient is captured (generic "
                "capture), because parts of it do not come from this layer",
            )
            return None
        if not all(can_fuse(module) for module in target.modules):
            self._warn(
                "own forward",
                f"{target.names[0]} ({type(target.modules[0]).__name__}) does not have a plain linear layer's forward "
                "pass: its whole gradient is captured (generic capture)",
            )
            return None
        return list(target.modules), target.transposed

    def check_dtype(self, parameter: Tensor) -> None:
        """Raise if a parameter is complex; say once if rounding its weights undoes the protection."""
        if parameter.is_complex():
            raise ValueError(
                f"{self.name(parameter)} is complex ({parameter.dtype}): pass torch.view_as_real of it as the parameter"
            )
        low = parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32
        if low and self.guard.protects and not self._master_weights:
            self._warn(
                "low precision",
                f"the weights are {parameter.dtype}: rounding them after each step moves the protected directions by "
                "more than the update does at small learning rates; keep float32 weights and train under autocast, or "
                "pass master_weights=True",
            )

    def _warn_full_rank(self, names: list[str], rank: int) -> None:
        if not names:
            return
        what = (
            "they get a basis of min(m, n) columns, as many as a gradient can have directions, so nothing is saved"
            if self.targets is not None or self.guard.protects
            else "they are not decomposed and take the plain inner step"
        )
        self._warn("full rank", f"rank={rank} >= min(m, n) for {some(names)}: {what}; lower rank to change that")

    def _warn(self, kind: str, message: str) -> None:
        """Once for each kind of degradation."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=2)


def _targets(model: nn.Module, target_modules: str | Iterable[str]) -> tuple[dict[Tensor, _Target], list[str]]:
    """The weights to decompose, and the names of layers whose weight is no parameter."""
    uses: Counter[Tensor] = Counter(parameter for _, parameter in named_parameters(model))
    found: dict[Tensor, _Target] = {}
    computed = []
    for name, module in select_layers(model, target_modules).items():
        weight = own_weight(module)
        if weight is None:
            computed.append(name)
            continue
        earlier = found.get(weight)
        names, modules = (earlier.names, earlier.modules) if earlier else ((), ())
        found[weight] = _Target((*names, name), (*modules, module), is_transposed(module), uses[weight] > 1)
    return found, computed
