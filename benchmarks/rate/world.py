"""SmolLM2-135M with the batches of a data set's two tasks, set back to its first weights before every run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from examples.unified_sr.config import resolve
from examples.unified_sr.data import load_dataset
from examples.unified_sr.feeds import Pool
from examples.unified_sr.general_domain import general_batches, perplexity, token_windows
from examples.unified_sr.general_text import load_general_text
from examples.unified_sr.methods import item_group, parameter_groups, train_only
from examples.unified_sr.model import Collator, PromptBuilder, Ranker, load_language_model
from gradsub import GemsOptimizer, NullSpace
from gradsub.layers import select_layers

TASKS: Final = ("search", "rec")
ENERGY: Final = 0.97
RANK: Final = 64
GAP: Final = 20
WINDOW: Final = 256
LEAST_EVENTS: Final = {"movielens-100k": 5}  # of Amazon's items, five events each would leave 149


class World:
    """The model, its linear layers and a stream of batches.

    Args:
        data: a data set's name, or its folder.
        text: a file of general text; None takes what Python brings along.
        batch_size: examples of each task and step.
    """

    def __init__(self, data: str, text: str | None, batch_size: int) -> None:
        least = LEAST_EVENTS.get(data, 1)
        self.settings: Any = resolve(
            flags={"method.name": "adamw", "training.item_lr": 3e-4, "model.max_history": 8, "data.source": data}
        )
        dataset = load_dataset(data, min_user_events=least, min_item_events=least, max_history=8)
        self.model = load_language_model(self.settings.model.name)
        self.ranker = Ranker(self.model, dataset.items)
        tokenizer = self.model.tokenizer
        self._prompts = PromptBuilder(
            tokenizer, first_item=self.ranker.first_item, encoder_decoder=False, max_history=8, max_query_tokens=32
        )
        self._collate = Collator(tokenizer.pad_token_id or 0)
        self._train, self._size = dataset.train, batch_size
        self.weights: dict[str, nn.Parameter] = {
            name: layer.weight for name, layer in select_layers(self.ranker.backbone).items()
        }
        train_only(self.ranker, list(self.weights.values()))
        self._text = load_general_text(text)
        self._first: dict[str, Tensor] | None = None

    def batches(self) -> Iterator[dict[str, Any]]:
        """The same ones each time, a batch of every task."""
        streams = {task: Pool(task, self._train[task]).batches(self._size, 0) for task in TASKS}
        while True:
            rows = {task: next(stream) for task, stream in streams.items()}
            yield {
                task: self._collate([self._prompts(row) for row in some], [row.target for row in some])
                for task, some in rows.items()
            }

    def null_space(self, tokens: int, file: Path) -> NullSpace:
        """That of the general text, from its file or else fitted and filed."""
        if not file.is_file():
            windows = token_windows(self.model.tokenizer, self._text[0], tokens=tokens, window=WINDOW)
            null_space = NullSpace(energy=ENERGY)
            null_space.collect(self.ranker.backbone, general_batches(self.model, windows, torch.device("cpu")))
            file.parent.mkdir(parents=True, exist_ok=True)
            null_space.save(file, statistics=False)
        return NullSpace.load(file)

    def reset(self) -> None:
        """The weights that the model came with."""
        trained = {name: weight for name, weight in self.ranker.named_parameters() if weight.requires_grad}
        if self._first is None:
            self._first = {name: weight.detach().clone() for name, weight in trained.items()}
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(self._first[name])
        self.ranker.zero_grad()
        self.ranker.train()

    def adamw(self, lr: float) -> torch.optim.Optimizer:
        """AdamW of the linear layers at this rate, without weight decay, and of the items' rows at their own."""
        groups = [{**group, "lr": lr, "weight_decay": 0.0} for group in self._groups()]
        return torch.optim.AdamW([*groups, {**item_group(self.ranker, self.settings.training), "subspace": False}])

    def gems(self, lr: float, null_space: NullSpace | None, **options: Any) -> GemsOptimizer:
        """The same inside the subspaces."""
        return GemsOptimizer(
            self.adamw(lr),
            tasks=TASKS,
            rank=RANK,
            update_proj_gap=GAP,
            null_space=null_space,
            model=self.ranker.backbone,
            **options,
        )

    def backward(self, batches: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """A pass a task, for either optimizer; the losses."""
        losses = {}
        for task, batch in batches.items():
            if isinstance(optimizer, GemsOptimizer):
                with optimizer.task(task, samples=self._size):
                    loss = self.ranker.loss(batch)
                    loss.backward()
            else:
                loss = self.ranker.loss(batch)
                (loss / len(batches)).backward()
            losses[task] = float(loss.detach())
        return losses

    def gradients(self, batches: Mapping[str, Any]) -> dict[str, Tensor]:
        """That of the mixed batch, of every linear layer; nothing is left in ``.grad``."""
        for batch in batches.values():
            (self.ranker.loss(batch) / len(batches)).backward()
        found = {name: weight.grad.clone() for name, weight in self.weights.items() if weight.grad is not None}
        self.ranker.zero_grad()
        return found

    def perplexity(self, tokens: int) -> float:
        """Of general text that the null space has not seen."""
        self.ranker.eval()
        windows = token_windows(self.model.tokenizer, self._text[1], tokens=tokens, window=WINDOW)
        found = perplexity(self.model, windows, torch.device("cpu"))
        self.ranker.train()
        return found.value

    def _groups(self) -> list[dict[str, Any]]:
        return [dict(group) for group in parameter_groups(list(self.weights.values()), self.settings.training)]
