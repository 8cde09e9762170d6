"""The plug-ins for axolotl and LLaMA-Factory, against stubs of the interfaces that they are written for.

The stubs have the signatures, and the order of calls, of axolotl's ``BasePlugin``, ``PluginManager`` and
``AxolotlTrainer``, and of LLaMA-Factory's ``OptimizerPlugin`` and v1 training loop.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from examples.recipes.problem import Sentences, build_model
from gradsub import GemsOptimizer, NullSpace
from gradsub.integrations import GemsTrainerMixin
from tests.integrations.trainers import GEMS, Ragged, arguments, distance


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture
def general(tmp_path: Path) -> str:
    null_space = NullSpace(energy=0.9)
    rows = Sentences(16, (0,))
    null_space.collect(build_model(), [{"input_ids": rows[index]["input_ids"][None]} for index in range(16)])
    null_space.save(tmp_path / "general.safetensors")
    return str(tmp_path / "general.safetensors")


def leaks(model: nn.Module, path: str) -> float:
    """The largest share of a layer's change that lies in protected directions."""
    null_space, start = NullSpace.load(path), build_model()
    shares = []
    for name in null_space:
        change = model.get_submodule(name).weight.detach() - start.get_submodule(name).weight.detach()
        assert float(change.norm()) > 0
        shares.append(float((change @ null_space.basis(name)).norm() / change.norm()))
    return max(shares)


# --- axolotl ----------------------------------------------------------------------------------------------------------


class Config(dict[str, Any]):
    """As axolotl's: what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class StubPlugin:
    def __init__(self) -> None:
        self.registered = True

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


class StubTrainer(Trainer):
    def __init__(
        self,
        *_args: Any,
        bench_data_collator: Any = None,
        eval_data_collator: Any = None,
        dataset_tags: Any = None,
        **kwargs: Any,
    ) -> None:
        self.eval_data_collator, self.dataset_tags = eval_data_collator, dataset_tags
        self._signature_columns = None
        super().__init__(*_args, **kwargs)


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    stubs = {
        "axolotl": module("axolotl"),
        "axolotl.integrations": module("axolotl.integrations"),
        "axolotl.integrations.base": module("axolotl.integrations.base", BasePlugin=StubPlugin),
        "axolotl.core": module("axolotl.core"),
        "axolotl.core.trainers": module("axolotl.core.trainers", AxolotlTrainer=StubTrainer),
    }
    with monkeypatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        import gradsub.integrations.axolotl as plugin

        yield importlib.reload(plugin)
    importlib.reload(plugin)


def build(plugin_module: ModuleType, cfg: Config, folder: Path, data: Any) -> tuple[Any, Any]:
    """As axolotl's builder: the plug-in by its name, its trainer class, the trainer."""
    plugin = plugin_module.GemsPlugin()
    trainer_class = plugin.get_trainer_cls(cfg)
    trainer = trainer_class(
        model=build_model(),
        train_dataset=data,
        args=arguments(folder, optim="adamw_torch", learning_rate=3e-3, max_grad_norm=1.0),
        callbacks=[],
        dataset_tags=["somebody/rows"],
    )
    plugin.post_trainer_create(cfg, trainer)
    return plugin, trainer


def test_axolotl_trains_with_the_mixin(axolotl: ModuleType, general: str, tmp_path: Path) -> None:
    gems = {"rank": 4, "update_proj_gap": 2, "null_space": general, "capture": "fused"}
    plugin, trainer = build(axolotl, Config(gems=gems, sample_packing=True), tmp_path, Sentences(64, (1,)))
    assert isinstance(plugin, StubPlugin)
    assert plugin.registered
    assert isinstance(trainer, GemsTrainerMixin)
    assert isinstance(trainer, StubTrainer)
    assert trainer.dataset_tags == ["somebody/rows"]
    trainer.model.requires_grad_(False)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("proj" in name)
    assert plugin.create_optimizer(Config(gems=gems), trainer) is trainer.gems
    trainer.train()
    assert trainer.gems.tasks == ("task",)
    assert leaks(trainer.model, general) < 1e-4


def test_axolotl_with_several_tasks(axolotl: ModuleType, tmp_path: Path) -> None:
    cfg = Config(gems={**GEMS, "tasks": ["search", "rec"]}, gems_task_column="kind")
    _, trainer = build(axolotl, cfg, tmp_path, Ragged(32, "kind"))
    trainer.train()
    assert trainer.gems.tasks == ("search", "rec")
    assert distance(trainer.model, build_model()) > 1e-3
    for option in ("sample_packing", "batch_flattening"):
        with pytest.raises(ValueError, match=rf"{option} joins rows of several tasks.*set {option}: false"):
            axolotl.GemsPlugin().get_trainer_cls(Config({**cfg, option: True}))


def test_axolotls_configuration(axolotl: ModuleType) -> None:
    plugin = axolotl.GemsPlugin()
    where, _, name = plugin.get_input_args().rpartition(".")
    model = getattr(importlib.import_module(where), name)
    assert model(gems={"rank": 4}).gems == {"rank": 4}
    assert model().gems is None
    assert plugin.get_trainer_cls(Config()) is None  # not asked for
    assert plugin.create_optimizer(Config(), SimpleNamespace()) is None
    with pytest.raises(ValueError, match=r"gems has \['rnak'\], which GemsOptimizer does not take"):
        plugin.get_trainer_cls(Config(gems={"rnak": 4}))


def test_axolotl_is_missing() -> None:
    from gradsub.integrations.axolotl import GemsPlugin

    with pytest.raises(ImportError, match="pip install axolotl"):
        GemsPlugin()


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------


class StubOptimizerPlugin:
    registry: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.name = name

    def register(self) -> Any:
        return lambda function: self.registry.setdefault(self.name, function)

    def __call__(self, model: nn.Module, optim_config: Any, **kwargs: Any) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = self.registry[self.name](model, optim_config, **kwargs)
        return found


class PluginConfig(dict[str, Any]):
    @property
    def name(self) -> str:
        return str(self["name"])


def build_adamw(model: nn.Module, optim_config: PluginConfig, **kwargs: Any) -> torch.optim.Optimizer:
    assert optim_config.name == "adamw"
    assert "rank" not in optim_config
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=optim_config["lr"], weight_decay=optim_config.get("weight_decay", 0.0))


@pytest.fixture
def llamafactory(monkeypatch: pytest.MonkeyPatch) -> type[StubOptimizerPlugin]:
    monkeypatch.setattr(StubOptimizerPlugin, "registry", {"adamw": build_adamw})
    where = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    for name in ("llamafactory", "llamafactory.v1", "llamafactory.v1.plugins", where.rpartition(".")[0]):
        monkeypatch.setitem(sys.modules, name, module(name))
    monkeypatch.setitem(sys.modules, where, module(where, OptimizerPlugin=StubOptimizerPlugin))
    return StubOptimizerPlugin


def test_llamafactory_trains_with_it(llamafactory: type[StubOptimizerPlugin], general: str) -> None:
    from gradsub.integrations.llamafactory import register

    register()
    config = PluginConfig(
        name="gems", lr=3e-3, weight_decay=0.1, rank=4, update_proj_gap=2, null_space=general, capture="fused"
    )
    model = build_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    optimizer = llamafactory(config.name)(model, config)
    assert isinstance(optimizer, GemsOptimizer)
    assert optimizer.param_groups[0]["lr"] == 3e-3
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: 1.0)
    data = Sentences(64, (1,))
    for step in range(4):
        for micro in range(2):  # the loop of LLaMA-Factory: batches of a step, clipping, step, schedule, zero
            rows = [data[8 * step + 4 * micro + index] for index in range(4)]
            tokens = torch.stack([row["input_ids"] for row in rows])
            (model(input_ids=tokens, labels=tokens).loss / 2).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert leaks(model, general) < 1e-4


def test_llamafactory_refuses_tasks(llamafactory: type[StubOptimizerPlugin]) -> None:
    from gradsub.integrations.llamafactory import register

    register("other")
    config = PluginConfig(name="other", base="adamw", lr=1e-3, tasks=["a"])
    with pytest.raises(ValueError, match="LLaMA-Factory's loop opens no task"):
        llamafactory("other")(build_model(), config)


def test_llamafactory_is_missing() -> None:
    from gradsub.integrations.llamafactory import register

    with pytest.raises(ImportError, match="pip install llamafactory"):
        register()
