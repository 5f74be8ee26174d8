"""Orders from distances between the columns of Phi, with no geometry given.

K = Phi^T Phi; of a K that may be indefinite Phi is K itself, and K^2 = Phi^T Phi.
"""

from __future__ import annotations

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.arrays import power_of_two
from gpu_hodlr.batched import splits
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import Operator, ProductColumns
from gpu_hodlr.ordering.bisection import Level, bisect

_CENTERS = 4  # random members that stand for a node's center


class Metric:
    """Inner products phi_i . phi_j, from a sketch of Phi or from entries.

    Args:
        operator: the matrix.
        seed: of the sketch.
        columns: of the sketch; 32 give squared distances within about 25 %.
        comm: the ranks; they share the work, and all have the metric.

    Attributes:
        n: N.
        squared_norms: (N,) phi_i . phi_i.

    Raises:
        ArgumentError: the matrix has neither a cheap sketch nor entries; or it is declared
            indefinite, and has no products.
    """

    def __init__(
        self,
        operator: Operator,
        seed: int,
        columns: int = 32,
        comm: Communicator = ALONE.comm,
    ) -> None:
        if operator.definite:
            sketch = operator.gram_vectors(columns, seed, comm)
        else:
            sketch = _column_sketch(operator, columns, seed, comm)
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

    def distances(self, name: str, rows: Array, cols: Array, summed: bool = False) -> Array:
        """Distances "gram" or "angle", see `splits.distances`; indices as of `inner_products`."""
        inner = self.inner_products(rows, cols)
        return splits.distances(name, inner, self.squared_norms, rows, cols, summed)


def _column_sketch(operator: Operator, num: int, seed: int, comm: Communicator) -> Array:
    """An (N, num) sketch X with E[X X^T] = K^2, times a number: products with random columns."""
    if not operator.has_products:
        raise ArgumentError(
            f"distances 'gram' and 'angle' of {type(operator).__name__}, which declares definite = "
            "False, need products; this matrix has none"
        )
    normal = batched.normal_source((seed, streams.ORDERING), operator.device)
    shape = operator.shape[0], num
    shared = ProductColumns.shared(
        operator, num, lambda part: normal(shape, operator.dtype, part), comm
    )
    xp = namespace(shared.y)
    x = comm.allgather(xp.ascontiguousarray(shared.y.T), shared.widths)
    return (x / x.dtype.type(power_of_two(float(abs(x).max()), x.dtype))).T


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
    rng = np.random.default_rng(seed)

    def distance(index: Array, members: Array) -> Array:
        """(blocks, m) the sum of the distances to some members (blocks, c)."""
        return metric.distances(name, index, members, summed=True)

    def keys(level: Level) -> Array:
        center = level.random_members(_CENTERS, rng)
        p = level.farthest(level.of_blocks(distance, center))
        to_p = level.of_blocks(distance, p)
        q = level.farthest(to_p)
        return splits.split_keys(to_p, level.of_blocks(distance, q), norms, level.index)

    return to_host(bisect(metric.n, parts, keys, namespace(norms), comm))
