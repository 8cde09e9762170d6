from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# A deadline would only measure how busy the machine is.
settings.register_profile("gradsub", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
