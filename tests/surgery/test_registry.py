import pytest
import torch

import gradsub.surgery
from gradsub.surgery import SURGERIES, GradVac, SurgeryInputs, mgda, resolve_surgery

from ._samplers import gradients


@pytest.mark.parametrize("name", ["sum", "pcgrad", "gradvac", "mgda", "cagrad", "upgrad"])
def test_every_method_has_its_name(name):
    J = gradients(3, 3)
    torch.testing.assert_close(resolve_surgery(name)(J @ J.mT), SURGERIES[name](J @ J.mT))
    SURGERIES["gradvac"].reset()


def test_callables_come_back():
    assert resolve_surgery("mgda") is mgda
    assert resolve_surgery(mgda) is mgda
    own = GradVac(beta=0.1)
    assert resolve_surgery(own) is own


def test_two_users_of_one_name_share_no_memory():
    first, second = resolve_surgery("gradvac"), resolve_surgery("gradvac")
    J = gradients(3, 3)
    first(J @ J.mT)
    assert first.targets.shape == (3, 3)
    assert second.targets.shape == (0, 0)
    SURGERIES["gradvac"](J @ J.mT)
    assert resolve_surgery("gradvac").targets.shape == (0, 0)
    SURGERIES["gradvac"].reset()


@pytest.mark.parametrize("surgery", ["PCGrad", "", None, 3])
def test_unknown_surgery(surgery):
    with pytest.raises(ValueError, match=r"surgery=.* must be one of \['cagrad', 'dwa', 'famo', 'gradvac', .*\]"):
        resolve_surgery(surgery)


def test_named_loss_weightings_share_no_memory():
    inputs = SurgeryInputs(torch.eye(2), torch.tensor([1.0, 2.0]), torch.ones(2))
    for name in ("famo", "dwa", "uncertainty"):
        first, second = resolve_surgery(name), resolve_surgery(name)
        first(inputs)
        assert first.state_dict()
        assert not second.state_dict()
        assert type(first) is type(SURGERIES[name])


def test_all_names_exist_and_are_documented():
    for name in gradsub.surgery.__all__:
        assert hasattr(gradsub.surgery, name)
