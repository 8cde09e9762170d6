"""What a base optimizer's step depends on, found out by running it on a small matrix rather than by its name."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

__all__ = ["PLAIN", "Probes", "Traits", "base_step", "constant_like", "pattern", "patterns"]

Options = Mapping[str, Any]
Decay = Literal["coupled", "rate", "fixed", "none", "other"]
Moment = Literal["first", "second", "root"]
Setting = tuple[torch.dtype, torch.device]

_AS_IS: Options = {}
_ROWS, _COLUMNS = 8, 4
_STEPS = 12  # past the averaging of a lookahead (every 5 or 6 steps) and the warm-up of RAdam
_MORE_STEPS = 120  # for positions in the state that no step has used so far
_SIZE = 0.05  # how well sizes of steps have to agree: Newton-Schulz iterations leave singular values of .7 to 1.2
_DEGREE = 1e-3  # how well a moment has to follow its rule: small terms in denominators spoil it a little
_RATE = 0.02
_DECAY = 0.05
# How steps are computed, not which: True would only ask for another device.
_IMPLEMENTATION = ("foreach", "fused", "capturable")
_REMEDY = "wrap an optimizer whose step depends on gradients alone, such as torch.optim.AdamW"


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


def base_step(base: Optimizer, *arguments: Any) -> None:
    """The class's own step: not what was patched over it, nor torch's wrapper, which fires the global step hooks."""
    step = type(base).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(base, *arguments)  # type: ignore[attr-defined]


def constant_like(value: Any, parameter: Tensor, other: Tensor) -> Any:
    """A constant accumulator of a parameter's shape, as one of another parameter's shape."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return value.flatten()[0].to(other).expand(other.shape).clone()
    return value.clone() if isinstance(value, Tensor) else value


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


class Probes:
    """Runs copies of a base optimizer on a small matrix; groups whose options have one `pattern` share a result.

    Nothing of the optimizer, no random number generator and no hook is touched. It costs some 120 steps of one matrix.

    Args:
        base: the optimizer.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._traits: dict[Any, Traits] = {}
        self._independent: dict[Any, bool] = {}
        self._odd_sizes: dict[Any, str | None] = {}

    def traits(self, options: Options, parameters: Sequence[Tensor], states: Mapping[Tensor, Any]) -> Traits:
        """Compare steps from one place, and on from there, with steps from 0 each time, as inside a subspace.

        Of an optimizer that can be wrapped they are the same.

        Args:
            options: of the group.
            parameters: of the group.
            states: what the optimizer put into its state when it was built.

        Raises:
            ValueError: steps need a closure, or depend on where the parameter stands or started otherwise than by a
                length that is a continuous function of the parameter's.
        """
        key = patterns(options)
        if key not in self._traits:
            sample = _sample(parameters, states)
            traits = _traits(_Trial(self._base, options, sample))
            entrywise = not traits.relative and _entries_are_independent(self._base, options, sample)
            self._traits[key] = replace(traits, entrywise=entrywise)
        return self._traits[key]

    def check_group_count(
        self, options: Options, parameters: Sequence[Tensor], states: Mapping[Tensor, Any], count: int
    ) -> None:
        """Raise if the optimizer keeps something for each of its groups, and would be given more of them.

        Args:
            options: of a group.
            parameters: of the group.
            states: what the optimizer put into its state when it was built.
            count: how many groups it would be given.

        Raises:
            ValueError: with so many groups it raises, or leaves some out, and with its own number it does not.
        """
        trial = _Trial(self._base, options, _sample(parameters, states))
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
        key = patterns(options)
        if key not in self._independent:
            sample = _sample(parameters, states)
            whole = _Trial(self._base, options, sample).from_zero(_STEPS)
            part = _Trial(self._base, options, sample, rows=_ROWS // 2).from_zero(_STEPS)
            pairs = zip(whole.steps, part.steps, strict=True)
            self._independent[key] = all(_close(a[: _ROWS // 2], b) for a, b in pairs)
        return self._independent[key]

    def odd_size(self, options: Options, parameters: Sequence[Tensor], states: Mapping[Tensor, Any]) -> str | None:
        """Why the root mean square of a step's entries is not the same for every gradient and shape; None if it is.

        Args:
            options: of the group.
            parameters: of the group.
            states: what the optimizer put into its state when it was built.
        """
        key = patterns(options)
        if key not in self._odd_sizes:
            sample = _sample(parameters, states)
            self._odd_sizes[key] = _odd_size(self._base, options, sample, self.traits(options, parameters, states))
        return self._odd_sizes[key]


def _odd_size(base: Optimizer, options: Options, sample: _Sample, traits: Traits) -> str | None:
    if traits.relative:
        return "are as long as the parameter is"
    trial = _Trial(base, options, sample)
    steps, larger = (trial.from_zero(_STEPS, factor=factor).steps for factor in (1.0, 16.0))
    # Past the warm-up of RAdam.
    if not all(_close(a, b, tolerance=_SIZE) for a, b in zip(steps[_STEPS // 2 :], larger[_STEPS // 2 :], strict=True)):
        return "follow the size of the gradient"
    if not traits.entrywise:
        narrow = _Trial(base, options, sample, columns=_COLUMNS // 2).from_zero(_STEPS).steps
        whole, part = (torch.stack(found).square().mean().sqrt() for found in (steps, narrow))
        if not _close(whole, part, tolerance=_SIZE):
            return "have entries whose size depends on the shape of the matrix"
    return None


def _entries_are_independent(base: Optimizer, options: Options, sample: _Sample) -> bool:
    """Whether a stack of two matrices is stepped as each of them alone, with state of its own shape or one number."""
    try:
        stack = _Trial(base, options, sample, stacked=True).from_zero(_STEPS)
    except ValueError:  # it wants matrices
        return False
    part = _Trial(base, options, sample, rows=_ROWS // 2).from_zero(_STEPS)
    shape = stack.steps[0].shape
    if not all(kept.numel() == 1 or kept.shape == shape for kept in stack.kept):
        return False
    return all(_close(a[0], b) for a, b in zip(stack.steps, part.steps, strict=True))


def patterns(options: Options) -> frozenset[tuple[str, Any]]:
    """The `pattern` of all options."""
    return frozenset((key, pattern(key, value)) for key, value in options.items())


def _traits(trial: _Trial) -> Traits:
    inside, alone = trial.from_zero(_STEPS), trial.alone(_STEPS)
    if not inside.moved and not alone.moved:
        inside, alone = trial.from_zero(_MORE_STEPS), trial.alone(_MORE_STEPS)
        if not inside.moved:
            raise ValueError(
                f"base={trial.name} does not move what is in its param_groups, as a wrapper around another optimizer "
                "does: wrap the innermost one"
            )
    relative = not _alike(inside, alone)
    if relative:
        trial.check_relative(inside, alone)
    elif trial.comes_back(inside, alone):
        raise ValueError(trial.refusal("takes other steps in the long run where the parameter started elsewhere"))
    moments, unknown = trial.moments()
    return Traits(relative, trial.decay(), inside.counters, moments=moments, unknown=unknown)


@dataclass(frozen=True)
class _Sample:
    """What the small matrix stands for: where the parameters are, and what was put into the state for one of them."""

    parameter: Tensor | None
    state: Mapping[str, Any]


def _sample(parameters: Sequence[Tensor], states: Mapping[Tensor, Any]) -> _Sample:
    for parameter in parameters:
        if states.get(parameter):
            return _Sample(parameter, states[parameter])
    return _Sample(parameters[0] if parameters else None, {})


@dataclass
class _Run:
    """Steps, where the matrix was before each, and what the optimizer was left with."""

    steps: list[Tensor]
    positions: list[Tensor]
    kept: list[Any]
    counters: frozenset[str]
    failed: bool  # it raised after it had moved the matrix

    @property
    def moved(self) -> bool:
        return any(bool(step.any()) for step in self.steps)


class _Trial:
    """Runs of fresh copies of a base optimizer, all with the same gradients and the same random numbers."""

    def __init__(
        self,
        base: Optimizer,
        options: Options,
        sample: _Sample,
        rows: int = _ROWS,
        stacked: bool = False,
        columns: int = _COLUMNS,
    ) -> None:
        self.base, self.options, self.sample = base, options, sample
        self.shape = torch.Size((2, rows // 2, columns) if stacked else (rows, columns))
        self.name = type(base).__name__
        numbers = np.random.default_rng(0)
        self._start = torch.from_numpy(3.0 * numbers.standard_normal((_ROWS, _COLUMNS)))[:rows]
        mean = numbers.standard_normal((_ROWS, _COLUMNS))
        # A common part, so that an optimizer that looks for its rate finds one.
        self._gradients = [
            torch.from_numpy(mean + numbers.standard_normal((_ROWS, _COLUMNS)))[:rows] for _ in range(_MORE_STEPS)
        ]
        for gradient in self._gradients[1::2]:
            # Orthogonal to the weight: some optimizers do something else then (AdamP).
            along = (gradient * self._start).sum(1, keepdim=True) / self._start.square().sum(1, keepdim=True)
            gradient -= along * self._start
        self._start = self._start[:, :columns].reshape(self.shape)
        self._gradients = [gradient[:, :columns].reshape(self.shape) for gradient in self._gradients]
        self._setting = self._possible_setting()

    def _possible_setting(self) -> Setting:
        """The first dtype and device on which a step can be taken: double precision on the CPU where possible."""
        cpu = torch.device("cpu")
        settings = [(torch.float64, cpu), (torch.float32, cpu)]
        if self.sample.parameter is not None and self.sample.parameter.device.type not in ("cpu", "meta"):
            settings.append((torch.float32, self.sample.parameter.device))
        first: Exception | None = None
        for setting in settings:
            self._setting = setting
            try:
                run = self.alone(3)
            except Exception as error:  # whatever a step raises
                first = first or error
                continue
            if setting == settings[0] and all(
                torch.equal(place.float().double(), place) for place in run.positions[1:]
            ):
                continue  # it computes in float32 whatever it is given (bitsandbytes), and is to be judged by that
            return setting
        if self._wants_closure(settings[0], first):
            raise ValueError(
                f"base={self.name} evaluates its closure several times a step, or cannot step without one, but "
                "captured gradients exist once: wrap a first-order optimizer such as torch.optim.AdamW"
            ) from first
        raise ValueError(
            f"base={self.name} could not take a step on a matrix of {_ROWS} x {_COLUMNS}, on which its kind is found "
            f"out: {type(first).__name__}: {first}"
        ) from first

    def _wants_closure(self, setting: Setting, without: Exception | None) -> bool:
        """Whether it was for want of a closure that a step raised."""
        calls = 0
        try:
            with _isolated(setting[1]):
                twin = _Twin(self.base, self.options, self.sample, setting, self.shape)

                def closure() -> Tensor:
                    nonlocal calls
                    calls += 1
                    for tensor in (twin.weight, twin.elsewhere):
                        tensor.grad = torch.ones_like(tensor)
                    return torch.zeros((), dtype=setting[0], device=setting[1])

                twin.weight.grad = torch.ones_like(twin.weight)
                base_step(twin.optimizer, closure)
        except Exception as error:  # it may want a graph as well; what it says is no longer that a closure is missing
            return calls > 0 and (type(error), str(error)) != (type(without), str(without))
        return calls > 0

    def moments(self) -> tuple[dict[str, Moment], frozenset[str]]:
        """What of the state is which moment, by what it does when the gradients g become -g and 2 g; and what is none.

        Odd: a first moment, of gradients or of steps (degree 0), which turns with the basis as they do. Even and of
        degree 2: a second moment. Even and of degree 1, or a length of steps, which follows the learning rate and not
        the gradients' scale: the root of one. Other sizes, even and nowhere negative, as Adadelta's squared steps, are
        treated as a second moment, of which only means are taken. What is there without gradients does not count.
        """
        found: dict[str, Moment] = {}
        unknown = set()
        plain = self.states()
        if not plain:
            return found, frozenset()
        mirrored, doubled, still = (self.states(factor) for factor in (-1.0, 2.0, 0.0))
        faster = self.states(rate=2 * _RATE)
        for key, g in plain.items():
            minus, twice, rest, fast = (other.get(key, g * 0) for other in (mirrored, doubled, still, faster))
            rest = rest.nan_to_num(0.0, 0.0, 0.0)
            if _close(g, rest, tolerance=1e-12):
                continue
            if g.ndim != len(self.shape) or any(a not in (1, b) for a, b in zip(g.shape, self.shape, strict=True)):
                if g.numel() >= self.shape.numel():
                    unknown.add(key)
                continue
            even = _close(minus - rest, g - rest, tolerance=_DEGREE)
            if _close(minus - rest, rest - g, tolerance=_DEGREE):
                found[key] = "first"
            elif even and _close(twice - rest, 4 * (g - rest), tolerance=_DEGREE):
                found[key] = "second"
            elif even and (
                _close(twice - rest, 2 * (g - rest), tolerance=_DEGREE)
                or (_close(twice, g, tolerance=_DEGREE) and _close(fast, 2 * g, tolerance=_DEGREE))
            ):
                found[key] = "root"
            elif even and bool((g >= 0).all()):
                found[key] = "second"
            else:
                unknown.add(key)
        return found, frozenset(unknown)

    def states(self, factor: float = 1.0, rate: float = _RATE) -> dict[str, Tensor]:
        """The tensors in the state, but single numbers, after steps from 0 with multiples of the gradients."""
        try:
            with _isolated(self._setting[1]) as reseed:
                twin = _Twin(self.base, self._options(_AS_IS), self.sample, self._setting, self.shape)
                if "lr" in twin.group:
                    twin.group["lr"] = rate
                for number in range(_STEPS):
                    reseed(number)
                    twin.take(factor * self._gradients[number], torch.zeros_like(self._start), 0.0)
                held = twin.optimizer.state.get(twin.weight, {})
                return {
                    key: value.detach().double().clone()
                    for key, value in held.items()
                    if isinstance(value, Tensor) and value.numel() > 1
                }
        except Exception:  # it does not step without a gradient
            return {}

    def fault_of_groups(self, count: int) -> str | None:
        """What goes wrong where the optimizer has so many groups of one matrix each."""
        with _isolated(self._setting[1]):
            twin = _Twin(self.base, self._options(_AS_IS), self.sample, self._setting, self.shape)
            weights = [nn.Parameter(torch.zeros_like(twin.weight)) for _ in range(count)]
            twin.optimizer.param_groups = [{**twin.group, "params": [weight]} for weight in weights]
            for weight in weights:
                if twin.weight in twin.optimizer.state:
                    twin.optimizer.state[weight] = copy.deepcopy(dict(twin.optimizer.state[twin.weight]))
            try:
                for gradient in self._gradients[:_STEPS]:
                    for weight in weights:
                        weight.grad = gradient.to(weight)
                    base_step(twin.optimizer)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return None if all(bool(weight.any()) for weight in weights) else "it leaves out the last ones"

    def _options(self, changes: Options) -> Options:
        return {**self.options, **({"weight_decay": 0.0} if "weight_decay" in self.options else {}), **changes}

    def from_zero(self, steps: int, changes: Options = _AS_IS, factor: float = 1.0) -> _Run:
        """As proxies inside a subspace: at 0 before every step, with ``factor`` times the gradients."""
        return self.at([torch.zeros_like(self._start)] * steps, changes=changes, factor=factor)

    def alone(self, steps: int, changes: Options = _AS_IS) -> _Run:
        """As the bare optimizer: from one place, and on from there."""
        return self.at([self._start, *([None] * (steps - 1))], changes=changes)

    def at(
        self, positions: Sequence[Tensor | None], pull: float = 0.0, changes: Options = _AS_IS, factor: float = 1.0
    ) -> _Run:
        """From given places; None: where the last step led. ``pull`` times the place is added to the gradients, which
        come ``factor`` times as large.
        """
        options = self._options(changes)
        with _isolated(self._setting[1]) as reseed:
            twin = _Twin(self.base, options, self.sample, self._setting, self.shape)
            before, steps, places = dict(twin.group), [], []
            for number, position in enumerate(positions):
                reseed(number)
                place, step = twin.take(factor * self._gradients[number], position, pull)
                places.append(place)
                steps.append(step)
            changed = {key for key in twin.group if key not in before or not _same(before[key], twin.group[key])}
            return _Run(steps, places, twin.kept(), frozenset(changed - {"params"}), twin.failed)

    def comes_back(self, inside: _Run, alone: _Run, changes: Options = _AS_IS) -> bool:
        """Whether a position that is left in the state, though no step has used it so far, makes a difference later."""
        same = len(inside.kept) == len(alone.kept) and all(map(_close, inside.kept, alone.kept))
        return not same and not _alike(self.from_zero(_MORE_STEPS, changes), self.alone(_MORE_STEPS, changes))

    def check_relative(self, inside: _Run, alone: _Run) -> None:
        """Refuse all steps but those whose length is a continuous function of the parameter's, as Adafactor's are."""
        elsewhere = self.at([place.flip(0, 1) for place in alone.positions])
        if not _alike(elsewhere, alone):
            raise ValueError(self.refusal("takes other steps where the parameter stands, or started, elsewhere"))
        nearly_zero = self.at([place * 1e-20 for place in alone.positions])
        if not _alike(nearly_zero, inside):
            # Of a step that jumps at 0, coordinates that happen to be 0 would get another than those beside it.
            raise ValueError(
                f"base={self.name} scales its step by the parameter's norm, which is 0 for the proxies "
                "that stand for the subspace: wrap an optimizer without a trust ratio, such as torch.optim.AdamW"
            )

    def refusal(self, what: str) -> str:
        """The message, with the option that is to blame if one is."""
        blame = next((key for key, value in self.options.items() if self._to_blame(key, value)), None)
        which, remedy = "", _REMEDY
        if blame is not None:
            off = False if isinstance(self.options[blame], bool) else 0
            which = f" with {blame}={self.options[blame]!r}"
            remedy = f"pass {blame}={off} (and weight_decay, if decay is wanted), or {_REMEDY}"
        return (
            f"base={self.name}{which} {what} with the same gradients, but proxies inside a subspace stand at 0 before "
            f"every step: {remedy}"
        )

    def _to_blame(self, key: str, value: Any) -> bool:
        mine = key in ("lr", "weight_decay", *_IMPLEMENTATION)
        if mine or not isinstance(value, (int, float)) or not value:
            return False
        without = {key: type(value)(0)}
        try:
            inside, alone = self.from_zero(_STEPS, without), self.alone(_STEPS, without)
        except Exception:  # an option that cannot be 0
            return False
        if inside.failed or key in inside.counters:
            return False
        fine = inside.moved and _finite(inside, alone) and _alike(inside, alone)
        return fine and not self.comes_back(inside, alone, without)

    def decay(self) -> Decay:
        """What ``weight_decay`` does."""
        if "weight_decay" not in self.options:
            return "rate"
        decayed = self.alone(_STEPS, {"weight_decay": _DECAY})
        sign = -1.0 if self.options.get("maximize") else 1.0
        if _alike(self.at(decayed.positions, pull=sign * _DECAY), decayed):
            return "coupled"
        without = self.at(decayed.positions)
        if _alike(without, decayed):
            return "none"
        # Decay before or after the step, divided by 1 + s or multiplied by 1 - s: that is all the same to first order.
        tolerance = 0.05
        kinds: tuple[tuple[Literal["rate", "fixed"], float], ...] = (("rate", _RATE * _DECAY), ("fixed", _DECAY))
        for kind, share in kinds:
            if all(
                _close(step - bare, -share * place, place, tolerance)
                for step, bare, place in zip(decayed.steps, without.steps, decayed.positions, strict=True)
                if bool(bare.any())  # some only prepare at first, and decay nothing (SOAP)
            ):
                return kind
        return "other"


class _Twin:
    """A copy of a base optimizer with one small matrix in its groups, and nothing in common with the original."""

    def __init__(self, base: Optimizer, options: Options, sample: _Sample, setting: Setting, shape: torch.Size) -> None:
        dtype, device = setting
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        # What stands for the parameters in the optimizer's own attributes.
        self.elsewhere = nn.Parameter(torch.zeros_like(self.weight))
        self.failed = False
        self.optimizer = object.__new__(type(base))
        memo: dict[int, Any] = {id(base): self.optimizer}
        for group in base.param_groups:
            memo.update((id(parameter), self.elsewhere) for parameter in group["params"])
        if sample.parameter is not None:
            memo[id(sample.parameter)] = self.elsewhere
        for key, value in vars(base).items():
            if key.startswith("_optimizer_") and key.endswith("_hooks"):
                vars(self.optimizer)[key] = OrderedDict()
            elif key not in ("state", "param_groups", "step"):
                vars(self.optimizer)[key] = _copied(value, memo)
        self.group = {key: _copied(value, memo) for key, value in options.items()}
        self.group["params"] = [self.weight]
        self.group.update(dict.fromkeys(self.group.keys() & set(_IMPLEMENTATION), False))
        if isinstance(self.group.get("lr"), (int, float, Tensor)):
            self.group["lr"] = _RATE  # a schedule may have begun at 0, where all steps are the same
        self.optimizer.param_groups = [self.group]
        self.optimizer.state = defaultdict(dict)
        if sample.parameter is not None and sample.state:
            self.optimizer.state[self.weight] = {
                key: constant_like(value, sample.parameter, self.weight) for key, value in sample.state.items()
            }

    def take(self, gradient: Tensor, position: Tensor | None, pull: float) -> tuple[Tensor, Tensor]:
        """Where the matrix was, and a step from there."""
        if position is not None:
            self.weight.copy_(position)
        before = self.weight.detach().clone()
        self.weight.grad = gradient.to(before) + pull * before
        try:
            base_step(self.optimizer)
        except Exception:
            if torch.equal(self.weight, before):
                raise
            # It has taken the step: what it raises afterwards is for the user's own step to raise.
            self.failed = True
        return before, self.weight.detach() - before

    def kept(self) -> list[Tensor]:
        """All numbers in the state and in attributes."""
        found: list[Tensor] = []
        _collect(
            {**vars(self.optimizer), "param_groups": self.optimizer.param_groups},
            {id(self.weight), id(self.elsewhere)},
            found,
        )
        return found


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy, as far as there can be one: process groups and the like are shared, and a model is never copied."""
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Tensor) and id(value) not in memo:
        return value.detach().clone()
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever cannot be copied
        return value


def _collect(value: Any, seen: set[int], found: list[Tensor]) -> None:
    if isinstance(value, (str, bytes, nn.Module)) or id(value) in seen:
        return
    if isinstance(value, Tensor):
        found.append(value.detach().clone())
    elif isinstance(value, (int, float)):
        found.append(torch.tensor(float(value), dtype=torch.float64, device="cpu"))
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for item in list(value.values()):
            _collect(item, seen, found)
    elif isinstance(value, (list, tuple)):
        seen.add(id(value))
        for item in value:
            _collect(item, seen, found)


def _alike(one: _Run, other: _Run) -> bool:
    return all(
        _close(a, b, torch.stack([p.abs().max(), q.abs().max()]))
        for a, b, p, q in zip(one.steps, other.steps, one.positions, other.positions, strict=True)
    )


def _finite(*runs: _Run) -> bool:
    return all(bool(step.isfinite().all()) for run in runs for step in run.steps)


def _close(a: Tensor, b: Tensor, places: Tensor | None = None, tolerance: float = 1e-6) -> bool:
    """Equal, within what rounding at these places does."""
    if torch.equal(a, b) or not b.numel():
        return True
    rounding = 0.0 if places is None else 8 * torch.finfo(places.dtype).eps * float(places.abs().max())
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    size = max(float(a.abs().max()), float(b.abs().max()))
    different = (a - b).abs() > tolerance * size + rounding
    return not bool((different | (a.isnan() != b.isnan())).any())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


@contextmanager
def _isolated(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Random numbers of its own, no global step hooks, no default device, nothing recorded and nothing said."""
    accelerator = None if device.type == "cpu" else getattr(torch, device.type, None)

    def reseed(number: int) -> None:
        torch.default_generator.manual_seed(number)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 (the optimizer's own choice)
        if accelerator is not None:
            accelerator.manual_seed(number)

    hooks: tuple[Any, ...] = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    kept = [dict(each) for each in hooks]
    numbers, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        devices = [] if accelerator is None else [device]
        stack.enter_context(torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else device.type))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(device)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            for each in hooks:
                each.clear()
            yield reseed
        finally:
            for each, held in zip(hooks, kept, strict=True):
                each.update(held)
            random.setstate(numbers)
            np.random.set_state(legacy)  # noqa: NPY002
