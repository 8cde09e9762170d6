from __future__ import annotations

import os
from collections.abc import Iterator

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
def _environment_as_found() -> Iterator[None]:
    """What a test, or a library that it runs, says in the environment is not said to the tests after it.

    A Trainer with ``bf16=True`` sets ``ACCELERATE_MIXED_PRECISION``, which every later ``Accelerator`` obeys.
    """
    found = dict(os.environ)
    yield
    for name in os.environ.keys() - found.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in found.items() if os.environ.get(name) != value})


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw from the global generator draw the same numbers in any order."""
    torch.manual_seed(0)
