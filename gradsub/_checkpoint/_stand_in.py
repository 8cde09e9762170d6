"""A stand-in for a base optimizer: of its class, with other parameters; it shows what the optimizer itself would do."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub._probe import base_step

TRIAL_STEPS: Final = 2


def stepped_state(base: Optimizer, options: Mapping[str, Any], shape: torch.Size, like: Tensor) -> dict[str, Any]:
    """The state that ``base`` has of a parameter after `TRIAL_STEPS` steps, in both directions.

    Args:
        like: has the parameter's dtype and device.

    Raises:
        Exception: whatever it raises where it cannot step on its own, or not with these options.
    """
    parameter = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
    stand_in = _stand_in(base, options, parameter)
    signs = 1 - 2 * (torch.arange(parameter.numel(), device=like.device) % 2).view(shape)
    with torch.random.fork_rng([like.device] if like.is_cuda else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for direction in range(TRIAL_STEPS):
            parameter.grad = signs.to(like.dtype) * (1 - 2 * direction)
            base_step(stand_in)
    return dict(stand_in.state.get(parameter, {}))


def upgraded(base: Optimizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Saved hyper-parameters as the class of ``base`` takes them up when it loads."""
    stand_in = _stand_in(base, {})
    try:
        stand_in.__setstate__({"state": defaultdict(dict), "param_groups": [{**options, "params": []}]})
    except Exception:
        return dict(options)  # what is wrong with them, `refusal` says
    return {key: value for key, value in stand_in.param_groups[0].items() if key != "params"}


def refusal(base: Optimizer, options: Mapping[str, Any], proven: Mapping[str, Any], like: Tensor) -> str | None:
    """What ``base`` says against hyper-parameters, when it is built of them and when it steps; None if nothing.

    Args:
        proven: others that are in use; where these fail as well, nothing can be said.
        like: a parameter that they are for.
    """
    accepted = inspect.signature(type(base)).parameters.keys() - {"params"}

    def build(options: Mapping[str, Any]) -> None:
        given = {key: value for key, value in options.items() if key in accepted}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            type(base)([nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))], **given)

    def step(options: Mapping[str, Any]) -> None:
        stepped_state(base, options, torch.Size([4, 6]), like)

    for use in (build, step):
        refused = _failure(use, options)
        if refused is not None and _failure(use, proven) is None:
            return refused
    return None


def _failure(use: Callable[[Mapping[str, Any]], None], options: Mapping[str, Any]) -> str | None:
    try:
        use(options)
    except Exception as error:
        return str(error) or repr(error)
    return None


def _stand_in(base: Optimizer, options: Mapping[str, Any], *parameters: Tensor) -> Optimizer:
    """An optimizer like ``base``, with other parameters and no state."""
    stand_in: Optimizer = object.__new__(type(base))
    attributes = vars(base).items()
    stand_in.__dict__.update({k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in attributes})
    stand_in.state = defaultdict(dict)
    stand_in.param_groups = [{**copy.deepcopy(dict(options)), "params": list(parameters)}]
    return stand_in
