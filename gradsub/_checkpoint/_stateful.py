"""The state of callables that weigh the tasks (a surgery, a gate), which a resume needs as much as any moment."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsub._checkpoint._hidden import ModuleState

# A callable holds another one, that a generator: deeper ones are somebody else's.
_DEEPEST = 4


class Stateful:
    """What of callables has state: random generators, and objects that have `state_dict` and `load_state_dict`.

    They are looked for in the callables themselves, in the arguments that a ``functools.partial`` binds, in the object
    of a bound method, in the variables of a closure and in attributes. A model or an optimizer that holds some of the
    trained parameters is saved elsewhere and left alone.

    Args:
        callables: by the arguments that they were given as, with which their keys begin.
        parameters: those that are trained.
    """

    def __init__(self, callables: Mapping[str, Any], parameters: Collection[Tensor]) -> None:
        trained = {id(parameter) for parameter in parameters}
        self._parts = {argument: dict(_parts(each, argument, trained, set())) for argument, each in callables.items()}

    def expect(self, gramian: Tensor) -> None:
        """Let the parts whose state depends on the number of tasks learn it now: its shapes must not depend on data.

        A distributed checkpoint is read into the state that is there.
        """
        for part in self._all().values():
            expect = getattr(part, "expect", None)
            if expect is not None and _is_stateful(part):
                expect(gramian)

    def state(self) -> dict[str, Any]:
        """A copy of all state: tensors and numbers under flat keys, which every kind of checkpoint can hold."""
        return _flat_all(self._all())

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; a callable of which there is no state, or is none to be loaded, is named.

        Raises:
            ValueError: other keys, or values that a part refuses; nothing was changed.
        """
        chosen: dict[str, Any] = {}
        for argument, parts in self._parts.items():
            there, here = ({key for key in keys if key.split(".")[0] == argument} for keys in (saved, _flat_all(parts)))
            if bool(there) != bool(parts):
                warnings.warn(
                    f"the state_dict has no state of {argument}=, as an earlier version's, or one without state: it "
                    "begins anew"
                    if parts
                    else f"the state_dict has a state of {argument}=, but {argument}= here has none",
                    stacklevel=4,
                )
                continue
            if there != here:
                raise ValueError(
                    f"state_dict: {argument} has the state {sorted(there)} there and {sorted(here)} here: pass the "
                    f"same {argument}=, or remove these keys from the state_dict to begin it anew"
                )
            chosen.update(parts)
        before = copy.deepcopy({path: _state_of(part) for path, part in chosen.items()})
        try:
            for path, part in chosen.items():
                mine = saved[path] if isinstance(part, torch.Generator) else _nested(path, part.state_dict(), saved)
                _check_like(f"{path!r}", mine, _state_of(part))
                _load(part, mine)
        except Exception as error:
            for loaded, state in before.items():
                _load(chosen[loaded], state)
            raise ValueError(f"state_dict: the state of {path.split('.')[0]} does not fit {path!r}: {error}") from error

    def _all(self) -> dict[str, Any]:
        return {path: part for parts in self._parts.values() for path, part in parts.items()}


def _parts(
    thing: Any, path: str, trained: Collection[int], seen: set[int], depth: int = 0
) -> Iterator[tuple[str, Any]]:
    if id(thing) in seen or isinstance(thing, (type, Tensor)) or _holds(thing, trained):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Generator):
        yield path, thing
    elif _is_stateful(thing):
        yield path, ModuleState(thing) if isinstance(thing, nn.Module) else thing
    elif depth < _DEEPEST:
        for name, part in _inside(thing):
            yield from _parts(part, f"{path}.{name}", trained, seen, depth + 1)


def _holds(thing: Any, trained: Collection[int]) -> bool:
    """Whether a model, an optimizer or a schedule has some of the trained parameters."""
    if isinstance(thing, nn.Module):
        return any(id(parameter) in trained for parameter in thing.parameters())
    optimizer = getattr(thing, "optimizer", thing)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return False
    return any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"])


def _is_stateful(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _inside(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object refers to, by name."""
    if isinstance(thing, functools.partial):
        yield "func", thing.func
        yield from ((str(i), value) for i, value in enumerate(thing.args))
        yield from thing.keywords.items()
    elif inspect.ismethod(thing):
        yield "self", thing.__self__
    elif inspect.isfunction(thing):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        yield from ((f"default{i}", value) for i, value in enumerate(thing.__defaults__ or ()))
        yield from (thing.__kwdefaults__ or {}).items()
    elif isinstance(thing, Mapping):
        yield from ((str(key), value) for key, value in thing.items())
    elif isinstance(thing, (list, tuple)):
        yield from ((str(i), value) for i, value in enumerate(thing))
    elif hasattr(thing, "__dict__") and not inspect.ismodule(thing):
        yield from vars(thing).items()
        if hasattr(thing, "__wrapped__"):
            yield "wrapped", thing.__wrapped__


def _state_of(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _load(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    else:
        part.load_state_dict(state)


def _flat_all(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for path, part in parts.items() for key, value in _flat(path, _state_of(part)).items()}


def _flat(path: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: leaf for name, inner in value.items() for key, leaf in _flat(f"{path}.{name}", inner).items()}
    return {path: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)}


def _nested(path: str, like: Any, saved: Mapping[str, Any]) -> Any:
    """The inverse of `_flat`, for a state of the structure of ``like``."""
    if isinstance(like, Mapping):
        return {name: _nested(f"{path}.{name}", value, saved) for name, value in like.items()}
    return saved[path]


def _check_like(what: str, value: Any, like: Any) -> None:
    """Raise a ValueError if a tensor is none, of another shape, or not finite; objects check the rest themselves."""
    if isinstance(like, Mapping):
        for name in like:
            _check_like(f"{what}.{name}", value[name], like[name])
    elif isinstance(like, Tensor):
        if not isinstance(value, Tensor):
            raise ValueError(f"{what} is a {type(value).__name__}, expected a tensor")
        if value.shape != like.shape or value.dtype.is_floating_point != like.dtype.is_floating_point:
            raise ValueError(
                f"{what} is a {value.dtype} tensor of shape {tuple(value.shape)} there and a {like.dtype} tensor of "
                f"shape {tuple(like.shape)} here"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{what} holds NaN or Inf")
    elif isinstance(like, (int, float)) and (not isinstance(value, (int, float)) or value != value):
        raise ValueError(f"{what} is {value!r}, expected a number")
