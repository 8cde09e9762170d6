"""Both tasks' whole gradients while SmolLM2-135M learns MovieLens-100K: 21 layers, every step."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from examples.unified_sr.config import resolve
from examples.unified_sr.data import load_dataset
from examples.unified_sr.feeds import Pool
from examples.unified_sr.general_domain import general_batches, token_windows
from examples.unified_sr.general_text import load_general_text
from examples.unified_sr.methods import item_group, model_parameters, parameter_groups, train_only
from examples.unified_sr.model import Collator, PromptBuilder, Ranker, load_language_model
from gradsub import NullSpace
from gradsub.layers import select_layers

TASKS: Final = ("search", "rec")
BLOCKS: Final = (1, 14, 28)  # near the input, in the middle, near the output
SIDES: Final = ("input", "output")


def collect(folder: Path, steps: int, batch_size: int) -> None:
    """Train by AdamW; save ``stepNNN.pt`` (layer -> (tasks, m, n)) and the protected directions ``null_SIDE.pt``."""
    settings = resolve(
        flags={"method.name": "adamw", "training.lr": 2e-4, "training.item_lr": 3e-3, "model.max_history": 6}
    )
    dataset = load_dataset(settings.data.source, min_user_events=5, min_item_events=5, max_history=6)
    language_model = load_language_model(settings.model.name)
    ranker = Ranker(language_model, dataset.items)
    tokenizer = language_model.tokenizer
    prompts = PromptBuilder(
        tokenizer, first_item=ranker.first_item, encoder_decoder=False, max_history=6, max_query_tokens=32
    )
    collate = Collator(tokenizer.pad_token_id or 0)
    every = select_layers(ranker.backbone)
    layers = {name: layer for name, layer in every.items() if any(f"layers.{block}." in name for block in BLOCKS)}
    folder.mkdir(parents=True, exist_ok=True)
    windows = token_windows(tokenizer, load_general_text(settings.evaluation.general_text)[0], tokens=4096, window=256)
    for side in SIDES:
        null_space = NullSpace(side=side, energy=0.97)
        batches = general_batches(language_model, windows, torch.device("cpu"))
        null_space.collect(ranker.backbone, batches, target_modules=list(layers), normalize=False)
        torch.save({name: null_space.basis(name).float() for name in layers}, folder / f"null_{side}.pt")
    weights = model_parameters(ranker)
    train_only(ranker, weights)
    optimizer = torch.optim.AdamW(
        [*parameter_groups(weights, settings.training), item_group(ranker, settings.training)]
    )
    streams = {task: Pool(task, dataset.train[task]).batches(batch_size, 0) for task in TASKS}
    ranker.train()
    for step in tqdm(range(steps), desc="training"):
        found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
        total: dict[str, torch.Tensor] = {}
        for task in TASKS:
            optimizer.zero_grad()
            rows = next(streams[task])
            ranker.loss(collate([prompts(row) for row in rows], [row.target for row in rows])).backward()
            for name, layer in layers.items():
                found[name].append(layer.weight.grad.clone())
            for name, weight in ranker.named_parameters():
                if weight.grad is not None:
                    total[name] = total.get(name, 0) + weight.grad / len(TASKS)
        for name, weight in ranker.named_parameters():
            weight.grad = total.get(name)
        optimizer.step()
        torch.save({name: torch.stack(gradients) for name, gradients in found.items()}, folder / f"step{step:03d}.pt")
