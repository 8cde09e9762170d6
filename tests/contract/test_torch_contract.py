"""What torch tests of each of its own optimizers, tried on `GemsOptimizer` around each of them.

Of torch's suite (test/test_optim.py) the following does not apply:

* errors of constructors: the base optimizer raises them before it is wrapped;
* sparse gradients and complex parameters: refused, which is tested here;
* differentiable=True and step() inside of a graph: refused, which is tested here;
* several devices in one optimizer, capturable=True and peak memory: they need an accelerator;
* defaults changed to foreach, and which kernel is launched: the base optimizer's business;
* compiled steps: tests of their own.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradsub import GemsOptimizer

from .configurations import EVERY, REFUSED, WRAPPED, Configuration

every = pytest.mark.parametrize("each", WRAPPED, ids=[each.name for each in WRAPPED])
one_implementation = pytest.mark.parametrize(
    "each",
    (loops := [c for c in WRAPPED if not c.options.get("foreach") and not c.options.get("fused")]),
    ids=[each.name for each in loops],
)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


class Problem:
    """A matrix and a vector to learn, an optimizer around them, and two tasks."""

    def __init__(
        self,
        each: Configuration,
        *,
        contiguous: bool = True,
        dtype: torch.dtype = torch.float32,
        groups: Callable[[list[nn.Parameter]], list[Any]] = list,
        seed: int = 0,
        named: bool = False,
        **options: Any,
    ) -> None:
        weight, bias = drawn(10, 5, seed=seed, dtype=dtype), drawn(10, seed=seed + 1, dtype=dtype)
        if not contiguous:
            weight, bias = (torch.stack([tensor] * 2, -1)[..., 0] for tensor in (weight, bias))
        self.each = each
        self.parameters = [nn.Parameter(tensor) for tensor in ([weight] if each.matrices_only else [weight, bias])]
        # Of full rank: what a lower rank leaves over is rounding, which every implementation rounds in its own way.
        self.inputs = drawn(8, 5, seed=seed + 2, dtype=dtype)
        given = list(zip(("weight", "bias"), self.parameters, strict=False)) if named else groups(self.parameters)
        self.base = each.base(given, **options)
        self.optimizer: Any = GemsOptimizer(self.base, tasks=("a", "b"), rank=2, update_proj_gap=4)

    def loss(self, task: int = 0) -> Tensor:
        out = (self.inputs * (1 + task)) @ self.parameters[0].mT
        if len(self.parameters) > 1:
            out = out + self.parameters[1]
        return out.square().mean()

    def closure(self) -> Tensor:
        """A gradient of each task, and one from outside."""
        self.optimizer.zero_grad()
        for task, name in enumerate("ab"):
            with self.optimizer.task(name):
                self.loss(task).backward()
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.closure)

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]


def numbers(value: Any) -> list[Any]:
    """Everything in nested containers, tensors as they are."""
    if isinstance(value, dict):
        return [item for key in sorted(value, key=str) for item in numbers(value[key])]
    if isinstance(value, (list, tuple)):
        return [item for each in value for item in numbers(each)]
    return [value.clone() if isinstance(value, Tensor) else value]


def equal(first: Any, second: Any) -> bool:
    pairs = list(zip(numbers(first), numbers(second), strict=True))
    return all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b for a, b in pairs)


# --- steps ------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_goes_the_right_direction(each, contiguous):
    problem = Problem(each, contiguous=contiguous)
    start = problem.loss().item()
    problem.train(8)
    end = problem.loss().item()
    assert end > start if each.ascends else end < start


@one_implementation
def test_goes_the_right_direction_under_schedulers(each):
    for makers in each.info.scheduler_inputs:
        problem = Problem(each)
        start = problem.loss().item()
        schedulers = [make(problem.optimizer) for make in makers]
        for _ in range(6):
            loss = problem.optimizer.step(problem.closure)
            for scheduler in schedulers:
                scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert problem.loss().item() > start if each.ascends else problem.loss().item() < start


@one_implementation
def test_a_group_has_options_of_its_own(each):
    if each.info.name == "Rprop":
        pytest.skip("its rate is the first step's length, and bounded from below")

    def groups(parameters: list[nn.Parameter]) -> list[Any]:
        return [{"params": parameters[:1], "lr": 0.0}, *({"params": [p], "lr": 0.01} for p in parameters[1:])]

    problem = Problem(each, groups=groups)
    before = problem.weights()
    problem.train(3)
    assert torch.equal(before[0], problem.parameters[0])
    assert all(not torch.equal(a, b) for a, b in zip(before[1:], problem.parameters[1:], strict=True))


@one_implementation
def test_weight_decay_of_a_group_is_its_own(each):
    if "weight_decay" not in Problem(each).base.defaults:
        pytest.skip("this optimizer has no weight_decay")
    ends = []
    for decay in (0.0, 0.9):
        problem = Problem(each, groups=lambda ps, decay=decay: [{"params": [p], "weight_decay": decay} for p in ps])
        problem.train(3)
        ends.append(problem.weights())
    assert all(not torch.equal(a, b) for a, b in zip(*ends, strict=True))


@every
def test_implementations_agree(each):
    if not (each.options.get("foreach") or each.options.get("fused")):
        pytest.skip("this is the one that the others are compared with")
    flags = {flag: False for flag in ("foreach", "fused") if flag in each.options}
    problem, loop = Problem(each), Problem(each, **flags)
    for _ in range(5):
        problem.train(1)
        loop.train(1)
        for a, b in zip(problem.parameters, loop.parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    for key, value in problem.optimizer.state[problem.parameters[0]].items():
        other = loop.optimizer.state[loop.parameters[0]][key]
        assert (value.shape, value.dtype) == (other.shape, other.dtype)


@every
def test_without_gradients_nothing_moves(each):
    problem = Problem(each)
    before = problem.weights()
    problem.optimizer.step()
    assert equal(before, problem.weights())
    problem.train(2)
    problem.optimizer.zero_grad()
    before, state = problem.weights(), numbers(problem.optimizer.state_dict())
    problem.optimizer.step()
    assert equal(before, problem.weights())
    assert equal(state, problem.optimizer.state_dict())


@every
def test_zero_gradients_move_nothing_at_first(each):
    problem = Problem(each, **({"weight_decay": 0.0} if "weight_decay" in Problem(each).base.defaults else {}))
    before = problem.weights()
    for parameter in problem.parameters:
        parameter.grad = torch.zeros_like(parameter)
    problem.optimizer.step()
    assert equal(before, problem.weights())


@one_implementation
def test_empty_parameters_are_no_obstacle(each):
    if each.info.name in ("Muon", "Adafactor"):
        pytest.skip("it divides by the number of entries, or takes matrices only")
    empty = [nn.Parameter(torch.empty(shape)) for shape in ((0,), (0, 4))]
    problem = Problem(each, groups=lambda parameters: [*parameters, *empty])
    for parameter in empty:
        parameter.grad = torch.empty_like(parameter)
    problem.train(2)
    for parameter in empty:
        parameter.grad = torch.empty_like(parameter)
    problem.optimizer.step()


@one_implementation
def test_a_rate_in_a_tensor_is_a_rate(each):
    for shape in ((), (1,)):
        ends = []
        for rate in (0.01, torch.full(shape, 0.01, dtype=torch.float64)):
            problem = Problem(each, lr=rate)
            problem.train(3)
            ends.append(problem.weights())
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every
def test_the_closure_runs_once_and_its_loss_is_returned(each):
    problem, calls = Problem(each), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return problem.closure()

    expected = problem.loss().item()
    assert problem.optimizer.step(closure).item() == expected
    assert calls == [True]


@every
def test_parameters_of_several_dtypes(each):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    parameters = [nn.Parameter(drawn(6, 5, dtype=dtype)) for dtype in dtypes]
    optimizer = GemsOptimizer(each.base(parameters), tasks=("a",), rank=2)
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(2):
        with optimizer.task("a"):
            sum(parameter.float().square().sum() for parameter in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [parameter.dtype for parameter in parameters] == list(dtypes)
    assert all(bool(parameter.isfinite().all()) for parameter in parameters)
    if each.info.name != "Adafactor":  # it begins with steps below what bfloat16 resolves
        assert all(not torch.equal(a, b) for a, b in zip(before[:2], parameters[:2], strict=True))


@one_implementation
def test_the_default_dtype_changes_nothing(each):
    ends = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            problem = Problem(each)
            problem.train(3)
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(problem.weights())
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every
def test_it_can_be_printed(each):
    text = repr(Problem(each).optimizer)
    assert text.startswith("GemsOptimizer (\nParameter Group 0\n")
    assert "    lr: " in text


@every
def test_gradients_can_be_set_to_zero_or_none(each):
    problem = Problem(each)
    for to_none in (False, True):
        problem.closure()
        problem.optimizer.zero_grad(set_to_none=to_none)
        assert all(p.grad is None if to_none else not bool(p.grad.any()) for p in problem.parameters)
    before = problem.weights()
    problem.optimizer.step()
    assert equal(before, problem.weights())


@every
def test_gradients_from_outside_are_as_they_were(each):
    """A step with maximize, or coupled decay, must not change them."""
    problem = Problem(each)
    problem.closure()
    before = [parameter.grad.clone() for parameter in problem.parameters]
    problem.optimizer.step()
    assert equal(before, [parameter.grad for parameter in problem.parameters])


# --- state ------------------------------------------------------------------------------------------------------------


@every
def test_state_is_not_empty(each):
    problem = Problem(each)
    problem.train(1)
    assert all(problem.optimizer.state[problem.parameters[0]])
    assert problem.optimizer.state_dict()["state"]


@every
def test_a_state_dict_resumes_and_is_deterministic(each):
    problem, again = Problem(each), Problem(each)
    problem.train(5)
    with torch.no_grad():
        for theirs, mine in zip(problem.parameters, again.parameters, strict=True):
            mine.copy_(theirs)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    kept = copy.deepcopy(saved)
    again.optimizer.load_state_dict(saved)
    for _ in range(4):
        problem.train(1)
        again.train(1)
        assert equal(problem.weights(), again.weights())
    assert equal(saved, kept)
    assert equal(problem.optimizer.state_dict(), again.optimizer.state_dict())


@every
def test_through_a_file_of_tensors_and_numbers(each):
    problem, again = Problem(each), Problem(each)
    problem.train(3)
    file = io.BytesIO()
    torch.save(problem.optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again.optimizer.load_state_dict(loaded)
    assert equal(problem.optimizer.state_dict(), again.optimizer.state_dict())


@every
def test_copies_and_pickles_go_on_alike(each):
    problem = Problem(each)
    problem.train(3)
    pair = {"parameters": problem.parameters, "optimizer": problem.optimizer}
    copies = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))]
    problem.train(3)
    for one in copies:
        assert vars(one["optimizer"]).keys() >= {key for key in vars(problem.optimizer) if not key.startswith("_")}
        other = copy.copy(problem)
        other.parameters, other.optimizer = one["parameters"], one["optimizer"]
        other.train(3)
        assert equal(problem.weights(), other.weights())


@one_implementation
@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)], ids=["both", "there", "here"])
def test_state_dicts_with_names_and_without(each, named):
    there, here = (Problem(each, named=each_named) for each_named in named)
    there.train(2)
    saved = there.optimizer.state_dict()
    here.optimizer.load_state_dict(saved)
    for parameters in (here.parameters, there.parameters):
        with torch.no_grad():
            for parameter, like in zip(parameters, there.weights(), strict=True):
                parameter.copy_(like)
    here.train(1)
    there.train(1)
    assert equal(here.weights(), there.weights())


@every
def test_a_group_can_be_added(each):
    problem = Problem(each)
    problem.train(2)
    more = nn.Parameter(drawn(7, 6))
    problem.optimizer.add_param_group({"params": [more]})
    before = more.detach().clone()
    for _ in range(2):
        with problem.optimizer.task("a"):
            more.square().sum().backward()
        problem.optimizer.step()
        problem.optimizer.zero_grad()
    assert not torch.equal(before, more)


@every
def test_an_older_state_dict_can_be_loaded(each):
    problem, again = Problem(each), Problem(each)
    problem.train(2)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    later = {*each.info.not_og_supported_flags, "fused"}
    lacking = sorted(later & saved["param_groups"][0].keys())
    for flag in lacking:
        for group in saved["param_groups"]:
            del group[flag]
    again.optimizer.load_state_dict(saved)
    again.train(1)
    assert all(flag in group for flag in lacking for group in again.optimizer.param_groups)


@every
def test_a_step_that_is_a_number_can_be_loaded(each):
    problem, again = Problem(each), Problem(each)
    problem.train(2)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    for state in saved["state"].values():
        for key in [key for key in state if key.rpartition(".")[2] == "step"]:
            state[key] = state[key].item()
    again.optimizer.load_state_dict(saved)
    with torch.no_grad():
        for mine, theirs in zip(again.parameters, problem.parameters, strict=True):
            mine.copy_(theirs)
    problem.train(2)
    again.train(2)
    assert equal(problem.weights(), again.weights())
    assert equal(problem.optimizer.state_dict(), again.optimizer.state_dict())


@every
def test_state_of_another_dtype_is_cast(each):
    """As torch casts it: to the parameter's dtype, counts excepted."""
    if each.options.get("fused"):
        pytest.skip("fused kernels want one dtype")
    wide, narrow = Problem(each, dtype=torch.float64), Problem(each)
    wide.train(2)
    narrow.optimizer.load_state_dict(copy.deepcopy(wide.optimizer.state_dict()))
    narrow.train(2)
    assert all(bool(parameter.isfinite().all()) for parameter in narrow.parameters)


# --- hooks ------------------------------------------------------------------------------------------------------------

hooked = pytest.mark.parametrize(
    "each", (firsts := list({c.info.name: c for c in WRAPPED}.values())), ids=lambda c: c.info.name
)


@contextmanager
def removed(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@hooked
def test_step_hooks(each):
    problem, seen = Problem(each), []
    pre = problem.optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    post = problem.optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    with removed(pre, post):
        problem.train(2)
    problem.train(1)
    assert seen == ["pre", "post"] * 2


@hooked
def test_a_step_pre_hook_can_change_the_arguments(each):
    problem, calls = Problem(each), []
    hook = problem.optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: calls.append(1)), {}))
    with removed(hook):
        problem.optimizer.step(problem.closure)
    assert calls == [1]


@hooked
def test_all_step_hooks_in_torchs_order(each):
    problem, seen = Problem(each), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        problem.optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        problem.optimizer.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    with removed(*handles):
        problem.train(1)
    assert seen == ["global pre", "pre", "post", "global post"]


@hooked
def test_state_dict_hooks(each):
    problem = Problem(each)

    def before(optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.25

    def after(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "seen": [*state_dict.get("seen", []), "after"]}

    def first(optimizer: Any, state_dict: dict[str, Any]) -> None:
        state_dict["seen"] = ["first"]

    handles = [
        problem.optimizer.register_state_dict_pre_hook(before),
        problem.optimizer.register_state_dict_post_hook(after),
        problem.optimizer.register_state_dict_post_hook(first, prepend=True),
    ]
    with removed(*handles):
        saved = problem.optimizer.state_dict()
    assert saved["param_groups"][0]["lr"] == 0.25
    assert saved["seen"] == ["first", "after"]
    assert "seen" not in problem.optimizer.state_dict()


@hooked
def test_load_hooks_see_and_change_what_is_loaded(each):
    problem, again, seen = Problem(each), Problem(each), []
    problem.train(2)

    def change(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("change")
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = 0.125
        changed["state"][0]["basis"].neg_()
        return changed

    def first(optimizer: Any, state_dict: dict[str, Any]) -> None:
        seen.append("first")
        assert state_dict["param_groups"][0]["lr"] != 0.125

    handles = [
        again.optimizer.register_load_state_dict_pre_hook(change),
        again.optimizer.register_load_state_dict_pre_hook(first, prepend=True),
        again.optimizer.register_load_state_dict_post_hook(lambda o: seen.append(float(o.param_groups[0]["lr"]))),
    ]
    with removed(*handles):
        again.optimizer.load_state_dict(problem.optimizer.state_dict())
    assert seen == ["first", "change", 0.125]
    mine, theirs = (p.optimizer.state[p.parameters[0]]["basis"] for p in (again, problem))
    assert bool(theirs.any())
    assert torch.equal(mine, -theirs)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", (no := [c for c in EVERY if c.refused]), ids=[c.name for c in no])
def test_what_does_not_apply_is_refused_with_the_reason(each):
    assert each.refused is not None
    with pytest.raises(ValueError, match=REFUSED[each.refused][0]):
        Problem(each)


@hooked
def test_complex_parameters_are_refused(each):
    parameter = nn.Parameter(torch.zeros(6, 5, dtype=torch.complex64))
    with pytest.raises(ValueError, match="is complex"):
        GemsOptimizer(each.base([parameter]), tasks=("a",), rank=2)


@hooked
def test_sparse_gradients_are_refused(each):
    weight = nn.Parameter(drawn(9, 6))
    optimizer = GemsOptimizer(each.base([weight]), tasks=("a",), rank=2)
    weight.grad = torch.eye(9, 6).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
