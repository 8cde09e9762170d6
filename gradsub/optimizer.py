"""`GemsOptimizer`: per-task gradients in, one protected low-rank update out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub import _settings as settings
from gradsub._finite import NonFiniteError, find_nonfinite, largest_entry
from gradsub._layout import Layout
from gradsub._measure import GATE_MEMORY, PREVIOUS_STEP, measure, needs_alignment
from gradsub._state import check_compatible, hand_down, mirror, restore
from gradsub.capture import (
    GenericCapture,
    LossWatcher,
    Projected,
    ScaleWitness,
    clip_captured,
    gather,
    loss_scale,
    mix,
    scale_captured,
)
from gradsub.gates import Gate, resolve_gate
from gradsub.inner import Inner, check_wrappable, decays_decoupled, decoupled_shrinkage
from gradsub.layers import ALL_LINEAR
from gradsub.null_space import NullSpace
from gradsub.report import Measurements, Report, make_report
from gradsub.subspace import SHARED, Layer, SubspaceBank, carry_moments, project
from gradsub.update import PROTECTED, apply_update, hold_protected, initialise_update

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
        orthogonalize: ``"none"``: bases are independent; ``"shared_first"``: task bases are orthogonal to the shared.
        gate: ``"heuristic"``, ``"uniform"``, ``"hypergradient"``, or a callable from `GateInputs` to gates (L, K).
        null_space: the protected directions; None protects nothing.
        model: names the layers. With it exactly the targeted linear layers are decomposed; without it every floating
            parameter with min(m, n) > rank, where one with more than two dimensions counts as the matrix
            ``out x (in * kernel)``. All other parameters take the plain inner step on G_sh.
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

    A parameter group may carry its own ``rank``, ``task_rank``, ``update_proj_gap``, ``scale``, and ``subspace=False``
    to keep its matrices whole.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: an argument is out of range; ``base`` has state, re-evaluates its closure or uses a trust ratio; a
            parameter is complex; ``null_space`` does not fit the layers or the side.

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
    ) -> None:
        check_wrappable(base)
        settings.check_arguments(side, orthogonalize, moments, nonfinite)
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
        self._gate = resolve_gate(gate)
        self._surgery = None if surgery == "sum" else _surgery(surgery)
        self._moments = moments
        self._nonfinite = nonfinite
        self._master_weights = master_weights
        self._layout = Layout(side, len(self.tasks), null_space, model, target_modules, master_weights)
        self._layers: dict[Tensor, Layer] = {}
        self._proxies: dict[Tensor, dict[str, Tensor]] = {}
        self._losses: dict[int, Tensor] = {}
        self._samples: dict[int, float] = {}
        self._task_open = False
        self._scale: Tensor | None = None
        self._skipped = 0
        self._witness = ScaleWitness()
        self._measured: Measurements | None = None
        super().__init__([dict(group) for group in base.param_groups], {**base.defaults, **own})
        self._bank = SubspaceBank(self.state, orthogonalize, seed)
        self._capture = GenericCapture(self._bank, self._layout.name, self._witness.joined)
        found = [self._lay_out(group, position) for position, group in enumerate(self.param_groups)]
        self._layout.check_names()
        # Nothing can be refused any more: only now is the base optimizer taken over.
        self._inner = Inner(base)
        for group, layers in zip(self.param_groups, found, strict=True):
            self._adopt(group, layers)

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
        if self._task_open:
            raise RuntimeError(
                f"task({name!r}) inside another task: a backward pass belongs to one task, close it first"
            )
        if self._witness.lost():
            # The scaler skipped the step and only model.zero_grad() was called: what was captured is of that step.
            self._witness.withdraw(None)
            self._discard()
        self._task_open = True
        self._capture.open(index)
        try:
            if loss is not None:
                self._saw_loss(index, loss)
            with LossWatcher(partial(self._saw_loss, index) if loss is None else self._saw_scale):
                yield
        finally:
            if self._capture.close():
                self._samples[index] = self._samples.get(index, 0.0) + samples
                self._bear_witness(index)
            self._task_open = False

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

    def _saw_loss(self, index: int, loss: Tensor) -> None:
        self._saw_scale(loss)
        loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).sum()
        self._losses[index] = self._losses[index] + loss if index in self._losses else loss

    def _saw_scale(self, loss: Tensor) -> None:
        if self._scale is None:
            self._scale = loss_scale(loss)

    def _bear_witness(self, index: int) -> None:
        """Let a `GradScaler` know what was captured of the task, if its loss was scaled."""
        if self._scale is not None:
            held = self._capture.gradients[index]
            with torch.no_grad():
                largest = largest_entry([captured.tensors()[0] for captured in held.values()])
                self._witness.place(self._capture.watched, largest)

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
        self._check_dense()
        self._unscale()
        if not self._finite():
            return result
        try:
            self._take_step()
        finally:
            self._discard()
        return result

    def _take_step(self) -> None:
        shares = self._sample_shares()
        projected = self._project(shares)
        self._measured = measure(projected, self._losses, self._samples, len(self.tasks), self._gate, self.state)
        weights = self._operate(shares)
        gradients = self._inner_gradients(projected, weights)
        outside = self._mix_plain(weights)
        try:
            steps = self._inner.step(self.param_groups, gradients, self._starts(projected))
        finally:
            for parameter, gradient in outside.items():
                parameter.grad = gradient
        self._update(projected, steps)
        self._show_inner_state()

    def clip_grad_norm_(self, max_norm: float) -> dict[str, Tensor]:
        """Scale each task's captured gradient, between backward and step, to a norm of at most ``max_norm``.

        The norm is that of G_k over all parameters; of layers whose task accumulated several backward passes, of the
        part in the shared subspace. Since the shares w_k sum to 1, the shared gradient's norm is bounded as well.
        Gradients outside any task are in ``p.grad``, for ``torch.nn.utils.clip_grad_norm_``; that function does not
        see captured ones. With a `GradScaler`, call ``scaler.unscale_(optimizer)`` first, as always.

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
            self._unscale()
            return {self.tasks[k]: clip_captured(held, max_norm) for k, held in self._capture.gradients.items()}

    def _unscale(self) -> None:
        """Divide captured gradients by the loss scale, if a `GradScaler` was at work."""
        factor = self._witness.withdraw(self._scale)
        if factor is not None:
            for held in self._capture.gradients.values():
                scale_captured(held, factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``p.grad`` and whatever was captured and not stepped."""
        self._witness.withdraw(None)
        super().zero_grad(set_to_none)
        self._discard()

    def _discard(self) -> None:
        self._capture.clear()
        self._losses.clear()
        self._samples.clear()
        self._scale = None

    def _sample_shares(self) -> dict[int, float]:
        """w_k: the tasks' shares of the samples."""
        total = sum(self._samples.values())
        return {task: samples / total for task, samples in self._samples.items()}

    def _check_dense(self) -> None:
        for parameter in self._layers:
            if parameter.grad is not None:
                self._capture.check_dense(parameter, parameter.grad)

    def _finite(self) -> bool:
        """Whether the step may go on."""
        if self._nonfinite == "ignore":
            return True
        outside = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        found = find_nonfinite(self._losses, self._capture.gradients, self.tasks, outside)
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
        self._discard()
        return False

    def _project(self, weights: Mapping[int, float]) -> dict[Layer, Projected]:
        """Refresh what is due and bring every layer's gradients into its subspaces."""
        projected = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                layer = self._layers.get(parameter)
                if layer is None:
                    continue
                captured = {
                    task: held[parameter] for task, held in sorted(self._capture.gradients.items()) if parameter in held
                }
                if not captured and parameter.grad is None:
                    continue
                if self._bank.due(layer, SHARED) and self._layout.outdated(layer):
                    self._protect(layer, self._layout.renewed(layer, layer.protected))
                projected[layer] = gather(
                    layer,
                    self._bank,
                    captured,
                    parameter.grad,
                    weights,
                    group["update_proj_gap"],
                    partial(self._carry, layer),
                )
        return projected

    def _protect(self, layer: Layer, protected: Tensor | None) -> None:
        """Take up protected directions; bases and what is kept of the weight follow."""
        layer.protected = None if protected is None else protected.to(layer.parameter.device)
        initialise_update(layer, self.state[layer.parameter], self._master_weights)
        self._bank.enforce(layer)

    def _carry(self, layer: Layer, subspace: int, old: Tensor, new: Tensor) -> None:
        proxy = self._proxy(layer, subspace)
        previous = self.state[layer.parameter].get(f"{PREVIOUS_STEP}{subspace - 1}")
        if previous is not None:
            carry_moments({"exp_avg": previous}, old, new, layer.axis)
        if self._moments == "rotate":
            carry_moments(self._inner.state_of(proxy), old, new, layer.axis)
        elif self._moments == "reset":
            self._inner.reset(proxy)

    def _operate(self, shares: dict[int, float]) -> Mapping[int, float | Tensor]:
        """Each task's weight in the shared gradient: its share of the samples, times what the surgery makes of it."""
        if self._surgery is None or self._measured is None or len(shares) < 2:
            return shares
        gramian = self._measured.gramian.sum(0)
        share = torch.tensor([shares.get(k, 0.0) for k in range(len(self.tasks))])
        share = share.to(gramian, non_blocking=True)
        weights = self._surgery(share[:, None] * gramian * share)
        return {task: share[task] * weights[task] for task in shares}

    def _inner_gradients(
        self, projected: Mapping[Layer, Projected], weights: Mapping[int, float | Tensor]
    ) -> dict[Tensor, Tensor]:
        """Every proxy's gradient; coupled (L2) weight decay joins the shared one, where the weight itself is known."""
        gradients: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            decay = group.get("weight_decay", 0.0)
            coupled = decay and not decays_decoupled(self._inner.base, group)
            for parameter in group["params"]:
                layer = self._layers.get(parameter)
                if layer is None or layer not in projected:
                    continue
                found = projected[layer]
                shared = mix(found.parts, weights, found.outside)
                if coupled:
                    sign = -1.0 if group.get("maximize") else 1.0
                    shared = shared + sign * decay * project(
                        layer.matrix(parameter), self._bank.basis(layer, SHARED), layer.axis
                    )
                gradients[self._proxy(layer, SHARED)] = shared
                gradients.update({self._proxy(layer, task + 1): R for task, R in found.own.items()})
        return gradients

    def _starts(self, projected: Mapping[Layer, Projected]) -> dict[Tensor, Tensor]:
        """The weights' coordinates, for a base optimizer whose step is relative to them."""
        if not self._inner.relative:
            return {}
        return {
            self._proxy(layer, subspace): project(
                layer.matrix(layer.parameter), self._bank.basis(layer, subspace), layer.axis
            )
            for layer in projected
            for subspace in range(len(layer.widths))
        }

    def _mix_plain(self, weights: Mapping[int, float | Tensor]) -> dict[Tensor, Tensor | None]:
        """Give plain parameters the shared gradient; what they, and decomposed ones, had in ``.grad``, to put back."""
        outside = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._layers:
                    continue
                outside[parameter] = parameter.grad
                full = {
                    task: gradient
                    for task, held in sorted(self._capture.gradients.items())
                    if parameter in held and (gradient := held[parameter].full) is not None
                }
                if full:
                    parameter.grad = mix(full, weights, parameter.grad)
        return outside

    def _update(self, projected: Mapping[Layer, Projected], steps: Mapping[Tensor, Tensor]) -> None:
        rows = {layer: row for row, layer in enumerate(projected)}
        gates = torch.empty(len(rows), 0) if self._measured is None else self._measured.gates
        for group in self.param_groups:
            shrink = decoupled_shrinkage(self._inner.base, group)
            for parameter in group["params"]:
                layer = self._layers.get(parameter)
                if layer is None or layer not in rows:
                    continue
                taken = {
                    subspace: steps[proxy]
                    for subspace, proxy in enumerate(self._proxies[parameter].values())
                    if proxy in steps
                }
                state = self.state[parameter]
                # At the first step as well: the model's weights may have been loaded after the optimizer was built.
                if projected[layer].refreshed or state["step"] == 0:
                    hold_protected(layer, state)
                apply_update(layer, self._bank, state, taken, gates[rows[layer]], group["scale"], shrink)
                self._bank.advance(layer)
                if needs_alignment(self._gate):
                    for subspace in taken.keys() - {SHARED}:
                        self.state[parameter][f"{PREVIOUS_STEP}{subspace - 1}"].copy_(taken[subspace])

    def _proxy(self, layer: Layer, subspace: int) -> Tensor:
        name = "shared" if subspace == SHARED else self.tasks[subspace - 1]
        return self._proxies[layer.parameter][f"{name}."]

    # --- groups and state --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters during training, with the base optimizer's options and this class's own."""
        super().add_param_group(param_group)
        if "_inner" not in self.__dict__:
            return  # called by torch's constructor: the groups are adopted together once everything is there
        group = self.param_groups[-1]
        try:
            layers = self._lay_out(group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._adopt(group, layers)

    def _lay_out(self, group: dict[str, Any], position: int) -> list[Layer]:
        settings.check_group(group)
        return self._layout.add_group(group, position)

    def _adopt(self, group: dict[str, Any], layers: list[Layer]) -> None:
        proxies: dict[Tensor, Tensor] = {}
        for layer in layers:
            self._layers[layer.parameter] = layer
            self._bank.initialise(layer)
            self._initialise_gate(layer)
            initialise_update(layer, self.state[layer.parameter], self._master_weights)
            mine: dict[str, Tensor] = {
                f"{name}.": Inner.proxy(layer.coordinates(subspace), layer.dtype, layer.parameter.device)
                for subspace, name in enumerate(("shared", *self.tasks))
            }
            self._proxies[layer.parameter] = mine
            proxies.update(dict.fromkeys(mine.values(), layer.parameter))
        plain = [parameter for parameter in group["params"] if parameter not in self._layers]
        self._proxies.update({parameter: {"": parameter} for parameter in plain})
        options = {key: value for key, value in group.items() if key not in settings.NOT_INNER}
        self._inner.add_group(options, plain, proxies)
        self._capture.watch(group["params"], layers)
        self._show_inner_state()

    def _initialise_gate(self, layer: Layer) -> None:
        weight = layer.parameter
        self.state[weight][GATE_MEMORY] = torch.zeros(len(self.tasks), dtype=layer.dtype, device=weight.device)
        if needs_alignment(self._gate):
            for task in range(len(self.tasks)):
                self.state[weight][f"{PREVIOUS_STEP}{task}"] = torch.zeros(
                    layer.coordinates(task + 1), dtype=layer.dtype, device=weight.device
                )

    def _show_inner_state(self) -> None:
        for parameter, proxies in self._proxies.items():
            mirror(self.state, parameter, self._inner, proxies)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` as if never interrupted; every tensor keeps the dtype that it was saved with.

        Raises:
            ValueError: the checkpoint comes from other tasks, ranks, shapes or parameters; nothing was loaded.
            RuntimeError: gradients were captured and not stepped: step or ``zero_grad()`` first.
        """
        if self._capture.gradients:
            raise RuntimeError("load_state_dict between backward and step: call step() or zero_grad() first")
        check_compatible(state_dict, self.param_groups, self.state, self._layers)
        earlier = self.state
        super().load_state_dict(state_dict)
        restore(state_dict, self.param_groups, self.state, earlier)
        for parameter, proxies in self._proxies.items():
            hand_down(self.state.get(parameter, {}), self._inner, proxies)
        for layer in self._layers.values():
            self._protect(layer, self._layout.renewed(layer, self.state[layer.parameter].get(PROTECTED)))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, as plain tensors and numbers.

        Raises:
            RuntimeError: gradients were captured and not stepped; they are in no checkpoint.
        """
        if self.__dict__.get("_capture") is not None and self._capture.gradients:
            raise RuntimeError(
                "state_dict between backward and step would lose gradients: call step() or zero_grad() first"
            )
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only defaults, state and groups; a copy or a pickle of a wrapper needs what it wraps as well.
        mine = {key: value for key, value in self.__dict__.items() if key in _OWN_ATTRIBUTES}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_bank" in self.__dict__:
            self._bank.attach(self.state)
        if "_capture" in state:
            self._capture.hook()

    # --- diagnostics -------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What the last step did in every layer; computed when asked for, and waits for the device."""
        if self._measured is None:
            return Report([])
        steps = [int(self.state[layer.parameter]["step"]) for layer in self._measured.layers]
        return make_report(self._bank, self.tasks, steps, self._measured)

    def close(self) -> None:
        """Give the parameters back: no hook of this optimizer stays on them."""
        self._capture.remove()


def _surgery(surgery: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from gradsub.surgery import resolve_surgery

    return resolve_surgery(surgery)


_OWN_ATTRIBUTES = frozenset(
    {
        "tasks",
        "_gate",
        "_moments",
        "_nonfinite",
        "_master_weights",
        "_layout",
        "_layers",
        "_proxies",
        "_losses",
        "_samples",
        "_task_open",
        "_scale",
        "_skipped",
        "_witness",
        "_surgery",
        "_measured",
        "_bank",
        "_capture",
        "_inner",
    }
)
