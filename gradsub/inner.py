"""The wrapped optimizer, run on small proxy parameters inside the subspaces."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub._probe import Probes, Traits, base_step, constant_like, pattern
from gradsub._settings import NOT_INNER
from gradsub.subspace import Block

__all__ = ["Inner", "check_wrappable", "decoupled_shrinkage"]


def check_wrappable(base: Optimizer) -> None:
    """Refuse what is no fresh optimizer; what its steps depend on is found out for each group, by `Probes`.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: it has stepped already, or is differentiable.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"base must be a torch.optim.Optimizer, found {type(base).__name__}: wrap one, which takes the parameters "
            "and the learning rate, as in GemsOptimizer(torch.optim.AdamW(model.parameters(), lr=...), ...)"
        )
    name = type(base).__name__
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(f"base={name}(differentiable=True) is not supported: pass differentiable=False")
    for state in base.state.values():
        # Adagrad fills its state when it is built; only a step that was counted says that it has been used.
        if state and float(state.get("step", 1)) > 0:
            raise ValueError(
                f"base={name} already has state from earlier steps, and its moments belong to whole weights: wrap a "
                "fresh optimizer, and resume with GemsOptimizer.load_state_dict"
            )


def decoupled_shrinkage(traits: Traits, group: Mapping[str, Any]) -> float | Tensor:
    """The share of the weight that decoupled decay takes away in a step: lr times weight decay, 0 if it is coupled.

    Raises:
        ValueError: there is no learning rate.
    """
    decay = group.get("weight_decay", 0.0)
    if not decay or traits.decay in ("coupled", "none"):
        return 0.0
    if traits.decay != "fixed" and group.get("lr") is None:
        raise ValueError(
            f"weight_decay={decay} takes a share of lr * weight_decay off the weight, but lr={group.get('lr')}: steps "
            "whose length the base optimizer finds itself have no rate that decay could follow. Pass lr (of "
            "transformers' Adafactor with relative_step=False), or weight_decay=0"
        )
    shrinkage: float | Tensor = decay if traits.decay == "fixed" else group["lr"] * decay
    return shrinkage.reshape(()) if isinstance(shrinkage, Tensor) else shrinkage  # a rate may have one dimension


class Inner:
    """Takes ``base`` over: same class, same hyper-parameters, but proxies in the place of decomposed weights.

    A proxy has the shape of a projected gradient. It is zero before the inner step and holds the step d after it.
    Between steps its storage is released. Weight decay of a proxy is 0: decay needs the weight, so it is the wrapper's.

    Outside of its steps the base optimizer shows the outer groups as its own: whoever writes a learning rate there, as
    a scheduler does, steers.

    Args:
        base: the wrapped optimizer.
        probes: say what its steps depend on.
    """

    def __init__(self, base: Optimizer, probes: Probes) -> None:
        self.base = base
        self.probes = probes
        self.traits: list[Traits] = []
        self._probed: list[dict[str, Any]] = []
        self._warned = False
        self._populated: set[Tensor] = set()
        # What an optimizer put into its state when it was built (Adagrad's accumulators), to give it to proxies too.
        self._initial = {parameter: dict(state) for parameter, state in base.state.items()}
        self._stands_for: dict[Tensor, Tensor] = {}
        self._shapes: dict[Tensor, torch.Size] = {}
        self._plain: list[dict[str, Any]] = []
        self._proxied: list[dict[str, Any]] = []
        base.state.clear()

    def add_group(
        self, options: Mapping[str, Any], traits: Traits, plain: Iterable[Tensor], proxies: Mapping[Tensor, Tensor]
    ) -> None:
        """Add one outer group.

        Args:
            options: its hyper-parameters.
            traits: what the base optimizer's steps depend on with these.
            plain: the parameters that the base optimizer steps itself.
            proxies: proxy -> the weight that it stands for.
        """
        if proxies:
            self._warn_of_decay(traits, options)
        self.traits.append(traits)
        self._probed.append(dict(options))
        self._plain.append({**options, "params": list(plain)})
        self._proxied.append({**options, "params": list(proxies)})
        if "weight_decay" in options:
            self._proxied[-1]["weight_decay"] = 0.0
        for parameter in self._plain[-1]["params"]:
            if parameter in self._initial:
                self.base.state[parameter] = self._initial[parameter]
        self._take_in(proxies)
        for parameter in set(proxies.values()) & self._initial.keys():
            # One number of a constant accumulator will do from now on; the whole would cost as much as the weight.
            self._initial[parameter] = {
                key: value.flatten()[0].clone().expand(value.shape) if isinstance(value, Tensor) else value
                for key, value in self._initial[parameter].items()
            }
        new = [group for group in (self._plain[-1], self._proxied[-1]) if group["params"]]
        self._populate(new)
        self._populated.update(parameter for group in new for parameter in group["params"] if self.state_of(parameter))
        self._release(self._proxied[-1]["params"])

    @staticmethod
    def proxies(block: Block, subspace: int, stacked: bool) -> list[nn.Parameter]:
        """What the base optimizer steps for a block in the place of the weights, zero.

        Args:
            block: L layers.
            subspace: whose coordinates they are.
            stacked: one stack of all layers' coordinates (L x m x r), or one matrix for each layer (m x r).
        """
        like = block.stacks["basis"]
        shape = block.first.coordinates(subspace)
        if stacked:
            return [nn.Parameter(like.new_zeros(len(block), *shape))]
        return [nn.Parameter(like.new_zeros(shape)) for _ in block.layers]

    def replace(self, group: int, old: Collection[Tensor], new: Mapping[Tensor, Tensor]) -> None:
        """Other proxies in the place of some of a group's, with a fresh state.

        Args:
            group: its index.
            old: those that go.
            new: those that come -> the weight that each stands for.
        """
        held = self._proxied[group]
        gone = {id(proxy) for proxy in old}
        held["params"] = [proxy for proxy in held["params"] if id(proxy) not in gone] + list(new)
        for proxy in old:
            self.base.state.pop(proxy, None)
            self._shapes.pop(proxy)
            self._stands_for.pop(proxy)
            self._populated.discard(proxy)
        self._take_in(new)
        self._populate([{**held, "params": list(new)}])
        self._populated.update(proxy for proxy in new if self.state_of(proxy))
        self._release(new)

    def _take_in(self, proxies: Mapping[Tensor, Tensor]) -> None:
        self._stands_for.update(proxies)
        for proxy in proxies:
            self._shapes[proxy] = proxy.shape
            self._give_initial(proxy)

    def split(self, proxy: Tensor, rows: list[int], staying: list[int]) -> nn.Parameter:
        """A second proxy for some rows of a stack, with their part of its state."""
        shape = self._shapes[proxy]
        other = nn.Parameter(proxy.data.new_zeros(len(rows), *shape[1:]))
        state = self.base.state.get(proxy, {})
        if state:
            stacked = {key for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape}
            self.base.state[other] = {
                key: value[rows] if key in stacked else copy.deepcopy(value) for key, value in state.items()
            }
            self.base.state[proxy] = {key: value[staying] if key in stacked else value for key, value in state.items()}
        self._shapes[other] = other.shape
        self._shapes[proxy] = torch.Size((len(staying), *shape[1:]))
        self._stands_for[other] = self._stands_for[proxy]
        next(g for g in self._proxied if any(proxy is p for p in g["params"]))["params"].append(other)
        if proxy in self._populated:
            self._populated.add(other)
        self._release([other])
        return other

    @property
    def relative(self) -> bool:
        """Whether a step's length follows the parameter's: then a proxy has to start as the weight's coordinates."""
        return any(traits.relative for traits in self.traits)

    def check_options(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Find out anew what steps depend on, where somebody else has switched an option on or off.

        Args:
            groups: the outer groups.

        Raises:
            ValueError: with these options the base optimizer cannot be wrapped.
        """
        for position, (outer, used) in enumerate(zip(groups, self._proxied, strict=True)):
            traits, probed = self.traits[position], self._probed[position]
            if not used["params"]:
                continue
            self._warn_of_decay(traits, outer)
            changed = {
                key: outer[key]
                for key in (used.keys() & probed.keys()) - traits.counters
                if outer[key] is not used[key] and pattern(key, outer[key]) != pattern(key, probed[key])
            }
            if changed:
                options = {**probed, **changed}
                weights = [self._stands_for[proxy] for proxy in used["params"]]
                self.traits[position] = self.probes.traits(options, weights, self._initial)
                self._probed[position] = options

    def _warn_of_decay(self, traits: Traits, group: Mapping[str, Any]) -> None:
        if traits.decay == "other" and group.get("weight_decay") and not self._warned:
            self._warned = True
            warnings.warn(
                f"weight_decay={group['weight_decay']} of base={type(self.base).__name__} neither joins the gradient "
                "nor takes a share of lr * weight_decay off the weight, as it does for decomposed weights: pass "
                "weight_decay=0, or an optimizer such as torch.optim.AdamW, if that matters",
                stacklevel=3,
            )

    def step(
        self, groups: Sequence[dict[str, Any]], gradients: Mapping[Tensor, Tensor], starts: Mapping[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        """One step of the base optimizer.

        Args:
            groups: the outer groups' current hyper-parameters, in order; what the base optimizer changes in its own
                (a schedule-free optimizer counts there) is written back to them.
            gradients: of proxies; a proxy without one is not stepped. Plain parameters carry theirs in ``.grad``.
            starts: where a proxy starts, if not at zero.

        Returns:
            d, the step taken, for every proxy in ``gradients``.
        """
        self._read_options(groups)
        places = {}
        for proxy, gradient in gradients.items():
            place = places[proxy] = starts[proxy].clone() if proxy in starts else torch.zeros_like(gradient)
            proxy.data, proxy.grad = place, gradient
        shown = self.base.param_groups
        self.base.param_groups = [
            group for pair in zip(self._plain, self._proxied, strict=True) for group in pair if group["params"]
        ]
        try:
            self._base_step()
        finally:
            self.base.param_groups = shown
        self._write_options(groups)
        # A base optimizer may have put other memory in the place of what it was given.
        ends = {proxy: end if proxy.data_ptr() == end.data_ptr() else proxy.data for proxy, end in places.items()}
        steps = {proxy: end - starts[proxy] if proxy in starts else end for proxy, end in ends.items()}
        self._release(gradients)
        return steps

    def _base_step(self) -> None:
        # A wrapper such as accelerate's has none of its own.
        for before in list(getattr(self.base, "_optimizer_step_pre_hooks", {}).values()):
            before(self.base, (), {})
        base_step(self.base)
        for after in list(getattr(self.base, "_optimizer_step_post_hooks", {}).values()):
            after(self.base, (), {})

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The base optimizer's state of a plain parameter or of a proxy; empty if it has none yet."""
        found: dict[str, Any] = self.base.state.get(parameter, {})
        return found

    def populated(self, parameter: Tensor) -> bool:
        """Whether the base optimizer has had state of it since before its first step."""
        return parameter in self._populated

    def shape_of(self, proxy: Tensor) -> torch.Size:
        """The shape of a proxy, whose storage is released between steps."""
        return self._shapes[proxy]

    def load_state(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Replace it."""
        if state:
            self.base.state[parameter] = state
        else:
            self.base.state.pop(parameter, None)

    def reset(self, proxy: Tensor) -> None:
        """Give a proxy the state of an optimizer that never stepped."""
        self.base.state.pop(proxy, None)
        # Before its state: accumulators that are there from the start have its shape.
        proxy.data = proxy.data.new_zeros(self._shapes[proxy])
        self._give_initial(proxy)
        group = next(group for group in self._proxied if any(proxy is other for other in group["params"]))
        self._populate([{**group, "params": [proxy]}])
        self._release([proxy])

    def _give_initial(self, proxy: Tensor) -> None:
        parameter = self._stands_for[proxy]
        initial = self._initial.get(parameter)
        if initial:
            self.base.state[proxy] = {key: constant_like(value, parameter, proxy) for key, value in initial.items()}

    def _read_options(self, groups: Sequence[dict[str, Any]]) -> None:
        for outer, plain, proxied in zip(groups, self._plain, self._proxied, strict=True):
            # Also those that came with a checkpoint: some optimizers keep counts there, which their first step creates.
            for key in outer.keys() - NOT_INNER:
                plain[key] = outer[key]
                if key != "weight_decay":
                    proxied[key] = outer[key]

    def _write_options(self, groups: Sequence[dict[str, Any]]) -> None:
        for outer, plain, proxied in zip(groups, self._plain, self._proxied, strict=True):
            used = proxied if proxied["params"] else plain
            for key in used.keys() - {"params", "weight_decay"}:
                outer[key] = plain[key] = proxied[key] = used[key]

    def _release(self, proxies: Iterable[Tensor]) -> None:
        empty: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for proxy in proxies:
            proxy.grad = None
            kind = (proxy.dtype, proxy.device)
            if kind not in empty:
                empty[kind] = proxy.data.new_empty(0)
            proxy.data = empty[kind]

    def _populate(self, groups: Sequence[dict[str, Any]]) -> None:
        """Create the base optimizer's state now, where torch lets us, so that its shapes never depend on data.

        Distributed checkpoints ask for the state before the first step. An optimizer without torch's ``_init_group``
        creates its state at its first step, as it would unwrapped.
        """
        init = getattr(self.base, "_init_group", None)
        if init is None:
            return
        collectors = [
            parameter
            for parameter in inspect.signature(init).parameters.values()
            if parameter.default is inspect.Parameter.empty
        ][1:]
        for group in groups:
            # A frozen parameter has no state, as everywhere in torch; it gets it when it first has a gradient.
            training = [parameter for parameter in group["params"] if parameter.requires_grad]
            held = [parameter.grad for parameter in training]
            for parameter in training:
                parameter.grad = parameter.detach().new_zeros(()).expand(parameter.shape)
            init({**group, "params": training}, *([] for _ in collectors))
            if group.get("momentum") and group.get("dampening") == 0:
                for parameter in training:
                    # SGD's buffer starts as the first gradient; without dampening, starting from zero is the same.
                    self.base.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            for parameter, gradient in zip(training, held, strict=True):
                parameter.grad = gradient
