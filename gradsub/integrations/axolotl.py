"""axolotl: a plug-in that trains with a `GemsOptimizer`.

In axolotl's YAML::

    plugins:
      - gradsub.integrations.axolotl.GemsPlugin
    gems:
      rank: 128
      lr_scale: adamw
      null_space: general.safetensors
    sample_packing: false  # with several tasks

``gems`` holds arguments of `GemsOptimizer`; the base optimizer is what ``optimizer``, ``learning_rate`` and
``weight_decay`` say. Without ``tasks`` there is one, called ``"task"``, and no column is needed. With several, each row
names its task in the column ``gems_task_column`` (``"task"``). axolotl drops columns that its prompt strategies do not
know, so data sets of several tasks come tokenized.

This was tested against stubs of axolotl's interface, not against axolotl itself.

Source: ``BasePlugin`` in ``axolotl/integrations/base.py`` and ``AxolotlTrainer`` in ``axolotl/core/trainers/base.py``
of axolotl-ai-cloud/axolotl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradsub.integrations._arguments import from_config

if TYPE_CHECKING:
    BasePlugin = object
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError:
        BasePlugin = object  # documentation may read this module without axolotl

__all__ = ["GemsPlugin"]


class GemsPlugin(BasePlugin):
    """Has axolotl train with a `GemsTrainerMixin` before its own trainer.

    Raises:
        ImportError: axolotl is not installed.
    """

    def __init__(self) -> None:
        if BasePlugin is object:
            raise ImportError("GemsPlugin is loaded by axolotl, which is not installed: pip install axolotl")
        super().__init__()

    def get_input_args(self) -> str:
        """Where axolotl finds the model of this plug-in's entries in the configuration."""
        return f"{__name__}.GemsArgs"

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """axolotl's trainer with the mixin; None for another kind of training than supervised.

        Args:
            cfg: axolotl's configuration.

        Raises:
            ValueError: several tasks and ``sample_packing``, or an argument that `GemsOptimizer` does not take.
        """
        if not getattr(cfg, "gems", None):
            return None
        from axolotl.core.trainers import AxolotlTrainer

        from gradsub.integrations.transformers import GemsTrainerMixin

        options = {"tasks": ("task",), **from_config(dict(cfg.gems))}
        column = getattr(cfg, "gems_task_column", None) or "task"
        packed = [name for name in ("sample_packing", "batch_flattening") if getattr(cfg, name, None)]
        if len(options["tasks"]) > 1 and packed:
            raise ValueError(
                f"{packed[0]} joins rows of several tasks into sequences, where the layers cannot tell them apart, and "
                f"gems has tasks={list(options['tasks'])}: set {packed[0]}: false, or use one task"
            )

        class GemsAxolotlTrainer(GemsTrainerMixin, AxolotlTrainer):  # type: ignore[misc]
            """axolotl's trainer, with the options of its configuration."""

            def __init__(self, *arguments: Any, **rest: Any) -> None:
                super().__init__(*arguments, gems=options, task_column=column, **rest)

        return GemsAxolotlTrainer

    def create_optimizer(self, cfg: Any, trainer: Any) -> Any:
        """The optimizer of a trainer that has the mixin; None for any other.

        Args:
            cfg: axolotl's configuration.
            trainer: the trainer.
        """
        from gradsub.integrations.transformers import GemsTrainerMixin

        return trainer.create_optimizer() if isinstance(trainer, GemsTrainerMixin) else None


def __getattr__(name: str) -> Any:
    if name == "GemsArgs":
        # axolotl joins it with its own configuration's model; pydantic comes with axolotl.
        from pydantic import create_model

        return create_model(
            "GemsArgs", gems=(dict[str, Any] | None, None), gems_task_column=(str | None, None), __module__=__name__
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
