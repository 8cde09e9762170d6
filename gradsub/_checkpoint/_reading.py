from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsub import _settings as settings
from gradsub._blocks import Blocks
from gradsub._checkpoint._bases import check_bases
from gradsub._checkpoint._converting import ANYTHING, check_usual, convert, count_of, described, is_finite
from gradsub._checkpoint._stand_in import refusal, stepped_state, upgraded
from gradsub._checkpoint._structure import check_option, check_structure
from gradsub._layout import Layout
from gradsub._state import INNER, group_parameters, is_weighing, loaded_inner, take_shards
from gradsub.inner import Inner
from gradsub.subspace import SKETCHES, Layer, Protected, SubspaceBank, is_distributed, orthonormality
from gradsub.update import ANCHOR, FREE, MASTER, PENDING_DECAY, PROTECTED

NULL_SPACE = frozenset({ANCHOR, FREE, PROTECTED})

# What says how the layers were built: compared by what it comes to, and then kept as it is here.
_STRUCTURE = frozenset({"params", "tasks", "side", "subspace", "rank", "task_rank"})


@dataclass
class Loaded:
    """What to go on from; every tensor is a copy, in the dtype and the memory format, and where, it is used here.

    Attributes:
        weighing: the state of the callables that weigh the tasks.
    """

    groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]
    weighing: dict[str, Any]


class StateDictReader:
    """Makes of a state dict what an optimizer goes on from, or says why that cannot be.

    Args:
        state: the optimizer's, which says what is expected.
        begins_anew: whether a new basis resets the base optimizer's state.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Any],
        blocks: Blocks,
        layout: Layout,
        bank: SubspaceBank,
        inner: Inner,
        begins_anew: bool,
    ) -> None:
        self._begins_anew = begins_anew
        self._groups = groups
        self._state = state
        self._layers = blocks.layers
        self._proxies = blocks.proxies_of
        self._layout = layout
        self._bank = bank
        self._inner = inner
        self._weighing: dict[str, Any] = {}
        self._trials: dict[Any, dict[str, Any]] = {}

    def read(self, saved: Any) -> Loaded:
        """Check and convert.

        Raises:
            ValueError: naming the parameter, or the group, the key, what was found and what was expected.
        """
        order = check_structure(saved, self._groups)
        _check_origin(saved["state"])
        saved = take_shards(saved, self._groups, self._layers)
        groups = [
            self._options(position, theirs, ours)
            for position, (theirs, ours) in enumerate(zip(saved["param_groups"], self._groups, strict=True))
        ]
        options = [group for group in groups for _ in group["params"]]
        entries = {
            index: (parameter, self._entry(index, group, parameter, saved["state"].get(index, {})))
            for index, group, parameter in zip(order, options, group_parameters(self._groups), strict=True)
        }
        state: dict[Tensor, dict[str, Any]] = dict(entries[index] for index in saved["state"])
        # What is frozen has no state in distributed checkpoints, as everywhere in torch.
        state.update(entry for index, entry in entries.items() if index not in saved["state"] and entry[1])
        return Loaded(groups, state, self._weighing)

    # --- options -----------------------------------------------------------------------------------------------------

    def _options(self, position: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        """The group as it is here, with all that the saved one says of it."""
        where = f"of param_groups[{position}]"
        for option in ("tasks", "side"):
            there, here = theirs.get(option, ours[option]), ours[option]
            if not isinstance(there, (str, list, tuple)) or list(there) != list(here):
                raise ValueError(f"state_dict: {option} is {there!r} there and {here!r} here: use the same")
        names = theirs.get("param_names", ours.get("param_names"))
        if "param_names" in theirs and (not isinstance(names, (list, tuple)) or len(names) != len(ours["params"])):
            raise ValueError(
                f"state_dict: param_names={names!r} {where} must name its {len(ours['params'])} parameters"
            )
        for key in theirs.keys() & ours.keys() - {"params", "param_names", "tasks", "side"}:
            check_option(f"{key}={theirs[key]!r} {where}", theirs[key], ours[key])
        merged = {**ours, **copy.deepcopy({key: value for key, value in theirs.items() if key != "params"})}
        try:
            settings.check_group(merged)
        except ValueError as error:
            raise ValueError(f"state_dict: {error} ({where.removeprefix('of ')})") from None
        for parameter in ours["params"]:
            layer = self._layers.get(parameter)
            widths = None if layer is None else self._layout.widths(parameter, merged)
            if layer is not None and widths != layer.widths:
                there, here = ((layer.dimension, sum(ranks or ())) for ranks in (widths, layer.widths))
                raise ValueError(
                    f"state_dict: 'basis' of {layer.name} has shape {there} there and {here} here, for subspaces of "
                    f"the ranks {widths} and {layer.widths}: use the same rank and task_rank"
                )
        given = upgraded(self._inner.base, settings.base_options(merged))
        proven = settings.base_options(ours)
        stepped = [proxy for parameter in ours["params"] for proxy in self._proxies(parameter).values()][:1]
        refused = next((refusal(self._inner.base, given, proven, proxy) for proxy in stepped), None)
        if refused is not None:
            raise ValueError(
                f"state_dict: the options {where} are none of {type(self._inner.base).__name__}'s: {refused}"
            )
        return {**merged, **given, **{key: ours[key] for key in _STRUCTURE}}

    # --- state -------------------------------------------------------------------------------------------------------

    def _entry(
        self, index: Any, group: Mapping[str, Any], parameter: Tensor, theirs: Mapping[str, Any]
    ) -> dict[str, Any]:
        layer = self._layers.get(parameter)
        name = self._layout.name(parameter) if layer is None else layer.name
        ours = self._state.get(parameter, {})
        for key in theirs:
            if not isinstance(key, str):
                raise ValueError(f"state_dict: {key!r} is no key of the state of {name}: keys are strings")
        self._set_aside(name, {key: value for key, value in theirs.items() if is_weighing(key)})
        theirs = {key: value for key, value in theirs.items() if not is_weighing(key)}
        if layer is not None and not theirs and not parameter.requires_grad:
            return {key: value for key, value in ours.items() if not is_weighing(key)}
        if layer is not None and not theirs:
            raise ValueError(f"state_dict lacks the state of {name}, parameter {index!r}: pass what state_dict() gave")
        if (layer is not None) != ("basis" in theirs):
            there, here = ("a plain", "a decomposed") if layer is not None else ("a decomposed", "a plain")
            raise ValueError(
                f"state_dict: {name} is {there} parameter there and {here} one here: save it from a GemsOptimizer with "
                "the same rank, target_modules and subspace options"
            )
        found = self._own(name, layer, parameter, theirs, ours)
        found.update(self._of_inner(name, layer, group, parameter, {**theirs, **found}))
        if layer is not None:
            check_bases(layer, found, self._bank, group["update_proj_gap"])
            self._check_steps(name, layer, found)
        return {key: found[key] for key in (*theirs, *found) if key in found}

    def _set_aside(self, name: str, weighing: Mapping[str, Any]) -> None:
        """The state of surgery and gate is beside that of any one parameter: hooks may have renumbered them."""
        twice = sorted(weighing.keys() & self._weighing.keys())
        if twice:
            raise ValueError(f"state_dict: {twice[0]!r} is in the state of {name} and of another parameter: remove one")
        self._weighing.update(weighing)

    def _own(
        self, name: str, layer: Layer | None, parameter: Tensor, theirs: Mapping[str, Any], ours: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is not the base optimizer's."""
        expected = {key: value for key, value in ours.items() if not key.startswith(INNER) and not is_weighing(key)}
        optional = NULL_SPACE | SKETCHES | {PENDING_DECAY} if layer is not None else frozenset({PROTECTED})
        given = {key for key in theirs if not key.startswith(INNER)}
        found = {
            key: convert(f"{key!r} of {name}", theirs[key], expected[key], parameter)
            for key in expected
            if key in given and key not in optional
        }
        missing, extra = expected.keys() - given - optional, given - expected.keys() - optional
        if missing or extra:
            raise ValueError(
                f"state_dict: {name} {_difference(missing, extra)}: use the same gate and master_weights, and what "
                "GemsOptimizer.state_dict() gave"
            )
        if PENDING_DECAY in expected and PENDING_DECAY in theirs:
            found[PENDING_DECAY] = share = convert(
                f"{PENDING_DECAY!r} of {name}", theirs[PENDING_DECAY], expected[PENDING_DECAY], parameter
            )
            given_as = theirs[PENDING_DECAY]
            whole = isinstance(given_as, Tensor) and not given_as.is_floating_point()
            if whole or not 0 <= float(share) <= 1:
                raise ValueError(
                    f"state_dict: {PENDING_DECAY!r} of {name} is {described(given_as)}: it must be a share from 0 to 1"
                )
        found.update(self._protection(name, layer, parameter, theirs))
        if layer is not None and layer.sketched:
            pair = {key for key in SKETCHES if key in theirs}
            # Version 0.1 knew no "usable".
            if pair and not pair >= SKETCHES - {"usable"}:
                raise ValueError(f"state_dict: {name} lacks {sorted(SKETCHES - pair)}, but has {sorted(pair)}")
            for key in pair:
                found[key] = convert(f"{key!r} of {name}", theirs[key], ours[key], parameter)
        return found

    def _protection(
        self, name: str, layer: Layer | None, parameter: Tensor, theirs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is protected may be more, or less, than it is here."""
        wanted = NULL_SPACE if layer is not None else {PROTECTED}
        given = {key for key in wanted if key in theirs}
        if not given:
            return {}
        if len(given & {FREE, PROTECTED}) != 1:
            raise ValueError(f"state_dict: {name} has {sorted(given)}, expected one of {FREE!r} and {PROTECTED!r}")
        key = FREE if FREE in given else PROTECTED
        K = theirs[key]
        dimension = layer.dimension if layer is not None else parameter.numel()
        if not isinstance(K, Tensor) or K.ndim != 2 or K.shape[0] != dimension or K.shape[1] > dimension:
            raise ValueError(
                f"state_dict: {key!r} of {name} is {described(K)}, expected at most {dimension} directions of "
                f"length {dimension}"
            )
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        like = torch.zeros(K.shape, dtype=dtype, device=parameter.device)
        directions = convert(f"{key!r} of {name}", K, like, parameter)
        eye = torch.eye(K.shape[1], dtype=dtype, device=parameter.device)
        if K.shape[1] and float((directions.mT @ directions - eye).abs().max()) > orthonormality(dtype):
            raise ValueError(f"state_dict: {key!r} of {name} has no orthonormal columns: it is damaged")
        if layer is None:
            return {PROTECTED: directions}
        found = {}
        protected = Protected(directions, key == FREE)
        if ANCHOR in given:
            (rows, columns), count = layer.shape, dimension - protected.free
            shape = (rows, count) if layer.axis == 1 else (count, columns)
            found[ANCHOR] = convert(f"'anchor' of {name}", theirs[ANCHOR], like.new_zeros(shape), parameter)
        kept = self._layout.guard.keep(protected, parameter)
        return {**found, FREE if kept.complement else PROTECTED: kept.directions}

    def _of_inner(
        self, name: str, layer: Layer | None, group: Mapping[str, Any], parameter: Tensor, theirs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The base optimizer's state of a parameter, or of its proxies."""
        left = {key for key in theirs if key.startswith(INNER)}
        found: dict[str, Any] = {}
        prefixes = list(self._proxies(parameter))
        for subspace, (prefix, proxy) in enumerate(self._proxies(parameter).items()):
            start = f"{INNER}{prefix}"
            mine = {f"{start}{key}" for key in loaded_inner(theirs, prefix, prefixes)}
            left -= mine
            shape = parameter.shape if layer is None else torch.Size(layer.coordinates(subspace))
            ours = loaded_inner(self._state.get(parameter, {}), prefix, prefixes)
            like = ours if self._inner.populated(proxy) else {}
            if not mine and not (like and parameter.requires_grad) and not self._has_stepped(layer, subspace, theirs):
                continue  # frozen, or an optimizer whose state begins with its first step
            strict = bool(like)
            if not strict and not is_distributed(parameter):
                like = self._trial(group, proxy, shape)
            expected = {f"{start}{key}": value for key, value in like.items()}
            missing, extra = expected.keys() - mine, (mine - expected.keys()) if strict else set()
            if missing or extra:
                remedy = "wrap the same optimizer with the same options"
                if not mine:
                    remedy = (
                        "it trains here, and was frozen there or stepped by another optimizer: freeze what was frozen "
                        f"before the optimizer is built, as freeze_unprotected does, or {remedy}"
                    )
                raise ValueError(
                    f"state_dict: the base optimizer's state of {name} {_difference(missing, extra)}: {remedy}"
                )
            device = parameter.device if group.get("fused") or group.get("capturable") else None
            usual = self._trial(group, proxy, torch.Size([4, 6] if len(shape) > 1 else [6]))
            for key in mine:
                seen, what = usual.get(key.removeprefix(start)), f"{key!r} of {name}"
                found[key] = convert(
                    what, theirs[key], expected.get(key, ANYTHING), parameter, device, finite=is_finite(seen)
                )
                check_usual(f"state_dict: {what}", found[key], seen)
        if left:
            raise ValueError(
                f"state_dict: the base optimizer's state of {name} {_difference(set(), left)}: use the same tasks and "
                "base optimizer"
            )
        return found

    def _has_stepped(self, layer: Layer | None, subspace: int, theirs: Mapping[str, Any]) -> bool:
        """Whether a saved layer shows that the base optimizer had stepped in a subspace, and not begun anew since."""
        if layer is None or layer.sketched or self._begins_anew:
            return False
        due, basis = theirs["next_refresh"], theirs["basis"]
        return bool(due[subspace] > 0) and bool((basis[:, layer.columns(subspace)] != 0).any())

    def _trial(self, group: Mapping[str, Any], proxy: Tensor, shape: torch.Size) -> dict[str, Any]:
        """The state that the base optimizer has of such a parameter once it has stepped, found out by stepping one."""
        options = settings.base_options(group)
        key = id(group), shape, proxy.dtype, proxy.device
        if key not in self._trials:
            try:
                self._trials[key] = stepped_state(self._inner.base, options, shape, proxy)
            except Exception:
                self._trials[key] = {}  # it does not step on its own: nothing is known of its state
        return self._trials[key]

    def _check_steps(self, name: str, layer: Layer, found: Mapping[str, Any]) -> None:
        """The base optimizer cannot have stepped more often than the layer."""
        taken = float(found["step"])
        for prefix in self._proxies(layer.parameter):
            key = f"{INNER}{prefix}step"
            value = found.get(key)
            if isinstance(value, (Tensor, float, int)) and count_of(value) == 1 and float(value) > taken + 1:
                raise ValueError(
                    f"state_dict: {key!r} of {name} is {float(value):g}, but the layer took {taken:g} steps"
                )


def _check_origin(state: Mapping[Any, Any]) -> None:
    """Raise a ValueError if another optimizer wrote it: a `GemsOptimizer` marks what is its base optimizer's."""
    keys = {key for entry in state.values() for key in entry if isinstance(key, str)}
    own = NULL_SPACE | SKETCHES | {PENDING_DECAY, MASTER, "basis"}
    if any(key in own or key.startswith(INNER) or is_weighing(key) for key in keys) or not keys:
        return
    raise ValueError(
        f"state_dict: it is a checkpoint of another optimizer, whose state is {sorted(keys)}; that of a GemsOptimizer "
        f"has bases, and the base optimizer's state under keys that begin with {INNER!r}. Load the model's weights of "
        "that checkpoint, and begin with a new state of the optimizer"
    )


def _difference(missing: set[str] | frozenset[str], extra: set[str]) -> str:
    parts = [f"{verb} {sorted(keys)}" for verb, keys in (("lacks", missing), ("has in addition", extra)) if keys]
    return " and ".join(parts)
