from collections.abc import Iterator

import pytest
import torch

from .settings import CONFIG


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(CONFIG["threads"] or before)
    yield
    torch.set_num_threads(before)
