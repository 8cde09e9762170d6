"""However the forward pass is run, the fused capture takes the steps of the generic one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .worlds import LENGTH, TASKS, flat, gems, losses_of, model_of, null_space_of, train

# Vectors move freely here on purpose: what holds of weights must hold beside them.
pytestmark = pytest.mark.filterwarnings("ignore:null_space has nothing for:UserWarning")

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
    """A layer that gets (batch * length, features), as behind a reshape: if its rows are said to be whose they are."""

    class Flat(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.flatten(0, 1)).view(*x.shape[:2], -1)

    model, plain = model_of(WIDTHS), model_of(WIDTHS)
    optimizer, reference = gems(model), gems(plain)
    optimizer.calls = Flat(model)
    with pytest.raises(RuntimeError, match=r"of \d has the shape .*other_rows"):
        train(model, optimizer, 1, forward="mixed inside")
    optimizer.other_rows = lambda ids: [[task for task in ids for _ in range(LENGTH)]]
    train(model, optimizer, 4, forward="mixed inside")
    train(plain, reference, 4, forward="inside")
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-9)


ARRANGED = {
    # What a model makes of (B, T, d) before its first layer, and back, and whose the entries of the first axis are.
    "flattened": (
        lambda x: x.flatten(0, 1),
        lambda y, B, T: y.unflatten(0, (B, T)),
        lambda ids, T: ids.repeat_interleave(T),
    ),
    "time first, flattened": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, B, T: y.unflatten(0, (T, B)).transpose(0, 1),
        lambda ids, T: ids.repeat(T),
    ),
    "one batch after another": (
        lambda x: torch.cat(list(x.unbind(1))),
        lambda y, B, T: torch.stack(y.chunk(T), dim=1),
        lambda ids, T: ids.repeat(T),
    ),
}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("arranged", ARRANGED)
def test_other_rows_are_whose_they_are_said_to_be(arranged, refresh, side):
    """Or the batch is refused, whatever the numbers: no multiple of its rows is taken for anything."""
    there, back, whose = ARRANGED[arranged]
    models = [model_of(WIDTHS), model_of(WIDTHS)]
    optimizers = [gems(each, refresh=refresh, side=side, update_proj_gap=2) for each in models]
    ids = torch.tensor([0, 2, 2, 0, 0, 2])
    for step in range(4):
        x = torch.randn(len(ids), LENGTH, 20, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        with optimizers[0].mixed(ids), pytest.raises(RuntimeError, match="not to be found out by counting"):
            models[0](there(x)).sum().backward()
        with optimizers[0].mixed(ids, other_rows=[whose(ids, LENGTH)]) as rows:
            output = back(models[0](there(x)), len(ids), LENGTH)
            losses = torch.cat([losses_of(TASKS[k], output[i : i + 1]) for i, k in enumerate(ids.tolist())])
            rows.loss(losses).backward()
        for k in (0, 2):
            mine = x[ids == k]
            with optimizers[1].task(TASKS[k], samples=len(mine)):
                losses_of(TASKS[k], models[1](mine)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=1e-9)


def test_chosen_tokens_and_the_whole_batch_in_one_pass():
    """A head that sees masked tokens only, of one task none; the layers below have the batch."""
    models = [model_of(WIDTHS), model_of(WIDTHS)]
    optimizers = [gems(each) for each in models]
    ids, mask = torch.tensor([0, 1, 0, 1]), torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    x = torch.randn(4, LENGTH, 20, dtype=torch.float64)
    chosen = ids[:, None].expand(4, LENGTH)[mask]
    with optimizers[0].mixed(ids, other_rows=[chosen]) as rows:
        hidden = models[0][:4](x)
        heads = models[0][4](hidden[mask]).square().sum(1)
        per_row = torch.zeros(4, dtype=torch.float64).index_add(0, mask.nonzero()[:, 0], heads)
        rows.loss(per_row + hidden.square().mean((1, 2))).backward()
    for k in range(2):
        with optimizers[1].task(TASKS[k], samples=2):
            hidden = models[1][:4](x[ids == k])
            (models[1][4](hidden[mask[ids == k]]).square().sum() / 2 + hidden.square().mean()).backward()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("task_ids", "told", "added"),
    [("bbb", False, 0.0), ("bbb", True, 0.0), ("bbb", True, 100.0), ("bba", True, 100.0)],
)
def test_the_gate_learns_the_loss_of_the_rows(task_ids, told, added):
    """Without what is added to ``rows.loss``; of one task alone, also from the mean."""
    seen = []

    def gate(inputs):
        seen.append(inputs.losses.clone())
        return torch.ones_like(inputs.gradient_norms)

    model = model_of(WIDTHS)
    optimizer = gems(model, gate=gate)
    x = torch.randn(3, 3, 20, dtype=torch.float64)
    with optimizer.mixed(list(task_ids)) as rows:
        losses = model(x).square().mean((1, 2))
        ((rows.loss(losses) if told else losses.mean()) + added).backward()
    optimizer.step()
    expected = torch.full((len(TASKS),), torch.nan, dtype=torch.float64)
    for task in set(task_ids):
        of_task = torch.tensor([each == task for each in task_ids])
        expected[TASKS.index(task)] = losses.detach()[of_task].mean()
    torch.testing.assert_close(seen[0], expected, equal_nan=True, rtol=0, atol=1e-6)


class TestMixedRefuses:
    def test_without_the_fused_capture(self):
        with pytest.raises(ValueError, match='capture="fused"'), gems(model_of(WIDTHS), capture="generic").mixed(["a"]):
            pass

    def test_a_model_without_plain_linear_layers(self):
        """What was given is not advised."""

        class Own(torch.nn.Linear):
            def forward(self, x):
                return x @ self.weight.mT

        model = torch.nn.Sequential(Own(20, 12, bias=False).double())
        with pytest.warns(UserWarning, match="does not have a plain linear layer's forward pass"):
            optimizer = gems(model)
        with pytest.raises(ValueError, match=r"none that is trained .* is a plain linear one") as refused:
            optimizer.mixed(["a"]).__enter__()
        assert "capture=" not in str(refused.value)

    @pytest.mark.parametrize("capture", ["auto", "fused"])
    def test_a_weight_that_a_function_takes(self, capture):
        """Whatever captures, the advice is one that helps there."""
        model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 300)).double()
        optimizer = gems(model, capture=capture)
        x = torch.randn(2, 300, dtype=torch.float64)
        with (
            pytest.raises(RuntimeError, match="is used otherwise, leave it out of target_modules"),
            optimizer.mixed("ab"),
        ):
            (model[0](x) @ model[1].weight).sum().backward()

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
            model(torch.randn(3, 3, 20, dtype=torch.float64)).sum().backward()

    def test_an_input_without_an_axis_of_rows(self):
        optimizer = gems(model := model_of(WIDTHS))
        with pytest.raises(RuntimeError, match="told of 20 rows"), optimizer.mixed(["a", "b"] * 10):
            model(torch.randn(20, dtype=torch.float64)).sum().backward()

    def test_no_pass_that_leaves_the_weights_without_a_gradient(self):
        """Of an input with any number of rows: a norm that is detached, or the gradient of an input alone."""
        model = model_of(WIDTHS)
        optimizer = gems(model)
        x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(model(x).sum(), x)
        with optimizer.mixed(["a", "b"]):
            assert not model(torch.eye(20, dtype=torch.float64)).detach().requires_grad
            (found,) = torch.autograd.grad(model(x).sum(), x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("other", "match"),
        [([["c"] * 4], "other_rows names"), ([["b", "a"]], "two accounts of 2"), ([["a"] * 4, ["b"] * 4], "of 4")],
    )
    def test_other_rows(self, other, match):
        optimizer = gems(model_of(WIDTHS))
        with pytest.raises(ValueError, match=match), optimizer.mixed(["a", "b"], other_rows=other):
            pass

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
