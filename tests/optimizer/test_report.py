"""The numbers of `report()`, computed once more from the definitions."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from gradsub import Report

from .toys import SAMPLES, TASKS, basis_of, gems, loss_of, mlp, null_space_of, train


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


def test_accumulated_norms_are_unknown_but_cosines_are_exact(device):
    """Norms of parts do not add up to the norm of the sum; inner products inside a fixed subspace do."""
    model = mlp((12, 10), device=device)
    optimizer = gems(model, update_proj_gap=50)
    train(model, optimizer, 1)
    parts = [gradients_of(model, model[0].weight, step) for step in (1, 2)]
    basis = basis_of(optimizer, model[0].weight, 0, (4, 2, 2)).numpy(force=True)
    for step in (1, 2):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                loss_of(model, step, task).backward()
    optimizer.step()
    (layer,) = optimizer.report().layers
    summed = {name: (parts[0][name] + parts[1][name]) @ basis for name in TASKS}
    cosine = np.sum(summed["search"] * summed["rec"]) / math.prod(np.linalg.norm(R) for R in summed.values())
    assert layer.cosines[TASKS] == pytest.approx(float(cosine), rel=1e-4)
    assert all(math.isnan(norm) for norm in layer.gradient_norms.values())
    assert all(math.isnan(share) for share in layer.energy.values())


def test_the_report_is_json_a_table_and_has_a_mean(device):
    model = mlp(device=device)
    optimizer = gems(model)
    assert optimizer.report() == Report([])
    train(model, optimizer, 1)
    report = optimizer.report()
    layers = json.loads(json.dumps(report.to_dict()))["layers"]
    assert [layer["name"] for layer in layers] == ["0", "2"]
    assert layers[0]["cosines"] == {"search|rec": report.layers[0].cosines[TASKS]}
    assert set(layers[0]["angles"]) == {"shared|search", "shared|rec", "search|rec"}
    table = str(report).splitlines()
    assert len(table) == 2 + 2
    assert table[2].startswith("0 ")
    mean = sum(layer.cosines[TASKS] for layer in report.layers) / 2
    assert report.mean_cosine(*TASKS) == pytest.approx(mean)
    assert math.isnan(report.mean_cosine("rec", "nobody"))


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
