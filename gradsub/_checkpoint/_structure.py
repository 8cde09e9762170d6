"""Whether a state dict has the groups, the parameters and the kinds of options of the optimizer at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradsub._checkpoint._converting import described, is_finite
from gradsub._state import group_parameters


def check_structure(saved: Any, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The saved numbers of the parameters, in their order.

    Raises:
        ValueError: the groups or the numbers are not those of the optimizer.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        found = list(saved)[:4] if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"state_dict must have 'state' and 'param_groups', found {found}: pass what state_dict() gave")
    theirs, states = saved["param_groups"], saved["state"]
    if not isinstance(theirs, (list, tuple)) or not isinstance(states, Mapping):
        raise ValueError(
            f"state_dict: 'param_groups' must be a list and 'state' a dict, found {type(theirs).__name__} and "
            f"{type(states).__name__}: pass what state_dict() gave"
        )
    for position, group in enumerate(theirs):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"state_dict: param_groups[{position}] must be a dict with a list of 'params'")
    order = [index for group in theirs for index in group["params"]]
    count = len(group_parameters(groups))
    if len(order) != count:
        raise ValueError(f"state_dict has {len(order)} parameters, the optimizer has {count}: load the same model")
    if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in groups]:
        raise ValueError(
            f"state_dict has parameter groups of {[len(group['params']) for group in theirs]} parameters, the "
            f"optimizer of {[len(group['params']) for group in groups]}: build it with the same groups"
        )
    if any(not isinstance(index, (int, str)) for index in order) or len(set(order)) != count:
        raise ValueError(f"state_dict: 'params' must be different numbers (or names), found {order}")
    for index, held in states.items():
        if index not in order:
            raise ValueError(
                f"state_dict has a state of {index!r}, but its groups know only {order[:4]}{' ...' * (count > 4)}: "
                "keys of 'state' are the numbers in 'params' (JSON makes strings of them)"
            )
        if not isinstance(held, Mapping):
            raise ValueError(f"state_dict: the state of parameter {index!r} is {described(held)}, expected a dict")
    return order


def check_option(what: str, there: Any, here: Any) -> None:
    """Raise if an option is of another kind than here, or not finite."""
    kinds = [(bool, type(None)), (int, float, Tensor), (str, type(None)), (list, tuple)]
    number = isinstance(here, (int, float, Tensor)) and not isinstance(here, bool)
    kind = (int, float, Tensor, type(None)) if number else next((k for k in kinds if isinstance(here, k)), object)
    # None stands for "the default" in many places; the base optimizer itself judges that.
    if here is None:
        fits = not isinstance(there, Mapping)
    else:
        fits = isinstance(there, kind) and not (number and isinstance(there, bool))
    if isinstance(here, (list, tuple)):
        fits = fits and len(there) == len(here)
    if not fits:
        raise ValueError(f"state_dict: {what} is {here!r} here: that is another kind of value")
    if not is_finite(there) and is_finite(here):
        raise ValueError(f"state_dict: {what} is not finite")
