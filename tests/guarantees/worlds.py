"""What the tests of the guarantees share: a small transformer, two tasks for it, and measures of what moved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsub import GemsOptimizer, NullSpace

VOCABULARY = 32
TASKS = ("copy", "sort")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Token ids (batch x length) to logits; its Linear layers are all those of the blocks."""

    def __init__(self, width: int = 24, layers: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed = nn.Embedding(VOCABULARY, width)
            self.blocks = nn.Sequential(*(Block(width, 2) for _ in range(layers)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCABULARY)
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens)))).float()


def tokens(step: int, task: int, rows: int = 4, length: int = 8) -> Tensor:
    return torch.randint(
        VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1000003 * (task + 1) + step)
    )


def losses(model: nn.Module, step: int) -> dict[str, Tensor]:
    """The previous token (copy) and the sorted sequence (sort), from one forward pass: both new to the model."""
    batch = tokens(step, 0)
    logits = model(batch).flatten(0, 1)
    targets = {"copy": batch.roll(1, 1), "sort": batch.sort(1).values}
    return {task: F.cross_entropy(logits, target.flatten()) for task, target in targets.items()}


def train_step(model: nn.Module, optimizer: GemsOptimizer, step: int) -> None:
    optimizer.backward(losses(model, step))
    optimizer.step()
    optimizer.zero_grad()


def general_null_space(model: nn.Module, side: str, rank: int = 8) -> NullSpace:
    """The directions that general text uses, ``rank`` in every layer."""
    batches = [tokens(step, 7, rows=16) for step in range(4)]
    return NullSpace(side=side, max_rank=rank).collect(model, batches)


def leak(change: Tensor, K: Tensor, side: str) -> float:
    """||dW K|| / ||dW|| for inputs, ||K^T dW|| / ||dW|| for outputs, in float64."""
    change, K = change.double(), K.double()
    inside = change @ K if side == "input" else K.mT @ change
    return float(inside.norm() / change.norm())


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the Linear layers inside the blocks, by layer name."""
    head = getattr(model, "head", None)
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def bases(optimizer: GemsOptimizer, weight: Tensor, widths: Iterable[int]) -> list[Tensor]:
    """The shared basis, then one a task."""
    return list(optimizer.state[weight]["basis"].split(list(widths), dim=1))


def assert_orthonormal(basis: Tensor, used: int | None = None) -> None:
    """Orthonormal columns, but for trailing zero ones where no direction was left."""
    gram = basis.double().mT @ basis.double()
    count = int((gram.diagonal() > 0.5).sum())
    expected = torch.zeros_like(gram)
    expected[range(count), range(count)] = 1.0
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5)
    if used is not None:
        assert count == used
