"""The names by which SciPy, NumPy and torch know a symmetric matrix that multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from scipy.sparse.linalg import LinearOperator

from gpu_hodlr.arrays import Vectors
from gpu_hodlr.devices import HostArray, move, to_host


class LinearMap(ABC):
    """A symmetric linear map: `K @ v`, `w @ K`, `K.T`, and the names that SciPy looks for.

    SciPy's `aslinearoperator`, `eigsh`, `cg` and `lobpcg`, and CuPy's, take it as it is.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".

    Example:
        >>> op = gh.DenseOperator(np.diag([1.0, 2.0]))
        >>> op @ np.ones(2), np.ones(2) @ op, op.T is op
        (array([1., 2.]), array([1., 2.]), True)
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    device: str

    __array_ufunc__ = None  # NumPy and CuPy leave `w @ K` to K

    @abstractmethod
    def matmat(self, v: Vectors) -> Vectors:
        """The map of (N,) or (N, k); the result is like v."""

    def matvec(self, v: Vectors) -> Vectors:
        """`matmat` of (N,) or (N, 1).

        Example:
            >>> gh.DenseOperator(np.diag([1.0, 2.0])).matvec(np.ones(2))
            array([1., 2.])
        """
        return self.matmat(v)

    def rmatvec(self, v: Vectors) -> Vectors:
        """`matvec`: the map is its own transpose.

        Example:
            >>> gh.DenseOperator(np.diag([1.0, 2.0])).rmatvec(np.ones(2))
            array([1., 2.])
        """
        return self.matmat(v)

    def rmatmat(self, v: Vectors) -> Vectors:
        """`matmat`: the map is its own transpose.

        Example:
            >>> gh.DenseOperator(np.diag([1.0, 2.0])).rmatmat(np.eye(2))
            array([[1., 0.],
                   [0., 2.]])
        """
        return self.matmat(v)

    def to_scipy(self) -> LinearOperator:
        """A SciPy LinearOperator of NumPy arrays, several columns at once; on a GPU it copies.

        Example:
            >>> from scipy.sparse.linalg import eigsh
            >>> A = gh.DenseOperator(np.diag(np.arange(1.0, 9.0))).to_scipy()
            >>> eigsh(A, k=1, v0=np.ones(8), return_eigenvectors=False).round(6)
            array([8.])
        """

        def apply(v: HostArray) -> HostArray:
            return to_host(self.matmat(move(np.asarray(v, self.dtype), self.device)))

        return LinearOperator(
            self.shape, matvec=apply, rmatvec=apply, matmat=apply, rmatmat=apply, dtype=self.dtype
        )

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: object = None,
    ) -> object:
        """Torch leaves `w @ K` to K, too, and nothing else."""
        if getattr(function, "__name__", "") in ("__matmul__", "matmul") and len(args) == 2:
            return args[1].__rmatmul__(args[0]) if isinstance(args[1], cls) else args[0] @ args[1]
        return NotImplemented

    def __matmul__(self, v: Vectors) -> Vectors:
        return self.matmat(v)

    def __rmatmul__(self, w: Vectors) -> Vectors:
        """`w @ K`, for w (N,) or (k, N): the transpose of K w^T."""
        return self.matmat(w) if w.ndim == 1 else self.matmat(w.T).T

    @property
    def T(self) -> Self:  # noqa: N802  NumPy's name
        """The map itself, which is symmetric."""
        return self
