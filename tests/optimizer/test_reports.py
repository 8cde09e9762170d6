"""What users of optimizers, wrappers and trainers report elsewhere, tried on this one."""

from __future__ import annotations

import copy
import enum
import gc
import io
import threading
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradsub import GemsOptimizer, NullSpace
from tests.optimizer.toys import gems, loss_of, mlp, noise, same, train, weights_of

CAPTURES = ("generic", "fused")


class Kind(str, enum.Enum):  # noqa: UP042 (not StrEnum, whose members print as their values)
    """Task names as many programs keep them."""

    SEARCH = "search"
    REC = "rec"


class Counting(torch.optim.Optimizer):
    """Counts in its group from the first step on, as apex's FusedAdam and many of pytorch-optimizer's do."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Divides by the count."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad / group["step"], alpha=group["lr"])


# --- counters (DeepSpeed 4396, apex 1615) ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("capture", CAPTURES)
def test_a_count_in_the_group_resumes(bias: bool, capture: str) -> None:
    ends = []
    for resumed in (False, True):
        model = mlp(bias=bias)
        optimizer = gems(model, base=Counting(model.parameters()), capture=capture)
        train(model, optimizer, 3)
        if resumed:
            weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = mlp(bias=bias, seed=1)
            model.load_state_dict(weights)
            optimizer = gems(model, base=Counting(model.parameters()), capture=capture)
            optimizer.load_state_dict(state)
        train(model, optimizer, 3, start=3)
        assert optimizer.param_groups[0]["step"] == 6
        ends.append(weights_of(model))
    assert same(*ends)


# --- step() and zero_grad() inside of a block (accelerate 1211) ------------------------------------------------------


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("what", ["step", "clip", "unscale", "reduce"])
def test_what_needs_complete_gradients_is_refused_inside_of_a_task(what: str, capture: str) -> None:
    model = mlp()
    optimizer = gems(model, capture=capture)
    before = weights_of(model)
    calls: dict[str, Any] = {
        "step": optimizer.step,
        "clip": lambda: optimizer.clip_grad_norm_(1.0),
        "unscale": lambda: optimizer.unscale_(2.0),
        "reduce": optimizer.reduce,
    }
    with optimizer.task("search"):
        loss_of(model, 0, 0).backward()
        with pytest.raises(RuntimeError, match=r"inside of task\('search'\).*after the `with` block"):
            calls[what]()
    assert same(before, weights_of(model))
    calls[what]()  # nothing was lost
    optimizer.step()
    assert not same(before, weights_of(model))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("named", [False, True])
def test_zero_grad_inside_of_a_task_drops_the_batch_with_its_samples(capture: str, named: bool) -> None:
    ends = []
    for dropped in (False, True):
        model = mlp()
        optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1), capture=capture)
        if dropped:
            with torch.enable_grad():
                loss = loss_of(model, 7, 0)
            with optimizer.task("search", samples=1000, loss=loss if named else None):
                loss.backward()
                optimizer.zero_grad()
        for task, name in enumerate(optimizer.tasks):
            with optimizer.task(name, samples=8):
                loss_of(model, 0, task).backward()
        optimizer.step()
        ends.append(weights_of(model))
    assert same(*ends)


@pytest.mark.parametrize("capture", CAPTURES)
def test_zero_grad_inside_of_a_task_lets_it_begin_anew(capture: str) -> None:
    ends = []
    for dropped in (False, True):
        model = mlp()
        optimizer = gems(model, capture=capture)
        with optimizer.task("search", samples=8):
            if dropped:
                loss_of(model, 7, 0).backward()
                optimizer.zero_grad()
            loss_of(model, 0, 0).backward()
        optimizer.step()
        ends.append(weights_of(model))
    assert same(*ends)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_inside_of_a_task_clears_gradients_of_no_task(set_to_none: bool) -> None:
    model = mlp()
    optimizer = gems(model)
    loss_of(model, 0, 0).backward()
    with optimizer.task("search"):
        optimizer.zero_grad(set_to_none)
    left = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is None if set_to_none else not bool(gradient.any()) for gradient in left)  # type: ignore[union-attr]


# --- models outlive optimizers (horovod 2017) ------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("capture", CAPTURES)
def test_an_optimizer_that_is_gone_leaves_no_hook(capture: str, copied: bool) -> None:
    model = mlp()
    for _ in range(3):
        optimizer = gems(model, capture=capture)
        if copied:
            model, optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, 1)
        del optimizer
    gc.collect()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model)


# --- gradients written by hand, and layers unfrozen inside of a block ------------------------------------------------


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("before", [False, True])
def test_a_gradient_written_inside_of_a_task_is_the_tasks(capture: str, before: bool) -> None:
    """From torch.autograd.grad or an evolution strategy."""
    ends = []
    for by_hand in (False, True):
        model = mlp()
        optimizer = gems(model, capture=capture)
        parameters = list(model.parameters())
        if before:
            loss_of(model, 5, 0).backward()
        outside = [parameter.grad for parameter in parameters]
        for task, name in enumerate(optimizer.tasks):
            loss = loss_of(model, 0, task)
            with optimizer.task(name, samples=8, loss=loss):
                if by_hand:
                    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                        parameter.grad = gradient
                else:
                    loss.backward()
        assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, outside, strict=True))
        optimizer.step()
        assert list(optimizer.report().layers[0].gates) == list(optimizer.tasks)
        ends.append(weights_of(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_layer_unfrozen_inside_of_a_task_learns_from_it(capture: str) -> None:
    ends = []
    for inside in (False, True):
        model = mlp()
        model.requires_grad_(not inside)
        optimizer = gems(model, capture=capture)
        for step in range(3):
            for task, name in enumerate(optimizer.tasks):
                with optimizer.task(name, samples=8):
                    model.requires_grad_(True)
                    loss_of(model, step, task).backward()
            optimizer.step()
            assert all(parameter.grad is None for parameter in model.parameters())
            optimizer.zero_grad()
        ends.append(weights_of(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_closed_optimizer_takes_no_gradients() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = gems(model)
    optimizer.close()
    with optimizer.task("search"):
        model.requires_grad_(True)
        loss_of(model, 0, 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_mixed_batch_refuses_a_gradient_written_by_hand() -> None:
    model = mlp(bias=False)
    optimizer = gems(model, capture="fused")
    with (
        pytest.raises(RuntimeError, match=r"cannot be told apart in .* leave it out of target_modules"),
        optimizer.mixed(["search"] * 2 + ["rec"] * 2),
    ):
        model[0].weight.grad = torch.ones_like(model[0].weight)
    with optimizer.task("search"):  # the block is closed all the same
        loss_of(model, 0, 0).backward()


# --- sizes, modes, names and numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_of_size_zero_change_nothing(shape: tuple[int, int], named: bool, device: torch.device) -> None:
    ends = []
    for empty in (False, True):
        model = mlp(device=device)
        extra = nn.Linear(shape[1], shape[0]).to(device)
        whole = nn.ModuleList([model, extra] if empty else [model])
        base = torch.optim.AdamW(whole.parameters(), lr=1e-2)
        optimizer = gems(model, base=base, model=whole if named else None)
        for step in range(4):
            for task, name in enumerate(optimizer.tasks):
                with optimizer.task(name):
                    loss = loss_of(model, step, task)
                    if empty:
                        loss = loss + 0 * extra(torch.ones(2, shape[1], device=device)).sum()
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ends.append(weights_of(model))
    assert same(*ends)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("what", ["built", "grown", "loaded"])
def test_inference_mode_leaves_a_state_that_can_be_written(what: str, capture: str) -> None:
    ends = []
    for inference in (False, True):
        model = mlp()
        head = nn.Linear(8, 8)
        named = {"model": None} if what == "grown" else {"capture": capture}
        optimizer = None if what == "built" else gems(model, **named)
        with torch.inference_mode(inference):
            if optimizer is None:
                optimizer = gems(model, **named)
            elif what == "grown":
                optimizer.add_param_group({"params": list(head.parameters())})
            else:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, 4)
        ends.append(weights_of(model))
    assert same(*ends)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_hooks_of_a_load_see_the_grad_mode_of_its_caller(mode: Any) -> None:
    optimizer = gems(mlp())
    seen: list[bool] = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with mode():
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == [torch.is_grad_enabled()]


def test_names_may_be_members_of_a_string_enumeration() -> None:
    model = mlp()
    optimizer = gems(model, tasks=tuple(Kind))
    assert [type(name) for name in optimizer.tasks] == [str, str]
    optimizer.backward(
        {kind: loss_of(model, 0, task) for task, kind in enumerate(Kind)}, samples={"search": 3, Kind.REC: 5}
    )
    assert list(optimizer.clip_grad_norm_(1.0)) == ["search", "rec"]
    optimizer.step()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    optimizer.load_state_dict(torch.load(saved, weights_only=True))
    gems(mlp()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("samples", [np.int64(3), np.float32(3), np.float64(3)])
def test_numbers_of_numpy_are_numbers(samples: Any) -> None:
    plain: dict[str, Any] = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "task_rank": 2}
    of_numpy = {"rank": np.int64(4), "update_proj_gap": np.int32(3), "scale": np.float32(0.5), "task_rank": np.int8(2)}
    ends = []
    for count, options in ((3, plain), (samples, of_numpy)):
        model = mlp()
        optimizer = gems(model, **options)
        with optimizer.task("search", samples=count):
            loss_of(model, 0, 0).backward()
        optimizer.backward({"rec": loss_of(model, 0, 1)}, samples={"rec": count})
        optimizer.step()
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        torch.load(saved, weights_only=True)
        ends.append(weights_of(model))
    assert same(*ends)


@pytest.mark.parametrize("samples", [np.int64(0), np.float64("nan"), np.bool_(True), "3", None])
def test_what_is_no_positive_number_is_refused(samples: Any) -> None:
    optimizer = gems(mlp())
    with (
        pytest.raises(ValueError, match=r"samples=.* must be a positive number"),
        optimizer.task("rec", samples=samples),
    ):
        pass


def test_mixed_takes_arrays_of_indices_and_enumerations() -> None:
    model = mlp(bias=False)
    optimizer = gems(model, capture="fused")
    x = noise(4, 12)
    every: list[Any] = [np.array([0, 1, 1, 0]), [Kind.SEARCH, Kind.REC, Kind.REC, Kind.SEARCH]]
    for ids in every:
        with optimizer.mixed(ids, samples={Kind.SEARCH: 2, "rec": 2}) as rows:
            rows.loss(model(x).square().mean(1)).backward()
        optimizer.step()
        assert list(optimizer.report().layers[0].gates) == ["search", "rec"]


@pytest.mark.parametrize("bad", ["number", "None", "detached", "vector", "samples"])
def test_backward_looks_at_all_losses_before_it_begins(bad: str) -> None:
    model = mlp()
    optimizer = gems(model)
    values: dict[str, Any] = {
        "number": 0.0,
        "None": None,
        "detached": torch.tensor(1.0),
        "vector": model(noise(4, 12)).mean(1),
        "samples": loss_of(model, 0, 1),
    }
    samples = {"rec": -1} if bad == "samples" else None
    with pytest.raises(ValueError, match="'rec'"):
        optimizer.backward({"search": loss_of(model, 0, 0), "rec": values[bad]}, samples)
    optimizer.state_dict()  # refused if something was captured
    optimizer.backward({"search": loss_of(model, 0, 0), "rec": loss_of(model, 0, 1).reshape(1)})
    optimizer.step()


# --- frozen layers in distributed checkpoints (pytorch 192202) -------------------------------------------------------


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("frozen", ["0.weight", "2.weight", "2.bias", ".weight"])
def test_a_frozen_layer_loads_through_distributed_checkpoints(frozen: str, capture: str) -> None:
    def make(seed: int) -> tuple[nn.Sequential, GemsOptimizer]:
        model = mlp((12, 12, 12, 8), seed=seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(frozen))
        return model, gems(model, capture=capture)

    ends = []
    for resumed in (False, True):
        model, optimizer = make(0)
        train(model, optimizer, 4)
        if resumed:
            weights, state = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
            model, optimizer = make(1)
            model.load_state_dict(weights)
            set_optimizer_state_dict(model, optimizer, state)
        train(model, optimizer, 4, start=4)
        ends.append(weights_of(model))
    assert same(*ends)


def test_a_layer_that_trains_still_needs_its_state() -> None:
    model = mlp()
    optimizer = gems(model)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]
    with pytest.raises(ValueError, match="lacks the state of 0"):
        optimizer.load_state_dict(saved)
    model[0].weight.requires_grad_(False)
    optimizer.load_state_dict(saved)


# --- groups and state that others edit (gaussian splatting's densification, Adam's reset) ----------------------------


def _replaced(model: nn.Sequential, optimizer: GemsOptimizer) -> None:
    old = optimizer.param_groups[1]["params"][0]
    new = nn.Parameter(old.detach().clone())
    optimizer.state[new] = optimizer.state.pop(old)
    optimizer.param_groups[1]["params"][0] = model[0].bias = new


def _reordered(model: nn.Sequential, optimizer: GemsOptimizer) -> None:
    optimizer.param_groups.reverse()


def _removed(model: nn.Sequential, optimizer: GemsOptimizer) -> None:
    optimizer.param_groups[1]["params"].clear()


def _added(model: nn.Sequential, optimizer: GemsOptimizer) -> None:
    optimizer.param_groups[1]["params"].append(nn.Parameter(torch.ones(3)))


def _other_list(model: nn.Sequential, optimizer: GemsOptimizer) -> None:
    optimizer.param_groups[1]["params"] = [nn.Parameter(torch.ones(16))]


def _deleted(model: nn.Sequential, optimizer: GemsOptimizer) -> None:
    del optimizer.param_groups[0]


@pytest.mark.parametrize("edit", [_replaced, _reordered, _removed, _added, _other_list, _deleted])
def test_edited_groups_are_refused_at_the_next_step(edit: Any) -> None:
    model = mlp()
    base = torch.optim.AdamW([{"params": [parameter]} for parameter in model.parameters()], lr=1e-2)
    optimizer = gems(model, base=base)
    train(model, optimizer, 2)
    edit(model, optimizer)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"param_groups holds other parameters.*add_param_group\(\).*close\(\)"):
        train(model, optimizer, 1)
    assert same(before, weights_of(model))


def _new_state(optimizer: GemsOptimizer) -> None:
    optimizer.state = defaultdict(dict)


def _copied_state(optimizer: GemsOptimizer) -> None:
    optimizer.state = defaultdict(dict, {parameter: dict(held) for parameter, held in optimizer.state.items()})


def _cleared_state(optimizer: GemsOptimizer) -> None:
    optimizer.state.clear()


def _one_cleared(optimizer: GemsOptimizer) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]].clear()


def _one_popped(optimizer: GemsOptimizer) -> None:
    optimizer.state.pop(optimizer.param_groups[0]["params"][0])


@pytest.mark.parametrize("edit", [_new_state, _copied_state, _cleared_state, _one_cleared, _one_popped])
def test_a_state_that_was_thrown_away_is_missed_at_the_next_step(edit: Any) -> None:
    model = mlp()
    optimizer = gems(model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy((model, optimizer))
    edit(optimizer)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"state was replaced or cleared.*close\(\)"):
        train(model, optimizer, 1)
    assert same(before, weights_of(model))
    optimizer.close()
    optimizer = gems(model)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    train(*twin, 1)
    assert same(weights_of(model), weights_of(twin[0]))


@pytest.mark.parametrize("how", ["copy", "load", "group"])
def test_what_is_no_edit_goes_on(how: str) -> None:
    model = mlp()
    optimizer = gems(model, model=None)
    train(model, optimizer, 2)
    if how == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    elif how == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(8, 8))]})
    train(model, optimizer, 2, start=2)


# --- losses that the gate does not see -------------------------------------------------------------------------------


def _in_a_thread(loss: Any) -> None:
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


def test_losses_are_seen_however_a_backward_pass_is_called() -> None:
    ends = []
    for call in (torch.Tensor.backward, lambda loss: torch.autograd.backward(loss)):
        model = mlp()
        optimizer = gems(model)
        for step in range(3):
            for task, name in enumerate(optimizer.tasks):
                with optimizer.task(name):
                    call(loss_of(model, step, task))
            optimizer.step()
        ends.append(weights_of(model))
    assert same(*ends)


def test_a_loss_in_another_thread_is_missed_aloud() -> None:
    optimizer = gems(model := mlp())
    with optimizer.task("search"):
        _in_a_thread(loss_of(model, 0, 0))
    with pytest.warns(UserWarning, match="none was seen of \\['search'\\]"):
        optimizer.step()


def _losses_told(optimizer: GemsOptimizer) -> dict[str, float]:
    """Each task's loss as the gate gets it, from the report of the step that follows."""
    return {optimizer.tasks[task]: float(loss) for task, loss in optimizer._intake.losses.items()}


def test_the_loss_of_another_model_in_another_thread_is_not_this_ones() -> None:
    optimizer, other = gems(model := mlp()), gems(far := mlp(seed=1))

    def work() -> None:
        with other.task("rec"):
            (loss_of(far, 0, 0) * 1000).backward()
        other.step()

    loss = loss_of(model, 0, 0)
    with optimizer.task("search"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        loss.backward()
    assert _losses_told(optimizer) == {"search": pytest.approx(loss.item())}


@pytest.mark.parametrize("around", [False, True])
def test_a_pass_that_failed_and_is_repeated_counts_once(around: bool) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("none left")

    optimizer = gems(model := mlp(), capture="fused")
    if around:  # what is seen by a hook, before the failure
        with pytest.raises(torch.OutOfMemoryError), optimizer.mixed([0, 1]) as rows:
            rows.loss(Fails.apply(model(noise(2, 12)).square().mean(1))).backward()
    with optimizer.task("search"):
        if not around:
            with pytest.raises(torch.OutOfMemoryError):
                Fails.apply(loss_of(model, 0, 0)).backward()
        loss = loss_of(model, 0, 0)
        loss.backward()
    assert _losses_told(optimizer) == {"search": pytest.approx(loss.item())}


def test_a_refused_group_leaves_no_trace_in_later_layers() -> None:
    ends = []
    for refused in (False, True):
        model, late = mlp(), mlp(seed=1)
        base = torch.optim.AdamW(model.parameters())
        optimizer = GemsOptimizer(base, tasks=("search", "rec"), rank=2, update_proj_gap=2, refresh="sketch")
        if refused:
            strange = nn.Parameter(torch.ones(8, 8, dtype=torch.complex64))
            with pytest.raises((TypeError, ValueError)):
                optimizer.add_param_group({"params": [*late.parameters(), strange]})
        optimizer.add_param_group({"params": list(late.parameters())})
        for step in range(4):
            for task, name in enumerate(optimizer.tasks):
                with optimizer.task(name):
                    (loss_of(model, step, task) + loss_of(late, step, task)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights_of(model) + weights_of(late))
    assert same(*ends)


@pytest.mark.parametrize("gate", ["heuristic", "uniform", lambda inputs: inputs.present / inputs.losses.numel()])
def test_a_gate_that_reads_losses_says_once_that_it_saw_none(gate: Any) -> None:
    backward = torch.autograd.backward  # as a module has it that imported the function itself
    model = mlp()
    optimizer = gems(model, gate=gate)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            for task, name in enumerate(optimizer.tasks):
                with optimizer.task(name):
                    (backward if task else torch.Tensor.backward)(loss_of(model, step, task))
            optimizer.step()
    texts = [str(warning.message) for warning in said]
    assert len(texts) == (gate != "uniform")
    assert all("none was seen of ['rec']" in text for text in texts)


def test_a_loss_that_is_named_is_seen() -> None:
    model = mlp()
    optimizer = gems(model)
    for task, name in enumerate(optimizer.tasks):
        loss = loss_of(model, 0, task)
        with optimizer.task(name, loss=loss):
            torch.autograd.backward(loss)
    optimizer.step()


# --- base optimizers with lists of their groups ----------------------------------------------------------------------


class Bounded(torch.optim.SGD):
    """Keeps the first rate of each group in a list, as AdaBound does; ``zipped``: and goes through both together."""

    def __init__(self, params: Any, lr: float = 0.01, zipped: bool = False) -> None:
        super().__init__(params, lr)
        self.zipped = zipped
        self.rates = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """SGD's."""
        for place, group in enumerate(self.param_groups[: len(self.rates)] if self.zipped else self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"] * self.rates[place])


@pytest.mark.parametrize("zipped", [False, True])
def test_lists_of_groups_are_refused_when_they_would_be_too_short(zipped: bool) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"base=Bounded keeps a list.*2 groups in the place of 1.*groups of their own"):
        gems(model, base=Bounded(model.parameters(), zipped=zipped))
    apart = [{"params": [p for p in model.parameters() if p.ndim == n]} for n in (1, 2)]  # the remedy
    before = weights_of(model)
    train(model, gems(model, base=Bounded(apart, zipped=zipped)), 2)
    assert not any(torch.equal(one, other) for one, other in zip(before, weights_of(model), strict=True))
    bare = mlp(bias=False)
    train(bare, gems(bare, base=Bounded(bare.parameters(), zipped=zipped)), 2)


# --- conversions that swap tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_conversion_may_swap_the_tensors_of_parameters(capture: str, steps: int) -> None:
    ends = []
    for swap in (False, True):
        model = mlp()
        optimizer = gems(model, capture=capture)
        train(model, optimizer, steps)
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model.to(torch.float64)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        train(model, optimizer, 3, start=steps)
        ends.append(weights_of(model))
    assert same(*ends)


@pytest.mark.parametrize("surgery", ["sum", "pcgrad", "cagrad", "mgda", "gradvac"])
def test_small_losses_train_as_large_ones(surgery: str) -> None:
    ends = []
    for scale in (1.0, 1e-22):
        model = mlp()
        base = torch.optim.SGD(model.parameters(), lr=0.1 / scale)
        optimizer = gems(model, base=base, surgery=surgery, gate="uniform")
        for step in range(4):
            for task, name in enumerate(optimizer.tasks):
                with optimizer.task(name):
                    (loss_of(model, step, task) * scale).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights_of(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- forward passes that others change, and layers that are frozen between the passes --------------------------------


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_layer_that_is_frozen_before_the_backward_pass_rests(capture: str) -> None:
    """As GANs freeze one network while the other learns (RelativisticGAN 22)."""
    model = mlp()
    optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1), capture=capture)
    train(model, optimizer, 1)
    frozen, before = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    with optimizer.task(optimizer.tasks[0]):
        loss = loss_of(model, 1, 0)
        model[0].requires_grad_(False)
        loss.backward()
    optimizer.step()
    assert torch.equal(frozen, model[0].weight)
    assert not torch.equal(before, model[2].weight)


@pytest.mark.parametrize("capture", CAPTURES)
def test_another_forward_pass_of_the_class_is_run(capture: str) -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, plain = mlp(), mlp()
    optimizer = gems(model, capture=capture)
    for each in (model, plain):
        each[0].__class__ = Twice
    x = noise(5, model[0].in_features, key=(1,))
    with optimizer.task(optimizer.tasks[0]):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("capture", CAPTURES)
def test_inputs_of_another_dtype_are_refused_as_ever(capture: str, dtype: torch.dtype) -> None:
    """A cast in silence would make zeros of the weights for an input of integers (facechain 41)."""
    layer = nn.Linear(16, 16, bias=False)
    optimizer = gems(layer, base=torch.optim.SGD(layer.parameters(), lr=0.1), capture=capture)
    for within in (False, True):
        with optimizer.task(optimizer.tasks[0]) if within else torch.enable_grad(), pytest.raises(RuntimeError):
            layer(torch.ones(2, 16, dtype=dtype))


def test_replicas_of_data_parallelism_run_their_own_weights() -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gems(nn.DataParallel(model), base=base, capture="auto")
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = model[0].weight.detach() * 0, model[0].bias.detach() * 0
    with optimizer.task(optimizer.tasks[0]):
        assert not replica(noise(2, model[0].in_features, key=(2,))).any()


@pytest.mark.filterwarnings("ignore:null_space protects all 8 directions:UserWarning")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_layer_of_which_all_is_protected_hides_no_leak(order):
    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
    null_space = NullSpace(energy=1.0)
    null_space.update(str(order[0]), torch.eye(8))
    null_space.update(str(order[1]), torch.eye(8)[:3])
    base = torch.optim.AdamW(layers.parameters())
    optimizer = GemsOptimizer(base, tasks=("a",), rank=2, model=layers, null_space=null_space)
    with optimizer.task("a"):
        layers[1](layers[0](torch.randn(5, 8))).square().mean().backward()
    optimizer.step()
    assert 0.0 <= optimizer.report(leak=True).scalars()["leak"] < 1e-6
