"""Transformers with random weights, of which every method trains the same linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from .data import Batch


def _t5(options: dict[str, Any]) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    # Dropout would draw other masks in every method, and cost them different shares of their time.
    fixed = {"dropout_rate": 0.0, "use_cache": False, "pad_token_id": 0, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**fixed, **options))


def _llama(options: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(use_cache=False, **options))


ARCHITECTURES: Final[dict[str, Callable[[dict[str, Any]], nn.Module]]] = {"t5": _t5, "llama": _llama}


def build_model(spec: Mapping[str, Any], seed: int) -> nn.Module:
    """The model of a config's entry, in training mode; only the weights of `trained_layers` require gradients."""
    options = dict(spec)
    architecture = options.pop("architecture")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture](options)
    model.requires_grad_(False)
    for layer in trained_layers(model).values():
        layer.weight.requires_grad_(True)
    return model.train()


def trained_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the output head, by name."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of `trained_layers`; none of them has a bias."""
    return [layer.weight for layer in trained_layers(model).values()]


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, the mean over all predicted tokens."""
    logits = model(**batch.inputs).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def task_losses(model: nn.Module, batch: Batch, tasks: int) -> list[Tensor]:
    """Every task's `mean_loss` from one forward pass of a joint batch, whose rows are in the order of the tasks."""
    logits = model(**batch.inputs).logits
    return [
        nn.functional.cross_entropy(part.flatten(0, 1), targets.flatten())
        for part, targets in zip(logits.chunk(tasks), batch.targets.chunk(tasks), strict=True)
    ]
