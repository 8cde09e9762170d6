"""`GemsOptimizer`: per-task gradients in, one protected low-rank update out."""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub import _settings as settings
from gradsub._blocks import Blocks
from gradsub._checkpoint import StateDictReader, Stateful
from gradsub._facade import put_before
from gradsub._finite import NonFiniteError
from gradsub._groups import Adopted, check_group_count, lay_out
from gradsub._intake import Intake
from gradsub._kinds import check_kind
from gradsub._layout import Layout
from gradsub._measure import needs_alignment
from gradsub._probe import Probes, Traits
from gradsub._reporting import LastKnown, Measurements, make_report
from gradsub._said import Said
from gradsub._state import group_parameters, show_shards
from gradsub._step import Stepper
from gradsub._summarising import summarise
from gradsub.capture import MIXED, Gathered, MixedRows, Part, scaler_reading, scaler_stepping
from gradsub.distributed import Exchange
from gradsub.gates import Gate, resolve_gate
from gradsub.inner import Inner, check_wrappable
from gradsub.layers import ALL_LINEAR, check_targets
from gradsub.linalg._arithmetic import full_precision, widest
from gradsub.null_space import NullSpace
from gradsub.null_space._null_space import check_side
from gradsub.report import Report
from gradsub.subspace import Layer, SubspaceBank
from gradsub.summary import Summary
from gradsub.surgery import Surgery, resolve_surgery

__all__ = ["GemsOptimizer", "NonFiniteError"]


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """In full precision, and outside of inference mode: what is made there can never be written to again."""
    grad = torch.is_grad_enabled()
    # The first two switch gradients off and on.
    with full_precision(), torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


class GemsOptimizer(Optimizer):
    r"""Runs any optimizer inside shared and task-specific low-rank subspaces, within a protected null space.

    For a weight W (m x n), tasks k = 1..K with gradients G_k and w_k the task's share of the samples,
    G_sh = sum_k w_k G_k. Every ``update_proj_gap`` steps the leading singular vectors of (I - K K^T) G_sh and of each
    (I - K K^T) G_k become the bases B_sh and B_k, where K are the protected directions of the layer. In between, the
    base optimizer runs on the projected gradients, and its steps d are lifted:

        side="input":   R = G B (m x r),    dW = scale (d_sh B_sh^T + sum_k g_k d_k B_k^T)
        side="output":  R = B^T G (r x n),  dW = scale (B_sh d_sh + sum_k g_k B_k d_k)

    with gates g_k that are positive and sum to 1. Since every basis is orthogonal to K, so is every update, whatever
    the base optimizer does. Decoupled weight decay is projected likewise; that of protected layers is collected until
    the next refresh. The wrapper takes ``base`` over: both show the same ``param_groups``, so that a scheduler built on
    either of them steers, and ``base.step()`` is the wrapper's.

    Gradients of ``backward()`` inside `task` are captured and do not appear in ``p.grad``; gradients from outside stay
    there, are free for clipping and belong to the shared subspace alone. `step` consumes what was captured.

    With ``model``, linear layers compute the projected gradients themselves; the weight's gradient exists at exact
    refreshes alone (``refresh``). Run the forward pass inside `task` as well: then only x B (N x r) is kept of a
    layer's input x (N x n), for ``side="input"``. Of a forward pass outside, x is kept, as always.

    Args:
        base: any ``torch.optim.Optimizer`` that has not stepped; all its hyper-parameters, per group, stay in force.
            ``weight_decay`` is applied to the weight by this class: decoupled where the base class decouples it,
            otherwise added to the shared gradient.
        tasks: the names of the tasks.
        rank: columns r of the shared basis (dimensionless; capped at min(m, n)). Typical: 32 to 256.
        task_rank: columns of each task's basis; None: ``max(1, rank // 2)``.
        update_proj_gap: steps between two refreshes of the bases. Typical: 50 to 500.
        scale: factor on the lifted update, as GaLore's alpha.
        lr_scale: how updates compare to those of whole weights at the same rate. None: each coordinate takes the step
            that ``base`` takes of an entry, so that the update's root mean square is only
            sqrt((r + sum_k g_k^2 r_k) / d) of it, with d the length of the axis that the bases span. ``"adamw"``:
            the lifted update is multiplied by the inverse of that, with gates of 1 / K, so that a rate that served
            AdamW serves here, as with ``match_rms_adamw`` of torch's Muon. Weight decay is that of ``base`` either
            way. It multiplies ``scale``. The steps of ``base`` must have one size, whatever that of the gradients, as
            AdamW's (it is tried out), not SGD's.
        side: ``"input"``: bases span input directions, and protected inputs give the same output as before;
            ``"output"``: bases span output directions, as published.
        orthogonalize: ``"none"``: bases are independent; ``"shared_first"``: task bases are orthogonal to the shared
            basis. If a task has no gradient when the shared basis changes, its basis is corrected at its next gradient.
        gate: ``"heuristic"``, ``"uniform"``, ``"hypergradient"``, or a callable from `GateInputs` to gates (L, K).
        null_space: the protected directions; None protects nothing. A layer that it knows, but whose product changes
            by anything else than a decomposed weight, is named by a warning with the reason. So is, with its share of
            the trained weights, whatever else trains and is not held: `freeze_unprotected` freezes it.
        model: names the layers. With it exactly the targeted linear layers are decomposed; without it every floating
            parameter with min(m, n) > rank, where one with more than two dimensions counts as the matrix
            ``out x (in * kernel)``. All other parameters take the base optimizer's plain step on G_sh, of which a
            vector that ``null_space`` knows (`NullSpace.collect_gradients`) keeps the part in its null space.
        target_modules: which layers of ``model``, by peft's convention: ``"all-linear"``, a regular expression, or
            names.
        seed: of the random test matrices; torch's global generator is never used.
        surgery: how conflicting tasks share the common subspace: ``"sum"``, ``"pcgrad"``, ``"upgrad"``, ``"famo"`` or
            any other of `gradsub.surgery`, or a callable from the K x K Gramian of the weighted task gradients,
            projected on the shared subspaces and summed over the layers, to K weights (any TorchJD ``Weighting`` of a
            Gramian). The Gramian is in float64 where the device has it, since squares of large gradients overflow in
            float32. A callable with ``needs_losses = True`` gets `SurgeryInputs`, with the losses, instead. What either
            remembers is in `state_dict`.
        moments: what happens to the base optimizer's moments when a basis changes: ``"rotate"`` expresses them in the
            new basis, ``"keep"`` leaves the numbers, ``"reset"`` starts afresh.
        nonfinite: ``"raise"`` checks losses and gradients before anything is changed, at the price of one wait for the
            device a step; ``"skip"`` checks likewise, drops the whole step and warns once; ``"ignore"`` does not look.
        master_weights: keep a float32 copy of weights below float32 (4 bytes a weight) and round the copy into them
            after each step. Without it rounding undoes the protection, which is said once.
        capture: ``"auto"``: layers of ``model`` with more than 4,096 entries compute projected gradients in their own
            backward pass; ``"fused"``: smaller ones too; ``"generic"``: autograd's gradient of every weight is taken
            and projected. Without ``model`` all is generic. A weight that several modules share, or whose module has
            another forward pass than a linear layer's, is captured generically, which is said once.
        refresh: where bases come from. ``"svd"``: the whole gradient, decomposed before the step, all layers in the
            same step. ``"sketch"``: products G^T Omega with max(2 r, r + 64) random directions in two consecutive
            steps, after which the basis changes; layers of one shape do so together, and shapes take turns.
            ``"auto"`` sketches a layer that is sharded, or that is captured by its own backward pass, has more than
            65,536 entries, and whose sketch is cheaper than its gradient. All others are decomposed.
        protection: where protected directions lie between refreshes, which alone need them: ``"host"``: in the host's
            memory; they come to the device layer by layer. ``"device"``: they stay there. ``"auto"``: the host.
        anchor: also keep the protected part W K of each weight, beside the directions, and set it back once in
            ``update_proj_gap`` steps, so that roundings do not add up: as many numbers more as protected directions
            times the other axis. Without it a few roundings of W are left after thousands of steps, and more with
            weight decay and a gap below about 100.
        process_group: the ranks that train this model on different data: a process group, a one-dimensional
            ``DeviceMesh``, or None: the default group once torch.distributed is initialised (a group of one rank turns
            communication off). Every rank has to step; what was captured is then summed in one flat bucket, and a
            task's gradient is that of all ranks' samples: G_k = sum_r (n_k^r / N_k) G_k^r for ``samples=n_k^r``. Give
            ``model`` with its ``DistributedDataParallel`` around it, and that sends no gradients inside of `task`.

    A parameter group may carry its own ``rank``, ``task_rank``, ``update_proj_gap``, ``scale``, ``lr_scale`` (a number
    there is another library's, and left alone), and ``subspace=False`` to keep its matrices whole, which also says that
    they are meant to move outside of ``null_space``.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: an argument is out of range; ``base`` has state, needs a closure, or takes steps that depend on
            where the parameter stands or started (it is tried out on a small matrix), or are of no one size under
            ``lr_scale="adamw"``; a parameter is complex; ``model`` is another copy than the one that ``base`` trains;
            ``null_space`` does not fit the layers or the side, or leaves no adapter (LoRA) a direction to move along; a
            weight is sharded otherwise than by rows, or ``base`` looks at whole matrices where each rank has some rows.

    Example:
        >>> import torch
        >>> from gradsub import GemsOptimizer
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(16, 8, bias=False)
        >>> optimizer = GemsOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), tasks=("sum", "max"), rank=4)
        >>> x = torch.randn(32, 16)
        >>> for _ in range(100):
        ...     for name, target in {"sum": x.sum(1), "max": x.amax(1)}.items():
        ...         with optimizer.task(name, samples=32):
        ...             loss = (model(x).mean(1) - target).square().mean()
        ...             loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.report().layers[0].step
        100

    Source: GEMS, "Unifying Search and Recommendation in LLMs via Gradient Multi-Subspace Tuning", arXiv 2601.09496.
    """

    # A fused base optimizer announces that it unscales gradients itself; it never sees the ones captured here. A
    # GradScaler finds them in `param_groups` instead.
    _step_supports_amp_scaling = False

    @_ordinary_tensors()
    def __init__(
        self,
        base: Optimizer,
        *,
        tasks: Iterable[str] = ("search", "rec"),
        rank: int = 128,
        task_rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        lr_scale: str | None = None,
        side: str = "input",
        orthogonalize: str = "none",
        gate: str | Gate = "heuristic",
        null_space: NullSpace | None = None,
        model: nn.Module | None = None,
        target_modules: str | Iterable[str] = ALL_LINEAR,
        seed: int = 0,
        surgery: str | Surgery = "sum",
        moments: str = "rotate",
        nonfinite: str = "raise",
        master_weights: bool = False,
        capture: str = "auto",
        refresh: str = "auto",
        protection: str = "auto",
        anchor: bool = False,
        process_group: Any = None,
    ) -> None:
        check_wrappable(base)
        settings.check_kinds(
            tasks=tasks, null_space=null_space, model=model, master_weights=master_weights, anchor=anchor
        )
        check_targets(target_modules)
        settings.check_count("seed", seed, least=0)
        check_side(side)
        settings.check_choices(
            orthogonalize=orthogonalize,
            moments=moments,
            nonfinite=nonfinite,
            capture=capture,
            refresh=refresh,
            protection=protection,
        )
        self.tasks = settings.check_tasks(tasks)
        own = {
            "tasks": self.tasks,
            "side": side,
            "subspace": True,
            "rank": rank,
            "task_rank": task_rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "lr_scale": lr_scale,
        }
        settings.check_group(own)
        settings.check_lr_scale(lr_scale)
        clash = sorted(own.keys() & base.defaults.keys())
        if clash:
            raise ValueError(f"base={type(base).__name__} has options {clash} that would be taken for GemsOptimizer's")
        weigh, gates = None if surgery == "sum" else resolve_surgery(surgery), resolve_gate(gate)
        self._nonfinite = nonfinite
        self._layout = Layout(
            side,
            len(self.tasks),
            null_space,
            model,
            target_modules,
            master_weights,
            # Without a task there is nothing to tell apart: autograd's own gradient is all there is.
            capture if self.tasks else "generic",
            refresh,
            protection,
            anchor,
        )
        self._said = Said(self._layout, null_space, model, target_modules)
        self._skipped = 0
        self._adopted = Adopted()
        self._measured: Measurements | None = None
        self._known = LastKnown()
        super().__init__([dict(group) for group in base.param_groups], {**base.defaults, **own})
        self._bank = SubspaceBank(orthogonalize, seed, self._layout.compiled)
        parameters: list[Tensor] = []
        self._exchange = Exchange(process_group, model, len(self.tasks), self._layout.name, parameters)
        self._intake = Intake(self._bank, self._exchange, self._layout.name, parameters, bool(self.tasks))
        probes = Probes(base)
        found = [self._lay_out(base, probes, position) for position in range(len(self.param_groups))]
        check_group_count(self.param_groups, [layers for layers, _ in found], base, probes)
        self._said.check()
        # Nothing can be refused any more: only now is the base optimizer taken over, with the very dictionaries that
        # others may hold.
        for own_group, theirs in zip(self.param_groups, base.param_groups, strict=True):
            theirs.update(own_group)
        self.param_groups = list(base.param_groups)
        self._inner = Inner(base, probes)
        put_before(base, self)
        # Moments that are reset have a step count of each layer's own.
        stacks = moments != "reset"
        known = self._bank, self._inner
        self._blocks = Blocks(
            *known, self.state, self.tasks, self._layout.guard, needs_alignment(gates), stacks, master_weights, anchor
        )
        self._stepper = Stepper(self._blocks, *known, self.tasks, gates, weigh, moments, lr_scale)
        for position, (layers, traits) in enumerate(found):
            self._adopt(position, layers, traits)
        self._weighing = Stateful({"surgery": weigh, "gate": gates}, group_parameters(self.param_groups))
        if self.tasks and self._blocks.layers:
            count, device = len(self.tasks), next(iter(self._blocks.layers)).device
            self._weighing.expect(torch.zeros(count, count, dtype=widest(device), device=device))
        self._show_callables()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters and their options, by group, for reading and changing.

        A `GradScaler` reads them to divide gradients by the loss scale and to look for Inf; it alone is shown one more
        group, whose gradients are the captured ones.
        """
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        intake: Intake | None = self.__dict__.get("_intake")
        if intake is None or not intake.expects:
            return groups
        scaler = scaler_reading(sys._getframe(1), self)
        if scaler is None:
            return groups
        with torch.no_grad():
            return [*groups, {"params": intake.show(scaler)}]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    # --- gradients in ------------------------------------------------------------------------------------------------

    @contextmanager
    def task(self, name: str, samples: float = 1, loss: Tensor | None = None) -> Iterator[None]:
        """Every ``backward()`` in here belongs to the task; may be entered several times a step, gradients add up.

        Args:
            name: one of ``tasks``.
            samples: how many samples the backward passes in here stand for; a task's share w_k of all samples weighs
                it in the shared gradient. When accumulating, pass each part's own number.
            loss: the loss, for the gate, where it is not a scalar on which ``backward()`` itself is called. It counts
                as the backward pass weighs it; if that does not pass through it, as it is.

        Raises:
            ValueError: the task was never declared, or ``samples`` is not positive.
            RuntimeError: another task is open, or the step's gradients were divided by the scale of the loss already.
        """
        index = self._task_index(name)
        samples = settings.check_samples(samples, name)
        check_kind("loss", loss, Tensor | None, "the loss as a tensor, or None")
        self._follow_conversions()
        with self._intake.open([Part(index)], {index: samples}, f"task({name!r})"), self._intake.watch(index, loss):
            yield

    @contextmanager
    def mixed(
        self,
        task_ids: Sequence[str | int] | Tensor,
        samples: Mapping[str, float] | None = None,
        other_rows: Sequence[Sequence[str | int] | Tensor] = (),
        shares: Mapping[str, float] | None = None,
    ) -> Iterator[MixedRows]:
        """One forward and one backward pass for a batch whose rows belong to several tasks.

        Equal to a pass for each task within rounding: the layers of ``model`` tell the rows apart in their backward
        pass. It needs the fused capture, and layers whose inputs' first axis is that of the rows; an axis that is
        another of the same length cannot be told from it, as with (T, B, d) where T == B. Inside, either call
        ``backward()`` on the mean over all rows, which leaves a gate that reads losses without them, or on
        ``rows.loss(losses)`` of the losses of the rows, which tells it each task's loss. Parameters without subspaces
        take the gradient of that one loss, whatever ``surgery`` says.

        Args:
            task_ids: (B,) the task of each row: names, indices, or a tensor of indices (on the CPU, where reading it
                does not wait for the device).
            samples: task -> what it counts in the shared gradient, if not its number of rows; the loss must weigh the
                tasks likewise, as a mean over tokens does with numbers of tokens.
            other_rows: for layers whose inputs' first axis is of another length: the task of each of its entries, one
                sequence for each length. ``task_ids.repeat_interleave(T)`` where a model flattens (B, T, d) to
                (B * T, d), ``task_ids.repeat(2)`` for a tower over two batches one after another,
                ``task_ids[:, None].expand(B, T)[mask]`` for chosen tokens.
            shares: for a batch that is a part of a step (gradient accumulation): task -> its share of the samples of
                all parts. The loss of a part is then its sum divided by the samples of all parts, so that the losses of
                the parts add up to the step's mean loss. None: the batch is a step of its own, or every part has the
                same shares.

        Yields:
            the rows, with ``rows.loss``.

        Raises:
            ValueError: no layer is captured by its forward pass; ``task_ids``, ``samples``, ``other_rows`` or
                ``shares`` do not fit the tasks or one another.
            RuntimeError: another block is open; in the backward pass, a gradient arrives in a layer whose input has a
                number of rows that none of them has, or a decomposed weight's gradient comes from elsewhere.
        """
        if not self._intake.fused:
            self._layout.refuse_mixed()
        self._follow_conversions()
        if samples is not None:
            samples = {str.__str__(name): count for name, count in samples.items()}
        if shares is not None:
            shares = {str.__str__(name): settings.check_samples(share, name) for name, share in shares.items()}
        rows = MixedRows(self.tasks, task_ids, samples, other_rows, shares, self._intake.saw_loss)
        counts = {task: settings.check_samples(count, self.tasks[task]) for task, count in rows.samples.items()}
        parts = rows.parts(self._intake.fused.device)
        # A part of a step is one of a mixed batch, also where all its rows are of one task.
        mixed = len(parts) > 1 or shares is not None
        with self._intake.open(parts, counts, "mixed(...)", mixed), self._intake.watch_rows(rows):
            yield rows

    def backward(
        self, losses: Mapping[str, Tensor], samples: Mapping[str, float] | None = None, retain_graph: bool = False
    ) -> None:
        """One backward pass a task, from losses that may share one forward pass.

        Args:
            losses: task -> its scalar loss.
            samples: task -> its number of samples; 1 each where missing.
            retain_graph: keep the graph after the last pass.

        Raises:
            ValueError: a task was never declared, ``samples`` names a task without a loss, or a loss is no scalar with
                a graph; nothing was captured.
        """
        check_kind("losses", losses, Mapping, "a mapping from tasks to their losses")
        losses = {self.tasks[self._task_index(name)]: loss for name, loss in losses.items()}
        samples = {self.tasks[self._task_index(name)]: count for name, count in (samples or {}).items()}
        for name, loss in losses.items():
            settings.check_loss(loss, name)
            settings.check_samples(samples.get(name, 1), name)
        unused = sorted(samples.keys() - losses.keys())
        if unused:
            raise ValueError(f"samples names {unused}, but losses has only {sorted(losses)}: pass their losses too")
        last = len(losses) - 1
        for position, (name, loss) in enumerate(losses.items()):
            with self.task(name, samples.get(name, 1)):
                loss.backward(retain_graph=retain_graph or position < last)  # type: ignore[no-untyped-call]

    def _task_index(self, name: str) -> int:
        if name not in self.tasks:
            raise ValueError(f"task {name!r} was never declared: tasks={self.tasks}; add it there or correct the name")
        return self.tasks.index(name)

    # --- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step from what was captured since the last one; with nothing captured, nothing moves.

        Args:
            closure: evaluated once, with gradients enabled; it may open tasks.

        Returns:
            what the closure returned.

        Raises:
            NonFiniteError: a task's loss or gradient is NaN or Inf; nothing was changed (``nonfinite="raise"``).
            RuntimeError: a task is open.
        """
        self._intake.check_closed("step()")
        self._adopted.check(self.param_groups)
        self._blocks.check(self.state)
        self._said.check_unfrozen()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        # For schedulers that were built on the base optimizer: they ask whether it has stepped before them.
        self._inner.base._opt_called = True  # type: ignore[attr-defined]
        # A lifted step is out of K as far as its product is exact: in bfloat16 or TF32 it leaks.
        with full_precision():
            self._inner.check_options(self.param_groups)
            self._follow_conversions()
            self._intake.check_dense()
            self._intake.say_missed()
            if not self._unscaled():
                return result
            self._intake.reduce(merge=self._stepper.sums)
            gathered = self._stepper.gather(self._intake)
            if not self._finite(gathered):
                return result
            self._intake.held.forget_stacks()
            try:
                self._measured = self._stepper.take(self.param_groups, gathered, self._intake)
                self._known.see(self._measured)
            finally:
                self._intake.clear()
        return result

    def clip_grad_norm_(self, max_norm: float) -> dict[str, Tensor]:
        """Scale each task's captured gradient, between backward and step, to a norm of at most ``max_norm``.

        The norm is that of G_k over all parameters; of layers whose task accumulated several backward passes, and of
        those whose whole gradient never existed (fused capture), of the part in the shared subspace.
        Since the shares w_k sum to 1, the shared gradient's norm is bounded as well. Gradients outside any task are in
        ``p.grad``, for ``torch.nn.utils.clip_grad_norm_``; that function does not see captured ones. With a
        `GradScaler`, call ``scaler.unscale_(optimizer)`` first, as always.

        Args:
            max_norm: the bound, in the gradient's units, positive.

        Returns:
            task -> the norm before (0-dim).

        Raises:
            ValueError: ``max_norm`` is not positive.
        """
        check_kind("max_norm", max_norm, SupportsFloat, "a positive number")
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm!r} must be positive")
        self._intake.check_closed("clip_grad_norm_()")
        with full_precision():
            self._intake.settle()
            self._intake.reduce(merge=False)
            names = {**dict(enumerate(self.tasks)), MIXED: "shared"}
            norms = self._intake.clip(max_norm)
            return {names[task]: norm for task, norm in norms.items()}

    def reduce(self) -> None:
        """Sum what was captured over the ranks now, rather than in `step`; a collective call, once a step.

        `step`, `clip_grad_norm_` and a `GradScaler` that unscales do it themselves.

        Raises:
            RuntimeError: the ranks start from different weights.
        """
        with full_precision():
            self._intake.settle()
            self._intake.reduce(merge=False)  # clipping may follow, and is by task

    @torch.no_grad()
    def unscale_(self, scale: float | Tensor) -> None:
        """Divide what was captured by the scale of the loss, after the last backward pass of the step.

        For loops that scale losses themselves: a ``torch.amp.GradScaler`` finds and divides captured gradients as it
        does those in ``p.grad``. The latter are not touched here. Waits for nothing; every rank has to call it with
        the same scale.

        Args:
            scale: what every loss was multiplied by before ``backward()``, a number or a tensor with one entry.

        Raises:
            ValueError: ``scale`` is not positive and finite, or has several entries.
            RuntimeError: it was divided already, or clipped, or a task is open.

        Example:
            >>> import torch
            >>> from gradsub import GemsOptimizer
            >>> layer = torch.nn.Linear(8, 8)
            >>> optimizer = GemsOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), tasks=("a",), rank=4)
            >>> with optimizer.task("a"):
            ...     (layer(torch.ones(2, 8)).square().mean() * 1024).backward()
            >>> optimizer.unscale_(1024)
            >>> norms = optimizer.clip_grad_norm_(1.0)
            >>> optimizer.step()
        """
        check_kind("scale", scale, SupportsFloat, "a positive number, or a tensor with one entry")
        fits = scale.numel() == 1 if isinstance(scale, Tensor) else 0 < scale < math.inf
        if not fits:
            raise ValueError(f"scale={scale!r} must be a positive number, or a tensor with one entry")
        self._intake.check_closed("unscale_()")
        self._intake.forget_skipped()
        if self._intake.unscaled:
            raise RuntimeError("unscale_ on gradients that were divided by the scale of the loss already: leave it out")
        tensor = scale.detach() if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64, device="cpu")
        self._intake.unscale(tensor.reshape(()))

    def _unscaled(self) -> bool:
        """Divide by what torch's protocol for loss scaling has put up here; whether the step may go on."""
        self._intake.settle()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            self._intake.unscale(scale.detach().reshape(()))
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad /= scale.to(parameter.grad.device)
        if self._intake.held and not self._intake.unscaled and scaler_stepping(sys._getframe(1)):
            raise RuntimeError(
                "a GradScaler takes the step of gradients that it has not divided by the loss scale: they were "
                "captured after it did (in a closure), or it does not look for gradients in optimizer.param_groups; "
                "call optimizer.unscale_(scaler.get_scale()) after the last backward pass"
            )
        if found_inf is not None and self._exchange.anywhere(found_inf):
            self._intake.clear()
            return False
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``p.grad`` and whatever was captured and not stepped.

        Inside of `task` it drops what the block has captured so far, with its samples. ``model.zero_grad()`` clears
        ``p.grad`` alone: what was captured stays.
        """
        self._intake.clear()
        self._intake.capture.zero_set_aside(set_to_none)
        super().zero_grad(set_to_none)

    def _finite(self, gathered: Sequence[Gathered]) -> bool:
        """Whether the step may go on."""
        if self._nonfinite == "ignore":
            return True
        outside = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        found = self._intake.find_nonfinite(self.tasks, gathered, self._blocks.plain, outside)
        if found is None:
            return True
        if self._nonfinite == "raise":
            raise NonFiniteError(
                f"{found} is NaN or Inf; weights and state are unchanged: call optimizer.zero_grad(), which clears "
                "what was captured (model.zero_grad() does not), and go on with the next batch"
            )
        if not self._skipped:
            warnings.warn(f"{found} is NaN or Inf: the step is skipped, as later ones will be", stacklevel=2)
        self._skipped += 1
        self._intake.clear()
        return False

    # --- groups and state --------------------------------------------------------------------------------------------

    @_ordinary_tensors()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters during training, with the base optimizer's options and this class's own."""
        super().add_param_group(param_group)
        if "_inner" not in self.__dict__:
            return  # called by torch's constructor: the groups are adopted together once everything is there
        position, count = len(self.param_groups) - 1, self._layout.count
        try:
            found = self._lay_out(self._inner.base, self._inner.probes, position)
            self._said.check()
        except Exception:
            self.param_groups.pop()
            self._layout.count = count  # which seeds what is random in a layer
            raise
        self._adopt(position, *found)

    def _lay_out(self, base: Optimizer, probes: Probes, position: int) -> tuple[list[Layer], Traits]:
        return lay_out(self.param_groups[position], position, self._layout, base, probes, self.defaults["lr_scale"])

    def _adopt(self, position: int, layers: list[Layer], traits: Traits) -> None:
        group = self.param_groups[position]
        fused = {
            p: found for p in (layer.parameter for layer in layers) if (found := self._layout.fused(p)) is not None
        }
        if layers:
            self._stepper.say_kept(traits.unknown)
        proxies = self._blocks.adopt(position, layers, fused, traits)
        plain = [parameter for parameter in group["params"] if parameter not in self._blocks.layers]
        self._blocks.hold(plain)
        self._inner.add_group(settings.base_options(group), traits, plain, proxies)
        self._intake.capture.watch(group["params"], layers)
        for layer in layers:
            if layer.parameter in fused:
                self._intake.fused.adopt(layer, *fused[layer.parameter])
        self._blocks.show()
        self._adopted.add(group)

    @torch.no_grad()
    def _follow_conversions(self) -> None:
        """Follow a model that was converted or moved since (``model.to(...)``), before or after the first step.

        Raises:
            RuntimeError: gradients were captured before it, or a parameter has another shape.
        """
        changed = self._adopted.converted()
        if not changed:
            return
        for parameter, (_, _, shape, _) in changed.items():
            if parameter.shape != shape:
                self._check_nothing_kept(parameter, shape)
        self._intake.forget_skipped()
        if self._intake.held:
            first, (dtype, device, *_) = next(iter(changed.items()))
            raise RuntimeError(
                f"{self._layout.name(first)} is {first.dtype} on {first.device} now, it was {dtype} on {device} when "
                "gradients were captured: convert the model between step() and the next backward pass, or call "
                "zero_grad()"
            )
        for parameter in changed:
            self._layout.check_dtype(parameter)
        counts_there = [group for group in self.param_groups if group.get("fused") or group.get("capturable")]
        self._blocks.convert(changed, {parameter for group in counts_there for parameter in group["params"]})
        for parameter in changed:
            self._adopted.follow(parameter)
            layer = self._blocks.layers.get(parameter)
            if layer is not None:
                self._intake.fused.convert(layer)
        self._bank.forget_directions()

    def _check_nothing_kept(self, parameter: Tensor, before: torch.Size) -> None:
        """Raise a RuntimeError if bases or the base optimizer's state are of the shape that a parameter had before."""
        state = self.state.get(parameter, {}).values()
        kept = any(isinstance(each, Tensor) and each.numel() > 1 for each in state)
        if kept or parameter in self._blocks.layers or self._layout.guard.knows(parameter):
            raise RuntimeError(
                f"{self._layout.name(parameter)} has the shape {tuple(parameter.shape)} now, it had {tuple(before)} "
                "when the optimizer was built, and bases and state are of that: resize the model "
                "(resize_token_embeddings) before the optimizer is built, or call optimizer.close() and build a new one"
            )

    @_ordinary_tensors()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` as if never interrupted.

        Hooks see what they see in torch, and what they return is loaded. Every tensor takes the dtype, the device and
        the memory format that it has here, numbers become tensors where tensors belong, and options that the groups
        lack stay as they are here.

        Raises:
            ValueError: the checkpoint comes from other tasks, ranks, shapes or parameters, or is damaged (NaN, missing
                or unknown keys, counts and bases that cannot be); nothing was loaded.
            RuntimeError: gradients were captured and not stepped: step or ``zero_grad()`` first.
        """
        self._intake.forget_skipped()
        if self._intake.held:
            raise RuntimeError("load_state_dict between backward and step: call step() or zero_grad() first")
        self._follow_conversions()
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)  # hooks may put other entries into it, as into torch's own copy
        for before in list(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        with torch.no_grad():
            reader = StateDictReader(
                self.param_groups,
                self.state,
                self._blocks,
                self._layout,
                self._bank,
                self._inner,
                self._stepper.moments == "reset",
            )
            loaded = reader.read(state_dict)
            self._weighing.load(loaded.weighing)
            # Nothing can be refused any more.
            self._intake.clear()
            self._known = LastKnown()  # of other gradients
            self.__setstate__({"state": defaultdict(dict, loaded.state), "param_groups": loaded.groups})
            self._settle()
            for after in list(self._optimizer_load_state_dict_post_hooks.values()):
                after(self)
                self._settle()  # it may have put other tensors into the state
        self._show_callables()

    def _settle(self) -> None:
        """Everybody goes on from what is in the state."""
        self._follow_state()
        self._blocks.take_over()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, as plain tensors and numbers.

        Raises:
            RuntimeError: gradients were captured and not stepped; they are in no checkpoint.
        """
        self._intake.forget_skipped()
        if self._intake.held:
            raise RuntimeError(
                "state_dict between backward and step would lose gradients: call step() or zero_grad() first"
            )
        self._show_callables()
        return show_shards(super().state_dict(), self.param_groups, self._blocks.layers)

    def _show_callables(self) -> None:
        """Put the state of surgery and gate where checkpoints find it: beside that of one layer."""
        holder = next((layer.parameter for layer in self._blocks.layers.values()), None)
        if holder is not None:
            self.state[holder].update(self._weighing.state())

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only defaults, state and groups; a copy or a pickle of a wrapper needs what it wraps as well.
        mine = {key: value for key, value in self.__dict__.items() if key in _OWN_ATTRIBUTES}
        state = self._blocks.unshown() if "_blocks" in mine else self.state
        return {**super().__getstate__(), "state": state, **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_state()
        if "_intake" in state:
            self._blocks.show(anew=True)
            self._intake.capture.hook()
            self._intake.fused.reinstall()

    def _follow_state(self) -> None:
        """Everybody follows to the state and the groups that torch has put in the place of the old ones."""
        self._blocks.state = self.state
        put_before(self._inner.base, self)

    # --- diagnostics -------------------------------------------------------------------------------------------------

    def report(self, *, angles: bool = True, leak: bool = False) -> Report:
        """What the last step did in every layer; computed when asked for, and waits for the device.

        Args:
            angles: whether the angles between the subspaces are computed, by decompositions of each basis and of an
                r x r matrix for each layer and pair of subspaces.
            leak: whether it is measured how much of the bases lies in what is protected; the protected directions come
                to the device for it, layer by layer.

        Returns:
            the report; without layers before the first step.

        Example:
            >>> import torch
            >>> from gradsub import GemsOptimizer
            >>> layer = torch.nn.Linear(8, 8, bias=False)
            >>> optimizer = GemsOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), tasks=("a", "b"), rank=4)
            >>> for name in optimizer.tasks:
            ...     with optimizer.task(name):
            ...         layer(torch.ones(2, 8)).square().mean().backward()
            >>> optimizer.step()
            >>> report = optimizer.report()
            >>> round(report.cosine("a", "b"), 4), sorted(report.scalars())[:3]
            (1.0, ['cosine/a|b', 'energy/a', 'energy/b'])
        """
        if self._measured is None:
            return Report([])
        with full_precision():
            return make_report(self.tasks, self._measured, self._known, angles, leak)

    def summary(self) -> Summary:
        """What is trained how, before training and at any time: subspaces and ranks, protection, memory, and what is
        not decomposed or not protected, and why.

        Bytes are those of the state that is there; some base optimizers have theirs from their first step on.

        Example:
            >>> import torch
            >>> from gradsub import GemsOptimizer
            >>> model = torch.nn.Linear(16, 8)
            >>> optimizer = GemsOptimizer(torch.optim.AdamW(model.parameters()), tasks=("a",), rank=4, model=model)
            >>> summary = optimizer.summary()
            >>> [(layer.ranks, layer.state) for layer in summary.layers]
            [((4, 2), 808)]
            >>> summary.not_decomposed
            {'bias': 'it is a vector'}
        """
        return summarise(self.tasks, self._layout, self._said, self.param_groups, self._blocks.layers, self.state)

    def close(self) -> None:
        """Give parameters and modules back: no hook of this optimizer stays on them, no forward pass of its own."""
        self._intake.fused.remove()
        self._intake.capture.remove()


_OWN_ATTRIBUTES = frozenset(
    {
        "tasks",
        "_nonfinite",
        "_layout",
        "_said",
        "_exchange",
        "_intake",
        "_skipped",
        "_measured",
        "_known",
        "_bank",
        "_blocks",
        "_stepper",
        "_inner",
        "_weighing",
        "_adopted",
    }
)
