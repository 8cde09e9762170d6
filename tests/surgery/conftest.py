import pytest
import torch


@pytest.fixture(autouse=True)
def _global_generator_stays_untouched():
    """Samplers draw from their own generators, so after any test here the global state is what it was before."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global random state was advanced"
