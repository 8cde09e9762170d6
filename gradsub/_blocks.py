"""An optimizer's blocks of layers and its other parameters, and what the parameters' states show of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradsub._guard import Guard
from gradsub._measure import GATE_MEMORY, previous_step
from gradsub._plain import ProtectedVectors, RestingRows
from gradsub._probe import Traits
from gradsub._state import INNER, hand_down, is_weighing, kind_of_loaded, loaded_inner, prefixed, show_block, show_plain
from gradsub.inner import Inner
from gradsub.subspace import SKETCHES, Block, Layer, Protected, SubspaceBank, make_blocks
from gradsub.update import FREE, MASTER, PENDING_DECAY, PROTECTED, initialise_update, protected_in

State = MutableMapping[Tensor, Any]


class Blocks:
    """Builds blocks, splits them, and lets them follow to what a conversion, a checkpoint or a null space has brought.

    Args:
        aligned: whether the steps taken in the tasks' own subspaces are kept for the gate.
        stacks: whether what is stepped entry by entry is stepped as one stack.
        master_weights: whether float32 copies of lower-precision weights are kept.
        anchor: whether the protected part of each weight is kept and set back at refreshes.

    Attributes:
        state: the optimizer's; another one where torch has put another one in its place.
        plain: the parameters without subspaces.
        vectors: those of them that are protected.
        rows: of embeddings among them that rest.
    """

    def __init__(
        self,
        bank: SubspaceBank,
        inner: Inner,
        state: State,
        tasks: Sequence[str],
        guard: Guard,
        aligned: bool,
        stacks: bool,
        master_weights: bool,
        anchor: bool,
    ) -> None:
        self._bank = bank
        self._inner = inner
        self.state = state
        self._tasks = tasks
        self._guard = guard
        self._aligned = aligned
        self._stacks = stacks
        self._master_weights = master_weights
        self._anchor = anchor
        self.all: list[Block] = []
        self.layers: dict[Tensor, Layer] = {}
        self.plain: list[Tensor] = []
        self.vectors = ProtectedVectors()
        self.rows = RestingRows()
        self._fused: set[Tensor] = set()
        self._as_stacks: list[bool] = []

    def adopt(
        self, group: int, layers: Sequence[Layer], fused: Iterable[Tensor], traits: Traits
    ) -> dict[Tensor, Tensor]:
        """Lay the layers of a parameter group out in blocks; what the base optimizer steps for them, and for which.

        Args:
            group: its index.
            fused: the weights that are captured by their own backward pass.
        """
        self.layers.update({layer.parameter: layer for layer in layers})
        self._fused.update(fused)
        self._as_stacks.append(traits.entrywise and self._stacks)
        return self._build(group, layers)

    def _build(self, group: int, layers: Sequence[Layer], turn: int | None = None) -> dict[Tensor, Tensor]:
        proxies: dict[Tensor, Tensor] = {}
        for block in make_blocks(group, layers, lambda layer: layer.parameter in self._fused, turn):
            self.all.append(block)
            self._bank.initialise(block)
            block.add(GATE_MEMORY, (len(self._tasks),))
            block.add(PENDING_DECAY, device="cpu")
            if self._aligned:
                for task in range(len(self._tasks)):
                    block.add(previous_step(task), block.first.coordinates(task + 1))
            block.show(self.state)
            for layer in block.layers:
                self._initialise(layer)
            block.proxies = [
                self._inner.proxies(block, subspace, self._as_stacks[group]) for subspace in range(1 + len(self._tasks))
            ]
            for _, mine in prefixed(block, self._tasks):
                proxies.update({proxy: block.layers[place].parameter for place, proxy in enumerate(mine)})
        return proxies

    def hold(self, plain: Sequence[Tensor]) -> None:
        """Take parameters without subspaces, and hold what is protected of them, or rests."""
        self.plain.extend(plain)
        for parameter in plain:
            self.vectors.protect(parameter, self._guard.vector(parameter), self.state)
            self.rows.hold(parameter, self._guard.resting(parameter))

    def _initialise(self, layer: Layer) -> None:
        initialise_update(layer, self.state[layer.parameter], self._master_weights, self._anchor)

    def proxies_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """What the base optimizer steps for a parameter, by the prefix of its state; maybe for others as well."""
        layer = self.layers.get(parameter)
        if layer is None:
            return {"": parameter}
        found = prefixed(layer.block, self._tasks)
        return {prefix: proxies[layer.row if len(proxies) > 1 else 0] for prefix, proxies in found}

    def show(self, anew: bool = False) -> None:
        """Show the base optimizer's state in the parameters' states; anew: what the blocks hold as well."""
        show_plain(self.state, self.plain, self._inner)
        for block in self.all:
            if anew:
                block.show(self.state)
            show_block(self.state, block, self._tasks, self._inner)

    def unshown(self) -> defaultdict[Tensor, dict[str, Any]]:
        """The parameters' states without what they show of the blocks: a pickle of each view would hold its stack."""
        found: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)  # as torch's, which makes those that are new
        found.update((parameter, dict(state)) for parameter, state in self.state.items())
        for block in self.all:
            for layer in block.layers:
                mine = found[layer.parameter]
                # The places stay, for the order of the keys.
                mine.update({key: None for key in mine if key in block.stacks or key.startswith(INNER)})
        return found

    def _split(self, block: Block, rows: list[int]) -> Block:
        """Make a block of its own of some rows, with its proxies."""
        self._bank.settle()
        leaving = set(rows)
        staying = [row for row in range(len(block)) if row not in leaving]
        size = len(block)
        other = block.split(rows)
        for proxies in block.proxies:
            if len(proxies) == size:
                other.proxies.append([proxies[row] for row in rows])
                proxies[:] = [proxies[row] for row in staying]
            else:
                other.proxies.append([self._inner.split(proxies[0], rows, staying)])
        self.all.insert(self.all.index(block) + 1, other)
        for part in (block, other):
            part.show(self.state)
        return other

    def divide(self, block: Block, kinds: Sequence[Hashable]) -> list[Block]:
        """Split a block so that every part has one kind."""
        parts = [block]
        while len(distinct := list(dict.fromkeys(kinds))) > 1:
            rows = [row for row, kind in enumerate(kinds) if kind != distinct[0]]
            block = self._split(block, rows)
            kinds = [kinds[row] for row in rows]
            parts.append(block)
        return parts

    def check(self, state: State) -> None:
        """Raise a RuntimeError if somebody else has thrown away the state that shows the blocks."""
        if state is not self.state or not all("basis" in state.get(parameter, ()) for parameter in self.layers):
            raise RuntimeError(
                "optimizer.state was replaced or cleared by somebody else: the subspaces go on from what they hold, of "
                "which a checkpoint would lack a part. Call optimizer.close() and build a new optimizer, and load a "
                "checkpoint into that one to go on from it"
            )

    def convert(self, parameters: Collection[Tensor], on_device: Collection[Tensor]) -> None:
        """Bring the state of parameters to the dtype, device and memory format that they have by now.

        Args:
            on_device: the parameters for which the base optimizer keeps counts on the device.
        """
        for parameter in parameters:
            if parameter in self.layers:
                continue
            self._convert_state(self.state[parameter], parameter, parameter.dtype, parameter in on_device)
            self._inner.load_state(parameter, loaded_inner(self.state[parameter], "", [""]))
        for block in [b for b in self.all if any(layer.parameter in parameters for layer in b.layers)]:
            self.all.remove(block)
            held = {layer.parameter: dict(self.state[layer.parameter]) for layer in block.layers}
            for layer in block.layers:
                state = held[layer.parameter]
                self._convert_state(state, layer.parameter, layer.dtype, layer.parameter in on_device)
                layer.protected = protected_in(state)
                if layer.parameter.dtype == layer.dtype:
                    state.pop(MASTER, None)
            before = len(self.all)
            fresh = self._build(block.group, block.layers, block.turn)
            self._inner.replace(block.group, [proxy for proxies in block.proxies for proxy in proxies], fresh)
            for made in self.all[before:]:
                self._go_on_from(made, held)
                for layer in made.layers:
                    self._initialise(layer)

    def _convert_state(self, state: dict[str, Any], parameter: Tensor, dtype: torch.dtype, on_device: bool) -> None:
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
                directions = key in (FREE, PROTECTED)
                wide = torch.promote_types(dtype, torch.float32) if directions else dtype
                state[key] = value.to(parameter.device, wide)
                if directions and parameter in self.layers:
                    state[key] = self._guard.keep(Protected(state[key], key == FREE), parameter).directions

    @contextmanager
    def held(self) -> Iterator[None]:
        """A step of the plain parameters in here moves nothing of them that is protected or rests."""
        with self.vectors.held(self._guard, self.state), self.rows.held(self._guard, self.plain):
            yield

    def follow(self, layer: Layer) -> None:
        """Take up what the null space has come to know of a layer since."""
        if self._guard.outdated(layer.parameter):
            protected = self._guard.grown(layer)
            if protected is not layer.protected:
                self._protect(layer, protected)

    def _protect(self, layer: Layer, protected: Protected | None) -> None:
        """Take up protected directions; bases and what is kept of the weight follow."""
        layer.protected = None if protected is None else self._guard.keep(protected, layer.parameter)
        self._initialise(layer)
        self._bank.enforce(layer)

    def _restore_protection(self) -> None:
        """After loading: protect what the checkpoint did; what the null space knows beyond it is taken up when it would
        have been, had the run never stopped: at the next refresh. A checkpoint that protected nothing has the null
        space obeyed from now on.
        """
        for parameter in (*self.layers, *self.plain):
            kept = protected_in(self.state.get(parameter, {}))
            layer = self.layers.get(parameter)
            if kept is not None:
                self._guard.reconsider(parameter)
            if layer is None:
                directions = self._guard.vector(parameter) if kept is None else kept.directions
                self.vectors.protect(parameter, directions, self.state)
            elif kept is None:
                self._protect(layer, layer.protected if self._guard.knows(parameter) else None)
            else:
                layer.protected = self._guard.keep(kept, parameter)
                self._initialise(layer)

    def take_over(self) -> None:
        """After loading: the blocks and the base optimizer go on from what the parameters' states have now."""
        for parameter in self.plain:
            self._inner.load_state(parameter, loaded_inner(self.state.get(parameter, {}), "", [""]))
        for block in list(self.all):
            self._go_on_from(block, {layer.parameter: dict(self.state[layer.parameter]) for layer in block.layers})
        self._restore_protection()

    def _go_on_from(self, whole: Block, held: Mapping[Tensor, dict[str, Any]]) -> None:
        """Have a block, and the base optimizer, go on from states that came from elsewhere."""
        shapes = {
            prefix: whole.first.coordinates(subspace)
            for subspace, (prefix, _) in enumerate(prefixed(whole, self._tasks))
        }
        kinds: Sequence[Hashable] = [kind_of_loaded(held[layer.parameter], shapes) for layer in whole.layers]
        if not self._as_stacks[whole.group]:
            kinds = [None] * len(whole)
        for block in self.divide(whole, kinds):
            for layer in block.layers:
                self.state[layer.parameter] = held[layer.parameter]
                if not layer.sketched:
                    for key in SKETCHES:
                        held[layer.parameter].pop(key, None)
            block.take_over(self.state)
            hand_down(self.state, block, self._tasks, self._inner)
            show_block(self.state, block, self._tasks, self._inner)
            self._bank.loaded(block)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "state": {}}  # the optimizer's own, which tells it again
