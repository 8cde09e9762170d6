from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# One deadline for all machines would only measure how busy they are; few examples, because each of them trains.
settings.register_profile(
    "gradsub", deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("gradsub")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw from the global generator draw the same numbers in any order."""
    torch.manual_seed(0)
