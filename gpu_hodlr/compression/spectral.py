"""The spectral norm of what a compression misses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace, to_host
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.operators import Operator, ProductColumns
from gpu_hodlr.schemes import Job
from gpu_hodlr.structures import Structure

COLUMNS, PRODUCTS = 8, 3  # vectors multiplied together, and how often
_SAMPLED, _AT_ONCE = 64, 4  # columns of K, without products; the parts they are read in
_KEPT = 1e-6  # of the largest singular value of a block: a smaller direction is left out


def spectral_error(job: Job, structure: Structure) -> float:
    """norm(E)_2 of E = K - K~, from below: mostly within 5 %.

    Block Lanczos with full orthogonalization: norm(E X)_2 for an orthonormal basis X of the space
    of Q and E Q, Q from the leading left singular vectors of E V, V random (Parlett, The Symmetric
    Eigenvalue Problem (1998), chapter 13; Musco, Musco, NeurIPS 2015). The same bits on any number
    of ranks.
    """
    difference = _Difference(job.operator, structure, job.owners)
    space = _Space(job.owners)
    normal = batched.normal_source((job.seed, streams.SPECTRAL), job.operator.device)
    v = job.owners.take(normal((structure.n, COLUMNS), job.operator.dtype))
    missed, found = space.by_leaves(difference(v)), []
    for _ in range(PRODUCTS - 1):
        block = space.added(missed)
        if block is None:  # what there is of E is in the space
            break
        v = space.by_rows(block).astype(job.operator.dtype)
        missed = space.by_leaves(difference(v))
        found.append(missed)
    return space.norm(found) if found else 0.0


def sampled_spectral_error(job: Job, structure: Structure) -> float:
    """The same without products, from some columns of E alone: within a factor of two or so.

    With the columns in two halves, scaled so that their squares sum to E^2 on average: norm(U^T Y)
    for Y of one half and the leading left singular vectors U of the other, which know nothing of
    Y; the mean of the two.
    """
    owners, n = job.owners, structure.n
    rng = np.random.default_rng((job.seed, streams.SPECTRAL))
    columns = np.sort(rng.choice(n, min(_SAMPLED, n), replace=False))
    space = _Space(owners)
    parts = [
        space.columns(job.operator, structure, part)
        for part in np.array_split(columns, min(_AT_ONCE, len(columns)))
    ]
    missed = namespace(parts[0]).concatenate(parts, axis=2)
    halves = [missed[:, :, i::2] * (n / len(columns[i::2])) ** 0.5 for i in range(2)]
    bases = [_Space(owners).added(half) for half in halves]
    return float(
        np.mean(
            [
                0.0 if basis is None else np.linalg.norm(space.inner(basis, half), 2)
                for basis, half in zip(bases, halves[::-1], strict=True)
            ]
        )
    )


class _Difference:
    """Multiplies by K - K~, in float64: this rank's rows to this rank's rows."""

    def __init__(self, operator: Operator, structure: Structure, owners: Ownership) -> None:
        self._operator, self._structure, self._owners = operator, structure, owners

    def __call__(self, v: Array) -> Array:
        """(K - K~) v."""
        difference = self._product(v).astype(np.float64)
        difference -= self._structure.matmat(v.astype(self._structure.dtype, copy=False))
        return difference

    def _product(self, v: Array) -> Array:
        """K v; all ranks multiply, a share of the columns each."""
        whole, xp = self._owners.whole(v), namespace(v)
        shared = ProductColumns.shared(
            self._operator,
            v.shape[1],
            lambda part: xp.ascontiguousarray(whole[:, part]),
            self._owners.comm,
        )
        return shared.to_rows(self._owners).y


class _Space:
    """Orthonormal vectors, by leaves: (leaves, m, k), zero on padding.

    Inner products are summed leaf by leaf, so that their bits do not depend on the ranks.

    Args:
        owners: which rank has which leaves.

    Attributes:
        leaves: this rank's.
    """

    def __init__(self, owners: Ownership) -> None:
        self._owners = owners
        self.leaves = owners.leaves[owners.mine(owners.depth)]
        self._local = owners.local(self.leaves)
        self._basis: list[Array] = []

    def by_leaves(self, x: Array) -> Array:
        """From this rank's rows (rows, k)."""
        return batched.gather_rows(x, self._local)

    def by_rows(self, x: Array) -> Array:
        """The way back."""
        return batched.scatter_rows(x, self._local, self._owners.num_rows(self._owners.n))

    def columns(self, operator: Operator, structure: Structure, index: HostIndex) -> Array:
        """Some columns of K - K~, from entries."""
        leaves, owners = self.leaves, self._owners
        exact = operator.reader.blocks(leaves, np.broadcast_to(index, (len(leaves), len(index))))
        unit = batched.identities(1, len(index), structure.arrays()[0])
        place = owners.places(index)[None]
        v = batched.scatter_rows(unit, place, owners.num_rows(owners.n))
        return exact.astype(np.float64) - self.by_leaves(structure.matmat(v)).astype(np.float64)

    def inner(self, x: Array, y: Array) -> HostArray:
        """X^T Y, summed over all leaves of all ranks; a host array."""
        xp = namespace(x)
        x, y = xp.ascontiguousarray(x), xp.ascontiguousarray(y)
        products = to_host(batched.matmul(x, y, transpose_a=True))
        total: HostArray = self._owners.sum_of_nodes(products, self._owners.depth)
        return total

    def norm(self, parts: list[Array]) -> float:
        """The spectral norm of X, given by some of its columns after the other."""
        gram = np.block([[self.inner(x, y) for y in parts] for x in parts])
        return math.sqrt(max(float(np.linalg.eigvalsh(gram)[-1]), 0.0))

    def added(self, x: Array) -> Array | None:
        """An orthonormal basis of the leading part of X that is orthogonal to the space.

        It belongs to the space from now on. None where there is no such part.
        """
        size = math.sqrt(np.diagonal(self.inner(x, x)).max(initial=0.0))
        if not size > 0:
            return None
        x = x / size
        for basis in self._basis:
            x -= _combined(basis, self.inner(basis, x))
        squares, vectors = self._owners.comm.bcast(np.linalg.eigh(self.inner(x, x)), 0)
        kept = np.nonzero(squares > _KEPT**2)[0][-COLUMNS:]
        if not kept.size:
            return None
        self._basis.append(_combined(x, vectors[:, kept] / np.sqrt(squares[kept])))
        return self._basis[-1]


def _combined(x: Array, coefficients: Any) -> Array:
    """X times a matrix, leaf by leaf."""
    xp = namespace(x)
    matrix = xp.ascontiguousarray(xp.asarray(coefficients, x.dtype))
    return batched.matmul(xp.ascontiguousarray(x), xp.broadcast_to(matrix, (len(x), *matrix.shape)))
