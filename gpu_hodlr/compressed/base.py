"""What all compressed matrices share: products, sizes, the advice where a factor fails."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.arrays import Vectors
from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.checks import check_number
from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.devices import Array, check_memory, memory_errors, namespace_on
from gpu_hodlr.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from gpu_hodlr.factor import IndefiniteError, Solver, SymmetricFactor
from gpu_hodlr.factor.advice import not_positive_definite, of_every_row
from gpu_hodlr.files.storage import save_structure
from gpu_hodlr.linear_map import LinearMap
from gpu_hodlr.operators import Diagonal
from gpu_hodlr.profiling import nvtx_range
from gpu_hodlr.structures import Structure
from gpu_hodlr.tree import ClusterTree

_DENSE_CHUNK = 256  # columns of the identity multiplied together by to_dense


class CompressedMatrix(LinearMap):
    """A compressed symmetric matrix K~, rows and columns in the user's order everywhere.

    On many ranks each has the part of its own nodes, `owners` says which, and all ranks make the
    same calls. Vectors are whole on every rank, (N,) or (N, k), and so is then the result; or this
    rank's rows of them, x[K.rows], and then the result is these rows of it.

    Args:
        structure: the stored arrays.
        report: what the compression did.
        dtype: of the matrix and its vectors; that of the arrays by default.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".
        tree: the cluster tree.
        structure: the stored arrays.
        report: what the compression did and the error it reached.
        owners: which rank has what of it.
        factors: the classes of what `factorize` gives.

    Example:
        >>> x = np.linspace(0, 1, 200)
        >>> K = gh.compress(gh.KernelOperator(x, "laplace"), rtol=1e-6, leaf_size=25)
        >>> K.ranks[0]  # of the eight leaves: exponentials are separable
        (1, 2, 2, 2, 2, 2, 2, 1)
        >>> bool(K.storage_fraction < 0.2), isinstance(2 * K, gh.HSSMatrix)
        (True, True)
    """

    factors: ClassVar[tuple[type[Solver], ...]] = ()

    def __init__(
        self, structure: Structure, report: CompressionReport, dtype: DTypeLike | None = None
    ) -> None:
        self.structure = structure
        self.report = report
        self.owners = structure.owners
        self.tree = ClusterTree(structure.all_leaves)
        self._num_stored = structure.num_stored
        self.shape = (structure.n, structure.n)
        self.dtype: np.dtype[Any] = np.dtype(structure.dtype if dtype is None else dtype)
        self.device = structure.device
        self._product = Replay(self.owners.capturable)

    @property
    def rows(self) -> Any:
        """The indices of the rows of vectors that this rank has; a host array."""
        return self.owners.take(np.arange(self.shape[0]))

    def __repr__(self) -> str:
        n, kept = self.shape[0], self.structure.dtype
        return (
            f"{type(self).__name__}({n} x {n}, {self.dtype}, {self.device}, "
            f"{100 * self.storage_fraction:.3g} % stored"
            f"{'' if kept == self.dtype else f' in {kept}'}, error {self.report.error:.2g}"
            f"{self.owners.said})"
        )

    def _matmat(self, v: Array) -> Array:
        """K~ v for v (N, k) on this device, computed in the type of the stored blocks."""
        stored = v.astype(self.structure.dtype, copy=False)
        return self.structure.matmat(stored).astype(self.dtype, copy=False)

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
        columns, restore = owners.columns(v, self.shape[0], self.dtype, self.device, "v")
        memory = memory_errors("a product", "the columns of v", self.device)
        with nvtx_range("product"), memory, owners.comm.phase("product"):
            return restore(self._product(self._matmat, columns))

    def _like(self, structure: Structure, frobenius_norm: float, error: float) -> Self:
        """A matrix of this kind with another structure, and what changes in the report."""
        report = replace(self.report, frobenius_norm=frobenius_norm, error=error)
        return type(self)(structure, report, self.dtype)

    def __mul__(self, factor: object) -> Self:
        """K~ times a number, with the same relative error.

        Collective: all ranks call.

        Raises:
            ArgumentError: NaN or infinite, or of a low-rank matrix not positive.
        """
        if isinstance(factor, bool) or not isinstance(factor, (int, float, np.number)):
            return NotImplemented
        self.owners.comm.same(factor=factor)
        number = float(factor)
        if not np.isfinite(number):
            raise ArgumentError(f"a factor must be finite, got {factor}")
        if number <= 0 and self.report.scheme == "lowrank":
            raise ArgumentError(f"a low-rank matrix can be scaled by a number > 0, got {factor}")
        norm = abs(number) * self.report.frobenius_norm
        return self._like(self.structure.scaled(number), norm, self.report.error)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Self:
        if isinstance(divisor, bool) or not isinstance(divisor, (int, float, np.number)):
            return NotImplemented
        return self * (1.0 / float(divisor))

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
        if tuple(getattr(d, "shape", ())) == self.shape[:1]:
            owners.comm.same(**{name: d})
        columns, _ = owners.columns(d, self.shape[0], self.dtype, self.device, name)
        rows: Array = columns[:, 0]
        return rows

    def _plus(self, rows: Array) -> Self:
        """K~ + diag(d), of this rank's rows of d."""
        owners, d = self.owners, rows.astype(np.float64)
        before = self.structure.diagonal().astype(np.float64)
        structure = self.structure.plus_diagonal(d)
        rounding = structure.diagonal().astype(np.float64) - before - d
        cross, square, lost = (
            sum(owners.comm.share(float(part))) for part in (before @ d, d @ d, rounding @ rounding)
        )
        norm, error = self.report.frobenius_norm, self.report.error
        new = math.sqrt(max(norm**2 + 2 * cross + square, 0.0))
        missed = math.hypot(error * norm, math.sqrt(lost))
        return self._like(structure, new, missed / new if new else missed)

    def diagonal(self) -> Array:
        """The diagonal of K~, (N,).

        Collective: all ranks call.

        Example:
            >>> gh.compress(np.eye(4) + 1.0).diagonal().round(6)
            array([2., 2., 2., 2.])
        """
        return self.owners.whole(self.structure.diagonal())

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
        xp = namespace_on(self.device)
        needed = 2 * n * n * self.dtype.itemsize
        check_memory(needed, f"a dense {n} x {n} matrix", "N", self.device)
        dense = xp.empty(self.shape, self.dtype)
        for start in range(0, n, _DENSE_CHUNK):
            unit = xp.eye(n, min(_DENSE_CHUNK, n - start), -start, dtype=self.dtype)
            dense[:, start : start + _DENSE_CHUNK] = self.matmat(unit)
        return dense

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Numerical ranks of all nodes, one tuple a level, leaves first, the root left out."""
        return self.structure.ranks

    @property
    def num_stored(self) -> int:
        """Floating numbers stored, padding included; on many ranks by all together."""
        return self._num_stored

    @property
    def storage_fraction(self) -> float:
        """Stored numbers / N^2 (may exceed 1 for tiny or incompressible matrices)."""
        return self.num_stored / self.shape[0] ** 2

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays on this rank, index arrays included."""
        return int(
            sum(a.nbytes for a in (*self.structure.arrays(), *self.structure.index_arrays()))
        )

    def save(self, path: str | os.PathLike[str]) -> None:
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
        save_structure(path, self.structure, asdict(self.report), self.dtype)

    @abstractmethod
    def _factor(self, structure: Any, damping: float) -> Any:
        """The factor of K~ + damping I.

        Raises:
            IndefiniteError: it is not positive definite.
        """

    def factorize(self, damping: Any = 0.0) -> SymmetricFactor:
        """Factorization of K~ + damping I, in the matrix's dtype: solve, logdet, square root.

        Collective: all ranks call.

        Another damping costs another factorization and no compression.

        Args:
            damping: added to the diagonal, >= 0: a number, or one for every row, (N,) or this
                rank's rows of them. Of a low-rank matrix those for every row must be > 0.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite; it tells the damping
                that would do, or an rtol.
            ArgumentError: damping negative, NaN or infinite, or other on other ranks.

        Example:
            >>> K = gh.compress(np.diag([1.0, 2.0, 3.0]))
            >>> K.factorize(damping=1.0).solve(np.ones(3)).round(6)
            array([0.5     , 0.333333, 0.25    ])
            >>> K.factorize(damping=np.array([1.0, 0.0, 1.0])).solve(np.ones(3)).round(6)
            array([0.5 , 0.5 , 0.25])
        """
        factor: SymmetricFactor = self._factorize(damping)
        return factor

    def _factorize(self, damping: Any) -> Any:
        with self.owners.comm.agreed():
            if getattr(damping, "ndim", 0):
                return self._factorize_with_diagonal(damping)
            self.owners.comm.same(damping=damping)
            damping = check_number(damping, "damping")
            structure = self.structure.astype(self.dtype)
            found = self._factor_if_definite(structure, damping)
            if found is None:
                raise self._not_positive_definite(structure, damping)
            return found

    def _factor_if_definite(self, structure: Any, damping: float) -> Any:
        """The factor of K~ + damping I; None on all ranks where it is not positive definite."""
        comm = self.owners.comm
        lower = memory_errors("the factorization", "max_rank, or use float32", self.device)
        try:
            with comm.agreed(), lower, comm.phase("factor"):
                return self._factor(structure, damping)
        except IndefiniteError:
            return None

    def _factorize_with_diagonal(self, damping: Any) -> Any:
        """See `factorize`: the diagonal becomes part of the matrix."""
        if damping.ndim != 1:
            raise ShapeError(f"damping must be a number or have shape ({self.shape[0]},)")
        rows = self._rows_of(damping, "damping")
        if not bool((rows >= 0).all()):
            raise ArgumentError("damping must be >= 0 everywhere")
        exact = type(self)(self.structure.astype(self.dtype), self.report, self.dtype)
        common = self._common_damping(rows)
        try:
            factor = exact._plus(rows - rows.dtype.type(common))._factorize(common)
        except NotPositiveDefiniteError as e:
            raise of_every_row(e, common) from None
        factor.damping, factor.row_damping = damping, rows.copy()  # the first is the user's
        return factor

    def _common_damping(self, rows: Array) -> float:
        """What of the damping of every row is added as a number; the rest goes into the matrix."""
        return 0.0

    def _would_do(self, structure: Any, damping: float) -> bool:
        """Whether there is a factor with this damping."""
        return self._factor_if_definite(structure, damping) is not None

    def _not_positive_definite(
        self, structure: Structure, damping: float
    ) -> NotPositiveDefiniteError:
        """Look for the smallest damping that does, by Lanczos and trial factorizations."""
        return not_positive_definite(
            self, damping, self.report.rtol, partial(self._would_do, structure)
        )
