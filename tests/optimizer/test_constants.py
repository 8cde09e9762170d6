"""Numbers on a device are those that were asked for last, and are sent again only when they change."""

from __future__ import annotations

import copy

import pytest
import torch

from gradsub._constants import Constants


def test_numbers_are_sent_when_they_change_and_only_then(device):
    constants, made = Constants(), []

    def send(*numbers: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        def make() -> list[float]:
            made.append(numbers)
            return list(numbers)

        return constants.send("weights", numbers, device, dtype, make)

    first = send(1.0, 2.0)
    assert send(1.0, 2.0) is first
    assert send(3.0, 2.0).tolist() == [3.0, 2.0]
    assert send(3.0, 2.0, dtype=torch.float64).dtype == torch.float64
    assert len(made) == 3


@pytest.mark.parametrize("inference", [False, True])
def test_numbers_that_somebody_has_written_to_are_sent_again(device, inference):
    constants = Constants()
    for _ in range(2):
        with torch.inference_mode(inference):
            found = constants.send("weights", 0, device, torch.float32, lambda: [1.0])
        assert found.tolist() == [1.0]
        found.mul_(2)
    assert copy.deepcopy(constants).send("weights", 0, device, torch.float32, lambda: [1.0]).tolist() == [1.0]
