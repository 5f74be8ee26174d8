"""What every compressed matrix offers, whatever it is stored as."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gpu_hodlr.arrays import Vectors
from gpu_hodlr.autograd import symmetric
from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.devices import Array, check_memory, is_array, memory_errors, namespace_on
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.errors import ArgumentError, DtypeError
from gpu_hodlr.factor import Solver
from gpu_hodlr.files.writing import AnyPath
from gpu_hodlr.linear_map import LinearMap
from gpu_hodlr.operators import Diagonal
from gpu_hodlr.profiling import nvtx_range

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDtype

_DENSE_CHUNK = 256  # columns of the identity multiplied together by to_dense


def each_damping(dampings: Any) -> list[Any]:
    """Dampings as `factorize` takes them, from a list, or an array of numbers or rows.

    Raises:
        DtypeError: it is no list.
    """
    try:
        every = list(dampings)
    except TypeError:
        raise DtypeError(f"dampings must be a list of them, got {dampings!r}") from None
    return [d.item() if is_array(d) and d.ndim == 0 else d for d in every]


class CompressedMatrix(LinearMap):
    """A compressed symmetric matrix K~, rows and columns in the user's order everywhere.

    On many ranks each has the part of its own nodes, `owners` says which, and all ranks make the
    same calls. Vectors are whole on every rank, (N,) or (N, k), and so is then the result; or this
    rank's rows of them, x[K.rows], and then the result is these rows of it.

    A subclass says how it multiplies, what its diagonal is, how it is scaled, added to and
    factorized: stacks of arrays (`StructuredMatrix`), or other matrices of which it is made.

    Args:
        n: N.
        dtype: of the matrix and its vectors.
        device: where it is.
        report: what the compression did.
        owners: which rank has what of it.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".
        report: what the compression did and the error it reached.
        owners: which rank has what of it.

    Example:
        >>> x = np.linspace(0, 1, 200)
        >>> K = gh.compress(gh.KernelOperator(x, "laplace"), rtol=1e-6, leaf_size=25)
        >>> K.ranks[0]  # of the eight leaves: exponentials are separable
        (1, 2, 2, 2, 2, 2, 2, 1)
        >>> bool(K.storage_fraction < 0.2), isinstance(2 * K, gh.HSSMatrix)
        (True, True)
    """

    def __init__(
        self,
        n: int,
        dtype: np.dtype[Any],
        device: str,
        report: CompressionReport,
        owners: Ownership,
    ) -> None:
        self.shape, self.dtype, self.device = (n, n), dtype, device
        self.report, self.owners = report, owners
        self._product = Replay(owners.capturable)

    @abstractmethod
    def _matmat(self, v: Array) -> Array:
        """K~ v for this rank's rows of v (N, k), on this device, in the matrix's dtype."""

    @abstractmethod
    def _diagonal(self) -> Array:
        """This rank's rows of the diagonal."""

    @abstractmethod
    def _times(self, number: float) -> Self:
        """K~ times a finite number."""

    @abstractmethod
    def _plus(self, rows: Array) -> Self:
        """K~ + diag(d), of this rank's rows of d."""

    @abstractmethod
    def factorize(
        self, damping: Any = 0.0, shift: str | None = None, dtype: AnyDtype | None = None
    ) -> Solver:
        """Factorization of K~ + damping I, in the matrix's dtype: solve, logdet, square root.

        Collective: all ranks call.

        Another damping costs another factorization and no compression.

        Args:
            damping: added to the diagonal, >= 0: a number, or one for every row, (N,) or this
                rank's rows of them. Of a low-rank matrix those for every row must be > 0.
            shift: "auto": where this damping does not do, the factor at one that does, a few per
                cent above one that does not. `damping` of the factor is the one it has, `shifted`
                how much that is more. It is meant for `M` of `gh.cg` at the smaller damping, and
                its own solutions are not those that were asked for. None: raise instead.
            dtype: of the factor, the matrix's by default. float32 of a float64 matrix halves its
                bytes; `solve` refines to the accuracy of float64 with products by K~, see
                `factor.RefinedFactor`, and all else has the rounding of float32.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite; it tells the damping
                that would do, or an rtol. Or the damping is too small for the rounding of float32.
            ArgumentError: damping negative, NaN or infinite, or other on other ranks; shift is
                another word; dtype is wider than the matrix's.
            DtypeError: dtype is neither float32 nor float64.

        Warns:
            AccuracyWarning: the compression's error (`report.spectral_error`) exceeds half of
                damping + nugget, and half of the smallest eigenvalue of what is factorized: its
                solutions may be far from those of K itself. Not with a shift.

        Example:
            >>> K = gh.compress(np.diag([1.0, 2.0, 3.0]))
            >>> K.factorize(damping=1.0).solve(np.ones(3)).round(6)
            array([0.5     , 0.333333, 0.25    ])
            >>> K.factorize(damping=np.array([1.0, 0.0, 1.0])).solve(np.ones(3)).round(6)
            array([0.5 , 0.5 , 0.25])
            >>> F = gh.compress(np.diag([-1.0, 2.0])).factorize(0.5, shift="auto")
            >>> round(F.damping, 2), round(F.shifted, 2)
            (1.02, 0.52)
        """

    def factorize_many(
        self,
        dampings: Iterable[Any],
        shift: str | None = None,
        dtype: AnyDtype | None = None,
    ) -> list[Any]:
        """The factors of K~ plus each of many dampings, each equal to `factorize`'s to rounding.

        What no damping changes is made once: the smallest eigenvalue that the error is compared
        with; of HSS the leaves' blocks with the rows to be eliminated uncoupled; of FMM the HSS
        form that preconditions, made for the smallest of them; of a matrix that is stored narrower
        the wider one. Of low rank without a diagonal there is nothing else, all factors share the
        eigenvectors; of HODLR and KFE all else depends on the damping. The factors are in memory
        together: take `factorize` in a loop to have one at a time.

        Collective: all ranks call.

        Args:
            dampings: each as in `factorize`.
            shift: see `factorize`, of every damping.
            dtype: see `factorize`; what is in float32 and refined shares less.

        Raises:
            NotPositiveDefiniteError: see `factorize`, as the next; the first in ascending order.
            ArgumentError: another number of dampings on other ranks, too.
            DtypeError: dampings is one number.
            MemoryEstimateError: the factors do not fit together.

        Warns:
            AccuracyWarning: see `factorize`.

        Example:
            >>> K = gh.compress(np.diag([1.0, 3.0]))
            >>> [F.solve(np.ones(2)).round(6).tolist() for F in K.factorize_many([1.0, 0.0])]
            [[0.5, 0.25], [1.0, 0.333333]]
        """
        return [self.factorize(damping, shift, dtype) for damping in each_damping(dampings)]

    @abstractmethod
    def save(self, path: AnyPath) -> None:
        """Write one .npz file (format version inside, no pickle).

        Collective: all ranks call.

        On many ranks, which all call, it is an index; beside it every rank writes a file of its
        own, `<name>.<token>.<rank>-of-<size>.npz`. The matrix is complete or absent: an
        interrupted save leaves an old one whole, and an error of one rank is raised on all.

        Raises:
            OSError: a file cannot be written.
            ArgumentError: the ranks have different paths.

        Example:
            >>> K = gh.compress(np.eye(4) + 1.0)
            >>> K.save("matrix.npz")
            >>> gh.load("matrix.npz").shape
            (4, 4)
        """

    @property
    @abstractmethod
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Numerical ranks of all nodes, one tuple a level, leaves first, the root left out."""

    @property
    @abstractmethod
    def num_stored(self) -> int:
        """Floating numbers stored, padding included; on many ranks by all together."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all stored arrays on this rank, index arrays included."""

    @property
    def rows(self) -> Any:
        """The indices of the rows of vectors that this rank has; a host array."""
        return self.owners.take(np.arange(self.shape[0]))

    def __repr__(self) -> str:
        n = self.shape[0]
        return (
            f"{type(self).__name__}({n} x {n}, {self.dtype}, {self.device}, "
            f"{100 * self.storage_fraction:.3g} % stored{self._stored_as}, error "
            f"{self.report.error:.2g}{self.owners.said})"
        )

    @property
    def _stored_as(self) -> str:
        """For the repr: how, where that is not in the matrix's dtype."""
        return ""

    @symmetric
    def matmat(self, v: Vectors) -> Vectors:
        """K~ v for v (N,) or (N, k); the result is like v.

        Collective: all ranks call.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.

        Example:
            >>> K = gh.compress(np.eye(4) + 1.0)
            >>> (K @ np.ones(4)).round(6)
            array([5., 5., 5., 5.])
            >>> K.matmat(np.ones((4, 2))).shape
            (4, 2)
        """
        owners = self.owners
        columns, restore = owners.right_hand_side(v, self.shape[0], self.dtype, self.device, "v")
        memory = memory_errors("a product", "the columns of v", self.device)
        with nvtx_range("product"), memory, owners.comm.phase("product"):
            return restore(self._product(self._matmat, columns))

    def __mul__(self, factor: object) -> Self:
        """K~ times a number, with the same relative error.

        Collective: all ranks call.

        Raises:
            ArgumentError: NaN or infinite.
        """
        if isinstance(factor, bool) or not isinstance(factor, (int, float, np.number)):
            return NotImplemented
        self.owners.comm.same(factor=factor)
        number = float(factor)
        if not np.isfinite(number):
            raise ArgumentError(f"a factor must be finite, got {factor}")
        return self._times(number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Self:
        if isinstance(divisor, bool) or not isinstance(divisor, (int, float, np.number)):
            return NotImplemented
        number = float(divisor)
        return self * (1.0 / number if number else math.inf)  # refused there, on all ranks

    def __neg__(self) -> Self:
        return self * -1.0

    def __add__(self, other: object) -> Self:
        """K~ + D for a `Diagonal` D, which is exact but for the rounding of the stored type.

        Collective: all ranks call.

        Raises:
            ShapeError, DeviceError: D does not fit.
        """
        if not isinstance(other, Diagonal):
            return NotImplemented
        return self._plus(self._rows_of(other.d, "d"))

    __radd__ = __add__

    def _rows_of(self, d: Any, name: str) -> Array:
        """This rank's rows of d, which is (N,) or has them alone, in the matrix's dtype.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`; d is whole
                and differs between ranks.
        """
        owners = self.owners
        columns, _ = owners.right_hand_side(d, self.shape[0], self.dtype, self.device, name)
        if len(d) == self.shape[0]:
            owners.comm.same(**{name: d})  # on a GPU, too
        rows: Array = columns[:, 0]
        return rows

    def diagonal(self) -> Array:
        """The diagonal of K~, (N,).

        Collective: all ranks call.

        Example:
            >>> gh.compress(np.eye(4) + 1.0).diagonal().round(6)
            array([2., 2., 2., 2.])
        """
        return self.owners.whole(self._diagonal())

    def trace(self) -> float:
        """The trace of K~.

        Collective: all ranks call.

        Example:
            >>> round(gh.compress(np.eye(4) + 1.0).trace(), 6)
            8.0
        """
        return float(self.diagonal().sum(dtype=np.float64))

    def to_dense(self) -> Array:
        """K~ as an (N, N) array (free memory is checked first).

        Collective: all ranks call.

        Raises:
            MemoryEstimateError: it does not fit.

        Example:
            >>> gh.compress(np.diag([1.0, 2.0])).to_dense().round(6)
            array([[1., 0.],
                   [0., 2.]])
        """
        n = self.shape[0]
        xp, what = namespace_on(self.device), f"a dense {n} x {n} matrix"
        with memory_errors(what, "N", self.device):
            with self.owners.comm.agreed():  # another rank may have less memory
                check_memory(2 * n * n * self.dtype.itemsize, what, "N", self.device)
                dense = xp.empty(self.shape, self.dtype)
            for start in range(0, n, _DENSE_CHUNK):
                unit = xp.eye(n, min(_DENSE_CHUNK, n - start), -start, dtype=self.dtype)
                dense[:, start : start + _DENSE_CHUNK] = self.matmat(unit)
        return dense

    @property
    def storage_fraction(self) -> float:
        """Stored numbers / N^2 (may exceed 1 for tiny or incompressible matrices)."""
        return self.num_stored / self.shape[0] ** 2
