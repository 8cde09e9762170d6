"""EASE: a linear autoencoder over the items that may not use an item to predict itself, in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg, sparse

Array = np.ndarray[Any, np.dtype[np.float64]]


def ease_weights(X: sparse.csr_array, regularisation: float) -> Array:
    r"""Return B (items, items) that minimises ||X - X B||^2 + lambda ||B||^2 subject to diag(B) = 0.

    With P = (X^T X + lambda I)^-1 the solution is B_ij = -P_ij / P_jj for i != j. It takes items^2 numbers of memory
    and items^3 operations. A user's scores are x B, with the user's items x.

    Args:
        X: (users, items), who took what.
        regularisation: lambda, in units of users per item, more than 0.

    Example:
        >>> X = sparse.csr_array(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        >>> ease_weights(X, 2.0).round(2)
        array([[0. , 0.5, 0. ],
               [0.5, 0. , 0. ],
               [0. , 0. , 0. ]])

    Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, arXiv 1905.03375.
    """
    gramian: Array = (X.T @ X).toarray()
    gramian[np.diag_indices_from(gramian)] += regularisation
    inverse: Array = linalg.inv(gramian, overwrite_a=True)
    weights: Array = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights + 0.0  # -0.0 becomes 0.0
