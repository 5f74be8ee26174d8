"""The root A of K = A^T A by products with it: what is known of K where A has few rows."""

from __future__ import annotations

from abc import ABC, abstractmethod

from gpu_hodlr.devices import Array
from gpu_hodlr.distributed import ALONE, Communicator

_DECOMPOSED = 10.0  # times rows^3: operations of eigenvalues and vectors
_GRAMS = 4.0  # times N s^2: operations of a low-rank form, beside the products with s columns
_EXACT = 2.0  # times what random columns cost: exact eigenvalues are worth that
_QUICK = 1e8  # operations that are always worth it


class Dual(ABC):
    """A (rows, N) of K = A^T A, which need not be stored: A A^T and A^T w.

    K and A A^T have the same eigenvalues but for zeros; A^T v / sqrt(lambda) is the eigenvector of
    K for the eigenvector v of A A^T (of networks the neural tangent kernel: Jacot, Gabriel,
    Hongler, NeurIPS 2018).

    Args:
        rows: of A.
        cost: operations of `gram`.
    """

    def __init__(self, rows: int, cost: float) -> None:
        self.rows, self.cost = rows, cost

    @abstractmethod
    def gram(self, comm: Communicator = ALONE.comm) -> Array:
        """A A^T, (rows, rows), float64: formed by the ranks together, and whole on each."""

    @abstractmethod
    def combine(self, w: Array) -> Array:
        """A^T w, (N, k), for w (rows, k) of K's type."""

    def pays(self, n: int, columns: int, product_cost: float) -> bool:
        """Whether it costs no more than a low-rank form made of products with so many columns."""
        sketched = columns * product_cost + _GRAMS * n * float(columns) ** 2
        decomposed = self.cost + _DECOMPOSED * float(self.rows) ** 3
        return self.rows <= n and decomposed <= max(_QUICK, _EXACT * sketched)


class ScaledDual(Dual):
    """That of factor * K.

    Args:
        dual: that of K.
        factor: > 0.
    """

    def __init__(self, dual: Dual, factor: float) -> None:
        super().__init__(dual.rows, dual.cost)
        self._dual, self._factor = dual, factor

    def gram(self, comm: Communicator = ALONE.comm) -> Array:
        """See `Dual`."""
        return self._dual.gram(comm) * self._factor

    def combine(self, w: Array) -> Array:
        """See `Dual`."""
        return self._dual.combine(w) * w.dtype.type(self._factor**0.5)
