"""`GemsOptimizer`: per-task gradients in, one protected low-rank update out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub import _settings as settings
from gradsub._finite import NonFiniteError
from gradsub._intake import Intake
from gradsub._layout import Layout
from gradsub._state import check_compatible, restore, show_shards, take_shards
from gradsub._step import Stepper
from gradsub.capture import MIXED, MixedRows, Part
from gradsub.distributed import Exchange
from gradsub.gates import Gate, resolve_gate
from gradsub.inner import Inner, check_elementwise, check_wrappable
from gradsub.layers import ALL_LINEAR
from gradsub.null_space import NullSpace
from gradsub.report import Measurements, Report, make_report
from gradsub.subspace import Layer, SubspaceBank

__all__ = ["GemsOptimizer", "NonFiniteError"]


class GemsOptimizer(Optimizer):
    r"""Runs any optimizer inside shared and task-specific low-rank subspaces, within a protected null space.

    For a weight W (m x n), tasks k = 1..K with gradients G_k and w_k the task's share of the samples,
    G_sh = sum_k w_k G_k. Every ``update_proj_gap`` steps the leading singular vectors of (I - K K^T) G_sh and of each
    (I - K K^T) G_k become the bases B_sh and B_k, where K are the protected directions of the layer. In between, the
    base optimizer runs on the projected gradients, and its steps d are lifted:

        side="input":   R = G B (m x r),    dW = scale (d_sh B_sh^T + sum_k g_k d_k B_k^T)
        side="output":  R = B^T G (r x n),  dW = scale (B_sh d_sh + sum_k g_k B_k d_k)

    with gates g_k that are positive and sum to 1. Since every basis is orthogonal to K, so is every update, whatever
    the base optimizer does; decoupled weight decay is projected likewise. The wrapper takes ``base`` over: from then on
    its ``param_groups`` are the ones to change, and ``base`` is not to be stepped.

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
        side: ``"input"``: bases span input directions, and protected inputs give the same output as before;
            ``"output"``: bases span output directions, as published.
        orthogonalize: ``"none"``: bases are independent; ``"shared_first"``: task bases are orthogonal to the shared
            one (that of a task whose gradient is absent or zero when that one changes: from its next gradient on).
        gate: ``"heuristic"``, ``"uniform"``, ``"hypergradient"``, or a callable from `GateInputs` to gates (L, K).
        null_space: the protected directions; None protects nothing.
        model: names the layers. With it exactly the targeted linear layers are decomposed; without it every floating
            parameter with min(m, n) > rank, where one with more than two dimensions counts as the matrix
            ``out x (in * kernel)``. All other parameters take the plain inner step on G_sh, of which a vector that
            ``null_space`` knows (`NullSpace.collect_gradients`) keeps the part in its null space.
        target_modules: which layers of ``model``, by peft's convention: ``"all-linear"``, a regular expression, or
            names.
        seed: of the random test matrices; torch's global generator is never used.
        surgery: how conflicting tasks share the common subspace: ``"sum"``, ``"pcgrad"``, or any other of
            `gradsub.surgery`, or a callable from the K x K Gramian of the weighted task gradients, projected on the
            shared subspaces and summed over the layers, to K weights (any TorchJD ``Weighting``).
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
            steps, after which the basis changes; layers take turns. ``"auto"``: sketches for layers with more than
            65,536 entries that are captured by their own backward pass, as far as their rank is so small that a sketch
            costs less than the whole gradient, and for all sharded ones; else decompositions, all in the same step.
        process_group: the ranks that train this model on different data: a process group, a one-dimensional
            ``DeviceMesh``, or None: the default group once torch.distributed is initialised (a group of one rank turns
            communication off). Every rank has to step; what was captured is then summed in one flat bucket, and a
            task's gradient is that of all ranks' samples: G_k = sum_r (n_k^r / N_k) G_k^r for ``samples=n_k^r``. Give
            ``model`` with its ``DistributedDataParallel`` around it, and that sends no gradients inside of `task`.

    A parameter group may carry its own ``rank``, ``task_rank``, ``update_proj_gap``, ``scale``, and ``subspace=False``
    to keep its matrices whole.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: an argument is out of range; ``base`` has state, re-evaluates its closure or uses a trust ratio; a
            parameter is complex; ``null_space`` does not fit the layers or the side; a weight is sharded otherwise than
            by rows, or ``base`` looks at whole matrices where each rank has some rows.

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

    # A fused base optimizer announces that it unscales gradients itself; it never sees the ones captured here.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        base: Optimizer,
        *,
        tasks: Iterable[str] = ("search", "rec"),
        rank: int = 128,
        task_rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        side: str = "input",
        orthogonalize: str = "none",
        gate: str | Gate = "heuristic",
        null_space: NullSpace | None = None,
        model: nn.Module | None = None,
        target_modules: str | Iterable[str] = ALL_LINEAR,
        seed: int = 0,
        surgery: str | Callable[[Tensor], Tensor] = "sum",
        moments: str = "rotate",
        nonfinite: str = "raise",
        master_weights: bool = False,
        capture: str = "auto",
        refresh: str = "auto",
        process_group: Any = None,
    ) -> None:
        check_wrappable(base)
        settings.check_arguments(side, orthogonalize, moments, nonfinite, capture, refresh)
        self.tasks = settings.check_tasks(tasks)
        own = {
            "tasks": self.tasks,
            "side": side,
            "subspace": True,
            "rank": rank,
            "task_rank": task_rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
        }
        settings.check_group(own)
        clash = sorted(own.keys() & base.defaults.keys())
        if clash:
            raise ValueError(f"base={type(base).__name__} has options {clash} that would be taken for GemsOptimizer's")
        self._nonfinite = nonfinite
        self._layout = Layout(
            side, len(self.tasks), null_space, model, target_modules, master_weights, capture, refresh
        )
        self._stepper = Stepper(
            self.tasks,
            self._layout,
            resolve_gate(gate),
            None if surgery == "sum" else _surgery(surgery),
            moments,
            master_weights,
        )
        self._skipped = 0
        self._measured: Measurements | None = None
        self._exchange = Exchange(process_group, model, len(self.tasks), self._layout.name)
        super().__init__([dict(group) for group in base.param_groups], {**base.defaults, **own})
        self._bank = SubspaceBank(orthogonalize, seed)
        self._intake = Intake(self._bank, self._exchange, self._layout.name)
        found = [self._lay_out(base, group, position) for position, group in enumerate(self.param_groups)]
        self._layout.check_names()
        # Nothing can be refused any more: only now is the base optimizer taken over.
        self._inner = Inner(base)
        self._stepper.attach(self.state)
        self._stepper.connect(self._bank, self._inner)
        self._exchange.connect(self._bank, self._stepper.layers, self._intake.capture.watched)
        for position, layers in enumerate(found):
            self._adopt(position, layers)

    # --- gradients in ------------------------------------------------------------------------------------------------

    @contextmanager
    def task(self, name: str, samples: float = 1, loss: Tensor | None = None) -> Iterator[None]:
        """Every ``backward()`` in here belongs to the task; may be entered several times a step, gradients add up.

        Args:
            name: one of ``tasks``.
            samples: how many samples the backward passes in here stand for; a task's share w_k of all samples weighs
                it in the shared gradient. When accumulating, pass each part's own number.
            loss: the loss, for the gate, where it is not a scalar on which ``backward()`` itself is called.

        Raises:
            ValueError: the task was never declared, or ``samples`` is not positive.
            RuntimeError: another task is open.
        """
        index = self._task_index(name)
        samples = settings.check_samples(samples, name)
        with self._intake.open([Part(index)], {index: samples}, f"task({name!r})"):
            if loss is not None:
                self._intake.saw_loss(index, loss)
            with self._intake.watch(index if loss is None else None):
                yield

    @contextmanager
    def mixed(
        self, task_ids: Sequence[str | int] | Tensor, samples: Mapping[str, float] | None = None
    ) -> Iterator[MixedRows]:
        """One forward and one backward pass for a batch whose rows belong to several tasks.

        Equal to a pass for each task within rounding: the layers of ``model`` tell the rows apart in their backward
        pass. It needs the fused capture and batches whose first axis is that of the rows. Inside, either call
        ``backward()`` on the mean over all rows, or on ``rows.loss(losses)`` of the losses of the rows, which also
        tells the gate each task's loss. Parameters without subspaces take the gradient of that one loss, whatever
        ``surgery`` says.

        Args:
            task_ids: (B,) the task of each row: names, indices, or a tensor of indices (on the CPU, where reading it
                does not wait for the device).
            samples: task -> what it counts in the shared gradient, if not its number of rows; the loss must weigh the
                tasks likewise, as a mean over tokens does with numbers of tokens.

        Yields:
            the rows, with ``rows.loss``.

        Raises:
            ValueError: no layer is captured by its forward pass; ``task_ids`` or ``samples`` do not fit the tasks.
            RuntimeError: another block is open; a layer's input has another number of rows, or a decomposed weight's
                gradient comes from elsewhere.
        """
        if not self._intake.fused:
            raise ValueError(
                'mixed(...) needs model= and layers large enough for the fused capture, or capture="fused", so that '
                "the layers can tell the rows apart: pass them, or use task() for each task"
            )
        rows = MixedRows(self.tasks, task_ids, samples, self._intake.saw_loss)
        counts = {task: settings.check_samples(count, self.tasks[task]) for task, count in rows.samples.items()}
        parts = rows.parts(self._intake.fused.device)
        with self._intake.open(parts, counts, "mixed(...)"), self._intake.watch(None):
            yield rows

    def backward(
        self,
        losses: Mapping[str, Tensor],
        samples: Mapping[str, float] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """One backward pass a task, from losses that may share one forward pass.

        Args:
            losses: task -> its scalar loss.
            samples: task -> its number of samples; 1 each where missing.
            retain_graph: keep the graph after the last pass.

        Raises:
            ValueError: a task was never declared, or ``samples`` names a task without a loss.
        """
        samples = samples or {}
        for name in (*losses, *samples):
            self._task_index(name)
        unused = sorted(samples.keys() - losses.keys())
        if unused:
            raise ValueError(f"samples names {unused}, but losses has only {sorted(losses)}: pass their losses too")
        last = len(losses) - 1
        for position, (name, loss) in enumerate(losses.items()):
            with self.task(name, samples.get(name, 1), loss):
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
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._intake.check_dense(self._stepper.layers)
        self._intake.unscale()
        self._intake.reduce(merge=self._stepper.sums)
        if not self._finite():
            return result
        try:
            self._measured = self._stepper.take(
                self.param_groups,
                self._intake.gradients,
                self._intake.samples,
                self._intake.mixed_samples,
                self._intake.losses,
            )
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
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm!r} must be positive")
        with torch.no_grad():
            self._intake.unscale()
            self._intake.reduce(merge=False)
            names = {**dict(enumerate(self.tasks)), MIXED: "shared"}
            norms = self._intake.clip(max_norm, self._stepper.layers)
            return {names[task]: norm for task, norm in norms.items()}

    def reduce(self) -> None:
        """Sum what was captured over the ranks now, rather than in `step`; a collective call, once a step.

        `step` and `clip_grad_norm_` do it themselves. With a `GradScaler` call it after the last backward pass and
        before ``scaler.unscale_`` or ``scaler.step``, so that the scaler finds the same Inf on every rank.

        Raises:
            RuntimeError: the ranks start from different weights.
        """
        with torch.no_grad():
            self._intake.reduce(merge=False)  # clipping may follow, and is by task
        self._intake.announce()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``p.grad`` and whatever was captured and not stepped."""
        self._intake.clear()
        super().zero_grad(set_to_none)

    def _finite(self) -> bool:
        """Whether the step may go on."""
        if self._nonfinite == "ignore":
            return True
        outside = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        found = self._intake.find_nonfinite(self.tasks, outside)
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters during training, with the base optimizer's options and this class's own."""
        super().add_param_group(param_group)
        if "_inner" not in self.__dict__:
            return  # called by torch's constructor: the groups are adopted together once everything is there
        group = self.param_groups[-1]
        try:
            layers = self._lay_out(self._inner.base, group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._adopt(len(self.param_groups) - 1, layers)

    def _lay_out(self, base: Optimizer, group: dict[str, Any], position: int) -> list[Layer]:
        settings.check_group(group)
        layers = self._layout.add_group(group, position)
        for layer in layers:
            if layer.splits_coordinates:
                check_elementwise(base, layer.name)
        return layers

    def _adopt(self, position: int, layers: list[Layer]) -> None:
        group = self.param_groups[position]
        fused = {layer.parameter: self._layout.fused(layer.parameter) for layer in layers}
        fused = {parameter: found for parameter, found in fused.items() if found is not None}
        proxies = self._stepper.adopt(position, layers, fused)
        plain = [parameter for parameter in group["params"] if parameter not in self._stepper.layers]
        self._stepper.plain.extend(plain)
        for parameter in plain:
            self._stepper.vectors.protect(parameter, self._layout.vector(parameter))
        options = {key: value for key, value in group.items() if key not in settings.NOT_INNER}
        self._inner.add_group(options, plain, proxies)
        self._intake.capture.watch(group["params"], layers)
        for layer in layers:
            if (found := fused.get(layer.parameter)) is not None:
                self._intake.fused.adopt(layer, *found)
        self._stepper.show()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` as if never interrupted; every tensor keeps the dtype that it was saved with.

        Raises:
            ValueError: the checkpoint comes from other tasks, ranks, shapes or parameters; nothing was loaded.
            RuntimeError: gradients were captured and not stepped: step or ``zero_grad()`` first.
        """
        if self._intake.gradients:
            raise RuntimeError("load_state_dict between backward and step: call step() or zero_grad() first")
        state_dict = take_shards(state_dict, self.param_groups, self._stepper.layers)
        check_compatible(state_dict, self.param_groups, self.state, self._stepper.layers)
        earlier = self.state
        super().load_state_dict(state_dict)
        self._attach()
        restore(state_dict, self.param_groups, self.state, earlier)
        self._stepper.take_over()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, as plain tensors and numbers.

        Raises:
            RuntimeError: gradients were captured and not stepped; they are in no checkpoint.
        """
        if "_intake" in self.__dict__ and self._intake.gradients:
            raise RuntimeError(
                "state_dict between backward and step would lose gradients: call step() or zero_grad() first"
            )
        saved = super().state_dict()
        layers = self._stepper.layers if "_stepper" in self.__dict__ else {}
        return show_shards(saved, self.param_groups, layers)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only defaults, state and groups; a copy or a pickle of a wrapper needs what it wraps as well.
        mine = {key: value for key, value in self.__dict__.items() if key in _OWN_ATTRIBUTES}
        state = self._stepper.unshown() if "_stepper" in mine else self.state
        return {**super().__getstate__(), "state": state, **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_stepper" in self.__dict__:
            self._attach()
        if "_intake" in state:
            self._stepper.show(anew=True)
            self._intake.capture.hook()
            self._intake.fused.reinstall()

    def _attach(self) -> None:
        """Everybody follows to the state that torch has put in the place of the old one."""
        self._stepper.attach(self.state)

    # --- diagnostics -------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What the last step did in every layer; computed when asked for, and waits for the device."""
        if self._measured is None:
            return Report([])
        steps = [int(self.state[layer.parameter]["step"]) for layer in self._measured.layers]
        return make_report(self._bank, self.tasks, steps, self._measured)

    def close(self) -> None:
        """Give parameters and modules back: no hook of this optimizer stays on them, no forward pass of its own."""
        self._intake.fused.remove()
        self._intake.capture.remove()


def _surgery(surgery: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from gradsub.surgery import resolve_surgery

    return resolve_surgery(surgery)


_OWN_ATTRIBUTES = frozenset(
    {
        "tasks",
        "_nonfinite",
        "_layout",
        "_exchange",
        "_intake",
        "_skipped",
        "_measured",
        "_bank",
        "_stepper",
        "_inner",
    }
)
