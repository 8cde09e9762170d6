"""Finds out what the null space knows, but nothing holds in it, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from gradsub._effective import (
    adapts_as_told,
    carries_protection,
    depends_on_parameters,
    is_bias,
    own_weight,
    stands_for,
)
from gradsub.layers import is_linear, is_transposed, named_layers, named_parameters


class Coverage:
    """Looks at a model for parameters that move what is meant to stay.

    Args:
        given: the base optimizer's parameters.
        held: the weights and vectors that are moved inside of their null space alone.
        targeted: the layers that ``target_modules`` names. What of these requires a gradient is expected to move, also
            where the base optimizer does not have it; of others what it has. What is frozen does not.
    """

    def __init__(
        self,
        model: nn.Module | None,
        given: Iterable[Tensor],
        held: Iterable[Tensor],
        names: Mapping[Tensor, str],
        targeted: Iterable[str],
    ) -> None:
        self._layers = {} if model is None else dict(named_layers(model))
        self._named = {} if model is None else dict(named_parameters(model))
        self._model = model
        self._given = set(given)
        self._held = set(held)
        self._names = names
        self._targeted = set(targeted)

    def loose(self, name: str, input_side: bool) -> str | None:
        """Why a layer or vector that the null space knows may move all the same, or None if it does not.

        What decides is whether its product, or that of the module which stands in its place, changes by anything but
        a held weight. Biases are not looked at: what is known of them has names of its own.
        """
        if self._model is None:
            return self._loose_by_name(name)
        module = self._layers.get(name)
        if module is None:
            parameter = self._named.get(name)
            if parameter is None:
                return "the model has no layer and no vector of that name"
            return self._loose_parameter(parameter, False)
        targeted = name in self._targeted
        weight = own_weight(module)
        if weight is None and is_linear(module):
            return self._computed(module, targeted)
        others = self._moving(module, targeted)
        if weight is not None:
            others.pop("weight", None)
            reason = self._loose_parameter(weight, targeted)
            if reason is not None:
                return reason
        if others:
            return f"what it computes depends on {' and '.join(list(others)[:3])}"
        if weight is None or not is_linear(module):
            return None
        if weight in self._held and weight.requires_grad and not _carries(module, input_side):
            return f"the forward pass of {type(module).__name__} computes with something else than its weight"
        return self._added(name, module, input_side)

    def _loose_by_name(self, name: str) -> str | None:
        """The same where only the base optimizer's names are known."""
        own = {called: p for p, called in self._names.items() if p in self._given}
        below = [called for called in own if called.startswith(f"{name}.") and own[called] not in self._held]
        below = [called for called in below if not is_bias(called[len(name) + 1 :])]
        if below:
            return f"what it computes depends on {' and '.join(below[:3])}"
        held = any(called in own and own[called] in self._held for called in _parameter_names(name))
        return None if held else "none of the base optimizer's parameters goes by that name (a frozen layer needs none)"

    def _loose_parameter(self, parameter: Tensor, targeted: bool) -> str | None:
        if parameter in self._held or not self._moves(parameter, targeted):
            return None
        if parameter in self._given:
            return "it takes the plain inner step"
        return "it is not among the base optimizer's parameters, but requires a gradient"

    def _computed(self, module: nn.Module, targeted: bool) -> str | None:
        """Why a weight that is no parameter may move. That it is computed from a held one holds nothing."""
        sources = [key for key, p in named_parameters(module) if not is_bias(key) and self._moves(p, targeted)]
        if sources:
            return f"its weight is computed from {' and '.join(sources[:3])}"
        return "its weight is computed from parameters elsewhere" if depends_on_parameters(module) else None

    def _added(self, name: str, layer: nn.Module, input_side: bool) -> str | None:
        """Why the module in which the layer stands moves what the layer does not."""
        outer = self._around(name)
        if not outer:
            return None  # the whole model stands in nobody's place
        moving = self._moving(self._layers[outer], name in self._targeted)
        others = [key for key, parameter in moving.items() if not self._inside(parameter, layer)]
        weight = own_weight(layer)
        frozen = weight not in self._held or not weight.requires_grad
        inside = self._held_inside(self._layers[outer], layer) if frozen and not others else {}
        if not (others or inside) or not stands_for(self._layers[outer], layer, frozen):
            return None
        if others:
            return f"the module around it answers for it, with {' and '.join(others[:3])}"
        if adapts_as_told(self._layers[outer], inside, input_side):
            return None
        return f"the module around it ({type(self._layers[outer]).__name__}) answers with more than what is held in it"

    def _held_inside(self, outer: nn.Module, layer: nn.Module) -> dict[nn.Module, bool]:
        """The other layers of a module that move in their null spaces, and whether their weights are transposed."""
        found = {}
        for module in outer.modules():
            weight = own_weight(module) if is_linear(module) and module is not layer else None
            if weight is not None and weight in self._held and weight.requires_grad:
                found[module] = is_transposed(module)
        return found

    def _around(self, name: str) -> str:
        """The module that calls the layer; empty if that is the model."""
        outer = name.rpartition(".")[0]
        while outer and type(self._layers[outer]).forward is nn.Module.forward:
            outer = outer.rpartition(".")[0]  # a list or dictionary of modules
        return outer

    def adapter(self, name: str) -> str | None:
        """The module in which a layer adapts a frozen one, as LoRA's factors do; None if it is no adapter."""
        outer = self._around(name) if name in self._layers else ""
        if not outer:
            return None
        for module in self._layers[outer].modules():
            weight = own_weight(module) if is_linear(module) else None
            if weight is not None and not weight.requires_grad and stands_for(self._layers[outer], module, True):
                return outer
        return None

    def _inside(self, parameter: Tensor, module: nn.Module) -> bool:
        return any(own is parameter for own in module.parameters())

    def _moving(self, module: nn.Module, targeted: bool) -> dict[str, Tensor]:
        """A module's parameters that move, or may, and that nothing holds."""
        return {
            name: parameter
            for name, parameter in named_parameters(module)
            if not is_bias(name) and self._moves(parameter, targeted) and parameter not in self._held
        }

    def _moves(self, parameter: Tensor, targeted: bool) -> bool:
        return parameter.requires_grad and (targeted or parameter in self._given)


def _parameter_names(name: str) -> tuple[str, ...]:
    return (name, f"{name}.weight" if name else "weight")


def _carries(module: nn.Module, input_side: bool) -> bool:
    try:
        return carries_protection(module, input_side, is_transposed(module))
    except Exception:
        return False  # it takes or returns something else than a linear layer does
