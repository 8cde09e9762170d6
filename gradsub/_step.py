"""One optimization step, from captured gradients to weights: each arrow of the architecture in its order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub._blocks import Block, make_blocks
from gradsub._layout import Layout
from gradsub._measure import GATE_MEMORY, measure, needs_alignment, previous_step
from gradsub._state import INNER, hand_down, is_weighing
from gradsub._vectors import ProtectedVectors
from gradsub.capture import MIXED, Captured, Projected, gather, mix
from gradsub.gates import Gate
from gradsub.inner import Inner, decoupled_shrinkage
from gradsub.report import Measurements
from gradsub.subspace import SHARED, Layer, SubspaceBank, carry_moments
from gradsub.update import MASTER, PROTECTED, apply_updates, hold_protected, initialise_update

State = MutableMapping[Tensor, Any]
Groups = Sequence[dict[str, Any]]


class Stepper:
    """Takes steps; it owns nothing but knows where everything is.

    Args:
        tasks: their names.
        layout: knows what is protected.
        gate: weighs the tasks' own steps.
        surgery: weighs the tasks in the shared subspace, from their Gramian; None leaves the plain sum.
        moments: what happens to the base optimizer's moments when a basis changes.
        master_weights: whether float32 copies of lower-precision weights are kept.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        layout: Layout,
        gate: Gate,
        surgery: Callable[[Tensor], Tensor] | None,
        moments: str,
        master_weights: bool,
    ) -> None:
        self._tasks = tasks
        self._layout = layout
        self._gate = gate
        self._surgery = surgery
        self.moments = moments
        self._master_weights = master_weights
        self.layers: dict[Tensor, Layer] = {}
        self.proxies: dict[Tensor, dict[str, Tensor]] = {}
        self.state: State = {}
        self.vectors = ProtectedVectors()

    @property
    def sums(self) -> bool:
        """Whether parameters without subspaces need only the weighted sum of the tasks' gradients."""
        return self._surgery is None

    def attach(self, state: State) -> None:
        """Tell where the optimizer's state is."""
        self.state = state
        self.vectors.attach(state)

    def connect(self, bank: SubspaceBank, inner: Inner) -> None:
        """Tell where the bases and the base optimizer are."""
        self._bank, self._inner = bank, inner

    def adopt(self, layer: Layer) -> dict[str, Tensor]:
        """Prepare a layer's state; its proxies for the base optimizer, by prefix of their state."""
        self.layers[layer.parameter] = layer
        state = self.state[layer.parameter]
        self._bank.initialise(layer)
        state[GATE_MEMORY] = torch.zeros(len(self._tasks), dtype=layer.dtype, device=layer.parameter.device)
        if needs_alignment(self._gate):
            for task in range(len(self._tasks)):
                state[previous_step(task)] = torch.zeros(
                    layer.coordinates(task + 1), dtype=layer.dtype, device=layer.parameter.device
                )
        initialise_update(layer, state, self._master_weights)
        self.proxies[layer.parameter] = {
            f"{name}.": Inner.proxy(layer.coordinates(subspace), layer.dtype, layer.parameter.device)
            for subspace, name in enumerate(("shared", *self._tasks))
        }
        return self.proxies[layer.parameter]

    def convert(self, parameter: Tensor, on_device: bool) -> None:
        """Bring the state of a parameter to the dtype, device and memory format that it has by now.

        Args:
            parameter: the parameter.
            on_device: whether its base optimizer keeps counts on the device.
        """
        layer, state = self.layers.get(parameter), self.state[parameter]
        dtype = parameter.dtype if layer is None else layer.dtype
        for key, value in list(state.items()):
            if not isinstance(value, Tensor) or is_weighing(key):
                continue
            if value.ndim == 0 or not value.is_floating_point():
                moves = value.device.type != "cpu" or (on_device and key.startswith(INNER))
                state[key] = value.to(parameter.device) if moves else value
            elif value.shape == parameter.shape:
                # Moments lie in memory like their parameter: fused optimizers read both side by side.
                state[key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(value)
            else:
                wide = torch.promote_types(dtype, torch.float32) if key == PROTECTED else dtype
                state[key] = value.to(parameter.device, wide)
        for proxy in self.proxies[parameter].values():
            if proxy is not parameter:
                proxy.data = proxy.data.to(parameter.device, dtype)
        hand_down(state, self._inner, self.proxies[parameter])
        if layer is not None:
            layer.protected = state.get(PROTECTED)
            if parameter.dtype == layer.dtype:
                state.pop(MASTER, None)
            initialise_update(layer, state, self._master_weights)

    def take(
        self,
        groups: Groups,
        gradients: Mapping[int, Mapping[Tensor, Captured]],
        samples: Mapping[int, float],
        mixed: float,
        losses: Mapping[int, Tensor],
        rounding: float,
    ) -> Measurements | None:
        """Take a step.

        Args:
            groups: the optimizer's parameter groups.
            gradients: by task, what was captured; it is used up.
            samples: by task.
            mixed: how many of all samples were rows of mixed batches.
            losses: by task, where a loss was seen.
            rounding: epsilon of the coarsest format in which a gradient was computed.

        Returns:
            what a report is made from.
        """
        total = sum(samples.values())
        shares = {task: count / total for task, count in samples.items()}
        projected = self._project(groups, gradients, shares)
        sketches = {layer: found.sketches for layer, found in projected.items() if found.sketches}
        positions = {
            self.layers[p]: position
            for position, group in enumerate(groups)
            for p in group["params"]
            if p in self.layers
        }
        held = {layer for layer in projected if self._bank.at_place(layer, groups[positions[layer]]["update_proj_gap"])}
        blocks = make_blocks(projected, positions, rounding)
        measured = measure(blocks, losses, samples, len(self._tasks), self._gate, self.state)
        weights = self._operate(shares, measured)
        steps = self._inner_step(groups, gradients, blocks, {**weights, MIXED: mixed / total if total else 0.0})
        self._update(groups, blocks, steps, held, measured)
        self._renew(sketches, {layer: groups[positions[layer]]["update_proj_gap"] for layer in sketches})
        for block in blocks:
            self._bank.advance(block.layers)
        return measured

    def _project(
        self, groups: Groups, gradients: Mapping[int, Mapping[Tensor, Captured]], shares: Mapping[int, float]
    ) -> dict[Layer, Projected]:
        """Refresh what is due and bring every layer's gradients into its subspaces."""
        projected = {}
        for group in groups:
            for parameter in group["params"]:
                layer = self.layers.get(parameter)
                if layer is None:
                    continue
                captured = {task: held[parameter] for task, held in sorted(gradients.items()) if parameter in held}
                if not captured and parameter.grad is None:
                    continue
                if not layer.sketched and self._bank.due(layer, SHARED):
                    self._follow(layer)
                projected[layer] = gather(
                    layer, self._bank, captured, parameter.grad, shares, group["update_proj_gap"], self._carry
                )
        return projected

    def _follow(self, layer: Layer) -> None:
        """Take up what the null space has come to know of a layer since."""
        if self._layout.outdated(layer.parameter):
            protected = self._layout.renewed(layer.parameter, layer.protected)
            if protected is not layer.protected:
                self.protect(layer, protected)

    def protect(self, layer: Layer, protected: Tensor | None) -> None:
        """Take up protected directions; bases and what is kept of the weight follow."""
        layer.protected = None if protected is None else protected.to(layer.parameter.device)
        initialise_update(layer, self.state[layer.parameter], self._master_weights)
        self._bank.enforce(layer)

    def restore_protection(self) -> None:
        """After loading: protect what the checkpoint did; what the null space knows beyond it is taken up when it would
        have been, had the run never stopped: at the next refresh. A checkpoint that protected nothing has the null
        space obeyed from now on.
        """
        for parameter in self.proxies:
            kept = self.state.get(parameter, {}).get(PROTECTED)
            layer = self.layers.get(parameter)
            if layer is not None:
                self._bank.follow_refresh(layer)
            if kept is not None:
                self._layout.reconsider(parameter)
            if layer is None:
                known = self._layout.vector(parameter) if kept is None else kept
                self.vectors.protect(parameter, known)
            elif kept is None:
                self.protect(layer, self._layout.renewed(parameter, None, layer.protected))
            else:
                layer.protected = kept

    def _carry(self, layer: Layer, subspace: int, old: Tensor, new: Tensor) -> None:
        proxy = self._proxy(layer, subspace)
        previous = self.state[layer.parameter].get(previous_step(subspace - 1))
        if previous is not None:
            carry_moments({"exp_avg": previous}, old, new, layer.axis)
        if self.moments == "rotate":
            carry_moments(self._inner.state_of(proxy), old, new, layer.axis)
        elif self.moments == "reset":
            gone = self._inner.state_of(proxy).keys()
            self._inner.reset(proxy)
            name = next(name for name, other in self.proxies[layer.parameter].items() if other is proxy)
            for key in gone - self._inner.state_of(proxy).keys():
                # A checkpoint taken before the next step would bring it back.
                self.state[layer.parameter].pop(f"{INNER}{name}{key}", None)

    def _operate(self, shares: Mapping[int, float], measured: Measurements | None) -> Mapping[int, float | Tensor]:
        """Each task's weight in the shared gradient: its share of the samples, times what the surgery makes of it."""
        if self._surgery is None or measured is None or len(shares) < 2:
            return shares
        gramian = measured.gramian.sum(0)
        share = torch.tensor(
            [shares.get(k, 0.0) for k in range(len(self._tasks))], dtype=gramian.dtype, device="cpu"
        ).to(gramian.device, non_blocking=True)
        weights = self._surgery(share[:, None] * gramian * share)
        return {task: share[task] * weights[task] for task in shares}

    def _inner_step(
        self,
        groups: Groups,
        gradients: Mapping[int, Mapping[Tensor, Captured]],
        blocks: Sequence[Block],
        weights: Mapping[int, float | Tensor],
    ) -> dict[Tensor, Tensor]:
        """d of every proxy; plain parameters are stepped on the way, with the shared gradient."""
        proxied: dict[Tensor, Tensor] = {}
        for block in blocks:
            shared = self._with_coupled_decay(block, groups[block.group], block.shared(weights))
            for subspace, stacked in {SHARED: shared, **{task + 1: R for task, R in block.own.items()}}.items():
                proxies = [self._proxy(layer, subspace) for layer in block.layers]
                proxied.update(zip(proxies, stacked.unbind(), strict=True))
        starts = self._starts(blocks) if self._inner.relative else {}
        outside = self._mix_plain(groups, gradients, weights)
        try:
            with self.vectors.held(self._layout):
                return self._inner.step(groups, proxied, starts)
        finally:
            for parameter, gradient in outside.items():
                parameter.grad = gradient

    def _with_coupled_decay(self, block: Block, group: Mapping[str, Any], shared: Tensor) -> Tensor:
        """Coupled (L2) weight decay joins the shared gradient, where the weight itself is known."""
        decay = group.get("weight_decay", 0.0)
        if not decay or self._inner.traits[block.group].decay != "coupled":
            return shared
        sign = -1.0 if group.get("maximize") else 1.0
        coordinates = torch.stack([self._coordinates(layer, SHARED) for layer in block.layers])
        return torch.add(shared, coordinates, alpha=sign * decay)

    def _coordinates(self, layer: Layer, subspace: int) -> Tensor:
        """The weight's own coordinates in a subspace."""
        return layer.total(layer.project(layer.matrix(layer.parameter), self._bank.basis(layer, subspace)))

    def _starts(self, blocks: Sequence[Block]) -> dict[Tensor, Tensor]:
        """The weights' coordinates, for a base optimizer whose step is relative to them."""
        return {
            self._proxy(layer, subspace): self._coordinates(layer, subspace)
            for block in blocks
            for layer in block.layers
            for subspace in range(len(layer.widths))
        }

    def _mix_plain(
        self,
        groups: Groups,
        gradients: Mapping[int, Mapping[Tensor, Captured]],
        weights: Mapping[int, float | Tensor],
    ) -> dict[Tensor, Tensor | None]:
        """Give plain parameters the shared gradient; what they had in ``.grad``, to put back."""
        outside = {}
        for group in groups:
            for parameter in group["params"]:
                if parameter in self.layers:
                    continue
                outside[parameter] = parameter.grad
                full = {
                    task: gradient
                    for task, held in sorted(gradients.items())
                    if parameter in held and (gradient := held[parameter].full) is not None
                }
                if full:
                    parameter.grad = mix(full, weights, parameter.grad)
        return outside

    def _update(
        self,
        groups: Groups,
        blocks: Sequence[Block],
        steps: Mapping[Tensor, Tensor],
        held: set[Layer],
        measured: Measurements | None,
    ) -> None:
        row = 0
        for block in blocks:
            group = groups[block.group]
            states = [self.state[layer.parameter] for layer in block.layers]
            for layer, state in zip(block.layers, states, strict=True):
                if layer in held:
                    hold_protected(layer, state, min(int(state["step"]), group["update_proj_gap"]))
            gates = None if measured is None else measured.gates[row : row + len(block.layers)]
            row += len(block.layers)
            taken = {
                subspace: [steps[self._proxy(layer, subspace)] for layer in block.layers]
                for subspace in (SHARED, *(task + 1 for task in block.own))
            }
            scaled = [self._scaled(subspace, torch.stack(d), gates, group["scale"]) for subspace, d in taken.items()]
            apply_updates(
                block.layers,
                states,
                torch.cat(scaled, dim=1 + block.layers[0].axis),
                [self._bank.joint_basis(layer, taken) for layer in block.layers],
                decoupled_shrinkage(self._inner.traits[block.group], group),
            )
            if needs_alignment(self._gate):
                for task in block.own:
                    torch._foreach_copy_([state[previous_step(task)] for state in states], taken[task + 1])

    def _scaled(self, subspace: int, d: Tensor, gates: Tensor | None, scale: float) -> Tensor:
        """The steps (L x m x r) as they enter the update: times the scale, and the gate of a task's own subspace."""
        if subspace == SHARED:
            return d if scale == 1.0 else d * scale
        assert gates is not None
        return d * (gates[:, subspace - 1] * scale).to(d)[:, None, None]

    def _renew(self, sketches: Mapping[Layer, Mapping[int, Tensor]], gaps: Mapping[Layer, int]) -> None:
        """Bases for the next step, from this step's sketches."""
        for layer, found in sketches.items():
            if SHARED in found:
                self._follow(layer)
        self._bank.renew(sketches, gaps, self._carry)

    def _proxy(self, layer: Layer, subspace: int) -> Tensor:
        name = "shared" if subspace == SHARED else self._tasks[subspace - 1]
        return self.proxies[layer.parameter][f"{name}."]
