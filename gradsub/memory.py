"""What training costs in memory, as formulas; the tests hold the optimizer to them, byte by byte."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from gradsub._guard import check_sides
from gradsub._layout import Layout
from gradsub._settings import check_choices, check_count
from gradsub.layers import some
from gradsub.null_space import NullSpace
from gradsub.null_space._null_space import check_side
from gradsub.subspace import Layer, sketch_size

__all__ = ["LayerBytes", "MethodBytes", "ModelBytes", "layer_bytes", "model_bytes"]


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer; with d the axis of the bases, o the other one, R = r + sum of r_k, and s bytes a number.

    Attributes:
        bases: s d R.
        moments: s o R for each moment of the base optimizer, and its step counts.
        protection: s d min(k, d - k): the protected directions in their smaller form, and with an anchor what they
            held; of layers with the same input there is one.
        bookkeeping: counts, gates, and what sketches remember: some hundred bytes.
        joint: s d (r + r_k) for every task: copies of its bases side by side, from its first pass on.
        captured: s o (r + r_k) for every task, from its backward pass to the step.
        sketches: s d c for every task, in steps that renew a basis, with c = min(o, max(2 r, r + 64)).
        on_host: whether the protection lies in the host's memory.
    """

    bases: int
    moments: int
    protection: int
    bookkeeping: int
    joint: int
    captured: int
    sketches: int
    on_host: bool = True

    @property
    def state(self) -> int:
        """What stays on the device between refreshes, as in a checkpoint; `joint` can be made of it at any time."""
        return self.bases + self.moments + self.bookkeeping + (0 if self.on_host else self.protection)

    @property
    def host(self) -> int:
        """What stays in the host's memory; for a model on a CPU the two are the same memory."""
        return self.protection if self.on_host else 0


def layer_bytes(
    out_features: int,
    in_features: int,
    *,
    rank: int,
    task_rank: int | None = None,
    tasks: int = 2,
    side: str = "input",
    moments: int = 2,
    protected: int = 0,
    sketched: bool = True,
    itemsize: int = 4,
    protection: str = "host",
    anchor: bool = False,
) -> LayerBytes:
    """The memory of a linear layer's training state under `GemsOptimizer`, besides the weight itself.

    Args:
        out_features: rows m of the weight.
        in_features: columns n of the weight.
        rank: r, columns of the shared basis; capped at min(m, n).
        task_rank: columns of each task's basis; None: ``max(1, rank // 2)``.
        tasks: how many.
        side: ``"input"`` or ``"output"``.
        moments: how many numbers the base optimizer keeps for each entry: 2 for Adam, 1 for momentum.
        protected: k, how many directions a null space protects in the layer.
        sketched: whether the bases are refreshed from sketches, as by default those of large layers at small ranks
            are. If not, the step of a refresh holds a whole gradient (s m n) for every task instead.
        itemsize: bytes of a number in the subspaces: 4, or 8 for float64 weights.
        protection: ``"host"`` (as ``"auto"`` is) or ``"device"``: where protected directions lie between refreshes.
        anchor: whether what they held is kept, too; then they are in no smaller form.

    Raises:
        ValueError: there is no such side or ``protection``, a number is none that there can be, or more directions are
            protected than there are.

    Example:
        >>> from gradsub.memory import layer_bytes
        >>> found = layer_bytes(576, 1536, rank=64, protected=1152)
        >>> found.state, found.host, found.captured
        (1376851, 2359296, 442368)
        >>> 2 * 4 * 576 * 1536  # the moments of Adam on the whole weight
        7077888
    """
    for name, size in (("out_features", out_features), ("in_features", in_features), ("itemsize", itemsize)):
        check_count(name, size)
    check_side(side)
    check_choices(protection=protection)
    out_features, in_features, itemsize = int(out_features), int(in_features), int(itemsize)
    rank, own, tasks, moments = _counts(rank, task_rank, tasks, moments)
    most = min(out_features, in_features)
    widths = [min(rank, most), *[min(own, most)] * tasks]
    d, o = (in_features, out_features) if side == "input" else (out_features, in_features)
    if not isinstance(protected, numbers.Integral) or not 0 <= protected <= d:
        raise ValueError(f"protected={protected} must be a number of directions from 0 to {d}")
    protected = int(protected)
    counts = len(widths)
    # step, next_refresh, gate_memory, pending_decay; of sketches, their number, singular values and whether the last
    # was usable.
    bookkeeping = 8 + 8 * counts + itemsize * (tasks + 1)
    bookkeeping += 9 * counts + itemsize * sum(widths) if sketched else 0
    kept = protected * (d + o) if anchor else d * min(protected, d - protected)
    return LayerBytes(
        bases=itemsize * d * sum(widths),
        moments=moments * itemsize * o * sum(widths) + (4 * counts if moments > 1 else 0),
        protection=itemsize * kept,
        bookkeeping=bookkeeping,
        joint=itemsize * d * sum(widths[0] + width for width in widths[1:]),
        captured=itemsize * o * sum(widths[0] + width for width in widths[1:]),
        sketches=itemsize * d * sketch_size(widths[0], o) * tasks if sketched else 0,
        on_host=protection != "device",
    )


@dataclass(frozen=True)
class MethodBytes:
    """Bytes of a model under one way to train it.

    Attributes:
        weights: of all parameters, adapters included.
        gradients: from the backward passes to the step, as far as they are whole: of parameters without subspaces for
            every task, and in steps that refresh layers that are not sketched those layers'.
        bases: of the subspaces.
        moments: of the base optimizer.
        bookkeeping: counts and gates.
        protection: on the device; that of norms and biases always is.
        master: float32 copies of the decomposed weights.
        joint: copies of each task's bases side by side, which are no state: they are made when a pass needs them.
        captured: projected gradients, from the backward passes to the step.
        sketches: in steps that refresh all layers, which take turns.
        host: protected directions in the host's memory; those of layers with the same input once.
    """

    weights: int
    gradients: int
    bases: int = 0
    moments: int = 0
    bookkeeping: int = 0
    protection: int = 0
    master: int = 0
    joint: int = 0
    captured: int = 0
    sketches: int = 0
    host: int = 0

    @property
    def state(self) -> int:
        """On the device between refreshes, as in a checkpoint, besides the weights."""
        return self.bases + self.moments + self.bookkeeping + self.protection + self.master

    @property
    def device(self) -> int:
        """On the device where all of it is there at once; activations come on top."""
        return self.weights + self.gradients + self.state + self.joint + self.captured + self.sketches


@dataclass(frozen=True)
class ModelBytes:
    """Bytes by method; as a string it is a table in megabytes."""

    methods: Mapping[str, MethodBytes]

    def __str__(self) -> str:
        names = [field.name for field in fields(MethodBytes) if field.name != "host"]
        lines = [f"{'MB':24}" + "".join(f"{method:>24}" for method in self.methods)]
        for name in [*names, "device", "host"]:
            cells = (getattr(found, name) / 1e6 for found in self.methods.values())
            lines.append(f"{name:24}" + "".join(f"{cell:24,.1f}" for cell in cells))
        return "\n".join(lines)


def model_bytes(
    model: nn.Module,
    *,
    rank: int,
    task_rank: int | None = None,
    tasks: int = 2,
    side: str = "input",
    target_modules: str | list[str] = "all-linear",
    null_space: NullSpace | Mapping[str, float] | None = None,
    moments: int = 2,
    refresh: str = "auto",
    protection: str = "host",
    inputs: Mapping[str, str] | None = None,
    master_weights: bool = False,
) -> ModelBytes:
    """What training a model takes, before it is spent: AdamW, LoRA of the same rank, gradsub, and with a null space.

    It reads shapes alone, so that the model may be on the device ``"meta"``. AdamW and gradsub train all parameters
    that require gradients, LoRA the adapters of the same layers.

    Args:
        model: the model.
        rank: columns of the shared basis, and LoRA's rank.
        task_rank: columns of each task's basis; None: ``max(1, rank // 2)``.
        tasks: how many.
        side: ``"input"`` or ``"output"``.
        target_modules: which layers are decomposed.
        null_space: the protected directions, or the protected share of each layer's by its name; None: no such row.
        moments: how many numbers the base optimizer keeps for each entry.
        refresh: as of `GemsOptimizer`.
        protection: ``"host"`` (as ``"auto"`` is) or ``"device"``: where protected directions lie between refreshes.
        inputs: layer -> any name of its input; layers with the same one have one set of directions. None: with a
            `NullSpace` those whose statistics are shared, else each layer has its own.
        master_weights: as of `GemsOptimizer`.

    Raises:
        ValueError: an argument is none that `GemsOptimizer` would take, ``null_space`` or ``inputs`` names a layer that
            is not decomposed, or a share is not from 0 to 1.

    Example:
        >>> import torch
        >>> from gradsub.memory import model_bytes
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(4096, 14336, bias=False)
        >>> found = model_bytes(model, rank=64, null_space={"": 0.77})
        >>> [round(method.state / 1e6, 1) for method in found.methods.values()]
        [469.8, 9.4, 16.8, 16.8]
        >>> round(found.methods["gradsub, null space"].host / 1e6, 1)
        15.4
    """
    check_side(side)
    check_choices(refresh=refresh, protection=protection)
    rank, task_rank, tasks, moments = _counts(rank, task_rank, tasks, moments)
    if isinstance(null_space, NullSpace):
        check_sides(null_space, side)
    layout = Layout(side, tasks, None, model, target_modules, refresh=refresh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    group = {"params": trained, "rank": rank, "task_rank": task_rank, "subspace": True}
    layers = layout.add_group(group, 0)
    shares = _shares(null_space, layers)
    _check_names("inputs", inputs or (), layers)
    decomposed = {layer.parameter for layer in layers}
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())

    def whole(weights: int, sizes: list[int]) -> MethodBytes:
        steps = 4 * len(sizes) if moments > 1 else 0
        return MethodBytes(weights, sum(sizes), moments=moments * sum(sizes), bookkeeping=steps)

    adapters = [
        min(rank, *layer.whole_shape) * side * layer.parameter.itemsize
        for layer in layers
        for side in layer.whole_shape
    ]
    found = {
        "AdamW": whole(weights, [p.numel() * p.itemsize for p in trained]),
        "LoRA": whole(weights + sum(adapters), adapters),
    }
    plain = [parameter for parameter in trained if parameter not in decomposed]
    rest = whole(weights, [p.numel() * p.itemsize for p in plain])
    wholes = [max(1, tasks) * layer.parameter.numel() * layer.dtype.itemsize for layer in layers if not layer.sketched]
    masters = [layer for layer in layers if master_weights and layer.parameter.dtype != layer.dtype]
    owners = {_owner(layer.name, null_space, inputs): layer.name for layer in layers}

    def ours(shares: Mapping[str, float], vectors: int) -> MethodBytes:
        each = {
            layer.name: bytes_of(layer, moments, shares.get(layer.name, 0.0), protection=protection) for layer in layers
        }
        kept = [each[layer] for layer in owners.values()]
        sums = {
            kind: sum(getattr(found, kind) for found in (rest, *each.values()))
            for kind in ("bases", "moments", "bookkeeping", "joint", "captured", "sketches")
        }
        return MethodBytes(
            weights,
            max(1, tasks) * rest.gradients + sum(wholes),
            protection=sum(found.protection - found.host for found in kept) + vectors,
            master=sum(layer.parameter.numel() * layer.dtype.itemsize for layer in masters),
            host=sum(found.host for found in kept),
            **sums,
        )

    found["gradsub"] = ours({}, 0)
    if null_space is not None:
        vectors = sum(_of_vector(null_space, layout.name(p), p) for p in plain if p.ndim == 1)
        found["gradsub, null space"] = ours(shares, vectors)
    return ModelBytes(found)


def bytes_of(layer: Layer, moments: int = 2, share: float = 0.0, *, protection: str = "host") -> LayerBytes:
    """`layer_bytes` of a layer of which this share of the directions is protected."""
    rank, *own = layer.widths
    return layer_bytes(
        *layer.whole_shape,
        rank=rank,
        task_rank=own[0] if own else None,
        tasks=len(own),
        side="input" if layer.axis == 1 else "output",
        moments=moments,
        protected=round(share * layer.dimension),
        sketched=layer.sketched,
        itemsize=layer.dtype.itemsize,
        protection=protection,
    )


def _of_vector(null_space: NullSpace | Mapping[str, float] | None, name: str, parameter: Tensor) -> int:
    """K (d x k) of a norm's weight or a bias, in float32 at least."""
    name = name.removesuffix(".weight")
    if not isinstance(null_space, NullSpace) or name not in null_space:
        return 0
    size = parameter.numel() * max(4, parameter.itemsize)
    return size * round(null_space.protected_fraction(name) * parameter.numel())


def _counts(rank: int, task_rank: int | None, tasks: int, moments: int) -> tuple[int, int, int, int]:
    """These, checked, as Python's integers: numpy's small ones would overflow."""
    check_count("rank", rank)
    check_count("task_rank", task_rank, optional=True)
    check_count("tasks", tasks, least=0)
    check_count("moments", moments, least=0)
    own = max(1, rank // 2) if task_rank is None else task_rank
    return int(rank), int(own), int(tasks), int(moments)


def _check_names(argument: str, names: Iterable[str], layers: list[Layer]) -> None:
    known = [layer.name for layer in layers]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{argument}: {unknown[:3]} are no decomposed layers; these are {some(known, 8)}")


def _shares(null_space: NullSpace | Mapping[str, float] | None, layers: list[Layer]) -> Mapping[str, float]:
    if null_space is None:
        return {}
    if isinstance(null_space, Mapping):
        _check_names("null_space", null_space, layers)
        for name, share in null_space.items():
            if not isinstance(share, numbers.Real) or not 0 <= share <= 1:
                raise ValueError(f"null_space[{name!r}]={share!r} must be the share that is protected, from 0 to 1")
        return {name: float(share) for name, share in null_space.items()}
    if not isinstance(null_space, NullSpace):
        raise ValueError(f"null_space={null_space!r} must be a NullSpace, a share for each layer by its name, or None")
    return {layer.name: null_space.protected_fraction(layer.name) for layer in layers if layer.name in null_space}


def _owner(name: str, null_space: NullSpace | Mapping[str, float] | None, inputs: Mapping[str, str] | None) -> object:
    if inputs is not None:
        return inputs.get(name, ("", name))
    if isinstance(null_space, NullSpace) and name in null_space:
        return id(null_space._shared.by_name[name])
    return name
