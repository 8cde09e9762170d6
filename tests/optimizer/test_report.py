"""The numbers of `report()`, computed once more from the definitions."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from gradsub import Report

from .toys import SAMPLES, TASKS, basis_of, gems, loss_of, mlp, null_space_of, train

NAMES = ("shared", *TASKS)


def gradients_of(model: torch.nn.Module, weight: torch.Tensor, step: int) -> dict[str, np.ndarray]:
    return {
        name: torch.autograd.grad(loss_of(model, step, task), weight)[0].numpy(force=True)
        for task, name in enumerate(TASKS)
    }


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("steps", [1, 3], ids=["at a refresh", "between refreshes"])
def test_every_number_of_the_report(device, side, steps):
    model = mlp((12, 10, 9), dtype=torch.float64, device=device)
    null_space = null_space_of(model, side)
    optimizer = gems(model, side=side, null_space=null_space, rank=4, task_rank=3, update_proj_gap=50)
    train(model, optimizer, steps - 1)
    losses = [loss_of(model, steps - 1, task).item() for task in range(2)]
    found = {name: gradients_of(model, model.get_submodule(name).weight, steps - 1) for name in ("0", "2")}
    train(model, optimizer, 1, start=steps - 1)
    report = {layer.name: layer for layer in optimizer.report().layers}
    assert list(report) == ["0", "2"]
    for name, layer in report.items():
        weight = model.get_submodule(name).weight
        bases = {
            key: basis_of(optimizer, weight, k, (4, 3, 3)).numpy(force=True) for k, key in enumerate(("shared", *TASKS))
        }

        def inside(gradient: np.ndarray, basis: np.ndarray) -> np.ndarray:
            return gradient @ basis if side == "input" else basis.T @ gradient

        whole = {task: float(np.linalg.norm(g)) for task, g in found[name].items()}
        common = {task: inside(g, bases["shared"]) for task, g in found[name].items()}
        own = {task: float(np.linalg.norm(inside(g, bases[task]))) for task, g in found[name].items()}
        cosine = np.sum(common["search"] * common["rec"]) / math.prod(np.linalg.norm(R) for R in common.values())
        assert layer.shape == tuple(weight.shape)
        assert layer.step == steps
        assert layer.gradient_norms == pytest.approx(whole, rel=1e-5)
        assert layer.cosines == {TASKS: pytest.approx(float(cosine), rel=1e-4, abs=1e-6)}
        kept = sum(np.linalg.norm(R) ** 2 for R in common.values()) / sum(norm**2 for norm in whole.values())
        energies = {"shared": float(kept), **{task: (own[task] / whole[task]) ** 2 for task in TASKS}}
        assert layer.energy == pytest.approx(energies, rel=1e-4)
        assert all(0 < share < 1 for share in layer.energy.values())
        for a, b in itertools.combinations(bases, 2):
            angles = scipy.linalg.subspace_angles(bases[a], bases[b])
            assert layer.angles[a, b] == pytest.approx(angles.tolist(), abs=1e-5)
        for k, task in enumerate(TASKS):
            expected = 0.4 * losses[k] / sum(losses) + 0.4 * own[task] / sum(own.values()) + 0.2 * SAMPLES[task] / 32
            assert layer.gates[task] == pytest.approx(expected, rel=1e-4)
        protected = null_space.basis(name)
        assert layer.protected_fraction == pytest.approx(protected.shape[1] / protected.shape[0])


def test_accumulated_norms_are_estimates_and_cosines_are_exact(device):
    """Norms of parts do not add up to the norm of the sum; inner products inside a fixed subspace do."""
    model = mlp((12, 10), device=device)
    plain = copy.deepcopy(model)
    optimizer = gems(model, update_proj_gap=50)
    train(model, optimizer, 1)
    (before,) = optimizer.report().layers
    parts = [gradients_of(model, model[0].weight, step) for step in (1, 2)]
    bases = {name: basis_of(optimizer, model[0].weight, k, (4, 2, 2)).numpy(force=True) for k, name in enumerate(NAMES)}
    for step in (1, 2):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                loss_of(model, step, task).backward()
    optimizer.step()
    (layer,) = optimizer.report().layers
    summed = {name: parts[0][name] + parts[1][name] for name in TASKS}
    inside = {name: summed[name] @ bases["shared"] for name in TASKS}
    cosine = np.sum(inside["search"] * inside["rec"]) / math.prod(np.linalg.norm(R) for R in inside.values())
    assert layer.cosines[TASKS] == pytest.approx(float(cosine), rel=1e-4)
    assert layer.estimated == TASKS
    assert before.estimated == ()
    for name in TASKS:
        first = gradients_of(plain, plain[0].weight, 0)[name]
        held = [sum(np.linalg.norm(G @ bases[key]) ** 2 for key in ("shared", name)) for G in (first, summed[name])]
        norm = before.gradient_norms[name] * math.sqrt(held[1] / held[0])
        own, shared = (float(np.linalg.norm(summed[name] @ bases[key])) for key in (name, "shared"))
        assert layer.gradient_norms[name] == pytest.approx(max(norm, own, shared), rel=1e-4)
        assert layer.energy[name] == pytest.approx((own / layer.gradient_norms[name]) ** 2, rel=1e-4)
    whole = sum(norm**2 for norm in layer.gradient_norms.values())
    kept = sum(np.linalg.norm(R) ** 2 for R in inside.values())
    assert layer.energy["shared"] == pytest.approx(float(kept / whole), rel=1e-4)


def test_the_report_is_json_a_table_and_has_a_mean(device):
    model = mlp(device=device)
    optimizer = gems(model)
    assert optimizer.report() == Report([])
    assert optimizer.report().scalars() == {}
    train(model, optimizer, 1)
    report = optimizer.report()
    assert report.step == 1
    found = strictly(report.to_json())
    assert found == strictly(json.dumps(report.to_dict()))
    layers = found["layers"]
    assert [layer["name"] for layer in layers] == ["0", "2"]
    assert layers[0]["cosines"] == {"search|rec": report.layers[0].cosines[TASKS]}
    assert set(layers[0]["angles"]) == {"shared|search", "shared|rec", "search|rec"}
    table = str(report).splitlines()
    assert len(table) == 2 + 2 + 1
    assert table[2].startswith("all 2 layers ")
    assert table[3].startswith("0 ")
    assert "~" not in str(report)
    mean = sum(layer.cosines[TASKS] for layer in report.layers) / 2
    for pair in itertools.permutations(TASKS):
        assert report.mean_cosine(*pair) == pytest.approx(mean)
        assert report.cosine(*pair) == report.cosine(*TASKS)
    assert report.cosine("rec", "rec") == pytest.approx(1.0)
    assert math.isnan(report.mean_cosine("rec", "nobody"))
    assert math.isnan(report.cosine("rec", "nobody"))


def test_the_table_has_whole_names_of_tasks(device):
    model = mlp(device=device)
    names = ("classification_of_items", "classification_of_users")
    optimizer = gems(model, tasks=names)
    for task, name in enumerate(names):
        with optimizer.task(name):
            loss_of(model, 0, task).backward()
    optimizer.step()
    for line in str(optimizer.report()).splitlines()[2:]:
        assert all(line.count(name) == 3 for name in names), "norm, energy, gate"


def strictly(text: str) -> Any:
    """As every other program reads JSON: NaN and Infinity are no part of it."""

    def refuse(token: str) -> None:
        raise AssertionError(token)

    return json.loads(text, parse_constant=refuse)


def test_the_scalars_are_those_of_all_layers_as_one(device):
    model = mlp((12, 10, 9), dtype=torch.float64, device=device)
    null_space = null_space_of(model, "input")
    optimizer = gems(model, null_space=null_space, rank=4, task_rank=3, update_proj_gap=50)
    train(model, optimizer, 2)
    losses = {name: loss_of(model, 2, task).item() for task, name in enumerate(TASKS)}
    gradients = {name: gradients_of(model, model.get_submodule(name).weight, 2) for name in ("0", "2")}
    train(model, optimizer, 1, start=2)
    report = optimizer.report(leak=True)
    scalars = report.scalars()
    inside: dict[str, list[np.ndarray]] = {task: [] for task in TASKS}
    kept, whole = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for name, found in gradients.items():
        for k, key in enumerate(NAMES):
            basis = basis_of(optimizer, model.get_submodule(name).weight, k, (4, 3, 3)).numpy(force=True)
            for task in TASKS if key == "shared" else (key,):
                kept[key] += np.linalg.norm(found[task] @ basis) ** 2
                whole[key] += np.linalg.norm(found[task]) ** 2
                if key == "shared":
                    inside[task].append((found[task] @ basis).ravel())
    search, rec = (np.concatenate(inside[task]) for task in TASKS)
    expected = {f"energy/{key}": kept[key] / whole[key] for key in NAMES}
    expected |= {f"norm/{task}": math.sqrt(whole[task]) for task in TASKS}
    expected |= {f"loss/{task}": losses[task] for task in TASKS}
    expected["cosine/search|rec"] = search @ rec / np.linalg.norm(search) / np.linalg.norm(rec)
    sizes = {"0": 120, "2": 90}
    for task in TASKS:
        expected[f"gate/{task}"] = sum(sizes[layer.name] * layer.gates[task] for layer in report.layers) / 210
    for a, b in itertools.combinations(NAMES, 2):
        places = NAMES.index(a), NAMES.index(b)
        pairs = [
            [basis_of(optimizer, model.get_submodule(name).weight, k, (4, 3, 3)).numpy(force=True) for k in places]
            for name in sizes
        ]
        shares = [np.linalg.norm(A.T @ B) ** 2 / min(A.shape[1], B.shape[1]) for A, B in pairs]
        expected[f"overlap/{a}|{b}"] = (120 * shares[0] + 90 * shares[1]) / 210
    ranks = {name: null_space.basis(name).shape[1] for name in sizes}
    expected["protected"] = (120 * ranks["0"] / 12 + 90 * ranks["2"] / 10) / 210
    leak = scalars.pop("leak")
    assert scalars == {key: pytest.approx(float(value), rel=1e-4) for key, value in expected.items()}
    assert 0 <= leak < 1e-12
    assert leak == max(layer.leak for layer in report.layers)


def test_a_leak_of_the_bases_shows(device):
    model = mlp((12, 10), dtype=torch.float64, device=device)
    null_space = null_space_of(model)
    optimizer = gems(model, null_space=null_space, update_proj_gap=50)
    train(model, optimizer, 2)
    assert optimizer.report(leak=True).scalars()["leak"] < 1e-12
    basis = optimizer.state[model[0].weight]["basis"]
    basis[:, 0] = null_space.basis("0")[:, 0].to(basis)
    assert optimizer.report(leak=True).scalars()["leak"] == pytest.approx(1 / math.sqrt(basis.shape[1]), rel=1e-6)
    assert "leak" not in optimizer.report().scalars()
    assert "leak" in str(optimizer.report(leak=True)).splitlines()[0]
    assert "leak" not in str(optimizer.report()).splitlines()[0]


def test_angles_are_left_out_where_nobody_asks(device):
    model = mlp(device=device)
    optimizer = gems(model)
    train(model, optimizer, 1)
    short, long = optimizer.report(angles=False), optimizer.report()
    assert not any(layer.angles for layer in short.layers)
    kept = {key: value for key, value in long.scalars().items() if not key.startswith("overlap/")}
    assert short.scalars() == kept


def test_a_frame_has_a_row_a_layer(device):
    pandas = pytest.importorskip("pandas")
    model = mlp(device=device)
    optimizer = gems(model)
    train(model, optimizer, 2)
    report = optimizer.report()
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["layer"]) == ["0", "2"]
    for (_, row), layer in zip(frame.iterrows(), report.layers, strict=True):
        assert (row["rows"], row["columns"], row["step"]) == (*layer.shape, 2)
        assert row["gate/rec"] == layer.gates["rec"]
        assert row["cosine/search|rec"] == layer.cosines[TASKS]
        assert row["angle/shared|rec"] == min(layer.angles["shared", "rec"])
        assert row["overlap/shared|rec"] == layer.overlaps["shared", "rec"]


def test_without_pandas_the_extra_is_named(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'gradsub\[pandas\]'"):
        Report([]).to_pandas()


def test_opposite_tasks_conflict_and_equal_ones_agree(device):
    weight = torch.nn.Parameter(torch.randn(9, 8, device=device))
    gradient = torch.randn(9, 8, device=device)
    for factor, cosine in ((-0.5, -1.0), (2.0, 1.0)):
        model = torch.nn.Linear(8, 9, bias=False, device=device)
        model.weight = weight
        optimizer = gems(torch.nn.Sequential(model))
        for name, scale in zip(TASKS, (1.0, factor), strict=True):
            with optimizer.task(name):
                (weight * gradient * scale).sum().backward()
        optimizer.step()
        assert optimizer.report().layers[0].cosines[TASKS] == pytest.approx(cosine, abs=1e-5)


def test_a_report_changes_nothing(device):
    models = [mlp(device=device) for _ in range(2)]
    for model in models:
        optimizer = gems(model)
        for step in range(4):
            train(model, optimizer, 1, start=step)
            if model is models[0]:
                optimizer.report()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
