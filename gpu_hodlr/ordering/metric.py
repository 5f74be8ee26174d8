"""Orders from distances between the columns of Phi, K = Phi^T Phi, with no geometry given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import Operator
from gpu_hodlr.ordering.bisection import bisect

NDArray = np.ndarray[Any, Any]
_SKETCH = 32  # columns of the sketch of Phi: squared distances within about 25 %
_CENTERS = 4  # random members that stand for a node's center


class Metric:
    """Inner products phi_i . phi_j = K_ij, from a sketch of Phi or from entries.

    Attributes:
        squared_norms: (N,) K_ii.

    Raises:
        ArgumentError: the matrix has neither a cheap sketch nor entries.
    """

    def __init__(self, operator: Operator, seed: int) -> None:
        sketch = operator.gram_vectors(_SKETCH, seed)
        if sketch is None and not operator.has_entries:
            raise ArgumentError("orderings 'gram' and 'angle' need entries; this matrix has none")
        self.n = operator.shape[0]
        self._operator = operator
        self._x = None if sketch is None else np.ascontiguousarray(to_host(sketch), np.float32)
        self.squared_norms = (
            np.maximum(to_host(operator.diagonal()), 0)
            if self._x is None
            else np.einsum("ij,ij->i", self._x, self._x)
        )

    def inner_products(self, rows: NDArray) -> Callable[[NDArray], NDArray]:
        """A function from (nodes, c) indices to inner products (nodes, m, c) with the rows.

        Padded rows (-1) get any values.
        """
        if self._x is None:
            return lambda cols: to_host(self._operator._entries(rows, cols))
        x = self._x
        mine = x[rows]
        return lambda cols: batched.matmul(mine, x[cols], transpose_b=True)


def gram_distance(inner: NDArray, left: NDArray, right: NDArray) -> NDArray:
    """|phi_i - phi_j|^2 from phi_i . phi_j and the squared norms."""
    squared: NDArray = left[:, :, None] + right[:, None, :] - 2 * inner
    return squared


def angle_distance(inner: NDArray, left: NDArray, right: NDArray) -> NDArray:
    """The squared sine of the angle: 1 for orthogonal and for zero columns (they are far)."""
    norms = left[:, :, None] * right[:, None, :]
    safe = np.where(norms > 0, norms, 1)
    sine: NDArray = 1 - np.where(norms > 0, inner**2 / safe, 0)
    return sine


def metric_permutation(metric: Metric, name: str, parts: int, seed: int) -> NDArray:
    """Bisection by d(i, p) - d(i, q), p far from the node's center, q far from p.

    Zero columns are sorted to the end of their node, so that they share leaves. Without a sketch
    it takes 6 N entries a level.

    Args:
        metric: inner products.
        name: "gram" or "angle".
        parts: leaves.
        seed: of the random members.
    """
    distance = gram_distance if name == "gram" else angle_distance
    norms = metric.squared_norms
    rng = np.random.default_rng(seed)

    def farthest(d: NDArray, index: NDArray) -> NDArray:
        slot = np.where(index >= 0, d, -np.inf).argmax(axis=1)
        return np.take_along_axis(index, slot[:, None], axis=1)

    def keys(index: NDArray) -> NDArray:
        inner = metric.inner_products(index)
        left = norms[index]
        sizes = np.count_nonzero(index >= 0, axis=1)
        draw = (rng.random((len(index), _CENTERS)) * sizes[:, None]).astype(int)
        centers = np.take_along_axis(index, draw, axis=1)
        p = farthest(distance(inner(centers), left, norms[centers]).sum(axis=2), index)
        to_p = distance(inner(p), left, norms[p])[:, :, 0]
        q = farthest(to_p, index)
        key = to_p - distance(inner(q), left, norms[q])[:, :, 0]
        return np.where(left > 0, key, np.finfo(key.dtype).max)

    return bisect(metric.n, parts, keys)
