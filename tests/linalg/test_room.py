"""A room given by what spans it is the room given by what spans the rest."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsub.linalg import orthonormalize
from gradsub.linalg._orthonormal import _orthonormalize_unchecked, complement_of
from gradsub.linalg._room import Room

from ._samplers import EPS, assert_orthonormal, dtypes, gaussian, generator, of_rank, orthonormal, seeds


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), d=st.integers(3, 40), dtype=dtypes, seed=seeds)
def test_in_coordinates_of_what_is_left_the_result_is_the_same(data, d, dtype, seed):
    k = data.draw(st.integers(1, d - 2))
    j = data.draw(st.integers(0, d - k - 1))
    c = data.draw(st.integers(1, d - k - j))
    rank = data.draw(st.integers(1, c))
    K = orthonormal(d, k, seed=seed, dtype=dtype)
    free = complement_of(K)
    # Further columns that lie in the room; and beside F a column of zeros, as where another layer has more.
    more = free @ orthonormal(d - k, j, seed=seed + 1, dtype=dtype) if j else free[:, :0]
    room = Room(within=torch.cat([free, free.new_zeros(d, 1)], dim=1)).without(more)
    Y = of_rank(d, c, rank, seed=seed + 2, scale=1.0, dtype=dtype)
    found = _orthonormalize_unchecked(room.enter(Y), room, generator(seed))
    assert_orthonormal(found)
    forbidden = torch.cat([K, more], dim=1)
    assert (forbidden.mT @ found).abs().max() <= 20 * EPS[dtype]
    expected = orthonormalize(Y, against=forbidden, generator=generator(seed))
    # The columns up to the rank are those of Y; of the others it is only said that they are in the room.
    left = Y - forbidden @ (forbidden.mT @ Y)
    independent = torch.linalg.cond(left[:, :rank])
    if independent < 1e3:
        torch.testing.assert_close(found[:, :rank], expected[:, :rank], rtol=0, atol=1e3 * EPS[dtype] * independent)


def test_each_of_a_stack_stays_in_its_own_room():
    frees = [orthonormal(20, f, seed=f, dtype=torch.float32) for f in (6, 9, 12)]
    within = torch.stack([torch.cat([free, free.new_zeros(20, 12 - free.shape[1])], dim=1) for free in frees])
    Y = gaussian(20, 5, seed=1, dtype=torch.float32).repeat(3, 1, 1)
    Y[:, :, 2] = 0  # drawn instead
    room = Room(within=within)
    found = _orthonormalize_unchecked(room.enter(Y), room, generator(0))
    for Q, free in zip(found, frees, strict=True):
        assert_orthonormal(Q)
        torch.testing.assert_close(free @ (free.mT @ Q), Q, rtol=0, atol=1e-6)


def test_bases_are_as_orthonormal_as_their_own_format_allows():
    """Directions of 256 and more features are found in float32, also for a model in float64."""
    free = orthonormal(300, 60, seed=1, dtype=torch.float32).double()
    shared = _orthonormalize_unchecked(gaussian(60, 4, seed=2), Room(within=free), generator(0))
    assert_orthonormal(shared)
    room = Room(within=free).without(shared)
    own = _orthonormalize_unchecked(room.enter(gaussian(300, 4, seed=3)), room, generator(0))
    assert_orthonormal(own)
    for Q in (shared, own):
        torch.testing.assert_close(free @ torch.linalg.lstsq(free, Q).solution, Q, rtol=0, atol=1e-12)
