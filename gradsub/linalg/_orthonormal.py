"""Orthonormal columns inside the complement of a given space, always as many as asked for."""

import torch
from torch import Tensor

from ._arithmetic import full_precision, widen
from ._checks import check_matrix
from ._gaussian import gaussian
from ._room import Room
from ._thin import added_by_each, independent_qr


def orthonormalize(Y: Tensor, *, against: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Orthonormal columns that span the columns of ``Y``, outside the space spanned by ``against``.

    With K = ``against``, the result Q satisfies QᵀQ = I and KᵀQ = 0 to working precision, and its
    first j columns span the first j columns of (I - K Kᵀ) Y, each with a positive component along its own
    (QR with a positive diagonal): column 1 of Q is parallel to column 1 of the projected ``Y``. Projection and QR are
    done twice, because one pass leaves the rounding error of a nearly cancelled column in K.

    A column that vanishes (a zero column, one inside the span of K, or one that depends linearly on the columns before
    it, at a relative size of 8 sqrt(d) eps) is replaced by a random direction of the complement, so the result always
    has c orthonormal columns. Each column is judged relative to its own norm: tiny columns are directions too.

    Not differentiable. The computation and the result are in float32, in float64 if either input is float64; autocast
    and TF32 are ignored. Which columns vanish is decided on the device, without waiting for it.

    Args:
        Y: Directions in the columns, shape (..., d, c), any unit, any floating dtype, finite.
        against: Orthonormal columns to stay orthogonal to, shape (..., d, k), dimensionless. Columns that are not
            orthonormal give a wrong projection: orthonormalise them first. None: nothing to avoid, k = 0.
        generator: Source of the replacements, on any device. None: a private generator with a constant seed. The
            global generator is never used.

    Returns:
        Q of shape (..., d, c) with orthonormal columns, deterministic given the generator.

    Raises:
        TypeError: An input is no tensor.
        ValueError: An input has less than two dimensions, is empty, complex, not floating point or not finite; the row
            counts or devices differ; or c > d - k, where the complement has too few dimensions.

    Example:
        >>> import torch
        >>> from gradsub.linalg import orthonormalize
        >>> K = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
        >>> Y = torch.tensor([[5.0, 1.0], [0.0, 0.0], [-3.0, 0.0], [4.0, 0.0]])  # column 2 lies inside K
        >>> Q = orthonormalize(Y, against=K)
        >>> [round(x, 3) + 0.0 for x in Q[:, 0].tolist()]
        [0.0, 0.0, -0.6, 0.8]
        >>> bool(torch.allclose(Q.mT @ Q, torch.eye(2), atol=1e-6)), bool((K.mT @ Q).abs().max() < 1e-6)
        (True, True)

    References:
        Giraud, Langou, Rozloznik, "The loss of orthogonality in the Gram-Schmidt orthogonalization process",
        Computers and Mathematics with Applications 2005 ("twice is enough").
    """
    check_matrix("Y", Y)
    if against is not None:
        check_matrix("against", against)
        if against.shape[-2] != Y.shape[-2]:
            raise ValueError(
                f"against must have as many rows as Y, got shapes {tuple(against.shape)} and {tuple(Y.shape)}: columns "
                "are the directions, transpose if they are your rows."
            )
        if against.device != Y.device:
            raise ValueError(
                f"against must be on the device of Y, got {against.device} and {Y.device}: move it with .to(Y.device)."
            )
    d, c = Y.shape[-2:]
    k = 0 if against is None else against.shape[-1]
    if c > d - k:
        raise ValueError(
            f"Y must have at most {d - k} columns, got {c}: {d} rows less {k} columns of against leave {d - k} "
            f"dimensions. Pass Y[..., :{d - k}], or a smaller against."
        )
    return _orthonormalize_unchecked(Y, Room(against), generator)


def _orthonormalize_unchecked(Y: Tensor, room: Room, generator: torch.Generator | None = None) -> Tensor:
    """`orthonormalize` without its checks, in a room: NaN in ``Y`` gives NaN.

    ``room`` may be given by zero columns, so that bases of different rank share one shape; the caller sees to it that
    it has space for all columns of ``Y``, and that none of them is rounding of what did not enter: only what the room
    itself takes away is told from what it leaves.

    Args:
        Y: directions in the columns, in the room's coordinates (..., f, c).
        room: where the result has to stay.
        generator: source of the replacements.

    Returns:
        Q (..., d, c).
    """
    with full_precision(Y.device):
        Y = widen(Y)
        for part in (room.against, room.within):
            Y = Y if part is None else Y.to(torch.promote_types(Y.dtype, part.dtype))
        room = room.widened(Y.dtype)
        d = Y.shape[-2] if room.within is None else room.within.shape[-2]
        negligible = 8 * d**0.5 * torch.finfo(Y.dtype).eps
        # What bounds the room may itself be the replacements of an earlier call with an equal seed: without the shift
        # the same directions would be drawn again, of which it leaves nothing.
        random = gaussian(d, Y.shape[-1], like=Y, generator=generator, skip=room.columns)
        if room.within is not None:
            random = room.enter(random.expand(*room.within.shape[:-2], -1, -1))
        random = room.project(random)
        random = random / random.norm(dim=-2, keepdim=True)
        W = _replace_vanished(_unit_columns(Y), room, random, negligible)
        W = _replace_dependent(W, random, negligible)
        if room.against is not None and room.against.shape[-1]:
            W = room.project(room.project(independent_qr(W)))
        # Outside of the coordinates: the columns that span the room may be those of a coarser format.
        return independent_qr(room.leave(W))


def complement_of(basis: Tensor) -> Tensor:
    """Orthonormal columns (d x (d - k)) that span what orthonormal columns (d x k) leave."""
    with full_precision(basis.device):
        Q: Tensor = torch.linalg.qr(basis, mode="complete").Q
        return Q[:, basis.shape[1] :].contiguous()


def _unit_columns(Y: Tensor) -> Tensor:
    """Columns of norm 1, zero columns kept. By the largest entry first, whose square need not be representable."""
    largest = Y.abs().amax(-2, keepdim=True)
    Y = Y / torch.where(largest == 0, 1, largest)
    return Y / torch.where(largest == 0, 1, Y.norm(dim=-2, keepdim=True))


def _replace_vanished(Y: Tensor, room: Room, random: Tensor, negligible: float) -> Tensor:
    """Unit columns of what the room has of Y, random where nothing is left of a column."""
    # Twice: after the first pass the rounding error is relative to Y, not to what is left of it.
    Y = room.project(room.project(Y))
    left = Y.norm(dim=-2, keepdim=True)
    vanished = left <= negligible  # false for NaN, which therefore reaches the caller
    return torch.where(vanished, random, Y / torch.where(vanished, 1, left))


def _replace_dependent(Y: Tensor, random: Tensor, negligible: float) -> Tensor:
    """Unit columns Y, random where a column depends linearly on the columns before it."""
    # A trace of the replacement is mixed in for the test only: in [e1, e1, e2] plain QR completes the second column
    # with e2 itself and then finds the third one dependent, which loses e2 from the span.
    left = added_by_each(Y + negligible / 4 * random).unsqueeze(-2)
    return torch.where(left <= negligible, random, Y)
