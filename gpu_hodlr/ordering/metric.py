"""Orders from distances between the columns of Phi, K = Phi^T Phi, with no geometry given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostIndex, namespace
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import Operator
from gpu_hodlr.ordering.bisection import Level, bisect

_CENTERS = 4  # random members that stand for a node's center


class Metric:
    """Inner products phi_i . phi_j = K_ij, from a sketch of Phi or from entries.

    Args:
        operator: the matrix.
        seed: of the sketch.
        columns: of the sketch; 32 give squared distances within about 25 %.
        comm: the ranks; they share the work, and all have the metric.

    Attributes:
        n: N.
        squared_norms: (N,) K_ii.

    Raises:
        ArgumentError: the matrix has neither a cheap sketch nor entries.
    """

    def __init__(
        self,
        operator: Operator,
        seed: int,
        columns: int = 32,
        comm: Communicator = ALONE.comm,
    ) -> None:
        sketch = operator.gram_vectors(columns, seed, comm)
        if sketch is None and not operator.has_entries:
            raise ArgumentError("distances 'gram' and 'angle' need entries; this matrix has none")
        self.n = operator.shape[0]
        self._operator = operator
        self._x = None
        if sketch is None:
            diagonal = operator.diagonal()
            self.squared_norms = namespace(diagonal).maximum(diagonal, 0)
        else:
            xp = namespace(sketch)
            self._x = xp.ascontiguousarray(sketch, dtype=np.float32)
            self.squared_norms = batched.squared_norms(self._x).astype(np.float32)

    def inner_products(self, rows: Array, cols: Array) -> Array:
        """phi_i . phi_j, (nodes, m, c), for (nodes, m) and (nodes, c) indices; padding gets any."""
        if self._x is None:
            return self._operator.reader.blocks(rows, cols)
        return batched.inner_products(self._x, rows, cols)


def gram_distance(inner: Array, left: Array, right: Array) -> Array:
    """|phi_i - phi_j|^2 from phi_i . phi_j and the squared norms."""
    return left[:, :, None] + right[:, None, :] - 2 * inner


def angle_distance(inner: Array, left: Array, right: Array) -> Array:
    """The squared sine of the angle: 1 for orthogonal and for zero columns (they are far)."""
    xp = namespace(inner)
    norms = left[:, :, None] * right[:, None, :]
    return 1 - xp.where(norms > 0, inner**2 / xp.where(norms > 0, norms, 1), 0)


DISTANCES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "gram": gram_distance,
    "angle": angle_distance,
}


def metric_permutation(
    metric: Metric, name: str, parts: int, seed: int, comm: Communicator = ALONE.comm
) -> HostIndex:
    """Bisection by d(i, p) - d(i, q), p far from the node's center, q far from p.

    Zero columns are sorted to the end of their node, so that they share leaves. Without a sketch
    it takes 6 N entries a level.

    Args:
        metric: inner products.
        name: "gram" or "angle".
        parts: leaves.
        seed: of the random members.
        comm: the ranks; they share the work.
    """
    norms = metric.squared_norms
    xp = namespace(norms)
    rng = np.random.default_rng(seed)

    def distance(index: Array, members: Array) -> Array:
        """(blocks, m) the sum of the distances to some members (blocks, c)."""
        inner = metric.inner_products(index, members)
        return DISTANCES[name](inner, norms[index], norms[members]).sum(axis=2)

    def keys(level: Level) -> Array:
        center = level.random_members(_CENTERS, rng)
        p = level.farthest(level.of_blocks(distance, center))
        to_p = level.of_blocks(distance, p)
        q = level.farthest(to_p)
        key = to_p - level.of_blocks(distance, q)
        return xp.where(norms[level.index] > 0, key, np.finfo(key.dtype).max)

    return bisect(metric.n, parts, keys, xp, comm)
