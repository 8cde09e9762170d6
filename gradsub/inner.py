"""The wrapped optimizer, run on small proxy parameters inside the subspaces."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub.subspace import Block

__all__ = ["Inner", "check_elementwise", "check_wrappable", "decays_decoupled", "decoupled_shrinkage"]

# torch's optimizers that add weight decay to the gradient (L2) unless a flag in the group says otherwise.
_COUPLED_DECAY = frozenset(
    {"SGD", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta", "Rprop", "ASGD", "SparseAdam"}
)
_TRUST_RATIO = ("lamb", "lars")
_REEVALUATES = ("sam", "lbfgs")
_WHOLE_MATRICES = (
    *("muon", "adafactor", "shampoo", "soap", "came", "galore", "novograd", "sm3", "lomo", "adammini", "kron", "psgd"),
    *("scion", "apollo", "dion", "nero", "fromage", "adalite"),
)
_POSITION = ("prodigy", "madgrad", "dowg", "cocob")


def check_wrappable(base: Optimizer) -> None:
    """Refuse an optimizer whose step cannot be run on a zero proxy.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: it has stepped already, evaluates its closure several times, scales by the parameter's norm, or
            remembers the parameter's position.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be a torch.optim.Optimizer, found {type(base).__name__}")
    name = type(base).__name__
    kinds = [cls.__name__.lower() for cls in type(base).__mro__]
    if any(kind.endswith(_REEVALUATES) for kind in kinds):
        raise ValueError(
            f"base={name} evaluates its closure several times a step, but captured gradients exist once: "
            "wrap a first-order optimizer such as torch.optim.AdamW"
        )
    if any(word in kind for kind in kinds for word in _TRUST_RATIO):
        raise ValueError(
            f"base={name} scales its step by the parameter's norm, which is 0 for the proxies that stand for the "
            "subspace: wrap an optimizer without a trust ratio, such as torch.optim.AdamW"
        )
    if any(word in kind for kind in kinds for word in _POSITION):
        raise ValueError(
            f"base={name} measures how far the parameter has come from where it started, but proxies start from 0 at "
            "every step: wrap an optimizer whose step depends on gradients alone, such as torch.optim.AdamW"
        )
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(f"base={name}(differentiable=True) is not supported: pass differentiable=False")
    for state in base.state.values():
        # Adagrad fills its state when it is built; only a step that was counted says that it has been used.
        if state and float(state.get("step", 1)) > 0:
            raise ValueError(
                f"base={name} already has state from earlier steps, and its moments belong to whole weights: wrap a "
                "fresh optimizer, and resume with GemsOptimizer.load_state_dict"
            )


def check_elementwise(base: Optimizer, layer: str) -> None:
    """Refuse an optimizer that looks at whole matrices, for a layer of which each rank has some rows.

    Raises:
        ValueError: naming the optimizer and the layer.
    """
    if looks_at_matrices(base):
        raise ValueError(
            f"base={type(base).__name__} looks at whole matrices, but {layer} is sharded and each rank steps its own "
            'rows: wrap an elementwise optimizer such as torch.optim.AdamW, or pass side="output"'
        )


def looks_at_matrices(base: Optimizer) -> bool:
    """Whether an entry's step depends on the other entries of its matrix."""
    kinds = [cls.__name__.lower() for cls in type(base).__mro__]
    return any(word in kind for kind in kinds for word in _WHOLE_MATRICES)


def decays_decoupled(base: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the group's ``weight_decay`` shrinks the weight directly (AdamW) or is added to the gradient (SGD)."""
    for flag in ("decoupled_weight_decay", "weight_decouple"):
        if flag in group:
            return bool(group[flag])
    return not any(
        kind.__module__.startswith("torch.optim") and kind.__name__ in _COUPLED_DECAY for kind in type(base).__mro__
    )


def decoupled_shrinkage(base: Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """The share of the weight that decoupled decay takes away in a step: lr times weight decay, 0 if it is coupled."""
    decay = group.get("weight_decay", 0.0)
    if not decay or not decays_decoupled(base, group):
        return 0.0
    shrinkage: float | Tensor = decay if group.get("fixed_decay") else group["lr"] * decay
    return shrinkage


class Inner:
    """Takes ``base`` over: same class, same hyper-parameters, but proxies in the place of decomposed weights.

    A proxy has the shape of a projected gradient. It is zero before the inner step and holds the step d after it.
    Between steps its storage is released. Weight decay of a proxy is 0: decay needs the weight, so it is the wrapper's.

    Args:
        base: the wrapped optimizer; its ``param_groups`` are replaced.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        # What an optimizer put into its state when it was built (Adagrad's accumulators), to give it to proxies too.
        self._initial = {parameter: dict(state) for parameter, state in base.state.items()}
        self._stands_for: dict[Tensor, Tensor] = {}
        self._shapes: dict[Tensor, torch.Size] = {}
        self._plain: list[dict[str, Any]] = []
        self._proxied: list[dict[str, Any]] = []
        base.state.clear()
        base.param_groups = []

    def add_group(self, options: Mapping[str, Any], plain: Iterable[Tensor], proxies: Mapping[Tensor, Tensor]) -> None:
        """Add one outer group.

        Args:
            options: its hyper-parameters.
            plain: the parameters that the base optimizer steps itself.
            proxies: proxy -> the weight that it stands for.
        """
        self._plain.append({**options, "params": list(plain)})
        self._proxied.append({**options, "params": list(proxies)})
        if "weight_decay" in options:
            self._proxied[-1]["weight_decay"] = 0.0
        for parameter in self._plain[-1]["params"]:
            if parameter in self._initial:
                self.base.state[parameter] = self._initial[parameter]
        self._stands_for.update(proxies)
        for proxy in proxies:
            self._shapes[proxy] = proxy.shape
            self._give_initial(proxy)
        for parameter in set(proxies.values()) & self._initial.keys():
            # One number of a constant accumulator will do from now on; the whole would cost as much as the weight.
            self._initial[parameter] = {
                key: value.flatten()[0].clone().expand(value.shape) if isinstance(value, Tensor) else value
                for key, value in self._initial[parameter].items()
            }
        new = [group for group in (self._plain[-1], self._proxied[-1]) if group["params"]]
        self.base.param_groups.extend(new)
        self._populate(new)
        self._release(self._proxied[-1]["params"])

    def proxies(self, block: Block, subspace: int, moments: str) -> list[nn.Parameter]:
        """What the base optimizer steps for a block in the place of the weights, zero.

        One stack of all layers' coordinates where the base optimizer looks at each entry alone. One matrix for each
        layer where it looks at whole matrices, and where moments are reset: a stack has one step count.
        """
        like = block.stacks["basis"]
        shape = block.first.coordinates(subspace)
        if self.elementwise and moments != "reset":
            return [nn.Parameter(like.new_zeros(len(block), *shape))]
        return [nn.Parameter(like.new_zeros(shape)) for _ in block.layers]

    @property
    def elementwise(self) -> bool:
        """Whether the base optimizer steps each entry by itself, so that many matrices can be stepped as one tensor."""
        return not looks_at_matrices(self.base)

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
        self._release([other])
        return other

    @property
    def relative(self) -> bool:
        """Whether the step's length follows the parameter's: then a proxy has to start as the weight's coordinates."""
        return any("adafactor" in kind.__name__.lower() for kind in type(self.base).__mro__)

    def step(
        self,
        groups: Iterable[dict[str, Any]],
        gradients: Mapping[Tensor, Tensor],
        starts: Mapping[Tensor, Tensor],
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
        groups = list(groups)
        self._read_options(groups)
        for proxy, gradient in gradients.items():
            proxy.data = starts[proxy].clone() if proxy in starts else torch.zeros_like(gradient)
            proxy.grad = gradient
        self._base_step()
        self._write_options(groups)
        steps = {proxy: proxy.data - starts[proxy] if proxy in starts else proxy.data for proxy in gradients}
        self._release(gradients)
        return steps

    def _base_step(self) -> None:
        """The base optimizer's step without torch's wrapper, which would fire the global step hooks a second time."""
        step = type(self.base).step
        if not getattr(step, "hooked", False):
            self.base.step()
            return
        for before in list(self.base._optimizer_step_pre_hooks.values()):
            before(self.base, (), {})
        step.__wrapped__(self.base)  # type: ignore[attr-defined]
        for after in list(self.base._optimizer_step_post_hooks.values()):
            after(self.base, (), {})

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The base optimizer's state of a plain parameter or of a proxy; empty if it has none yet."""
        found: dict[str, Any] = self.base.state.get(parameter, {})
        return found

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
        self._give_initial(proxy)
        group = next(group for group in self._proxied if any(proxy is other for other in group["params"]))
        proxy.data = proxy.data.new_zeros(self._shapes[proxy])
        self._populate([{**group, "params": [proxy]}])
        self._release([proxy])

    def _give_initial(self, proxy: Tensor) -> None:
        parameter = self._stands_for[proxy]
        initial = self._initial.get(parameter)
        if initial:
            self.base.state[proxy] = {key: _like(value, parameter, proxy) for key, value in initial.items()}

    def _read_options(self, groups: list[dict[str, Any]]) -> None:
        for outer, plain, proxied in zip(groups, self._plain, self._proxied, strict=True):
            for key in plain.keys() - {"params"}:
                plain[key] = outer[key]
                if key != "weight_decay":
                    proxied[key] = outer[key]

    def _write_options(self, groups: list[dict[str, Any]]) -> None:
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

    def _populate(self, groups: list[dict[str, Any]]) -> None:
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


def _like(value: Any, parameter: Tensor, proxy: Tensor) -> Any:
    """A constant accumulator of the weight's shape, as one of the proxy's shape."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return value.flatten()[0].to(proxy.dtype).expand(proxy.shape).clone()
    return value.clone() if isinstance(value, Tensor) else value
