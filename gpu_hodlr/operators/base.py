"""What compression needs to know of a symmetric matrix."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr.arrays import as_columns, check_dtype
from gpu_hodlr.devices import Array, check_memory, namespace, namespace_on, resolve_device
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError


@dataclass(frozen=True)
class Runs:
    """The natural order of a matrix, in runs of indices that belong together.

    Attributes:
        permutation: (N,) indices in natural order.
        starts: (runs,) where each run starts in the permutation; the first is 0.
    """

    permutation: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]


def by_blocks(multiply: Callable[[Array], Array], v: Array, width: int) -> Array:
    """A product with v (N, k), a call for every `width` columns: of the same shape and strides."""
    xp = namespace(v)
    products = [
        multiply(xp.ascontiguousarray(v[:, start : start + width]))
        for start in range(0, v.shape[1], width)
    ]
    if len(products) == 1:
        return products[0]
    return xp.concatenate(products, axis=1) if products else multiply(v)


class Operator(ABC):
    """A symmetric matrix K of order N, given by products, blocks of entries, or both.

    A subclass writes `_matmat` and/or `_entries` and states which of them it has. Shapes, types
    and devices are handled here, once.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".
        has_products: whether `_matmat` is there.
        has_entries: whether `_entries` is there.
        product_cost: operations of a product with one column.
        entry_cost: operations of one entry.
        points: (N, d) coordinates of the rows, or None.
    """

    has_products: bool = True
    has_entries: bool = True
    product_cost: float = 0.0
    entry_cost: float = 0.0
    points: Array | None = None

    def __init__(self, n: int, dtype: Any, device: str) -> None:
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
            raise DtypeError(f"n must be an integer, got {type(n).__name__}")
        if n < 2:
            raise ShapeError(f"the matrix must be at least 2 x 2, got {n} x {n}")
        self.shape = (int(n), int(n))
        self.dtype = check_dtype(dtype, "dtype")
        self.device = device

    @abstractmethod
    def _matmat(self, v: Array) -> Array:
        """K v for v (N, k) of the operator's library and dtype."""

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        """K v, every `width` columns multiplied as if alone: others change none of their bits.

        BLAS sums in another order for another shape. A subclass may write it where a call a block
        would do the same work again.
        """
        return by_blocks(self._matmat, v, width)

    @abstractmethod
    def _entries(self, rows: Array, cols: Array) -> Array:
        """Blocks K[rows[t], cols[t]], (t, m, k), for (t, m) and (t, k) indices; -1 gives zeros."""

    @abstractmethod
    def _diagonal(self) -> Array:
        """The diagonal, (N,)."""

    def to(self, device: str) -> Operator:
        """The same matrix with its data on a device ("cpu" or "cuda"); itself when it is there.

        Raises:
            ArgumentError: an unknown device name.
            DeviceError: the device cannot be used, or the matrix cannot be moved.
        """
        if resolve_device(device) == self.device:
            return self
        moved = copy.copy(self)
        moved._move_data(device)
        moved.device = device
        return moved

    def _move_data(self, device: str) -> None:
        """Move this object's arrays; a subclass that can be moved writes it."""
        raise DeviceError(
            f"{type(self).__name__} is on {self.device} and cannot be moved to {device}"
        )

    def runs(self) -> Runs:
        """The natural order: the matrix's own, every index a run, unless a subclass knows more."""
        n = self.shape[0]
        return Runs(np.arange(n), np.arange(n))

    def summand(self, index: int, count: int) -> Operator | None:
        """One of `count` operators with products whose sum is K; None where K has none."""
        return None

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array | None:
        """An (N, num) sketch X with E[X X^T] = K, where one is cheap; else None.

        The ranks of `comm` form it together, and get the same bits as one alone.
        """
        return None

    def matmat(self, v: Any) -> Any:
        """K v for v of shape (N,) or (N, k); the result is like v.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.
        """
        columns, restore = as_columns(v, self.shape[0], self.dtype, self.device, "v")
        return restore(self._matmat(columns))

    def __matmul__(self, v: Any) -> Any:
        return self.matmat(v)

    def entries(self, rows: Any, cols: Any) -> Array:
        """A block K[rows, cols], or a batch of blocks K[rows[t], cols[t]].

        Args:
            rows: (m,) or (t, m) integer indices.
            cols: (k,) or (t, k) integer indices.

        Returns:
            (m, k) or (t, m, k).

        Raises:
            DtypeError: indices are not integers.
            ShapeError: not both 1-D or both 2-D of the same length.
            ArgumentError: an index is outside 0 .. N - 1.
        """
        if not self.has_entries:
            raise ArgumentError(f"{type(self).__name__} has no entries, only products")
        rows, cols = np.asarray(rows), np.asarray(cols)
        for name, index in (("rows", rows), ("cols", cols)):
            if not np.issubdtype(index.dtype, np.integer):
                raise DtypeError(f"{name} must be integers, got {index.dtype}")
            if index.size and (index.min() < 0 or index.max() >= self.shape[0]):
                raise ArgumentError(
                    f"{name} must lie in 0 .. {self.shape[0] - 1}, "
                    f"got {index.min()} .. {index.max()}"
                )
        if rows.ndim != cols.ndim or rows.ndim not in (1, 2):
            raise ShapeError(f"rows, cols must both be 1-D or 2-D, got {rows.shape}, {cols.shape}")
        if rows.ndim == 1:
            block: Array = self._entries(rows[None], cols[None])[0]
            return block
        if len(rows) != len(cols):
            raise ShapeError(f"rows and cols need the same length, got {len(rows)}, {len(cols)}")
        return self._entries(rows, cols)

    def diagonal(self) -> Array:
        """The diagonal of K, (N,)."""
        return self._diagonal()

    def to_dense(self) -> Array:
        """K as an (N, N) array (free memory is checked first).

        Raises:
            MemoryEstimateError: it does not fit.
        """
        n = self.shape[0]
        needed = 3 * n * n * self.dtype.itemsize
        check_memory(needed, f"a dense {n} x {n} matrix", "N", self.device)
        if self.has_entries:
            every = np.arange(n)[None]
            dense: Array = self._entries(every, every)[0]
            return dense
        return self._matmat(namespace_on(self.device).eye(n, dtype=self.dtype))
