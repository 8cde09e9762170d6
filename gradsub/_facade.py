"""The base optimizer as others see it once it is wrapped: what is asked of it, its wrapper does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["put_before"]

_ASKED = ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict")


def put_before(base: Optimizer, wrapper: Optimizer) -> None:
    """Let ``wrapper`` do what schedulers, trainers and loops ask of ``base``, and show them its groups.

    Left to itself, ``base.step()`` would step whole weights by nothing, and a scheduler would steer nobody. Calling it
    again, after a copy or a load, does no harm.
    """
    base.param_groups = wrapper.param_groups
    if getattr(base, "_step_supports_amp_scaling", False):
        base._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # or GradScaler unscales nothing
    for name in _ASKED:
        there = getattr(base, name, None)
        if isinstance(vars(base).get(name), _Forwarded) and vars(base)[name].wrapper() is wrapper:
            continue
        setattr(base, name, _Forwarded(base, wrapper, name, scheduled=hasattr(there, "_wrapped_by_lr_sched")))


class _Forwarded:
    """A method of the base optimizer that calls the wrapper's; neither keeps the other alive."""

    def __init__(self, base: Optimizer, wrapper: Optimizer, name: str, scheduled: bool) -> None:
        self.wrapper = weakref.ref(wrapper)
        self.__name__ = name
        self._base = type(base).__name__
        if scheduled:
            # A scheduler that was built earlier looks for its mark and warns if it is gone.
            self._wrapped_by_lr_sched = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wrapper = self.wrapper()
        if wrapper is None:
            raise RuntimeError(
                f"{self._base}.{self.__name__}(): this optimizer was wrapped in a GemsOptimizer that is gone; keep the "
                "GemsOptimizer and use that, or build a new base optimizer"
            )
        return getattr(wrapper, self.__name__)(*args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a bound method has it: a scheduler takes it, and calls it with the optimizer."""

        def call(base: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return call
