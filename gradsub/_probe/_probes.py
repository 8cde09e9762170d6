"""What is asked of a base optimizer before it is wrapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsub._probe._runs import alike, close
from gradsub._probe._trial import COLUMNS, MORE_STEPS, ROWS, STEPS, Decay, Moment, Trial
from gradsub._probe._twin import Options, Sample

_SIZE: Final = (
    0.05  # how well sizes of steps have to agree: Newton-Schulz iterations leave singular values of .7 to 1.2
)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Traits:
    """What the wrapper has to know of a base optimizer under a group's options.

    Attributes:
        relative: the step's length follows the parameter's, so a proxy has to start as the weight's coordinates.
        decay: what ``weight_decay`` does: ``"coupled"``: it times the weight joins the gradient; ``"rate"``: lr times
            it is taken off the weight; ``"fixed"``: it is; ``"none"``: nothing; ``"other"``: something else.
        counters: options that the optimizer itself changes in a step.
        entrywise: each entry is stepped by itself, so that many matrices can be stepped as one stack.
        moments: by name, what of the state is a ``"first"`` or a ``"second"`` moment, or the ``"root"`` of one.
        unknown: what else of the state has a place for each entry and depends on the gradients.
    """

    relative: bool
    decay: Decay
    counters: frozenset[str]
    entrywise: bool = False
    moments: Mapping[str, Moment] = field(default_factory=dict)
    unknown: frozenset[str] = frozenset()


# Of a group in which nothing can have a proxy.
PLAIN = Traits(relative=False, decay="rate", counters=frozenset())


def pattern(option: str, value: Any) -> Any:
    """What of an option decides which terms a step has: whether a number is 0, and every choice.

    A schedule changes numbers in every step; a term that was switched off appears when one leaves 0.
    """
    if isinstance(value, (tuple, list)):
        return tuple(pattern(option, item) for item in value)
    if isinstance(value, (str, bool)) or value is None:
        return value
    if option in ("lr", "weight_decay"):
        return "number"
    # Reading a tensor would wait for the device.
    return value != 0 if isinstance(value, (int, float)) else type(value).__name__


def patterns(options: Options) -> frozenset[tuple[str, Any]]:
    """The `pattern` of all options."""
    return frozenset((key, pattern(key, value)) for key, value in options.items())


class Probes:
    """Runs copies of a base optimizer on a small matrix; groups whose options have one `pattern` share a result.

    Nothing of the optimizer, no random number generator and no hook is touched. It costs some 120 steps of one matrix.
    Each question is about a group: its options, its parameters, and what the optimizer put into the states of these
    when it was built.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._answers: dict[Any, Any] = {}

    def _ask(
        self,
        what: str,
        question: Callable[[Optimizer, Options, Sample], Answer],
        options: Options,
        parameters: Sequence[Tensor],
        states: Mapping[Tensor, Any],
    ) -> Answer:
        key = what, patterns(options)
        if key not in self._answers:
            self._answers[key] = question(self._base, options, _sample(parameters, states))
        answer: Answer = self._answers[key]
        return answer

    def traits(self, options: Options, parameters: Sequence[Tensor], states: Mapping[Tensor, Any]) -> Traits:
        """Compare steps from one place, and on from there, with steps from 0 each time, as inside a subspace.

        Of an optimizer that can be wrapped they are the same.

        Raises:
            ValueError: steps need a closure, or depend on where the parameter stands or started otherwise than by a
                length that is a continuous function of the parameter's.
        """
        return self._ask("traits", _traits, options, parameters, states)

    def check_group_count(
        self, options: Options, parameters: Sequence[Tensor], states: Mapping[Tensor, Any], count: int
    ) -> None:
        """Raise if the optimizer keeps something for each of its groups, and would be given more of them.

        Raises:
            ValueError: with so many groups it raises, or leaves some out, and with its own number it does not.
        """
        trial = Trial(self._base, options, _sample(parameters, states))
        own = len(self._base.param_groups)
        fault = trial.fault_of_groups(count) if count > own else None
        if fault is not None and trial.fault_of_groups(own) is None:
            raise ValueError(
                f"base={trial.name} keeps a list with an entry for each parameter group ({fault}), and is given "
                f"{count} groups in the place of {own}, because it steps the decomposed weights of a group apart from "
                "its other parameters: put biases and other vectors into parameter groups of their own, or wrap "
                "another optimizer"
            )

    def rows_are_independent(
        self, options: Options, parameters: Sequence[Tensor], states: Mapping[Tensor, Any]
    ) -> bool:
        """Whether some rows of a matrix are stepped alone as they are with the others."""
        return self._ask("rows", _rows_are_independent, options, parameters, states)

    def odd_size(self, options: Options, parameters: Sequence[Tensor], states: Mapping[Tensor, Any]) -> str | None:
        """Why the root mean square of a step's entries is not the same for every gradient and shape; None if it is."""
        traits = self.traits(options, parameters, states)
        return self._ask("odd size", partial(_odd_size, traits), options, parameters, states)


def _rows_are_independent(base: Optimizer, options: Options, sample: Sample) -> bool:
    whole = Trial(base, options, sample).from_zero(STEPS).steps
    part = Trial(base, options, sample, rows=ROWS // 2).from_zero(STEPS).steps
    return all(close(a[: ROWS // 2], b) for a, b in zip(whole, part, strict=True))


def _odd_size(traits: Traits, base: Optimizer, options: Options, sample: Sample) -> str | None:
    if traits.relative:
        return "are as long as the parameter is"
    trial = Trial(base, options, sample)
    steps, larger = (trial.from_zero(STEPS, factor=factor).steps for factor in (1.0, 16.0))
    # Past the warm-up of RAdam.
    if not all(close(a, b, tolerance=_SIZE) for a, b in zip(steps[STEPS // 2 :], larger[STEPS // 2 :], strict=True)):
        return "follow the size of the gradient"
    if not traits.entrywise:
        narrow = Trial(base, options, sample, columns=COLUMNS // 2).from_zero(STEPS).steps
        whole, part = (torch.stack(found).square().mean().sqrt() for found in (steps, narrow))
        if not close(whole, part, tolerance=_SIZE):
            return "have entries whose size depends on the shape of the matrix"
    return None


def _entries_are_independent(base: Optimizer, options: Options, sample: Sample) -> bool:
    """Whether a stack of two matrices is stepped as each of them alone, with state of its own shape or one number."""
    try:
        stack = Trial(base, options, sample, stacked=True).from_zero(STEPS)
    except ValueError:  # it wants matrices
        return False
    part = Trial(base, options, sample, rows=ROWS // 2).from_zero(STEPS)
    shape = stack.steps[0].shape
    if not all(kept.numel() == 1 or kept.shape == shape for kept in stack.kept):
        return False
    return all(close(a[0], b) for a, b in zip(stack.steps, part.steps, strict=True))


def _traits(base: Optimizer, options: Options, sample: Sample) -> Traits:
    trial = Trial(base, options, sample)
    inside, alone = trial.from_zero(STEPS), trial.alone(STEPS)
    if not inside.moved and not alone.moved:
        inside, alone = trial.from_zero(MORE_STEPS), trial.alone(MORE_STEPS)
        if not inside.moved:
            raise ValueError(
                f"base={trial.name} does not move what is in its param_groups, as a wrapper around another optimizer "
                "does: wrap the innermost one"
            )
    relative = not alike(inside, alone)
    if relative:
        trial.check_relative(inside, alone)
    elif trial.comes_back(inside, alone):
        raise ValueError(trial.refusal("takes other steps in the long run where the parameter started elsewhere"))
    moments, unknown = trial.moments()
    entrywise = not relative and _entries_are_independent(base, options, sample)
    return Traits(relative, trial.decay(), inside.counters, entrywise, moments, unknown)


def _sample(parameters: Sequence[Tensor], states: Mapping[Tensor, Any]) -> Sample:
    for parameter in parameters:
        if states.get(parameter):
            return Sample(parameter, states[parameter])
    return Sample(parameters[0] if parameters else None, {})
