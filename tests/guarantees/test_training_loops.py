"""Other people's training loops: accelerate, the Trainer of transformers, clipping, a gradient scaler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace

from .worlds import TASKS, Transformer, clones, general_null_space, leak, linear_weights, losses, train_step

# Vectors move freely here on purpose: what holds of weights must hold beside them.
pytestmark = pytest.mark.filterwarnings("ignore:null_space has nothing for:UserWarning")


def gems(model: nn.Module, null_space: NullSpace | None = None, **options: Any) -> GemsOptimizer:
    base = options.pop("base", None) or torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    return GemsOptimizer(base, tasks=TASKS, rank=4, update_proj_gap=2, model=model, null_space=null_space, **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def assert_only_free_directions_moved(model: nn.Module, before: dict[str, Tensor], null_space: NullSpace) -> None:
    for name, weight in linear_weights(model).items():
        if name in null_space:
            change = weight.detach() - before[name]
            assert change.norm() > 1e-3
            assert leak(change, null_space.basis(name), "input") < 2e-5  # three steps move little more than rounding


# --- accelerate ----------------------------------------------------------------------------------------------------


@pytest.fixture
def build_accelerator() -> Iterator[Any]:
    """``Accelerator`` on the CPU in full precision, whatever a trainer in an earlier test has left of its settings."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        for singleton in (AcceleratorState, GradientState, PartialState):
            singleton._reset_state()

    reset()
    yield partial(accelerate.Accelerator, cpu=True, mixed_precision="no")
    reset()


@pytest.fixture
def accelerator(build_accelerator) -> Any:
    return build_accelerator()


@pytest.mark.parametrize("way", ["the optimizer itself", "prepared.optimizer"])
def test_a_prepared_run_equals_one_without_accelerate(accelerator, way):
    plain = Transformer()
    optimizer = gems(plain, general_null_space(plain, "input"))
    for step in range(5):
        train_step(plain, optimizer, step)

    model = Transformer()
    mine = gems(model, general_null_space(model, "input"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(mine, lambda step: 1.0)
    model, prepared, scheduler = accelerator.prepare(model, mine, scheduler)
    tasks = mine if way == "the optimizer itself" else prepared.optimizer
    for step in range(5):
        found = losses(model, step)
        for position, (name, loss) in enumerate(found.items()):
            with tasks.task(name):
                accelerator.backward(loss, retain_graph=position == 0)
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
    assert same(plain, model)


def test_preparing_in_the_middle_of_a_run_changes_nothing(accelerator):
    """``prepare`` takes the state out and loads it again."""
    plain, model = Transformer(), Transformer()
    first, second = gems(plain), gems(model)
    for step in range(3):
        train_step(plain, first, step)
        train_step(model, second, step)
    model, _ = accelerator.prepare(model, second)
    for step in range(3, 6):
        train_step(plain, first, step)
        train_step(model, second, step)
    assert same(plain, model)


def test_accumulation_by_accelerate_steps_once_for_all_parts(build_accelerator):
    accelerator = build_accelerator(gradient_accumulation_steps=2)
    plain, model = Transformer(), Transformer()
    first, mine = gems(plain), gems(model)
    model, prepared = accelerator.prepare(model, mine)
    for step in range(3):
        for part in range(2):
            with accelerator.accumulate(model):
                for position, (name, loss) in enumerate(losses(model, 2 * step + part).items()):
                    with mine.task(name):
                        accelerator.backward(loss, retain_graph=position == 0)
                prepared.step()
                prepared.zero_grad()
        for part in range(2):
            first.backward({name: loss / 2 for name, loss in losses(plain, 2 * step + part).items()})
        first.step()
        first.zero_grad()
    assert int(mine.state[linear_weights(model)["blocks.0.up"]]["step"]) == 3
    assert same(plain, model)


# --- the Trainer of transformers -----------------------------------------------------------------------------------


class Sequences(torch.utils.data.Dataset):
    """Copying for even numbers, counting up for odd ones."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(32, (6,), generator=torch.Generator().manual_seed(index))
        if index % 2:
            ids = (ids[0] + torch.arange(6)) % 32
        return {"input_ids": ids, "labels": ids.clone(), "task": torch.tensor(index % 2)}


@pytest.fixture
def llama() -> Iterator[nn.Module]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    yield transformers.LlamaForCausalLM(config)
    for singleton in (AcceleratorState, GradientState, PartialState):
        singleton._reset_state()


def general_domain(model: nn.Module) -> NullSpace:
    ids = torch.randint(32, (16, 6), generator=torch.Generator().manual_seed(99))
    return NullSpace(max_rank=6).collect(model, [{"input_ids": ids}])


def train_with(trainer_class: type, model: nn.Module, optimizer: GemsOptimizer, folder: Any, **options: Any) -> Any:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        max_grad_norm=0.0,  # it does not see captured gradients, which is said
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **options,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 10)
    trainer = trainer_class(model=model, args=arguments, train_dataset=Sequences(), optimizers=(optimizer, scheduler))
    trainer.train()
    return trainer


def test_the_trainer_as_it_is_trains_in_the_shared_subspace_alone(llama, tmp_path):
    from transformers import Trainer

    class Plain(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "task"}, *args, **kwargs)

    null_space = general_domain(llama)
    before = {name: weight.detach().clone() for name, weight in linear_weights(llama).items()}
    optimizer = gems(llama, null_space)
    with pytest.warns(UserWarning, match="3 steps had gradients, and none of them a task"):
        train_with(Plain, llama, optimizer, tmp_path)
    assert_only_free_directions_moved(llama, before, null_space)
    for name, weight in linear_weights(llama).items():
        if name in null_space:
            shared, *own = optimizer.state[weight]["basis"].split([4, 2, 2], dim=1)
            assert int(optimizer.state[weight]["step"]) == 3
            assert shared.norm() > 1
            assert all(basis.abs().sum() == 0 for basis in own)


def task_trainer(optimizer: GemsOptimizer, record: list[dict[str, Tensor]]) -> type:
    """The subclass that the documentation shows: a batch may mix tasks in any way."""
    from transformers import Trainer

    class TaskTrainer(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            record.append({key: value.clone() for key, value in inputs.items()})
            which = inputs.pop("task")
            total = 0.0
            for k, name in enumerate(optimizer.tasks):
                mine = which == k
                if mine.any():
                    part = {key: value[mine] for key, value in inputs.items()}
                    with optimizer.task(name, samples=int(mine.sum())):
                        total = total + super().training_step(model, part) * mine.float().mean()
            return total

    return TaskTrainer


@pytest.mark.parametrize("parts", [1, 2], ids=["", "accumulation"])
def test_a_trainer_that_opens_tasks_equals_the_loop_written_by_hand(llama, tmp_path, parts):
    null_space = general_domain(llama)
    by_hand = copy.deepcopy(llama)
    before = {name: weight.detach().clone() for name, weight in linear_weights(llama).items()}
    optimizer, record = gems(llama, null_space), []
    train_with(task_trainer(optimizer, record), llama, optimizer, tmp_path, gradient_accumulation_steps=parts)
    assert_only_free_directions_moved(llama, before, null_space)
    assert set(optimizer.report().layers[0].gates) == set(TASKS)
    assert len(record) == 3 * parts

    twin = gems(by_hand, null_space)
    schedule = torch.optim.lr_scheduler.LambdaLR(twin, lambda step: 1.0 - step / 10)
    for step in range(3):
        for batch in record[parts * step : parts * (step + 1)]:
            for k, name in enumerate(TASKS):
                mine = batch["task"] == k
                if mine.any():
                    with twin.task(name, samples=int(mine.sum())):
                        loss = by_hand(input_ids=batch["input_ids"][mine], labels=batch["labels"][mine]).loss
                        (loss / parts).backward()
        twin.step()
        schedule.step()
        twin.zero_grad()
    for a, b in zip(llama.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- clipping and scaling ------------------------------------------------------------------------------------------


def test_torchs_clipping_acts_on_gradients_outside_and_the_optimizers_on_captured_ones():
    model = Transformer()
    optimizer = gems(model)
    sum(losses(model, 0).values()).backward()
    outside = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert outside > 1e-2
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert total == pytest.approx(1e-3, rel=1e-3)

    optimizer.backward(losses(model, 1))
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9) == pytest.approx(1e-3, rel=1e-3)
    first = optimizer.clip_grad_norm_(1e-3)
    assert set(first) == set(TASKS)
    assert all(norm > 1e-2 for norm in first.values())
    again = optimizer.clip_grad_norm_(1e-3)
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in again.values())


def test_the_captured_norm_is_that_of_the_whole_gradient():
    model = Transformer()
    optimizer = gems(model)
    for step in range(3):  # at a refresh, and between two
        expected = {}
        for name, loss in losses(model, step).items():
            gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            expected[name] = float(torch.stack([g.norm() for g in gradients]).norm())
        optimizer.backward(losses(model, step))
        found = {name: float(norm) for name, norm in optimizer.clip_grad_norm_(1e9).items()}
        assert found == pytest.approx(expected, rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()


def test_clipping_with_sgd_bounds_the_step():
    steps = {}
    for bound in (1e9, 1e-2):
        model = Transformer()
        before = clones(model.parameters())
        optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=1.0))
        optimizer.backward(losses(model, 0))
        optimizer.clip_grad_norm_(bound)
        optimizer.step()
        changes = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        steps[bound] = float(torch.stack([change.norm() for change in changes]).norm())
    assert steps[1e-2] < 2.001e-2 < 0.1 < steps[1e9]  # shared + gated own part, each at most 1e-2


def state_of(optimizer: GemsOptimizer) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


def scaled_run(fused: bool, scale: bool, bad: int | None, max_norm: float | None = None) -> Transformer:
    """Six steps; the one at ``bad`` is infinite under the scaler and left out without it."""
    model = Transformer()
    base = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=fused)
    optimizer = gems(model, general_null_space(model, "input"), base=base)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scale)
    for step in range(6):
        if step == bad and not scale:
            continue
        before = clones(model.parameters()), state_of(optimizer)
        found = losses(model, step)
        if step == bad:
            found["sort"] = found["sort"] * torch.inf
        for position, (name, loss) in enumerate(found.items()):
            with optimizer.task(name):
                scaler.scale(loss).backward(retain_graph=position == 0)
        if max_norm is not None:
            scaler.unscale_(optimizer)
            norms = optimizer.clip_grad_norm_(max_norm)
            assert step == bad or all(1e-2 < norm < 50 for norm in norms.values())  # of unscaled gradients
        scale_before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if step == bad:
            assert scaler.get_scale() == scale_before / 2
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before[0], strict=True))
            assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), before[1], strict=True))
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loop"])
@pytest.mark.parametrize("bad", [None, 2, 3], ids=["finite", "inf at a refresh", "inf between"])
@pytest.mark.parametrize("max_norm", [None, 0.05], ids=["", "clipped"])
def test_a_scaled_run_equals_an_unscaled_one(fused, bad, max_norm):
    scaled, plain = (scaled_run(fused, scale, bad, max_norm) for scale in (True, False))
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_scaled_sgd_run_equals_an_unscaled_one():
    """Its step follows the gradient's size: a forgotten scale, which Adam divides away, would show."""
    found = []
    for scale in (True, False):
        model = Transformer()
        optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scale)
        for step in range(3):
            for position, (name, loss) in enumerate(losses(model, step).items()):
                with optimizer.task(name):
                    scaler.scale(loss).backward(retain_graph=position == 0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(clones(model.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
