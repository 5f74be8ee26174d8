"""Orders from distances between the columns of Phi, K = Phi^T Phi, with no geometry given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr.arrays import to_host
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import Operator
from gpu_hodlr.ordering.bisection import bisect

NDArray = np.ndarray[Any, Any]
Distance = Callable[[NDArray, NDArray, NDArray], NDArray]
_SKETCH = 64  # columns of the sketch of Phi: squared distances within about 18 %
_CENTERS = 4  # random members that stand for a node's center


def gram_distance(inner: NDArray, left: NDArray, right: NDArray) -> NDArray:
    """|phi_i - phi_j|^2 from phi_i . phi_j and the squared norms."""
    return left[:, :, None] + right[:, None, :] - 2 * inner


def angle_distance(inner: NDArray, left: NDArray, right: NDArray) -> NDArray:
    """The squared sine of the angle: 1 for orthogonal and for zero columns (they are far)."""
    norms = left[:, :, None] * right[:, None, :]
    safe = np.where(norms > 0, norms, 1.0)
    return 1.0 - np.where(norms > 0, inner**2 / safe, 0.0)


def metric_permutation(operator: Operator, distance: Distance, parts: int, seed: int) -> NDArray:
    """Bisection by d(i, p) - d(i, q), p far from the node's center, q far from p.

    Zero columns are sorted to the end of their node, so that they share leaves. Needs one
    sketch of Phi, or else 6 N entries a level.

    Raises:
        ArgumentError: the matrix has neither a cheap sketch nor entries.
    """
    rng = np.random.default_rng(seed)
    sketch = operator.gram_vectors(_SKETCH, seed)
    if sketch is None and not operator.has_entries:
        raise ArgumentError("orderings 'gram' and 'angle' need entries; this matrix has none")
    if sketch is not None:
        x = to_host(sketch)
        norms = np.einsum("ij,ij->i", x, x)
    else:
        norms = np.maximum(to_host(operator.diagonal()), 0)

    def distances(rows: NDArray, cols: NDArray) -> NDArray:
        # Padded rows repeat index -1, the last one: harmless, their keys are replaced.
        if sketch is not None:
            inner = x[rows] @ x[cols].swapaxes(1, 2)
        else:
            inner = to_host(operator._entries(rows, cols))
        return distance(inner, norms[rows], norms[cols])

    def farthest(d: NDArray, index: NDArray) -> NDArray:
        slot = np.where(index >= 0, d, -np.inf).argmax(axis=1)
        return np.take_along_axis(index, slot[:, None], axis=1)

    def keys(index: NDArray) -> NDArray:
        sizes = np.count_nonzero(index >= 0, axis=1)
        draw = (rng.random((len(index), _CENTERS)) * sizes[:, None]).astype(int)
        centers = np.take_along_axis(index, draw, axis=1)
        p = farthest(distances(index, centers).sum(axis=2), index)
        to_p = distances(index, p)[:, :, 0]
        q = farthest(to_p, index)
        key = to_p - distances(index, q)[:, :, 0]
        largest = np.finfo(key.dtype).max
        return np.where(norms[index] > 0, key, largest)

    return bisect(operator.shape[0], parts, keys)
