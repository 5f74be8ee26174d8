"""The kernel matrix between two sets of points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator

from gpu_hodlr.arrays import Vectors, as_columns
from gpu_hodlr.devices import Array, HostArray, check_memory, device_of, move, namespace, to_host
from gpu_hodlr.linear_map import LinearMap
from gpu_hodlr.operators.operator import block_indices
from gpu_hodlr.operators.point_blocks import PointBlocks


class CrossKernel(LinearMap):
    """K(new points, points), (M, N), as a linear map: see `KernelOperator.cross`.

    It is never formed as a whole: a product reads every entry, strip by strip.

    Args:
        entries: of the kernel matrix of the N points.
        new: (M, d) the others, scaled alike.

    Attributes:
        shape: (M, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".

    Example:
        >>> C = gh.KernelOperator(np.array([0.0, 1.0, 3.0]), "laplace").cross(np.array([0.0, 1.0]))
        >>> C.to_dense().round(3)
        array([[1.   , 0.368, 0.05 ],
               [0.368, 1.   , 0.135]])
        >>> (C @ np.ones(3)).round(3), (C.T @ np.ones(2)).round(3)
        (array([1.418, 1.503]), array([1.368, 1.368, 0.185]))
    """

    def __init__(self, entries: PointBlocks, new: Array) -> None:
        xp = namespace(new)
        both = xp.concatenate([new, entries.x])
        # One set of points, the new ones first: no row is a column, and a nugget never met.
        self._entries = replace(entries, x=both, nugget=xp.zeros(1, both.dtype))
        self._rows, self._cols = range(len(new)), range(len(new), len(both))
        self._set_shape()

    def _set_shape(self) -> None:
        self.shape = (len(self._rows), len(self._cols))
        self.dtype, self.device = self._entries.x.dtype, device_of(self._entries.x)

    @property
    def T(self) -> CrossKernel:  # noqa: N802
        """K(points, new points), (N, M).

        Example:
            >>> gh.KernelOperator(np.array([0.0, 1.0, 3.0])).cross(np.array([2.0])).T.shape
            (3, 1)
        """
        other = object.__new__(CrossKernel)
        other._entries, other._rows, other._cols = self._entries, self._cols, self._rows
        other._set_shape()
        return other

    def matmat(self, v: Vectors) -> Vectors:
        """The product with v (N,) or (N, k): (M,) or (M, k), of the library of v.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.

        Example:
            >>> C = gh.KernelOperator(np.array([0.0, 1.0, 3.0])).cross(np.array([0.0]))
            >>> C.matmat(np.eye(3)).round(3)
            array([[1.   , 0.607, 0.011]])
        """
        columns, restore = as_columns(v, self.shape[1], self.dtype, self.device, "v")
        columns = namespace(columns).ascontiguousarray(columns)
        return restore(
            self._entries.product(self._rows, self._cols, columns, max(1, columns.shape[1]))
        )

    def rmatvec(self, v: Vectors) -> Vectors:
        """The product of the transpose.

        Example:
            >>> C = gh.KernelOperator(np.array([0.0, 1.0])).cross(np.array([0.0]))
            >>> C.rmatvec(np.ones(1)).round(3)
            array([1.   , 0.607])
        """
        return self.T.matmat(v)

    def rmatmat(self, v: Vectors) -> Vectors:
        """The product of the transpose.

        Example:
            >>> C = gh.KernelOperator(np.array([0.0, 1.0])).cross(np.array([0.0]))
            >>> C.rmatmat(np.ones((1, 3))).shape
            (2, 3)
        """
        return self.T.matmat(v)

    def __rmatmul__(self, w: Vectors) -> Vectors:
        """`w @ C`, for w (M,) or (k, M)."""
        return self.T.matmat(w) if w.ndim == 1 else self.T.matmat(w.T).T

    def entries(self, rows: ArrayLike, cols: ArrayLike) -> Array:
        """A block, or a batch of blocks, see `Operator.entries`.

        Raises:
            DtypeError, ShapeError, ArgumentError: of the indices.

        Example:
            >>> C = gh.KernelOperator(np.array([0.0, 1.0, 3.0])).cross(np.array([0.0]))
            >>> C.entries([0], [1]).round(3)
            array([[0.607]])
        """
        i, j = block_indices(rows, cols, self.shape)
        i, j = i + self._rows.start, j + self._cols.start
        if i.ndim == 1:
            return self._entries.blocks(i[None], j[None])[0]
        return self._entries.blocks(i, j)

    def to_dense(self) -> Array:
        """The matrix as an (M, N) array (free memory is checked first).

        Raises:
            MemoryEstimateError: it does not fit.

        Example:
            >>> gh.KernelOperator(np.array([0.0, 1.0])).cross(np.array([0.0])).to_dense().round(3)
            array([[1.   , 0.607]])
        """
        m, n = self.shape
        needed = 3 * m * n * self.dtype.itemsize
        check_memory(needed, f"a dense {m} x {n} matrix", "the points", self.device)
        return self.entries(np.arange(m), np.arange(n))

    def to_scipy(self) -> LinearOperator:
        """A SciPy LinearOperator of NumPy arrays; on a GPU it copies.

        Example:
            >>> C = gh.KernelOperator(np.array([0.0, 1.0])).cross(np.array([0.0])).to_scipy()
            >>> C.matvec(np.ones(2)).round(3)
            array([1.607])
        """

        def apply(v: HostArray) -> HostArray:
            return to_host(self.matmat(move(np.asarray(v, self.dtype), self.device)))

        def back(v: HostArray) -> HostArray:
            return to_host(self.T.matmat(move(np.asarray(v, self.dtype), self.device)))

        return LinearOperator(
            self.shape, matvec=apply, rmatvec=back, matmat=apply, rmatmat=back, dtype=self.dtype
        )
