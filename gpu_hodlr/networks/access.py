"""What a curvature matrix is read through: one class a way to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.eigenbasis import Rotated
from gpu_hodlr.operators import Dual, Runs
from gpu_hodlr.operators.reader import by_blocks


def chunk_of_blocks(width: int, most: int) -> int:
    """Columns that go through together, as many as fit, so that no block of `width` is cut."""
    return max(c for c in range(1, min(most, width) + 1) if width % c == 0)


class Access(ABC):
    """A way to K: products, and what else is cheap by it.

    Attributes:
        name: what `entries=` calls it.
        n: N.
        dtype: float32 or float64.
        device: "cpu" or "cuda".
        has_entries: whether `blocks` is written.
        has_eigenbasis: whether `eigenbasis` gives one.
        product_cost: operations of a product with one column.
        entry_cost: operations of one entry.
    """

    name: str
    has_entries: bool = False
    has_eigenbasis: bool = False
    product_cost: float
    entry_cost: float = 0.0

    def __init__(self, n: int, dtype: np.dtype[Any], device: str) -> None:
        self.n, self.dtype, self.device = n, dtype, device

    @abstractmethod
    def matmat(self, v: Array) -> Array:
        """K v, (N, k)."""

    def matmat_by_blocks(self, v: Array, width: int) -> Array:
        """K v, every `width` columns as if alone."""
        return by_blocks(self.matmat, v, width)

    def blocks(self, rows: Array, cols: Array) -> Array:
        """Blocks (t, m, k) for (t, m) and (t, k) indices; -1 gives zeros."""
        raise NotImplementedError

    @property
    def has_diagonal(self) -> bool:
        """Whether `diagonal` costs less than N products."""
        return True

    @abstractmethod
    def diagonal(self) -> Array:
        """The diagonal, (N,)."""

    @abstractmethod
    def on(self, device: str) -> Access:
        """The same with its data on a device.

        Raises:
            DeviceError: it cannot be there.
        """

    def summand(self, index: int, count: int) -> Access | None:
        """A part of the sum over samples; None where there is none."""
        return None

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array | None:
        """(N, num) X with E[X X^T] = K; None where it costs too much."""
        return None

    def runs(self) -> Runs | None:
        """The natural order in runs; None where the network says."""
        return None

    def eigenbasis(self) -> Rotated | None:
        """See `Operator.eigenbasis`."""
        return None

    def root(self) -> Array | None:
        """A^T (N, rows) of K = A^T A, where it is stored."""
        return None

    def dual(self) -> Dual | None:
        """A of K = A^T A by A A^T and A^T w; None where they are not known."""
        return None
