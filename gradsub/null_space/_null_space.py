from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradsub._kinds import check_kind
from gradsub._table import aligned
from gradsub.distributed import Ranks
from gradsub.layers import ALL_LINEAR, select_layers
from gradsub.null_space._collecting import check_groups, check_seen, collect_features, collect_gradients, collect_into
from gradsub.null_space._content import Content
from gradsub.null_space._criterion import Criterion
from gradsub.null_space._features import unit_rows
from gradsub.null_space._files import DamagedError, check_writable, read, write
from gradsub.null_space._fitted_on import FittedOn
from gradsub.null_space._gradients import own_loss
from gradsub.null_space._normalization import check_told, normalization
from gradsub.null_space._protection import Protection, extend
from gradsub.null_space._ranks import on_every_rank
from gradsub.null_space._residual import residual_shares
from gradsub.null_space._scratch import Scratch
from gradsub.null_space._shared import SharedStatistics
from gradsub.null_space._statistics import Statistics

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

    The statistics of a layer are its covariance, half of a symmetric float64 sum (little more than 4 d^2 bytes) that is
    exact but for the rounding of its products, which are float32 where ``energy`` is at most 0.999, d at least 256 and
    the features no float64; or, where ``layer_memory_budget`` does not allow that, a Frequent Directions sketch. The
    sketch knows its own error: its covariance Ĉ obeys 0 <= C - Ĉ <= `error_bound` I, and the bound is at most the sum
    of all but the k largest eigenvalues of C, divided by l + 1 - k, for every k <= l, half the rows that fit into the
    budget. Batches may come in any order and any division: exact statistics differ by rounding only, sketches by the
    bound. A sketch errs towards protection: ``energy`` counts against the exact tr(C), and ``threshold`` takes every
    direction that may reach it. Where it cannot hold enough directions, it warns once and protects all it holds. Its
    certificate of the energy is loose unless the budget holds several times as many rows as there are directions to
    protect: where that is no saving over 4 d^2 bytes, prefer exact statistics, which are faster to collect as well.

    Norm weights and biases have null spaces as well, of the gradients that general-domain data has for them:
    `collect_gradients`.

    Layers that receive the very same tensor in every batch, as query, key and value projections do, share their
    statistics, one eigendecomposition, and the directions that are kept: K or its complement, whichever is smaller.

    Args:
        side: ``"input"`` (features are layer inputs, d = in_features) or ``"output"`` (d = out_features, as published).
        energy: share in (0, 1] of the features' mean square tr(C) that the protected directions hold at least; the
            smallest such k is taken. 0.95 when no criterion is given.
        threshold: absolute eigenvalue, in squared feature units (of `collect_gradients`, squared units of gradients):
            directions with a smaller eigenvalue are free (published: 2e-2). Excludes ``energy``.
        max_rank: at most this many protected directions a layer; alone, without the others, exactly that many (as far
            as the features have rank).
        layer_memory_budget: bytes that a layer's statistics may take between calls; None: always exact. With d the
            features' width, layers with 8 d^2 bytes or less stay exact, the others hold budget / (4 d) rows of
            float32 features (8 d of float64). Working memory of several times the budget comes on top while rows are
            condensed or a basis is computed, for one layer at a time.

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
        layer_memory_budget: int | None = None,
    ) -> None:
        self.side = check_side(side)
        if energy is None and threshold is None and max_rank is None:
            energy = 0.95
        self.criterion = Criterion(energy, threshold, max_rank)
        if layer_memory_budget is not None and layer_memory_budget < 1:
            raise ValueError(
                f"layer_memory_budget={layer_memory_budget} must be a positive number of bytes, or None for exact "
                "statistics of every layer"
            )
        self.layer_memory_budget = layer_memory_budget
        self._content = Content(self.criterion, layer_memory_budget)
        self._unseen: set[str] = set()
        self.fitted_on = FittedOn()
        self._free_rows: dict[str, Tensor] = {}  # of embeddings whose other rows rest, see freeze_unprotected

    def collect(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        target_modules: str | Iterable[str] = ALL_LINEAR,
        *,
        normalize: bool | None = None,
        layers_at_once: int | None = None,
        out: str | os.PathLike[str] | None = None,
        shard: bool = True,
        process_group: Any = None,
    ) -> NullSpace:
        """Add what ``batches`` show of every targeted layer, in one pass for all layers; call again to add more.

        The model runs in evaluation mode without gradients, uncompiled, and every module's mode is restored. A layer
        that saw no features is named by a warning. If anything fails, layers that are new here are left out again;
        one that had features before keeps those that reached it. On several ranks each
        runs its part of the batches, and every rank ends with the statistics of all, the same bits everywhere:
        covariances add exactly, sketches merge within their bound; if anything fails, nothing is added.

        Args:
            model: the model whose layers are protected; layers are named as in ``model.named_modules()``.
            batches: each is a tensor (``model(batch)``), a tuple (``model(*batch)``) or a mapping (``model(**batch)``).
                A mapping's ``attention_mask`` (batch x tokens) keeps padding out of the statistics; of an encoder and
                a decoder, that of the encoder's positions, and ``decoder_attention_mask`` that of the decoder's. It is
                applied wherever features have its shape: pass batches without padding where positions of that number
                come in another order, as in a model that computes (tokens x batch) on as many tokens as rows.
            target_modules: ``"all-linear"``, a regular expression, or names; see `gradsub.layers.select_layers`.
            normalize: divide every token's features by their norm, so that all tokens count the same. Language models
                have layers where few tokens are thousands of times as large as the others (massive activations, arXiv
                2402.17762). There nearly all of the mean square is theirs, and ``energy`` is satisfied by one or two
                directions that leave the other tokens unprotected. What all features span stays the same; features
                that are zero stay so. None: yes, unless ``threshold`` decides, which is an absolute eigenvalue
                (with ``normalize=True`` a mean squared cosine). The choice is kept with the layer, in files as well:
                later calls follow it.
            layers_at_once: so many layers in one pass over the batches, of which only the protected directions are kept
                afterwards, in their smaller form: for models whose statistics do not fit into memory. The passes are as
                many as groups of layers, ``batches`` must be there for each, and nothing can be added to these layers.
                Layers with the same input share their directions only within a group: choose a multiple of the
                layers in a block. None: all of them.
            out: a safetensors file for the protected directions of all layers, in their smaller form. The layers
                collected here are mapped from it afterwards, and nothing can be added to them. Each layer's directions
                leave the memory as they are found, and its statistics too. So with ``layers_at_once=1``, building takes
                the memory of one layer, however many there are. Temporary files next to it take the same room until it
                is complete. Whatever interrupts the building leaves an earlier file as it was. On several ranks each
                one writes it. None: the directions stay in memory, and `save` writes them.
            shard: on several ranks, whether they were given the same batches, of which rank r runs every one whose
                position is r modulo their number; False: every rank has batches of its own and runs all of them.
            process_group: the ranks; None: the default group, once torch.distributed is initialised.

        Returns:
            itself, so that ``NullSpace().collect(model, batches)`` reads as one expression.

        Raises:
            ValueError: no layer matches or sees any features, there is no batch, or a feature is NaN or Inf (the
                layer is named); ``normalize`` is another than that of the layer's earlier features, or is None where
                an older version's file does not tell; ``layers_at_once`` is no positive integer, or ``batches`` can be
                run through only once; or ``shard`` is true and the ranks have different batches.
            RuntimeError: another rank failed.
            OSError: ``out`` cannot be written.
            ImportError: ``out`` is given, and safetensors is not installed.

        Example:
            >>> import torch
            >>> from gradsub import NullSpace
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
            >>> batches = [torch.eye(4)[:2]]
            >>> null_space = NullSpace(energy=1.0).collect(model, batches)
            >>> {name: null_space.basis(name).shape for name in null_space}
            {'0': torch.Size([4, 2]), '1': torch.Size([3, 2])}
        """
        _check_given(model, batches)
        check_kind("normalize", normalize, bool | None, "True, False, or None for the default")
        layers = select_layers(model, target_modules)
        names = list(layers)
        normalize = normalization(self._content, names, normalize)
        if layers_at_once is not None:
            check_groups(layers_at_once, batches)
        ranks = Ranks(process_group)
        with nullcontext() if out is None else Scratch(out) as scratch:
            if scratch is not None:
                on_every_rank(ranks, partial(check_writable, scratch))
            for start in range(0, len(names), layers_at_once or len(names)):
                group = {name: layers[name] for name in names[start:][:layers_at_once]}
                observed = partial(collect_features, model=model, layers=group, side=self.side, normalize=normalize)
                collect_into(self._content, model, batches, ranks, shard, observed)
                if layers_at_once is not None or scratch is not None:
                    on_every_rank(ranks, partial(self._content.condense, group, scratch))
            check_seen(self._content, names, self._unseen)
            self.fitted_on.note({name: module for name, module in layers.items() if name in self}, self.side)
            if out is not None:
                on_every_rank(ranks, partial(self._move_into, out, names))
        return self

    def collect_gradients(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        shard: bool = True,
        process_group: Any = None,
    ) -> NullSpace:
        """Add what the general-domain ``loss`` asks of every vector: norm weights and biases; call again to add more.

        A vector v (d) acts on every input, so that no change of it leaves all answers as they are; but it can leave
        their loss as it is to first order. The features of v are the gradients g_t (d) of ``loss`` with respect to v
        that come through the positions t, one row for each, for either ``side``; they sum to the gradient of v. The
        optimizer then projects each step of v onto the complement of their leading directions K, so that
        g^T dv = 0 for every g in the span of K: at the weights at which they were collected, and of the part of each
        gradient that K holds. It protects the vectors that are known when it is built.

        The model runs in evaluation mode; modes, ``requires_grad`` and ``.grad`` are as before afterwards. Vectors are
        collected whether they require gradients or not. If anything fails, nothing is added. A vector's statistics are
        its own (4 d^2 to 8 d^2 bytes, or ``layer_memory_budget``), and for one batch at a time two rows (d) for every
        position are held for each vector.

        Args:
            model: the model whose vectors are protected; all that scale or shift their module's features on the last
                axis, as norm weights and biases do. Others are left out, and a warning names each with the reason;
                those on which the loss does not depend need no protection.
            batches: each is a tensor, a tuple or a mapping, or whatever ``loss`` takes. Padding is kept out by
                ``loss``, which must not depend on it.
            loss: maps the model and a batch to a scalar, best a sum over positions: a mean over N divides the rows by
                N, so that a short batch counts more than a long one. None: ``model(batch).loss``, which models of
                transformers compute from ``labels``; it is a mean.
            shard: as of `collect`.
            process_group: as of `collect`.

        Returns:
            itself.

        Raises:
            ValueError: there is no batch, no vector or no loss, a vector is sharded, or a gradient is NaN or Inf; or
                ``shard`` is true and the ranks have different batches.
            RuntimeError: another rank failed.

        Example:
            >>> import torch
            >>> from gradsub import NullSpace
            >>> norm = torch.nn.LayerNorm(4)
            >>> x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
            >>> null_space = NullSpace(energy=0.99).collect_gradients(norm, [x], lambda norm, x: norm(x)[:, 0].sum())
            >>> {name: null_space.basis(name).shape for name in null_space}  # the loss depends on one entry alone
            {'weight': torch.Size([4, 1]), 'bias': torch.Size([4, 1])}

        Source: projecting updates off gradients of what is to be kept is OGD (arXiv 1910.07104).
        """
        _check_given(model, batches)
        if loss is not None:
            check_kind("loss", loss, Callable, "a function of the model and a batch, or None")
        observed = partial(collect_gradients, model=model, loss=loss or own_loss)
        collect_into(self._content, model, batches, Ranks(process_group), shard, observed)
        return self

    def update(self, name: str, features: Tensor) -> None:
        """Add features (N x d) of the layer ``name``; leading dimensions are flattened.

        They count as they are, but in a layer that was collected with ``normalize`` each row is divided by its norm, as
        there. Allowed at any time, during training too: `version` rises, and `basis` gives the directions of all
        features so far.

        Raises:
            ValueError: the features are not at least 2-D, are empty, hold NaN or Inf, or their width d differs from
                what the layer had before; or ``layer_memory_budget`` is too small for two rows of them.
        """
        check_kind("name", name, str, "a layer's name")
        check_kind("features", features, Tensor, "a tensor (N, d)")
        if features.ndim < 2 or features.numel() == 0:
            raise ValueError(f"features of {name!r} must be (N, d) and not empty, found {tuple(features.shape)}")
        rows = features.detach().reshape(-1, features.shape[-1])
        first = name not in self
        normalized = not first and self._shared.normalized.get(name)
        self._content.add(name, unit_rows(rows) if normalized else rows, [])
        if first:
            self._shared.normalized[name] = False

    def merge(self, other: NullSpace) -> NullSpace:
        """Add all that another null space has seen, as if its features had come here; ``other`` stays as it is.

        Covariances add exactly. Sketches merge by Frequent Directions, with the error bound of a single sketch of all
        features. So ranks of a distributed run can each collect their share of the data.

        Returns:
            itself.

        Raises:
            ValueError: side, criterion, memory budget, or a layer's width or normalization differ, or the latter is
                known of one of them alone; then nothing is changed.
        """
        check_kind("other", other, NullSpace, "a NullSpace")
        settings, others = self._settings(), other._settings()
        different = {key: (value, others[key]) for key, value in settings.items() if others[key] != value}
        if different:
            raise ValueError(f"the settings of other differ (here, there): {different}: collect both alike")
        check_told(self._content, other._content)
        self._content.merge(other._content)
        self.fitted_on.adopt(other.fitted_on)
        self._free_rows = {**other._free_rows, **self._free_rows}
        return self

    def basis(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The protected directions K (d x k) of the layer ``name``, which span what the null space leaves out.

        Its columns are orthonormal, strongest first; those of the null space itself are `complement`. Whichever of the
        two is smaller is kept. Where that is the complement, K is computed from the statistics, again if nobody has the
        last one any more; layers with the same input get the same tensor. Without statistics
        (``save(path, statistics=False)``) its columns are in no order then. Do not change the result.

        Args:
            name: the layer.
            dtype: of the result. With ``energy`` up to 0.999, directions of 256 and more float32 features are float32;
                all others are float64 wherever the device has it.

        Raises:
            KeyError: nothing was collected for the layer; the message lists the layers there are.
        """
        return self._content.basis(name, dtype)

    def complement(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The free directions (d x (d - k)) of the layer ``name``: orthonormal columns, orthogonal to `basis`.

        Args:
            name: the layer.
            dtype: of the result, as of `basis`.

        Raises:
            KeyError: nothing was collected for the layer.

        Example:
            >>> import torch
            >>> from gradsub import NullSpace
            >>> null_space = NullSpace(energy=1.0)
            >>> null_space.update("layer", torch.eye(4)[:3])
            >>> null_space.complement("layer").abs().mT
            tensor([[0., 0., 0., 1.]])
        """
        return self._protection(name).complement().to(dtype)

    def extended(self, name: str, kept: Tensor) -> Tensor:
        """The directions to protect now, without giving up any of ``kept``: for a basis that is in use already.

        More general-domain data shifts the leading eigenvectors, and `basis` follows them; what was protected before
        must stay so. The result spans ``kept`` and the fewest further directions that satisfy the criterion; it is
        ``kept`` itself where that does already.

        Args:
            name: the layer.
            kept: (d, k), orthonormal columns.

        Returns:
            (d, k'), orthonormal columns, those of ``kept`` first, with its dtype and device.

        Raises:
            KeyError: nothing was collected for the layer.
            ValueError: ``kept`` has another number of rows than the layer's features have columns.

        Example:
            >>> import torch
            >>> from gradsub import NullSpace
            >>> null_space = NullSpace(energy=1.0)
            >>> null_space.update("layer", torch.eye(4)[:1])
            >>> kept = null_space.basis("layer")
            >>> null_space.update("layer", torch.eye(4)[2:3])
            >>> null_space.extended("layer", kept).shape
            torch.Size([4, 2])
        """
        statistics = self._statistics(name)
        if kept.ndim != 2 or kept.shape[0] != statistics.dimension:
            raise ValueError(
                f"kept must be ({statistics.dimension}, k) for {name!r}, found {tuple(kept.shape)}: pass a basis of "
                "the same layer and side"
            )
        fresh = self.basis(name, kept.dtype).to(kept.device)
        if bool((fresh - kept @ (kept.mT @ fresh)).norm() <= 1e-5 * max(1, fresh.shape[1]) ** 0.5):
            return kept
        with torch.inference_mode(False), torch.no_grad():
            return extend(statistics.spectrum(), self.criterion, kept).to(kept)

    def eigenvalues(self, name: str) -> Tensor:
        """Eigenvalues (d,) of the layer's covariance, largest first, in squared feature units.

        Those of a sketch are lower by `error_bound` at most, and zero beyond the directions that it holds.
        """
        return self._protection(name).eigenvalues.clone()

    def protected_fraction(self, name: str) -> float:
        """k / d: the share of the layer's directions that no update may use."""
        protection = self._protection(name)
        return protection.count / protection.dimension

    def residual_energy(self, held_out: NullSpace) -> dict[str, float]:
        r"""How much of other features' energy every layer leaves unprotected: has enough been collected?

        1 - tr(K^T C K) / tr(C), in [0, 1], with the protected directions K of this null space and the covariance C of
        ``held_out``: the share of the mean square through which updates reach these features. If ``energy`` chose K,
        it is at most 1 - ``energy`` on the data that K was taken from, and usually more on fresh data of the same kind,
        the more so the fewer tokens were collected. Collect until it no longer falls; a larger ``energy`` lowers it
        too, but leaves less to train.

        Args:
            held_out: another null space, of the same side, collected alike on text that this one has not seen; its own
                criterion does not matter, but ``normalize`` has to be the same, whose default a ``threshold`` decides.
                Where its statistics are sketches, the result is an upper bound.

        Returns:
            layer -> share, for the layers that both know, in the order of this one. 0 where C is 0.

        Raises:
            ValueError: the sides differ, no layer is in both, or a layer's features have another width or another
                ``normalize``.

        Example:
            >>> import torch
            >>> from gradsub import NullSpace
            >>> null_space, held_out = NullSpace(energy=1.0), NullSpace()
            >>> null_space.update("layer", torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
            >>> held_out.update("layer", torch.tensor([[3.0, 0.0, 1.0], [0.0, 3.0, 1.0]]))
            >>> round(null_space.residual_energy(held_out)["layer"], 6)
            0.1
        """
        check_kind("held_out", held_out, NullSpace, "a NullSpace")
        if held_out.side != self.side:
            raise ValueError(f"held_out.side={held_out.side!r} must be {self.side!r}, as here: collect it again")
        return residual_shares(self._content, held_out._content)

    def error_bound(self, name: str) -> float:
        """How far the layer's covariance may be off, as a spectral norm in squared feature units; 0 if exact."""
        return self._statistics(name).error

    def tokens(self, name: str) -> int:
        """How many rows of features the layer's statistics are made of."""
        return self._statistics(name).count

    def version(self, name: str) -> int:
        """How often the layer's statistics have grown: who keeps a basis compares this to learn that it is old."""
        self._statistics(name)
        return self._shared.versions[name]

    def table(self) -> str:
        """A line per layer: dimension d, protected directions k, k / d, their share of the features' mean square
        (a lower bound for a sketch), the kind of statistics and the number of tokens seen.

        Computes every basis that is not there yet.

        Example:
            >>> import torch
            >>> from gradsub import NullSpace
            >>> null_space = NullSpace(max_rank=1)
            >>> null_space.update("layer", torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
            >>> print(null_space.table())
            layer  dimension  protected  fraction  energy   kind  tokens
            layer          2          1     0.500  0.8000  exact       2
            statistics: 0.0 MB
        """
        lines = [["layer", "dimension", "protected", "fraction", "energy", "kind", "tokens"]]
        for name, statistics in self._shared.by_name.items():
            found = self._protection(name)
            numbers = found.dimension, found.count, f"{found.count / found.dimension:.3f}", f"{found.energy:.4f}"
            lines.append([name, *map(str, numbers), statistics.kind, str(statistics.count)])
        nbytes = sum(statistics.nbytes for statistics in self._shared.distinct().values())
        return "\n".join([*aligned(lines, [False, *[True] * 6]), f"statistics: {nbytes / 1e6:.1f} MB"])

    @property
    def _shared(self) -> SharedStatistics:
        return self._content.shared

    def _statistics(self, name: str) -> Statistics:
        return self._content.statistics(name)

    def _protection(self, name: str) -> Protection:
        return self._content.protection(name)

    @classmethod
    def _of(cls, settings: dict[str, Any]) -> NullSpace:
        """The inverse of `_settings`, of a file's."""
        expected = cls()._settings().keys()
        if settings.keys() != expected:
            raise DamagedError(f"has the settings {sorted(settings)}, expected {sorted(expected)}")
        try:
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise DamagedError(f"has a setting that cannot be: {error}") from error

    def _settings(self) -> dict[str, Any]:
        return {"side": self.side, **vars(self.criterion), "layer_memory_budget": self.layer_memory_budget}

    def __contains__(self, name: object) -> bool:
        return name in self._shared.by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._shared.by_name)

    def __len__(self) -> int:
        return len(self._shared.by_name)

    def __repr__(self) -> str:
        chosen = ", ".join(f"{key}={value!r}" for key, value in self._settings().items() if value is not None)
        return f"NullSpace({chosen}, layers={len(self)})"

    def save(self, path: str | os.PathLike[str], *, statistics: bool = True) -> None:
        """Write a safetensors file, in which layers with the same input have one entry.

        The file takes its name when it is complete: whatever interrupts the writing leaves an earlier one as it was.

        Args:
            path: the file.
            statistics: whether the statistics are kept (8 d^2 bytes where they are exact), so that `load` can go on
                collecting. False: the directions alone in their smaller form, K or its complement (at most 2 d^2 bytes
                in float32). Nothing has to be decomposed after loading then, and nothing can be added.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        shared = self._shared if statistics else self._content.directions()
        write(path, self._settings(), shared, self.fitted_on)

    def _move_into(self, path: str | os.PathLike[str], names: Iterable[str]) -> None:
        """Write all directions to a file, and read those of ``names`` from it from now on."""
        self.save(path, statistics=False)
        _, written, _ = read(path, "cpu")
        self._content.replace({name: written.by_name[name] for name in names if name in self})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> NullSpace:
        """Read what `save` wrote.

        On a CPU the file is mapped into memory: nothing is copied before it is changed.

        Args:
            path: the safetensors file.
            device: where the statistics are put.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the file is damaged or holds something else, or statistics in it are NaN, Inf, asymmetric,
                negative or of a wrong dtype, or directions are not orthonormal; the message names the file and the
                layer.
        """
        try:
            with torch.inference_mode(False):  # nothing could be added to what is read in it
                settings, shared, fitted_on = read(path, device)
            loaded = cls._of(settings)
        except DamagedError as error:
            raise ValueError(f"path={os.fspath(path)!r} {error}") from error
        loaded._content.shared, loaded.fitted_on = shared, fitted_on
        return loaded


def _check_given(model: object, batches: object) -> None:
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    kind = () if isinstance(batches, (str, bytes)) else Iterable
    check_kind("batches", batches, kind, "batches of what the model takes, such as token ids")
