"""Dense linear algebra of the subspaces: dominant ranges, orthonormal bases and the angles between them.

Everything here is pure: tensors in, new tensors out, no global random state, no gradient tracking. The public functions
check their input, which waits for the device once; the optimizer calls the private ``_*_unchecked`` twins, which do not
look at the values.
"""

from ._angles import subspace_angles
from ._orthonormal import orthonormalize
from ._randomized_svd import SVDResult, randomized_svd
from ._range_finder import range_finder

__all__ = ["SVDResult", "orthonormalize", "randomized_svd", "range_finder", "subspace_angles"]
