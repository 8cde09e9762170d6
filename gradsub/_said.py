"""What is said of parameters that are not decomposed or not protected: in warnings, each once, and in a summary."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gradsub._coverage import Coverage
from gradsub._effective import is_bias
from gradsub._layout import Layout
from gradsub._left_out import LeftOut, left_out, smaller_side
from gradsub._unprotected import embeds_alone, known_everywhere
from gradsub.layers import ALL_LINEAR, some
from gradsub.null_space import NullSpace

# How many names a warning lists of what is not protected.
_NAMED = 12
_FREE = (
    "null_space has nothing for {names}, {share} of the trained weights: their updates are not constrained, and what "
    "it protects elsewhere can be lost through them. Before you build the base optimizer, freeze them with\n"
    "    {call}\n"
    "or protect norms and biases with null_space.collect_gradients(model, batches); what is meant to move freely gets "
    "a group with subspace=False"
)
_SAID = {
    "plain": "{} is protected by null_space but takes the plain inner step, which does not obey it: leave "
    "subspace=True for it, target it, or freeze it",
    "no freedom": "null_space protects all {}: it cannot learn",
    "no direction": "null_space protects no direction of {}: its criterion asks for none, or its features were zero. A "
    "threshold is in squared units of the features (for vectors, of gradients); energy has no units",
}


class Said:
    """Looks at what a layout decided, and remembers of what it has spoken."""

    def __init__(
        self, layout: Layout, null_space: NullSpace | None, model: nn.Module | None, target_modules: str | Iterable[str]
    ) -> None:
        self._layout = layout
        self._guard = layout.guard
        self._null_space = null_space
        self._model = model
        self._target_modules = target_modules
        self._looked = 0
        self._left_out: set[str] = set()
        self._reported: set[str] = set()
        self._told: set[Tensor] = set()
        self._frozen: list[Tensor] = []

    def check(self) -> None:
        """Say what is not decomposed, and what the null space knows but nothing holds.

        Raises:
            ValueError: nothing of either can be found among the base optimizer's parameters.
        """
        self._warn_left_out()
        if self._null_space is None:
            return
        layout = self._layout
        if not any(map(self._guard.knows, layout.names)) and not any(map(self._knows, layout.computed)):
            known = list(self._null_space)[:4]
            raise ValueError(
                f"null_space knows the layers {known} ... but none of the optimizer's parameters goes by such a name: "
                "pass the model= on which it was collected, or build the base optimizer from named_parameters()"
            )
        coverage = self._coverage()
        self._check_adapters(coverage)
        self._warn_protection()
        self._guard.fit.say(stacklevel=4)
        self._warn_loose(self._null_space, coverage)
        self._warn_free([parameter for parameter in layout.given if self._moves_freely(parameter)], stacklevel=4)

    def _knows(self, name: str) -> bool:
        return self._null_space is not None and name in self._null_space

    def _warn_left_out(self) -> None:
        trained = max(1, sum(p.numel() for p in self._layout.given if p.requires_grad))
        for parameters, message, _, always in self._find_left_out():
            new = {name: p for name, p in parameters.items() if name not in self._left_out}
            new = {name: p for name, p in new.items() if always or not self._knows(name)}
            self._left_out.update(new)
            if new:
                share = sum(parameter.numel() for parameter in new.values()) / trained
                text = message.format(names=some(new, _NAMED), share=f"{share:.0%}")
                warnings.warn(text, UserWarning, stacklevel=5)

    def _find_left_out(self) -> Iterator[LeftOut]:
        if self._model is None:
            return iter(())
        layout = self._layout
        targets = {parameter: target.names[0] for parameter, target in (layout.targets or {}).items()}
        return left_out(self._model, self._target_modules, layout.given, targets, layout.computed, layout.name)

    def left_out(self) -> dict[str, str]:
        """By name, what is not decomposed although one might think so: why."""
        return {name: each.reason for each in self._find_left_out() for name in each.parameters}

    def loose(self) -> dict[str, str]:
        """By name, what the null space knows, but something moves that does not obey it: why."""
        return self._loose(self._coverage(), self._null_space or ())

    def _loose(self, coverage: Coverage, names: Iterable[str]) -> dict[str, str]:
        reasons = {name: coverage.loose(name, self._layout.side == "input") for name in names}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def why_not_decomposed(self, parameter: Tensor, group: Mapping[str, Any], left_out: Mapping[str, str]) -> str:
        """Why a parameter of a group is not trained inside subspaces, in a few words.

        Args:
            left_out: by name, what was found out already.
        """
        if not group["subspace"]:
            return "its group has subspace=False"
        if parameter.ndim < 2:
            return "it is a vector"
        if not parameter.is_floating_point() or not parameter.numel():
            return "it has no floating-point entries"
        if self._layout.targets is None:
            return f"rank={group['rank']} >= min(m, n) = {smaller_side(parameter)}"
        name = self._layout.name(parameter)
        return left_out.get(
            name, left_out.get(name.removesuffix(".weight"), "it is no weight of a layer that target_modules names")
        )

    def why_not_protected(self, parameter: Tensor) -> str | None:
        """Why a parameter's updates may go anywhere, in a few words; None if they may not, or nothing is protected."""
        if self._null_space is None or parameter in self._guard.held or self._guard.resting(parameter) is not None:
            return None
        if self._guard.knows(parameter):
            return "it takes the plain inner step, which does not obey null_space"
        return "null_space has nothing for it"

    def _coverage(self) -> Coverage:
        layout = self._layout
        targeted = [*layout.computed, *(name for target in (layout.targets or {}).values() for name in target.names)]
        return Coverage(self._model, layout.given, self._guard.held, layout.names, targeted)

    def _check_adapters(self, coverage: Coverage) -> None:
        """Raise if no adapter can have any effect: B A x of a frozen layer's x, where B may move along no A x."""
        held = [(parameter, kept) for parameter, kept in self._guard.held.items() if kept is not None]
        layers = {name: count >= dimension for parameter, (name, dimension, count) in held if parameter.ndim > 1}
        if not any(layers.values()):
            return
        adapters: dict[str, bool] = {}
        for name, stuck in layers.items():
            outer = coverage.adapter(name)
            if outer is not None:
                adapters[outer] = adapters.get(outer, False) or stuck
        if adapters and all(adapters.values()):
            stuck_layers = [name for name, stuck in layers.items() if stuck]
            raise ValueError(
                f"null_space protects all directions of {some(stuck_layers)}, so the adapters of "
                f"{some(list(adapters))} would never move: general text uses every direction between the factors of so "
                "small a rank. Train the layers themselves, whose updates are of low rank already (the model before "
                "get_peft_model, or after merge_and_unload); or raise the adapters' rank, or lower energy"
            )

    def _warn_loose(self, null_space: NullSpace, coverage: Coverage) -> None:
        """Name what the null space knows, but something moves that does not obey it."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, reason in self._loose(coverage, [name for name in null_space if name not in self._reported]).items():
            found[reason].append(name)
            self._reported.add(name)
        if found:
            listed = "; ".join(f"{some(names, _NAMED)}: {reason}" for reason, names in found.items())
            warnings.warn(
                f"null_space knows layers that nothing holds in it. {listed}. They are "
                "not protected: freeze what moves, decompose it, or collect a null space of the model as it is now",
                UserWarning,
                stacklevel=5,
            )

    def _moves_freely(self, parameter: Tensor) -> bool:
        """Whether nothing holds a parameter of the base optimizer, nobody has said so yet, and that is not meant."""
        if parameter in self._told or not self._layout.given[parameter] or not parameter.numel():
            return False
        if parameter in self._guard.held:
            uses = self._layout.uses.get(parameter, ())
            return parameter.ndim > 1 and not embeds_alone(uses) and not known_everywhere(uses, self._knows)
        name = self._layout.name(parameter)
        if not parameter.requires_grad:
            return True  # of which nobody speaks before it trains
        if name in self._left_out:
            return False
        above = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        # Of these it is told why nothing holds the layer; biases are not looked at there.
        return not any(self._knows(layer) and not is_bias(name[len(layer) + 1 :]) for layer in above)

    def _warn_free(self, free: list[Tensor], stacklevel: int) -> None:
        """Name what trains and is not held, with its share; what is frozen now is remembered."""
        self._frozen += [parameter for parameter in free if not parameter.requires_grad]
        training = [parameter for parameter in free if parameter.requires_grad]
        self._told.update(free)
        plain = [
            parameter for parameter in training if parameter not in self._guard.held and self._guard.knows(parameter)
        ]
        if plain:
            names = some([self._layout.name(parameter) for parameter in plain], _NAMED)
            warnings.warn(_SAID["plain"].format(names), UserWarning, stacklevel=stacklevel + 1)
        training = [parameter for parameter in training if all(parameter is not other for other in plain)]
        if not training:
            return
        trained = sum(parameter.numel() for parameter in self._layout.given if parameter.requires_grad)
        share = sum(parameter.numel() for parameter in training) / trained
        more = "" if self._target_modules == ALL_LINEAR else f", {self._target_modules!r}"
        call = f"gradsub.freeze_unprotected(model, null_space{more})"
        names = some([self._layout.name(parameter) for parameter in training], _NAMED)
        message = _FREE.format(names=names, share=f"{share:.1%}", call=call)
        warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)

    def check_unfrozen(self) -> None:
        """Before a step: name what was frozen when it was looked at, trains by now, and is not held."""
        if any(parameter.requires_grad for parameter in self._frozen):
            frozen, self._frozen = self._frozen, []
            self._warn_free(frozen, stacklevel=5)

    def _warn_protection(self) -> None:
        """Name all parameters since the last call whose protection is not what one might think."""
        new, self._looked = list(self._layout.given)[self._looked :], len(self._layout.given)
        found: dict[str, list[str]] = defaultdict(list)
        for parameter in new:
            known, held = self._guard.protecting(parameter), self._guard.held.get(parameter)
            if held is not None:
                name, dimension, count = held
                if count >= dimension:
                    found["no freedom"].append(f"{dimension} directions of {name}")
                if not count:
                    found["no direction"].append(name)
            elif known and parameter.ndim != 1 and parameter.requires_grad:
                found["plain"].append(self._layout.name(parameter))
                self._told.add(parameter)
            if held is None or parameter.ndim == 1:
                self._reported.update(known)
        for kind, names in found.items():
            warnings.warn(_SAID[kind].format(some(names, _NAMED)), UserWarning, stacklevel=5)
