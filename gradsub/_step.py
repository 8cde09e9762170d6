"""One optimization step, from captured gradients to weights: each arrow of the architecture in its order."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub._blocks import Blocks
from gradsub._constants import Constants
from gradsub._intake import Intake
from gradsub._lr_scale import asks, factor
from gradsub._measure import measure, needs_alignment, previous_step
from gradsub._reporting import Measurements
from gradsub._state import INNER, prefixed
from gradsub.capture import MIXED, Captured, Gathered, Projected, gather_block, gather_stacks, mix, project_block
from gradsub.gates import Gate
from gradsub.inner import Inner, decoupled_shrinkage
from gradsub.subspace import SHARED, Block, Layer, SubspaceBank, carry_moments
from gradsub.surgery import Surgery, SurgeryInputs
from gradsub.surgery._inputs import needs_losses, weigh
from gradsub.update import apply_updates, collect_decay, decay, hold_protected

Groups = Sequence[dict[str, Any]]


class Stepper:
    """Takes steps; it owns nothing but knows where everything is.

    Args:
        blocks: what it moves.
        bank: the bases.
        inner: the base optimizer.
        tasks: their names.
        gate: weighs the tasks' own steps.
        surgery: weighs the tasks in the shared subspace, from their Gramian or their losses; None leaves the plain sum.
        moments: what happens to the base optimizer's moments when a basis changes.
        lr_scale: whether updates are to be as large as those of whole weights, where a group does not say.
    """

    def __init__(
        self,
        blocks: Blocks,
        bank: SubspaceBank,
        inner: Inner,
        tasks: Sequence[str],
        gate: Gate,
        surgery: Surgery | None,
        moments: str,
        lr_scale: str | None,
    ) -> None:
        self._blocks = blocks
        self._bank = bank
        self._inner = inner
        self._tasks = tasks
        self._gate = gate
        self._surgery = surgery
        self.moments = moments
        self._lr_scale = lr_scale
        self._said: set[str] = set()
        self._constants = Constants()

    @property
    def sums(self) -> bool:
        """Whether parameters without subspaces need only the weighted sum of the tasks' gradients."""
        return self._surgery is None

    def gather(self, intake: Intake) -> list[Gathered]:
        """What the captures left by block, without what is only rounding; layers without gradients get a block."""
        found = []
        stacks = intake.held.stacks_by_block(self._blocks.all)
        gradients, rounding = intake.held.single, intake.rounding
        tasks = sorted(task for task in gradients if task != MIXED)
        for whole in list(self._blocks.all):
            if whole in stacks:
                outside = [layer.parameter.grad for layer in whole.layers]
                found.append(gather_stacks(whole, stacks[whole], outside, rounding))
                continue
            present = self._of_block(whole, gradients, tasks)
            blocks = [whole]
            if not present or not all(map(all, present.values())):
                kinds = [
                    tuple(task for task in tasks if present[task][row])
                    or (None if layer.parameter.grad is None else ())
                    for row, layer in enumerate(whole.layers)
                ]
                blocks = self._blocks.divide(whole, kinds)
            for block in blocks:
                here = present if len(blocks) == 1 else self._of_block(block, gradients, tasks)
                captured = {task: [each for each in mine if each is not None] for task, mine in here.items()}
                captured = {task: mine for task, mine in captured.items() if mine}
                outside = [layer.parameter.grad for layer in block.layers]
                if captured or outside[0] is not None:
                    found.append(gather_block(block, captured, outside, rounding))
        return found

    @staticmethod
    def _of_block(
        block: Block, gradients: Mapping[int, Mapping[Tensor, Captured]], tasks: Iterable[int]
    ) -> dict[int, list[Captured | None]]:
        """By task, what was captured of each layer."""
        parameters = [layer.parameter for layer in block.layers]
        return {task: list(map(gradients[task].get, parameters)) for task in tasks}

    def take(self, groups: Groups, gathered: Sequence[Gathered], intake: Intake) -> Measurements | None:
        """Take a step.

        Args:
            groups: the optimizer's parameter groups.
            gathered: of the layers, what was captured; it is used up.
            intake: what else came in.

        Returns:
            what a report is made from.
        """
        samples, mixed, losses = intake.samples, intake.mixed_samples, intake.losses
        total = sum(samples.values())
        shares = {task: count / total for task, count in samples.items()}
        projected = self._project(groups, gathered, shares, intake.rounding)
        # Who calls backward() on the mean of a mixed batch, not on rows.loss(), has chosen a gate without losses.
        unseen = (lambda tasks: None) if mixed else self._say_unseen
        measured = measure(projected, losses, samples, len(self._tasks), self._gate, unseen, self._constants)
        weights = self._operate(shares, samples, measured, losses)
        weights = {**weights, MIXED: mixed / total if total else 0.0}
        steps = self._inner_step(groups, intake.held.single, projected, weights)
        self._update(groups, projected, steps, measured)
        self._renew(groups, projected)
        for found in projected:
            self._bank.advance(found.block)
        self._blocks.show()
        return measured

    def _project(
        self, groups: Groups, gathered: Sequence[Gathered], shares: Mapping[int, float], rounding: float
    ) -> list[Projected]:
        """Refresh what is due and bring every layer's gradients into its subspaces."""
        found = []
        for each in gathered:
            block = each.block
            if not block.first.sketched:
                for row in self._bank.due(block)[:, SHARED].nonzero()[0]:
                    self._blocks.follow(block.layers[row])
            gap = groups[block.group]["update_proj_gap"]
            try:
                found.append(project_block(each, self._bank, shares, gap, rounding))
            finally:
                self._carry(block)
        return found

    def _carry(self, block: Block) -> None:
        """Have what is kept in coordinates of old bases follow to the new ones."""
        while block.rotations:
            rows, subspace, rotation = block.rotations.pop(0)
            some = None if len(rows) == len(block) else rows
            previous = block.stacks.get(previous_step(subspace - 1))
            if previous is not None:
                carry_moments({"step": previous}, {"step": "first"}, some, rotation, block.first.axis)
            proxies = block.proxies[subspace]
            if len(self._inner.shape_of(proxies[0])) == 3:
                self._rotate(block, proxies[0], some, rotation)
                continue
            for place, row in enumerate(rows):
                self._rotate(block, proxies[row], None, rotation[place])
                self._reset(block, row, subspace)

    def _rotate(self, block: Block, proxy: Tensor, rows: Sequence[int] | None, rotation: Tensor) -> None:
        if self.moments == "rotate":
            kinds = self._inner.traits[block.group].moments
            state = self._inner.state_of(proxy)
            self.say_kept(carry_moments(state, kinds, rows, rotation, block.first.axis))

    def _reset(self, block: Block, row: int, subspace: int) -> None:
        if self.moments != "reset":
            return
        proxy = block.proxies[subspace][row]
        gone = self._inner.state_of(proxy).keys()
        self._inner.reset(proxy)
        prefix = list(prefixed(block, self._tasks))[subspace][0]
        for key in gone - self._inner.state_of(proxy).keys():
            # A checkpoint taken before the next step would bring it back.
            self._blocks.state[block.layers[row].parameter].pop(f"{INNER}{prefix}{key}", None)
            block.shown.pop((f"{INNER}{prefix}{key}", row), None)

    def _say_unseen(self, tasks: Sequence[int]) -> None:
        """Warn once of tasks whose loss the gate would have wanted."""
        self._say(
            "unseen",
            f"the gate reads losses, and none was seen of {[self._tasks[task] for task in tasks]}: only a call of "
            "backward() on the scalar loss itself tells it; pass task(name, loss=loss), or a gate that needs none, "
            "such as gate='uniform'",
            stacklevel=9,
        )

    def _say_unweighted(self, tasks: Sequence[int]) -> None:
        """Warn once of tasks whose loss the surgery would have wanted."""
        if tasks:
            self._say(
                "unweighted",
                f"surgery={type(self._surgery).__name__} reads losses, and none was seen of "
                f"{[self._tasks[task] for task in tasks]}: their weight is 1. Only a call of backward() on the scalar "
                "loss itself tells it, or rows.loss(losses) inside of mixed(); pass task(name, loss=loss), or a "
                "surgery that needs none, such as surgery='upgrad'",
                stacklevel=6,
            )

    def say_kept(self, names: Collection[str]) -> None:
        """Warn once of what the base optimizer keeps and no rotation reaches."""
        if names and self.moments == "rotate":
            self._say(
                "kept",
                f"moments='rotate' leaves {sorted(names)} of base={type(self._inner.base).__name__} as they are when a "
                "basis changes: they are no moments of the gradients, or no floating-point numbers; pass "
                "moments='keep' or 'reset' for all of the state to be treated alike",
                stacklevel=5,
            )

    def _say(self, kind: str, message: str, stacklevel: int) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, stacklevel=stacklevel + 1)

    def _operate(
        self,
        shares: Mapping[int, float],
        samples: Mapping[int, float],
        measured: Measurements | None,
        seen: Collection[int],
    ) -> Mapping[int, float | Tensor]:
        """Each task's weight in the shared gradient: its share of the samples, times what the surgery makes of it."""
        if self._surgery is None or measured is None or not shares:
            return shares
        if needs_losses(self._surgery):
            self._say_unweighted([task for task in shares if task not in seen])
        elif len(shares) < 2:
            return shares
        gramian = measured.gramian.sum(0)
        counts = tuple(tuple(each.get(k, 0.0) for k in range(len(self._tasks))) for each in (shares, samples))
        share, count = self._constants.send("shares", counts, gramian.device, gramian.dtype, lambda: counts)
        inputs = SurgeryInputs(share[:, None] * gramian * share, measured.losses, count)
        weights = weigh(self._surgery, inputs)
        return {task: share[task] * weights[task] for task in shares}

    def _inner_step(
        self,
        groups: Groups,
        gradients: Mapping[int, Mapping[Tensor, Captured]],
        projected: Sequence[Projected],
        weights: Mapping[int, float | Tensor],
    ) -> dict[Tensor, Tensor]:
        """d of every proxy; plain parameters are stepped on the way, with the shared gradient."""
        proxied: dict[Tensor, Tensor] = {}
        mixed = mix([found.parts for found in projected], weights, [found.outside for found in projected])
        for found, shared in zip(projected, mixed, strict=True):
            block = found.block
            shared = self._with_coupled_decay(block, groups[block.group], shared)
            for subspace, stacked in {SHARED: shared, **{task + 1: R for task, R in found.own.items()}}.items():
                proxies = block.proxies[subspace]
                if len(self._inner.shape_of(proxies[0])) == 3:
                    # Contiguous: torch's fused optimizers read a gradient's memory as if it were, and say nothing.
                    proxied[proxies[0]] = stacked.contiguous()
                else:
                    proxied.update(zip(proxies, stacked.contiguous().unbind(), strict=True))
        starts = self._starts(projected) if self._inner.relative else {}
        outside = self._mix_plain(gradients, weights)
        try:
            with self._blocks.held():
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

    def _starts(self, projected: Sequence[Projected]) -> dict[Tensor, Tensor]:
        """The weights' coordinates, for a base optimizer whose step is relative to them."""
        return {
            proxy: self._coordinates(layer, subspace)
            for found in projected
            if self._inner.traits[found.block.group].relative
            for subspace, proxies in enumerate(found.block.proxies)
            for layer, proxy in zip(found.block.layers, proxies, strict=True)
        }

    def _mix_plain(
        self, gradients: Mapping[int, Mapping[Tensor, Captured]], weights: Mapping[int, float | Tensor]
    ) -> dict[Tensor, Tensor | None]:
        """Give plain parameters the shared gradient; what they had in ``.grad``, to put back."""
        outside = {parameter: parameter.grad for parameter in self._blocks.plain}
        full = [
            {
                task: gradient
                for task, held in sorted(gradients.items())
                if (captured := held.get(parameter)) is not None and (gradient := captured.full) is not None
            }
            for parameter in self._blocks.plain
        ]
        there = [(parameter, found) for parameter, found in zip(self._blocks.plain, full, strict=True) if found]
        mixed = mix([found for _, found in there], weights, [outside[parameter] for parameter, _ in there])
        for (parameter, _), gradient in zip(there, mixed, strict=True):
            parameter.grad = gradient
        return outside

    def _update(
        self,
        groups: Groups,
        projected: Sequence[Projected],
        steps: Mapping[Tensor, Tensor],
        measured: Measurements | None,
    ) -> None:
        lengths = [len(found.block) for found in projected]
        gates = [None] * len(lengths) if measured is None else list(torch.split(measured.gates, lengths))
        for found, mine in zip(projected, gates, strict=True):
            block, group = found.block, groups[found.block.group]
            states = [self._blocks.state[layer.parameter] for layer in block.layers]
            shrink = decoupled_shrinkage(self._inner.traits[block.group], group)
            collect_decay(block, states, shrink)
            gap = group["update_proj_gap"]
            for row in self._bank.at_place(block, gap):
                decay(block.layers[row], states[row])
                hold_protected(block.layers[row], states[row], min(int(block.array("step")[row]), gap))
            taken = {
                subspace: self._stacked(block, subspace, steps) for subspace in (SHARED, *(k + 1 for k in found.own))
            }
            joint = torch.cat(list(taken.values()), dim=1 + block.first.axis)
            scale = group["scale"] * factor(block, self._bank) if asks(group, self._lr_scale) else group["scale"]
            factors = self._factors(block, tuple(taken), mine, scale)
            if factors is not None:
                joint *= factors.unsqueeze(1 if block.first.axis == 1 else 2)
            basis = block.stacks["basis"]
            if len(taken) < len(block.proxies):
                basis = torch.cat([block.basis(subspace) for subspace in taken], dim=2)
            apply_updates(block, states, joint, basis, shrink)
            if needs_alignment(self._gate):
                for task in found.own:
                    block.stacks[previous_step(task)].copy_(taken[task + 1])

    def _factors(
        self, block: Block, subspaces: tuple[int, ...], gates: Tensor | None, scale: float | Tensor
    ) -> Tensor | None:
        """By what the steps enter the update (L x R): the scale, and for a task's own subspace its gate as well."""
        if isinstance(scale, Tensor):
            gated = self._factors(block, subspaces, gates, 1.0)
            return scale if gated is None else gated * scale
        if gates is None or len(subspaces) == 1:
            return None if scale == 1.0 else block.stacks["basis"].new_full((1, 1), scale)
        constant, columns = block.columns(subspaces)
        return torch.addmm(constant, gates.to(constant), columns, beta=scale, alpha=scale)

    def _stacked(self, block: Block, subspace: int, steps: Mapping[Tensor, Tensor]) -> Tensor:
        """The steps in a subspace (L x m x r)."""
        found = [steps[proxy] for proxy in block.proxies[subspace]]
        return found[0] if found[0].ndim == 3 else torch.stack(found)

    def _renew(self, groups: Groups, projected: Sequence[Projected]) -> None:
        """Bases for the next step, from this step's sketches."""
        sketched = [found for found in projected if found.sketches]
        for found in sketched:
            for row in found.sketches.get(SHARED, ((), None))[0]:
                self._blocks.follow(found.block.layers[row])
        batches = [(each.block, each.sketches, groups[each.block.group]["update_proj_gap"]) for each in sketched]
        try:
            self._bank.renew(batches)
        finally:
            for each in sketched:
                self._carry(each.block)
