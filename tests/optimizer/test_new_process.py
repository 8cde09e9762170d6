"""A checkpoint file is all that another process needs to go on, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from .toys import gems, mlp, null_space_of, same, train, weights_of

GO_ON = """
import sys
import torch
from tests.optimizer.toys import gems, mlp, null_space_of, train

saved = torch.load(sys.argv[1], weights_only=True)
null_space = null_space_of(mlp(), rank=2)
model = mlp(seed=7)
model.load_state_dict(saved["model"])
optimizer = gems(model, null_space=null_space, gate="hypergradient")
optimizer.load_state_dict(saved["optimizer"])
train(model, optimizer, 6, start=5)
torch.save(list(model.parameters()), sys.argv[2])
"""


def test_a_new_process_goes_on_where_the_old_one_was(tmp_path: Path) -> None:
    null_space = null_space_of(mlp(), rank=2)
    model = mlp()
    optimizer = gems(model, null_space=null_space, gate="hypergradient")
    train(model, optimizer, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    subprocess.run(
        [sys.executable, "-c", GO_ON, str(tmp_path / "checkpoint.pt"), str(tmp_path / "after.pt")],
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    before = weights_of(model)
    train(model, optimizer, 6, start=5)
    after = torch.load(tmp_path / "after.pt", weights_only=True)
    assert same(model.parameters(), after)
    assert not same(before, after)
