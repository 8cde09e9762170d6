"""Several ranks with parts of the batch train what one process trains on the whole batch."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.worlds import World, trained

PLAIN = [
    World(base=base, side=side, capture=capture, refresh=refresh)
    for base, side, (capture, refresh) in itertools.product(
        ("adamw", "sgd"), ("input", "output"), (("generic", "svd"), ("fused", "sketch"))
    )
]
WORLDS = [
    *PLAIN,
    World(capture="generic", refresh="sketch"),
    World(capture="fused", refresh="svd", protect=True),
    World(capture="fused", refresh="sketch", protect=True, side="output"),
    World(ddp=True),
    World(ddp=True, capture="fused", refresh="sketch", forward="shared"),
    World(ddp=True, capture="generic", forward="shared"),
    World(ddp=True, capture="fused", refresh="sketch", forward="mixed"),
    World(capture="fused", refresh="sketch", forward="mixed"),
    World(surgery="pcgrad", capture="fused", refresh="sketch"),
    World(clip=0.3, capture="fused", refresh="sketch"),
    World(gate="hypergradient"),
]


def _all(rank: int, ranks: int) -> list[dict[str, torch.Tensor]]:
    return [trained(world, rank, ranks) for world in WORLDS]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_what_one_process_trains(ranks: int, tmp_path: Path) -> None:
    found = launch(_all, ranks, tmp_path, ranks)
    for world, *of_ranks in zip(WORLDS, *found, strict=True):
        alone = trained(world)
        for name, value in alone.items():
            for other in of_ranks[1:]:
                assert torch.equal(other[name], of_ranks[0][name]), (world, name)
            if name.endswith("basis"):
                # a column's sign is free, the space is not
                value, mine = (b @ b.mT for b in (value[:, :3], of_ranks[0][name][:, :3]))
            else:
                mine = of_ranks[0][name]
            assert torch.allclose(mine, value, rtol=0, atol=1e-8), (world, name, (mine - value).abs().max())
