"""LLaMA-Factory (v1): an optimizer plug-in.

LLaMA-Factory imports no plug-ins of others, so a script of one's own registers it and starts the training; run it by
``python train.py config.yaml`` or ``torchrun --nproc_per_node 2 train.py config.yaml``::

    from gradsub.integrations.llamafactory import register
    from llamafactory.v1.trainers.sft_trainer import run_sft

    register()
    run_sft()

In LLaMA-Factory's YAML::

    optim_config:
      name: gems
      base: adamw
      lr: 1.0e-4
      rank: 128
      lr_scale: adamw
      null_space: general.safetensors

``base`` names another of LLaMA-Factory's optimizers (``"adamw"`` if left out), which takes the options that
`GemsOptimizer` does not. LLaMA-Factory's loop opens no task: all gradients belong to the shared subspace, the null
space holds, and ``max_grad_norm`` clips as always. There are no several tasks.

This was tested against stubs of LLaMA-Factory's interface, not against LLaMA-Factory itself.

Source: ``OptimizerPlugin`` in ``llamafactory/v1/plugins/trainer_plugins/optimizer.py`` of hiyouga/LLaMA-Factory.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gradsub.integrations._arguments import NAMES, from_config
from gradsub.optimizer import GemsOptimizer

__all__ = ["register"]


def register(name: str = "gems") -> None:
    """Make the optimizer known to LLaMA-Factory.

    Args:
        name: what ``optim_config`` calls it.

    Raises:
        ImportError: LLaMA-Factory is not installed, or has no v1.
    """
    try:
        from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
    except ImportError as missing:
        raise ImportError(
            "register() needs LLaMA-Factory with its v1: pip install llamafactory, or a newer version"
        ) from missing

    def build(model: nn.Module, optim_config: Any, **rest: Any) -> GemsOptimizer:
        """LLaMA-Factory's call: the model, ``optim_config`` and what else its loop may say."""
        options = {key: value for key, value in optim_config.items() if key not in ("name", "base")}
        gems = from_config({key: options.pop(key) for key in NAMES & options.keys()})
        if gems.get("tasks"):
            raise ValueError(f"tasks={gems['tasks']!r}: LLaMA-Factory's loop opens no task; leave tasks out")
        base = optim_config.get("base", "adamw")
        # Of the same kind: it is a dictionary that knows its own name.
        theirs = type(optim_config)({"name": base, **options})
        return GemsOptimizer(OptimizerPlugin(base)(model, theirs, **rest), **{"tasks": (), "model": model, **gems})

    OptimizerPlugin(name).register()(build)
