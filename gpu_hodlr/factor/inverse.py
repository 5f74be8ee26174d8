"""What is asked of (K + damping I)^-1 itself: its diagonal, blocks, quadratic forms and trace."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gpu_hodlr import batched
from gpu_hodlr.arrays import Vectors, as_array, plain, tensor_of
from gpu_hodlr.autograd import linear
from gpu_hodlr.devices import (
    AnyArray,
    Array,
    HostIndex,
    check_memory,
    device_of,
    is_torch,
    memory_errors,
    namespace,
    namespace_on,
    to_host,
)
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError
from gpu_hodlr.linear_map import LinearMap
from gpu_hodlr.profiling import nvtx_range

_CHUNK = 256  # unit vectors solved for together, and the bytes they may take, but 16 at least
_CHUNK_BYTES = 1 << 28
_LEAST_CHUNK = 16
_COPIES = 5  # of them, while they are solved for


class InverseParts(LinearMap):
    """Parts and functions of the inverse, from solves and from what a factor knows.

    Attributes:
        owners: which rank has what.
        inverse_diagonal_error: (N,) standard errors of the last `inverse_diagonal`, 0 where it is
            exact; None before.
        logdet_gradient_error: the standard error of the last `logdet_gradient`, 0 where it is
            exact; None before.
    """

    owners: Ownership
    inverse_diagonal_error: Array | None = None
    logdet_gradient_error: float | None = None

    @abstractmethod
    def solve(self, b: Vectors) -> Vectors:
        """(K + damping I)^-1 b for b (N,) or (N, k); the result is like b."""

    @abstractmethod
    def inverse_diagonal(self) -> Array:
        """The diagonal of (K + damping I)^-1, (N,), an array of the matrix's library.

        `inverse_diagonal_error` is its standard error: 0 where the factor is exact, as of HSS,
        HODLR and low rank. On many ranks it is whole on every one.

        Collective: all ranks call.

        Raises:
            MemoryEstimateError: what it takes does not fit.

        Example:
            >>> F = gh.compress(np.diag([1.0, 3.0])).factorize(damping=1.0)
            >>> F.inverse_diagonal().round(6), F.inverse_diagonal_error
            (array([0.5 , 0.25]), array([0., 0.]))
        """

    @abstractmethod
    def logdet_gradient(self) -> float:
        """The derivative of log det(K + d I) in d at the damping: the trace of the inverse.

        `logdet_gradient_error` is its standard error: 0 where the factor is exact. Of a damping of
        every row it is the derivative in a number that is added to all of them.

        Collective: all ranks call.

        Example:
            >>> F = gh.compress(np.diag([1.0, 3.0])).factorize(damping=1.0)
            >>> round(F.logdet_gradient(), 6), F.logdet_gradient_error
            (0.75, 0.0)
        """

    def inverse_block(self, index: ArrayLike | AnyArray) -> Array:
        """The block (K + damping I)^-1[index, index], dense, an array of the matrix's library.

        By solves for unit vectors, some at a time: as exact as `solve`.

        Collective: all ranks call.

        Args:
            index: (p,) integers in 0 .. N - 1, each once; the same on every rank.

        Returns:
            (p, p), symmetric; on many ranks whole on every one.

        Raises:
            DtypeError, ShapeError, ArgumentError: index is not such a list, or another one on
                another rank.
            MemoryEstimateError: the block and the vectors do not fit.

        Example:
            >>> F = gh.compress(np.diag([1.0, 3.0, 4.0])).factorize(damping=1.0)
            >>> F.inverse_block([2, 0]).round(6)
            array([[0.2, 0. ],
                   [0. , 0.5]])
        """
        n, owners, itemsize = self.shape[0], self.owners, self.dtype.itemsize
        xp, what = namespace_on(self.device), "a block of the inverse"
        with memory_errors(what, "the number of indices", self.device):
            with owners.comm.agreed():
                host = _checked_index(index, n)
                owners.comm.same(index=host)
                p = len(host)
                chunk = min(p, _CHUNK, max(_LEAST_CHUNK, _CHUNK_BYTES // (n * itemsize)))
                needed = itemsize * (2 * p * p + _COPIES * n * chunk)
                check_memory(needed, what, "the number of indices", self.device)
                block, rows = xp.empty((p, p), self.dtype), xp.asarray(host)
            for start in range(0, p, max(chunk, 1)):
                some = rows[start : start + chunk]
                unit = xp.zeros((n, len(some)), self.dtype)
                unit[some, xp.arange(len(some))] = 1
                block[:, start : start + chunk] = self.solve(unit)[rows]
        return (block + block.T) / 2

    def quadratic_form(self, b: Vectors) -> Any:
        """b_j^T (K + damping I)^-1 b_j of every column, of the type of the matrix.

        Of a factor with a square root W it is norm(W^-1 b_j)^2, which is never negative; of others
        b_j times `solve`. Of a torch tensor that requires grad it has a gradient.

        Collective: all ranks call.

        Args:
            b: (N,) or (N, k); on many ranks whole on every one, or this rank's rows.

        Returns:
            A number of b's library for (N,), or (k,); on many ranks the same on every one.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.

        Example:
            >>> F = gh.compress(np.diag([1.0, 3.0])).factorize(damping=1.0)
            >>> F.quadratic_form(np.array([[2.0, 0.0], [0.0, 4.0]])).round(6)
            array([2., 4.])
            >>> round(float(F.quadratic_form(np.array([2.0, 4.0]))), 6)
            6.0
        """
        left, right = self._halves(b)
        spread = b.shape[0] != self.shape[0]
        if is_torch(left):
            dots = (left * right).sum(0)  # torch's own, which it can differentiate again
            return linear(dots, self._added_up, self._added_up, _itself) if spread else dots
        left, right = as_array(left, "b"), as_array(right, "b")
        ones = left.ndim == 1
        if ones:
            left, right = left[:, None], right[:, None]
        wide = (x.astype(np.float64) for x in (left, right))
        dots = batched.column_dots(*wide).astype(left.dtype)
        dots = self.owners.sum(dots) if spread else dots
        return dots[0] if ones else dots

    def _halves(self, b: Vectors) -> tuple[Any, Any]:
        """Two (rows, k) whose dot products the quadratic form is, like b."""
        x = self.solve(b)
        return _of_dtype(b, x), x

    def _added_up(self, dots: Any) -> Any:
        """Sums over the ranks of a tensor."""
        return tensor_of(self.owners.sum(as_array(dots, "b").reshape(-1))).reshape(dots.shape)


class ExactInverse(InverseParts):
    """The diagonal of the inverse in closed form, or by selected inversion."""

    @abstractmethod
    def _inverse_diagonal(self) -> Array:
        """This rank's rows of the diagonal of the inverse."""

    @abstractmethod
    def _inverse_diagonal_bytes(self) -> int:
        """Of what `_inverse_diagonal` has in memory at its peak."""

    def inverse_diagonal(self) -> Array:
        """See `InverseParts`."""
        comm, what, lower = self.owners.comm, "the inverse's diagonal", "max_rank, or use float32"
        with memory_errors(what, lower, self.device), nvtx_range(what), comm.phase(what):
            with comm.agreed():
                check_memory(self._inverse_diagonal_bytes(), what, lower, self.device)
            diagonal = self.owners.whole(self._inverse_diagonal())
        self.inverse_diagonal_error = namespace(diagonal).zeros_like(diagonal)
        return diagonal

    def logdet_gradient(self) -> float:
        """See `InverseParts`: the sum of `inverse_diagonal`."""
        trace = float(self.inverse_diagonal().sum(dtype=np.float64))
        self.logdet_gradient_error = 0.0
        return trace


def _itself(x: Any) -> Any:
    return x


def _of_dtype(b: Any, like: Any) -> Any:
    """B in the type of the result of a solve for it."""
    return b.to(like.dtype) if is_torch(b) else as_array(b, "b").astype(like.dtype)


def _checked_index(index: Any, n: int) -> HostIndex:
    """Indices of rows, a host array.

    Raises:
        DtypeError, ShapeError, ArgumentError: they are not integers, not a list, outside or
            repeated.
    """
    if is_torch(index):
        index = index.detach().cpu().numpy()
    elif device_of(index) == "cuda":
        index = to_host(index)
    host = plain(np.asanyarray(index), "index")
    if host.ndim != 1:
        raise ShapeError(f"index must have shape (p,), got {host.shape}")
    if not host.size:  # an empty list is one of floats to NumPy
        return np.zeros(0, np.int64)
    if not np.issubdtype(host.dtype, np.integer):
        raise DtypeError(f"index must be integers, got {host.dtype}")
    if host.min() < 0 or host.max() >= n:
        raise ArgumentError(f"index must lie in 0 .. {n - 1}, got {host.min()} .. {host.max()}")
    values, counts = np.unique(host, return_counts=True)
    if len(values) < len(host):
        raise ArgumentError(f"index must have every row once, got {values[counts > 1][0]} again")
    return host.astype(np.int64)
