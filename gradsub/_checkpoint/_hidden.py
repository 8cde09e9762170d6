"""State that a module keeps in plain attributes, of which its own `state_dict` does not know."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_STARTED = "started"


class ModuleState:
    """The state of a weighting that is a module: what its `state_dict` has, and what calling it changes besides.

    Some of TorchJD's weightings keep a moving average in an attribute, or in a buffer that is None before the first
    call. `expect` finds these out by trying: it calls a copy with two Gramians and looks at which attributes have
    become others. What a saved state holds then has the same names and shapes before the first call as after it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # By path: what the attribute was at first, and what it was after a call.
        self._hidden: dict[str, tuple[Any, Any]] = {}

    def expect(self, gramian: Tensor) -> None:
        """Find out what calling the module with such a Gramian changes; of one that takes something else, nothing."""
        if callable(expect := getattr(self._module, "expect", None)):
            expect(gramian)
            return
        before, tried = copy.deepcopy(self._module), copy.deepcopy(self._module)
        eye = torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
        with torch.random.fork_rng([gramian.device] if gramian.device.type == "cuda" else []), torch.no_grad():
            try:
                for Gramian in (eye, eye + 0.5):
                    tried(Gramian)
            except Exception:
                return  # a gate, or one of so many tasks only
        # A module whose own state has its shapes from the start is saved by it.
        shaped = _shapes(before.state_dict()) == _shapes(tried.state_dict())
        own = set(before.state_dict()) if shaped else set()
        first, after = dict(_attributes(before)), dict(_attributes(tried))
        for path, value in after.items():
            if path not in own and _is_plain(value) and not _same(first.get(path), value):
                self._hidden[path] = (first.get(path), value)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers; of what is not there before the first call, zeros."""
        known = {key: value for key, value in self._module.state_dict().items() if key not in self._hidden}
        if not self._hidden:
            return dict(known)
        now = dict(_attributes(self._module))
        changed = any(not _same(now.get(path), first) for path, (first, _) in self._hidden.items())
        found: dict[str, Any] = {_STARTED: int(changed)}
        for path, (_, like) in self._hidden.items():
            value = now.get(path)
            if isinstance(like, Tensor):
                found[path] = value.detach().clone() if isinstance(value, Tensor) else torch.zeros_like(like)
            elif _is_number(like):
                found[path] = value if _is_number(value) else type(like)(0)
        return {**known, **found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        known = {key: value for key, value in state.items() if key not in self._hidden and key != _STARTED}
        self._module.load_state_dict(known, strict=not self._hidden)
        for path, (first, like) in self._hidden.items():
            if not state[_STARTED]:
                value = copy.deepcopy(first)
            elif isinstance(like, Tensor):
                value = state[path].detach().clone().to(like)
            else:
                # What is neither, such as a shape and a dtype that were seen, is the same for every such Gramian.
                value = state[path] if _is_number(like) else copy.deepcopy(like)
            where, _, name = path.rpartition(".")
            setattr(self._module.get_submodule(where), name, value)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """By path: what lies in the module and in its parts, buffers included."""
    for where, part in module.named_modules():
        for name, value in (*vars(part).items(), *part._buffers.items()):
            if not name.startswith("__") and name not in _TORCHS:
                yield f"{where}.{name}" if where else name, value


_TORCHS = frozenset(vars(nn.Module()))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
        return alike and bool(torch.equal(one, other))
    return type(one) is type(other) and one == other


def _is_plain(value: Any) -> bool:
    """Whether two of them can be compared, and one of them kept."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value)) and not any(isinstance(each, Tensor) for each in value)
    return value is None or isinstance(value, (Tensor, numbers.Number, str, torch.dtype, torch.device))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number)


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.shape for key, value in state.items() if isinstance(value, Tensor)}
