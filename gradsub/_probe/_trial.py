"""Runs of copies of a base optimizer, and what they tell of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub._probe._runs import Run, alike, close, finite, same
from gradsub._probe._twin import IMPLEMENTATION, RATE, Options, Sample, Setting, Twin, base_step, isolated

Decay: TypeAlias = Literal["coupled", "rate", "fixed", "none", "other"]
Moment: TypeAlias = Literal["first", "second", "root"]

AS_IS: Options = {}
ROWS, COLUMNS = 8, 4
STEPS: Final = 12  # past the averaging of a lookahead (every 5 or 6 steps) and the warm-up of RAdam
MORE_STEPS: Final = 120  # for positions in the state that no step has used so far
_DEGREE: Final = 1e-3  # how well a moment has to follow its rule: small terms in denominators spoil it a little
_DECAY: Final = 0.05
_REMEDY: Final = "wrap an optimizer whose step depends on gradients alone, such as torch.optim.AdamW"


class Trial:
    """Runs of fresh copies of a base optimizer, all with the same gradients and the same random numbers."""

    def __init__(
        self,
        base: Optimizer,
        options: Options,
        sample: Sample,
        rows: int = ROWS,
        stacked: bool = False,
        columns: int = COLUMNS,
    ) -> None:
        self.base, self.options, self.sample = base, options, sample
        self.shape = torch.Size((2, rows // 2, columns) if stacked else (rows, columns))
        self.name = type(base).__name__
        numbers = np.random.default_rng(0)
        self._start = torch.from_numpy(3.0 * numbers.standard_normal((ROWS, COLUMNS)))[:rows]
        mean = numbers.standard_normal((ROWS, COLUMNS))
        # A common part, so that an optimizer that looks for its rate finds one.
        self._gradients = [
            torch.from_numpy(mean + numbers.standard_normal((ROWS, COLUMNS)))[:rows] for _ in range(MORE_STEPS)
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
            f"base={self.name} could not take a step on a matrix of {ROWS} x {COLUMNS}, on which its kind is found "
            f"out: {type(first).__name__}: {first}"
        ) from first

    def _wants_closure(self, setting: Setting, without: Exception | None) -> bool:
        """Whether it was for want of a closure that a step raised."""
        calls = 0
        try:
            with isolated(setting[1]):
                twin = Twin(self.base, self.options, self.sample, setting, self.shape)

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
        faster = self.states(rate=2 * RATE)
        for key, g in plain.items():
            minus, twice, rest, fast = (other.get(key, g * 0) for other in (mirrored, doubled, still, faster))
            rest = rest.nan_to_num(0.0, 0.0, 0.0)
            if close(g, rest, tolerance=1e-12):
                continue
            if g.ndim != len(self.shape) or any(a not in (1, b) for a, b in zip(g.shape, self.shape, strict=True)):
                if g.numel() >= self.shape.numel():
                    unknown.add(key)
                continue
            even = close(minus - rest, g - rest, tolerance=_DEGREE)
            if close(minus - rest, rest - g, tolerance=_DEGREE):
                found[key] = "first"
            elif even and close(twice - rest, 4 * (g - rest), tolerance=_DEGREE):
                found[key] = "second"
            elif even and (
                close(twice - rest, 2 * (g - rest), tolerance=_DEGREE)
                or (close(twice, g, tolerance=_DEGREE) and close(fast, 2 * g, tolerance=_DEGREE))
            ):
                found[key] = "root"
            elif even and bool((g >= 0).all()):
                found[key] = "second"
            else:
                unknown.add(key)
        return found, frozenset(unknown)

    def states(self, factor: float = 1.0, rate: float = RATE) -> dict[str, Tensor]:
        """The tensors in the state, but single numbers, after steps from 0 with multiples of the gradients."""
        try:
            with isolated(self._setting[1]) as reseed:
                twin = Twin(self.base, self._options(AS_IS), self.sample, self._setting, self.shape)
                if "lr" in twin.group:
                    twin.group["lr"] = rate
                for number in range(STEPS):
                    reseed(number)
                    twin.step(factor * self._gradients[number], torch.zeros_like(self._start), 0.0)
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
        with isolated(self._setting[1]):
            twin = Twin(self.base, self._options(AS_IS), self.sample, self._setting, self.shape)
            weights = [nn.Parameter(torch.zeros_like(twin.weight)) for _ in range(count)]
            twin.optimizer.param_groups = [{**twin.group, "params": [weight]} for weight in weights]
            for weight in weights:
                if twin.weight in twin.optimizer.state:
                    twin.optimizer.state[weight] = copy.deepcopy(dict(twin.optimizer.state[twin.weight]))
            try:
                for gradient in self._gradients[:STEPS]:
                    for weight in weights:
                        weight.grad = gradient.to(weight)
                    base_step(twin.optimizer)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return None if all(bool(weight.any()) for weight in weights) else "it leaves out the last ones"

    def _options(self, changes: Options) -> Options:
        return {**self.options, **({"weight_decay": 0.0} if "weight_decay" in self.options else {}), **changes}

    def from_zero(self, steps: int, changes: Options = AS_IS, factor: float = 1.0) -> Run:
        """As proxies inside a subspace: at 0 before every step, with ``factor`` times the gradients."""
        return self.at([torch.zeros_like(self._start)] * steps, changes=changes, factor=factor)

    def alone(self, steps: int, changes: Options = AS_IS) -> Run:
        """As the bare optimizer: from one place, and on from there."""
        return self.at([self._start, *([None] * (steps - 1))], changes=changes)

    def at(
        self, positions: Sequence[Tensor | None], pull: float = 0.0, changes: Options = AS_IS, factor: float = 1.0
    ) -> Run:
        """From given places; None: where the last step led. ``pull`` times the place is added to the gradients, which
        come ``factor`` times as large.
        """
        options = self._options(changes)
        with isolated(self._setting[1]) as reseed:
            twin = Twin(self.base, options, self.sample, self._setting, self.shape)
            before, steps, places = dict(twin.group), [], []
            for number, position in enumerate(positions):
                reseed(number)
                place, step = twin.step(factor * self._gradients[number], position, pull)
                places.append(place)
                steps.append(step)
            changed = {key for key in twin.group if key not in before or not same(before[key], twin.group[key])}
            return Run(steps, places, twin.kept(), frozenset(changed - {"params"}), twin.failed)

    def comes_back(self, inside: Run, alone: Run, changes: Options = AS_IS) -> bool:
        """Whether a position that is left in the state, though no step has used it so far, makes a difference later."""
        same = len(inside.kept) == len(alone.kept) and all(map(close, inside.kept, alone.kept))
        return not same and not alike(self.from_zero(MORE_STEPS, changes), self.alone(MORE_STEPS, changes))

    def check_relative(self, inside: Run, alone: Run) -> None:
        """Refuse all steps but those whose length is a continuous function of the parameter's, as Adafactor's are."""
        elsewhere = self.at([place.flip(0, 1) for place in alone.positions])
        if not alike(elsewhere, alone):
            raise ValueError(self.refusal("takes other steps where the parameter stands, or started, elsewhere"))
        nearly_zero = self.at([place * 1e-20 for place in alone.positions])
        if not alike(nearly_zero, inside):
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
        mine = key in ("lr", "weight_decay", *IMPLEMENTATION)
        if mine or not isinstance(value, (int, float)) or not value:
            return False
        without = {key: type(value)(0)}
        try:
            inside, alone = self.from_zero(STEPS, without), self.alone(STEPS, without)
        except Exception:  # an option that cannot be 0
            return False
        if inside.failed or key in inside.counters:
            return False
        fine = inside.moved and finite(inside, alone) and alike(inside, alone)
        return fine and not self.comes_back(inside, alone, without)

    def decay(self) -> Decay:
        """What ``weight_decay`` does."""
        if "weight_decay" not in self.options:
            return "rate"
        decayed = self.alone(STEPS, {"weight_decay": _DECAY})
        sign = -1.0 if self.options.get("maximize") else 1.0
        if alike(self.at(decayed.positions, pull=sign * _DECAY), decayed):
            return "coupled"
        without = self.at(decayed.positions)
        if alike(without, decayed):
            return "none"
        # Decay before or after the step, divided by 1 + s or multiplied by 1 - s: that is all the same to first order.
        tolerance = 0.05
        kinds: tuple[tuple[Literal["rate", "fixed"], float], ...] = (("rate", RATE * _DECAY), ("fixed", _DECAY))
        for kind, share in kinds:
            if all(
                close(step - bare, -share * place, place, tolerance)
                for step, bare, place in zip(decayed.steps, without.steps, decayed.positions, strict=True)
                if bool(bare.any())  # some only prepare at first, and decay nothing (SOAP)
            ):
                return kind
        return "other"
