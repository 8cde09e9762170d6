"""However the forward pass is run, the fused capture takes the steps of the generic one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .worlds import TASKS, flat, gems, model_of, null_space_of, train

FORWARDS = ["inside", "outside", "mixed inside", "mixed outside"]
WIDTHS = (20, 28, 24, 28, 12)


def ends(widths, options, *, forward, capture, steps=8, **kind):
    model = model_of(widths, **kind)
    null_space = null_space_of(model, options["side"]) if options.pop("null_space", False) else None
    optimizer = gems(model, capture=capture, null_space=null_space, **options)
    before = flat(model)
    train(model, optimizer, steps, forward=forward)
    return flat(model), before


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("null_space", [False, True])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_equals_the_generic_capture(side, refresh, null_space, forward):
    options = {"side": side, "refresh": refresh, "null_space": null_space}
    fused, before = ends(WIDTHS, dict(options), forward=forward, capture="fused")
    generic, _ = ends(WIDTHS, dict(options), forward="inside", capture="generic")
    torch.testing.assert_close(fused, generic, rtol=0, atol=1e-9)
    assert (fused - before).norm() > 0.01 * before.norm(), "both stood still"


@example(  # what the shared basis leaves of the tasks' gradients has a lower rank than theirs
    widths=[3, 7],
    rank=6,
    gap=1,
    side="output",
    refresh="sketch",
    orthogonalize="shared_first",
    gate="heuristic",
    transposed=False,
    bias=False,
    forward="mixed inside",
)
@settings(max_examples=25)
@given(
    widths=st.lists(st.integers(3, 18), min_size=2, max_size=4),
    rank=st.integers(1, 6),
    gap=st.integers(1, 6),
    side=st.sampled_from(["input", "output"]),
    refresh=st.sampled_from(["svd", "sketch"]),
    orthogonalize=st.sampled_from(["none", "shared_first"]),
    gate=st.sampled_from(["heuristic", "hypergradient"]),
    transposed=st.booleans(),
    bias=st.booleans(),
    forward=st.sampled_from(FORWARDS),
)
@pytest.mark.filterwarnings("ignore:rank=")
def test_equals_the_generic_capture_for_any_shape(
    widths, rank, gap, side, refresh, orthogonalize, gate, transposed, bias, forward
):
    # SGD, so that an entry of a gradient that is zero but for rounding does not become a whole step.
    kind = {"transposed": transposed, "bias": bias}
    found = []
    for capture, way in (("fused", forward), ("generic", "inside")):
        model = model_of(tuple(widths), **kind)
        optimizer = gems(
            model,
            base=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5),
            rank=rank,
            update_proj_gap=gap,
            side=side,
            refresh=refresh,
            orthogonalize=orthogonalize,
            gate=gate,
            capture=capture,
        )
        train(model, optimizer, 3, forward=way)
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("surgery", ["pcgrad", "cagrad"])
def test_surgery_sees_the_same_gramian(surgery):
    options = {"side": "input", "surgery": surgery}
    fused, _ = ends(WIDTHS, dict(options), forward="inside", capture="fused", bias=False)
    generic, _ = ends(WIDTHS, dict(options), forward="inside", capture="generic", bias=False)
    mixed, _ = ends(WIDTHS, dict(options), forward="mixed inside", capture="fused", bias=False)
    torch.testing.assert_close(fused, generic, rtol=0, atol=1e-8)
    torch.testing.assert_close(mixed, generic, rtol=0, atol=1e-8)


def test_parts_of_a_batch_add_up():
    """Accumulation: two halves of every task's batch, as two blocks, are the whole."""
    whole, parts = model_of(WIDTHS), model_of(WIDTHS)
    first, second = gems(whole, refresh="sketch"), gems(parts, refresh="sketch")
    x = torch.randn(8, 3, 20, dtype=torch.float64)
    for _ in range(4):
        with first.task("a", samples=8):
            whole(x).square().mean().backward()
        for half in x.split(4):
            with second.task("a", samples=4):
                (parts(half).square().mean() / 2).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(flat(whole), flat(parts), rtol=0, atol=1e-9)


def test_tokens_may_be_flattened_into_rows():
    """A layer that gets (batch * length, features), as inside a mixture of experts or behind a reshape."""

    class Flat(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.flatten(0, 1)).view(*x.shape[:2], -1)

    model, plain = model_of(WIDTHS), model_of(WIDTHS)
    optimizer, reference = gems(model), gems(plain)
    optimizer.calls = Flat(model)
    train(model, optimizer, 4, forward="mixed inside")
    train(plain, reference, 4, forward="inside")
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-9)


class TestMixedRefuses:
    def test_without_the_fused_capture(self):
        with pytest.raises(ValueError, match='capture="fused"'), gems(model_of(WIDTHS), capture="generic").mixed(["a"]):
            pass

    @pytest.mark.parametrize(("ids", "match"), [([], "empty"), (["x"], "'x'"), ([3], "3"), ([True], "True")])
    def test_task_ids(self, ids, match):
        with pytest.raises(ValueError, match=match), gems(model_of(WIDTHS)).mixed(ids):
            pass

    def test_samples_of_an_absent_task(self):
        optimizer = gems(model_of(WIDTHS))
        with pytest.raises(ValueError, match="samples names"), optimizer.mixed(["a"], samples={"b": 1}):
            pass

    def test_another_number_of_rows(self):
        model = model_of(WIDTHS)
        optimizer = gems(model)
        with pytest.raises(RuntimeError, match="told of 2 rows"), optimizer.mixed(["a", "b"]):
            model(torch.randn(3, 3, 20, dtype=torch.float64))

    def test_losses_of_another_shape(self):
        with gems(model_of(WIDTHS)).mixed(["a", "b"]) as rows, pytest.raises(ValueError, match="one loss a row"):
            rows.loss(torch.ones(3))

    def test_a_weight_that_something_else_uses(self):
        model = model_of((20, 20))
        optimizer = gems(model)
        with pytest.raises(RuntimeError, match="mixed batch"), optimizer.mixed(["a", "b"]):
            (model[0].weight.sum() + model(torch.randn(2, 3, 20, dtype=torch.float64)).sum()).backward()

    def test_a_tensor_of_indices_is_fine(self):
        model, twin = model_of(WIDTHS), model_of(WIDTHS)
        x = torch.randn(2, 3, 20, dtype=torch.float64)
        for each, ids in ((model, torch.tensor([2, 0])), (twin, ["c", "a"])):
            optimizer = gems(each)
            with optimizer.mixed(ids):
                each(x).square().mean().backward()
            optimizer.step()
        assert torch.equal(flat(model), flat(twin))
        assert TASKS[2] == "c"
