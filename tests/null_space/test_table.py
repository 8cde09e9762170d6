"""Many layers: the table, versions, merging, and layers that share their statistics."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsub import NullSpace

from .test_sketch import features

quick = settings(max_examples=20, deadline=None)
SKETCHED = 10 * 24 * 4
budgets = st.sampled_from([None, SKETCHED])


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small are decomposed faster by one thread than by several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    """Query, key and value on one tensor, then a projection, and two feed-forward layers that share another one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out, self.gate, self.up = (nn.Linear(24, 24) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        attended = self.out(torch.tanh(self.query(x) + self.key(x)) * self.value(x))
        return self.gate(attended) * self.up(attended)


class Planned(nn.Module):
    """Calls its layers in the order of a plan, each on one of three tensors."""

    def __init__(self, plan: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 2) for _ in range(3))
        self.plan = plan

    def forward(self, *sources: Tensor) -> None:
        for layer, source in self.plan:
            self.layers[layer](sources[source])


def assert_same(one: NullSpace, other: NullSpace) -> None:
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one.eigenvalues(name), other.eigenvalues(name), rtol=1e-10, atol=1e-12)
        assert one.error_bound(name) == pytest.approx(other.error_bound(name))
        assert one._statistics(name).count == other._statistics(name).count


def collected(model: nn.Module, seed: int = 0, batches: int = 3, **arguments: object) -> NullSpace:
    inputs = features(20 * batches, 24, 1.0, seed, torch.float32).split(20)
    return NullSpace(**{"max_rank": 3, **arguments}).collect(model, inputs)


def test_table_has_a_line_per_layer():
    null_space = NullSpace(energy=0.9, layer_memory_budget=600)
    null_space.update("small", torch.eye(4)[:2])
    null_space.update("encoder.large", features(50, 20, 3.0, seed=1, dtype=torch.float32))
    header, small, large, footer = null_space.table().splitlines()
    assert header.split() == ["layer", "dimension", "protected", "fraction", "energy", "kind", "tokens"]
    assert small.split() == ["small", "4", "2", "0.500", "1.0000", "exact", "2"]
    name, dimension, protected, fraction, energy, kind, tokens = large.split()
    assert (name, dimension, kind, tokens) == ("encoder.large", "20", "sketch", "50")
    assert int(protected) == null_space.basis("encoder.large").shape[1]
    assert float(fraction) == pytest.approx(null_space.protected_fraction("encoder.large"), abs=1e-3)
    assert 0.9 <= float(energy) <= 1.0
    assert footer == "statistics: 0.0 MB"
    assert len({len(line) for line in (header, small, large)}) == 1
    assert "\n" not in repr(null_space)


def test_table_of_nothing():
    assert NullSpace().table().splitlines()[1:] == ["statistics: 0.0 MB"]


def test_layers_of_one_input_share_statistics_and_one_decomposition(monkeypatch):
    null_space = collected(Attention())
    query, key, value, out, gate, up = null_space._shared.by_name.values()
    assert query is key is value
    assert gate is up
    assert len({id(statistics) for statistics in (query, out, gate)}) == 3
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *arguments: calls.append(1) or eigh(*arguments))
    for name in null_space:
        null_space.basis(name)
    assert len(calls) == 3


@pytest.mark.parametrize("budget", [None, SKETCHED])
def test_update_of_one_layer_leaves_those_it_shared_with(budget):
    null_space = collected(Attention(), layer_memory_budget=budget)
    before = {name: (null_space.eigenvalues(name), null_space.version(name)) for name in null_space}
    null_space.update("key", features(30, 24, 0.0, seed=9, dtype=torch.float32))
    for name, (eigenvalues, version) in before.items():
        assert torch.equal(null_space.eigenvalues(name), eigenvalues) == (name != "key")
        assert null_space.version(name) == version + (name == "key")


@pytest.mark.filterwarnings("ignore:.* saw no features")
@quick
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6), min_size=1, max_size=4),
    budgets,
    st.integers(0, 2**16),
)
def test_sharing_never_changes_a_layer(plans, budget, seed):
    """Whatever the order of calls, and whatever is repeated or skipped, layers hold what they would hold alone."""
    model = Planned([])
    sources = features(90, 24, 1.0, seed, torch.float32).split(30)
    shared, alone = (NullSpace(max_rank=3, layer_memory_budget=budget) for _ in range(2))
    for plan in plans:
        model.plan = plan
        shared.collect(model, [sources], normalize=False)
        for layer, source in plan:
            alone.update(f"layers.{layer}", sources[source])
    assert_same(shared, alone)
    assert {name: shared.version(name) for name in shared} == {name: alone.version(name) for name in alone}


@pytest.mark.parametrize("budget", [None, SKETCHED])
def test_sharing_survives_files_copies_and_pickles(tmp_path, budget):
    null_space = collected(Attention(), layer_memory_budget=budget)
    null_space.save(tmp_path / "null_space.safetensors")
    loaded = NullSpace.load(tmp_path / "null_space.safetensors")
    for twin in (loaded, copy.deepcopy(null_space), pickle.loads(pickle.dumps(null_space))):
        assert len(twin._shared.distinct()) == 3
        assert_same(twin, null_space)
        twin.update("query", torch.ones(2, 24))
        assert twin.version("query") == 4
        assert twin._statistics("key").count == null_space._statistics("key").count


@quick
@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 2**16))
def test_merged_covariances_equal_one_collection(sizes, seed):
    parts = features(sum(sizes), 12, 1.0, seed).split(sizes)
    merged, whole = NullSpace(energy=0.9), NullSpace(energy=0.9)
    for part in parts:
        rank = NullSpace(energy=0.9)
        rank.update("layer", part)
        assert merged.merge(rank) is merged
        whole.update("layer", part)
    assert_same(merged, whole)
    assert merged.version("layer") == len(parts)


def test_merged_sketches_obey_the_bound_of_one():
    A = features(400, 24, 1.0, seed=2, dtype=torch.float32)
    one, two = (NullSpace(max_rank=3, layer_memory_budget=SKETCHED) for _ in range(2))
    one.update("layer", A[:150])
    two.update("layer", A[150:])
    one.merge(two)
    exact = torch.linalg.eigvalsh(A.double().mT @ A.double() / 400).flip(0)
    error = one.error_bound("layer")
    assert 0 < error <= min(exact[k:].sum() / (6 - k) for k in range(6)) + 1e-6
    lost = exact - one.eigenvalues("layer")
    assert lost.min() >= -1e-6
    assert lost.max() <= error + 1e-6


@pytest.mark.parametrize("budget", [None, SKETCHED])
def test_merge_keeps_sharing_and_the_other_and_takes_new_layers(budget):
    model = Attention()
    one, two = collected(model, 0, layer_memory_budget=budget), collected(model, 1, layer_memory_budget=budget)
    two.update("extra", torch.ones(3, 5))
    before = copy.deepcopy(two)
    one.merge(two)
    assert len(one._shared.distinct()) == 4
    assert one._statistics("key").count == 120
    assert "extra" in one
    one.update("extra", torch.ones(3, 5))
    assert_same(two, before)


@pytest.mark.parametrize("budget", [None, SKETCHED])
def test_merge_with_itself_counts_everything_twice(budget):
    null_space = collected(Attention(), layer_memory_budget=budget)
    before = copy.deepcopy(null_space)
    null_space.merge(null_space)
    for name in null_space:
        assert null_space._statistics(name).count == 2 * before._statistics(name).count
        change = (null_space.eigenvalues(name) - before.eigenvalues(name)).abs().max()
        assert change <= null_space.error_bound(name) + 1e-6


@pytest.mark.parametrize(
    ("arguments", "width", "match"),
    [
        ({"side": "output"}, 24, "side"),
        ({"max_rank": 4}, 24, "max_rank"),
        ({"layer_memory_budget": SKETCHED}, 24, "layer_memory_budget"),
        ({}, 12, "width 12 for 'query'"),
    ],
)
def test_merge_of_what_differs_changes_nothing(arguments, width, match):
    null_space = collected(Attention())
    versions = {name: null_space.version(name) for name in null_space}
    other = NullSpace(**{"max_rank": 3, **arguments})
    other.update("out", torch.ones(2, 24))
    other.update("query", torch.ones(2, width))
    with pytest.raises(ValueError, match=match):
        null_space.merge(other)
    assert {name: null_space.version(name) for name in null_space} == versions


def test_version_rises_with_every_addition_and_never_by_reading():
    null_space = NullSpace()
    null_space.update("layer", torch.eye(4))
    first = null_space.version("layer")
    null_space.basis("layer")
    null_space.table()
    assert null_space.version("layer") == first
    with pytest.raises(ValueError, match="NaN"):
        null_space.update("layer", torch.full((2, 4), torch.nan))
    assert null_space.version("layer") == first
    null_space.update("layer", torch.eye(4))
    assert null_space.version("layer") > first
    with pytest.raises(KeyError, match="layer"):
        null_space.version("unknown")


@pytest.mark.parametrize("budget", [None, SKETCHED])
def test_what_inference_mode_began_can_go_on_outside(budget):
    model = Attention()
    with torch.inference_mode():
        null_space = collected(model, layer_memory_budget=budget)
        null_space.update("value", features(8, 24, 1.0, 3, torch.float32))
        null_space.basis("value")
    null_space.update("value", features(8, 24, 1.0, 4, torch.float32))
    null_space.collect(model, [features(20, 24, 1.0, 5, torch.float32)])
    assert null_space._statistics("value").count == 96
    assert not null_space.basis("value").is_inference()
