"""Makes the optimizer of a plain ``Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from gradsub.integrations._arguments import telling_rows_apart
from gradsub.optimizer import GemsOptimizer


def as_it_will_run(model: nn.Module, arguments: Any) -> nn.Module:
    """The model as the Trainer compiles it after the optimizer is made; a graph is made when it is called, not here."""
    compiled: Any = torch.compile(model) if getattr(arguments, "torch_compile", False) else model
    return cast(nn.Module, compiled)


class GemsFactory:
    """Makes the optimizer of a plain ``Trainer``: ``Trainer(optimizer_cls_and_kwargs=(GemsFactory, {...}))``.

    The base optimizer is the one that the training arguments name, with the Trainer's groups with and without decay.
    Without `GemsTrainerMixin` the Trainer opens no task. So ``tasks`` is empty by default: all gradients belong to the
    shared subspace, the null space holds, and ``max_grad_norm`` clips as always.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from gradsub.integrations import GemsFactory
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> arguments = TrainingArguments(output_dir="out", optim="adamw_torch", learning_rate=1e-3, weight_decay=0.01)
        >>> trainer = Trainer(model, arguments, optimizer_cls_and_kwargs=(GemsFactory, {"args": arguments, "rank": 4}))
        >>> [len(group["params"]) for group in trainer.create_optimizer().param_groups]
        [9, 3]
    """

    def __call__(self, model: nn.Module, *, args: Any, tasks: Sequence[str] = (), **gems: Any) -> GemsOptimizer:
        """The optimizer.

        Args:
            model: the Trainer's.
            args: its ``TrainingArguments``, which the Trainer does not pass on.
            tasks: the names of the tasks, for `GemsTrainerMixin`; with several, ``capture`` is ``"fused"`` unless it is
                given.
            gems: other arguments of `GemsOptimizer`.

        Raises:
            ValueError: the base optimizer cannot be wrapped.
        """
        from transformers import Trainer  # here: what says that it is not installed is imported first

        maker: Any = object.__new__(Trainer)  # what makes an optimizer needs no more of a Trainer than this
        maker.args, maker.model, maker.optimizer, maker.optimizer_cls_and_kwargs = args, model, None, None
        base = maker.create_optimizer()
        model = as_it_will_run(model, args)
        return GemsOptimizer(base, **{"model": model, **telling_rows_apart({"tasks": tasks, **gems})})
