"""Every inner optimizer trains a small transformer on two tasks, inside a null space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradsub import NullSpace

from .test_inner_optimizers import every
from .toys import TASKS, gems, leak

WORDS, WIDTH, LENGTH = 12, 16, 8


class Transformer(nn.Module):
    """One causal block without biases and norms, since Muon takes matrices only; the embedding is frozen."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
            self.place = nn.Parameter(torch.randn(LENGTH, WIDTH), requires_grad=False)
            self.mix = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 32, bias=False), nn.Linear(32, WIDTH, bias=False)
            self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.place[: words.shape[1]]
        query, key, value = self.mix(x).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def sentences(task: int, step: int, device: torch.device) -> Tensor:
    """Words that go up by one in the first task and down by two in the second, from random starts."""
    start = torch.randint(WORDS, (8, 1), generator=torch.Generator().manual_seed(10 * step + task))
    return ((start + (1, -2)[task] * torch.arange(LENGTH)) % WORDS).to(device)


def loss_of(model: nn.Module, task: int, step: int, device: torch.device) -> Tensor:
    words = sentences(task, step, device)
    return nn.functional.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


@every
def test_trains_a_transformer(device, make):
    model = Transformer().to(device)
    batches = [torch.randint(WORDS, (4, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)]
    null_space = NullSpace(max_rank=3).collect(model, batches)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    base = make(weights)
    if type(base).__name__ == "Adafactor":
        base.param_groups[0]["lr"] = (
            0.02  # its rate for the quadratic, 0.2 whatever the weight's size, is too much here
        )
    optimizer = gems(model, base=base, null_space=null_space, rank=8, update_proj_gap=15)
    old = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}

    def losses() -> list[float]:
        with torch.no_grad():
            return [sum(loss_of(model, task, 1000 + n, device).item() for n in range(4)) for task in range(2)]

    start = losses()
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    for step in range(40):
        for task, name in enumerate(TASKS):
            with optimizer.task(name, samples=8):
                (sign * loss_of(model, task, step, device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(now < 0.9 * before for before, now in zip(start, losses(), strict=True)), (start, losses())
    for name, before in old.items():
        assert leak(model.get_submodule(name).weight.detach() - before, null_space.basis(name), "input") < 2e-6


def test_the_task_is_no_formality():
    """Untrained, the model knows neither task: what the test above asserts has to be learned."""
    model = Transformer()
    for task in range(2):
        assert loss_of(model, task, 0, torch.device("cpu")).item() > 2.0
