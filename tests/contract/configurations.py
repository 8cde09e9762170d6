"""Every optimizer that torch ships, with every input and implementation of its own tests, and what does not apply."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import unittest
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings


def _optimizers_of_torch() -> list[Any]:
    """torch's list; its module also loads a package that is not installed, and forbids to set torch's backend flags."""
    missing = importlib.util.find_spec("expecttest") is None
    if missing:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    frozen = torch.backends.flags_frozen()
    try:
        from torch.testing._internal.common_optimizers import optim_db
    finally:
        if missing:
            del sys.modules["expecttest"]
        if not frozen:
            torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
        settings.load_profile("gradsub")  # the module chooses one of its own, for all tests
    return list(optim_db)


# Optimizers and options that `GemsOptimizer` refuses, with the error's words and the reason.
REFUSED = {
    "LBFGS": ("evaluates its closure several times", "captured gradients exist once"),
    "SparseAdam": ("does not support dense gradients", "projected gradients are dense"),
    "differentiable": (r"differentiable=True\) is not supported", "updates are made in place"),
    "lambd": ("with lambd=.* takes other steps", "ASGD shrinks the weight, which a proxy does not know"),
}


@dataclass(frozen=True)
class Configuration:
    """An optimizer class with options."""

    info: Any
    options: dict[str, Any]
    name: str

    def base(self, parameters: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
        """A new bare one; Muon takes matrices only."""
        mine = copy.deepcopy(self.options)
        found: torch.optim.Optimizer = self.info.optim_cls(parameters, **{**mine, **options})
        return found

    @property
    def refused(self) -> str | None:
        """The key in `REFUSED`."""
        name = self.info.optim_cls.__name__
        if name in REFUSED:
            return name
        if self.options.get("differentiable"):
            return "differentiable"
        return "lambd" if name == "ASGD" and self.options.get("lambd", 1e-4) else None

    @property
    def matrices_only(self) -> bool:
        return self.info.optim_cls.__name__ == "Muon"

    @property
    def ascends(self) -> bool:
        return bool(self.options.get("maximize"))


def all_configurations() -> list[Configuration]:
    """On the CPU; on other devices torch's list has more inputs, of ``capturable``."""
    found = []
    for info in _optimizers_of_torch():
        for given in info.optim_inputs_func(device="cpu"):
            flags = [flag for flag in info.supported_impls if flag != "fused" or "cpu" in info.supports_fused_on]
            off = dict.fromkeys(flags, False)
            for flag in (None, *flags):
                options = {**given.kwargs, **off, **({flag: True} if flag else {})}
                found.append(Configuration(info, options, f"{info.name}: {given.desc}{f', {flag}' if flag else ''}"))
        if info.name == "ASGD":
            # All of torch's inputs shrink the weight; without that ASGD is one as the others.
            found += [Configuration(info, {"lambd": 0.0, **more}, f"ASGD: without lambd {more}") for more in _ASGD]
    return found


_ASGD: list[dict[str, Any]] = [{}, {"foreach": True}, {"lr": 0.02, "weight_decay": 0.1, "maximize": True}]
EVERY = all_configurations()
WRAPPED = [each for each in EVERY if each.refused is None]
