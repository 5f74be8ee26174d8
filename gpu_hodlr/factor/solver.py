"""What every exact factor K + damping I = W W^T offers: solves, square roots, samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import FLOATS, Vectors
from gpu_hodlr.autograd import symmetric, transposable
from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import (
    Array,
    check_memory,
    memory_errors,
    namespace,
    to_host,
    to_hosts,
)
from gpu_hodlr.distributed import Ownership, Rows
from gpu_hodlr.factor.accuracy import Accuracy
from gpu_hodlr.factor.inverse import InverseParts
from gpu_hodlr.files.storage import save_factor
from gpu_hodlr.files.writing import AnyPath
from gpu_hodlr.krylov import extreme_eigenvalues
from gpu_hodlr.profiling import nvtx_range
from gpu_hodlr.structures import Structure
from gpu_hodlr.structures.stored import Part, Stored, check_types

_STEPS = 20  # of Lanczos with the inverse, whose largest eigenvalues stand apart

_COPIES = 5  # of random vectors, while they are multiplied by W


class IndefiniteError(Exception):
    """A Cholesky factorization failed: the matrix plus damping is not positive definite."""


class Solver(InverseParts, Stored):
    """(K + damping I)^-1.

    SciPy's and CuPy's solvers take it for `M`. What they multiply by is the inverse: `F @ b`,
    `matvec` and `matmat` are `solve`.

    Args:
        structure: of K.
        damping: added to the diagonal.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".
        damping: what was added to the diagonal, a number or (N,); a loaded one of every row has
            this rank's rows alone.
        row_damping: (rows,) this rank's rows of a damping of every row, which the matrix then has
            in itself, in its dtype; else None.
        shifted: how much more than was asked for `damping` is, with `shift="auto"`; else 0.
        accuracy: of the compressed matrix; None where it is not known.
        owners: which rank has what.
        inverse_diagonal_error: see `InverseParts`, as the next.
        logdet_gradient_error: of the last `logdet_gradient`.

    Example:
        >>> F = gh.compress(np.diag([1.0, 3.0])).factorize(damping=1.0)
        >>> F.solve(np.ones(2)).round(6), (F @ np.ones(2)).round(6)
        (array([0.5 , 0.25]), array([0.5 , 0.25]))
    """

    BY_ROWS: ClassVar[tuple[str, ...]] = ("row_damping",)

    def __init__(self, structure: Structure, damping: float) -> None:
        self._begin(structure.n, structure.dtype, structure.device, structure.owners, damping)
        self._loaded = False

    def _begin(
        self, n: int, dtype: np.dtype[Any], device: str, owners: Ownership, damping: float | None
    ) -> None:
        """Set what all solvers have."""
        self.shape = (n, n)
        self.dtype: np.dtype[Any] = dtype
        self.device = device
        self.damping: Any = damping
        self.owners: Ownership = owners
        self.row_damping: Array | None = None
        self.shifted = 0.0
        self.accuracy: Accuracy | None = None
        self._residual_bound: float | None = None
        self.inverse_diagonal_error = self.logdet_gradient_error = None
        self._replay = Replay(owners.capturable)
        self._loaded = True  # what a matrix would share with it is its own

    @classmethod
    def _unpacked(cls, part: Part, n: int, dtype: np.dtype[Any]) -> Self:
        """A solver that has what all have, with nothing factorized.

        Raises:
            KeyError, TypeError, ValueError: the file says no damping that can be.
        """
        if dtype not in FLOATS:
            raise ValueError(f"a factor cannot have type {dtype}")
        self = cls.__new__(cls)
        if not part.has("row_damping"):
            damping = check_number(part.about["damping"], "damping")
            self._begin(n, dtype, part.device, part.owners, damping)
            self._read(part.about)
            return self
        rows = part.own_rows("row_damping")
        check_types({"row_damping": rows}, dtype)
        here = part.owners.num_rows(n)
        if rows.shape != (here,) or (rows < 0).any():
            raise ValueError(f"the damping of every row has shape {rows.shape} or is negative")
        self._begin(n, dtype, part.device, part.owners, None)
        self._read(part.about)
        self.damping = self.row_damping = part.placed(rows)
        return self

    def _read(self, about: Mapping[str, Any]) -> None:
        """What a file says of the shift and the compression; older files say nothing."""
        self.shifted = check_number(about.get("shifted", 0.0), "shifted")
        if about.get("accuracy") is not None:
            self.accuracy = Accuracy.read(about["accuracy"])
        if about.get("residual_bound") is not None:
            self._residual_bound = check_number(about["residual_bound"], "residual_bound")

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        return {} if self.row_damping is None else {"row_damping": to_host(self.row_damping)}

    def about(self) -> dict[str, Any]:
        """See `Stored`; factors need no ranks."""
        return {
            "damping": self.damping if self.row_damping is None else None,
            "ranks": [],
            "shifted": self.shifted,
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "residual_bound": self._residual_bound,
        }

    def save(self, path: AnyPath) -> None:
        """Write one .npz file (format version inside, no pickle), for `gpu_hodlr.load`.

        Collective: all ranks call.

        Loading does not factorize again. On many ranks, which all call, it is an index, and every
        rank writes a file of its own beside it, as `CompressedMatrix.save` does; any number of
        ranks can load it. The factor is complete or absent: an interrupted save leaves an old file
        whole, and an error of one rank is raised on all.

        Raises:
            OSError: a file cannot be written.
            ArgumentError: the ranks have different paths.

        Example:
            >>> F = gh.compress(np.eye(4) + 1.0).factorize(damping=1.0)
            >>> F.save("factor.npz")
            >>> gh.load("factor.npz").logdet() == F.logdet()
            True
        """
        save_factor(path, self)

    @abstractmethod
    def solve(self, b: Vectors) -> Vectors:
        """(K + damping I)^-1 b for b (N,) or (N, k); the result is like b.

        Collective: all ranks call.

        Example:
            >>> gh.compress(np.diag([1.0, 3.0])).factorize(1.0).solve(np.eye(2)).round(6)
            array([[0.5 , 0.  ],
                   [0.  , 0.25]])
        """

    @abstractmethod
    def _inverse(self, b: Array) -> Array:
        """`solve` of this rank's rows of b (N, k), as exactly as an estimate needs."""

    def verified(self) -> bool:
        """Whether K + damping I is positive definite: a factor exists of nothing else.

        Collective: all ranks call.

        Example:
            >>> gh.compress(np.diag([1.0, 3.0])).factorize(1.0).verified()
            True
        """
        return True

    @property
    def inverse_norm(self) -> float:
        """norm((K + damping I)^-1)_2, by Lanczos with solves: within a few per cent, from below.

        Collective: all ranks ask.

        Example:
            >>> round(gh.compress(np.diag([1.0, 3.0])).factorize(1.0).inverse_norm, 6)
            0.5
        """
        return extreme_eigenvalues(_Inverse(self), _STEPS)[1]

    @property
    def residual_bound(self) -> float | None:
        """Of norm(b - A x) / norm(b), x = `solve(b)`, A the exact matrix plus damping.

        With E = A - (K + damping I) the residual is -E x: its norm is at most norm(E)_2 times
        norm((K + damping I)^-1)_2 norm(b), to which `solve`'s own rounding is added, or the rtol of
        CG. norm(E)_2 is taken from the compression's report, a quarter larger than measured, or
        norm(E)_F where it was not; the inverse's norm is `inverse_norm`. Formed at first use.

        Collective: all ranks ask.

        Returns:
            None where nothing is known of the compression.

        Example:
            >>> x = np.linspace(0, 1, 200)
            >>> op = gh.KernelOperator(x, "gaussian", 0.2, nugget=0.1)
            >>> F = gh.compress(op, rtol=1e-6, leaf_size=25).factorize()
            >>> b = np.sin(9 * x)
            >>> residual = np.linalg.norm(b - op @ F.solve(b)) / np.linalg.norm(b)
            >>> bool(residual <= F.residual_bound < 0.01)
            True
        """
        missed = None if self.accuracy is None else self.accuracy.bound
        if self._residual_bound is None and missed is not None:
            self._residual_bound = missed * self.inverse_norm
        return self._residual_bound

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of what is stored."""

    @classmethod
    def memory(cls, structure: Any) -> int:
        """Bytes at the peak of making the factor of a structure, within a factor of 1.5."""
        return 0

    def matmat(self, v: Vectors) -> Vectors:
        """`solve`: the inverse times v, which is what a preconditioner is to SciPy.

        Collective: all ranks call.

        Example:
            >>> gh.compress(np.diag([1.0, 3.0])).factorize(1.0).matmat(np.ones(2)).round(6)
            array([0.5 , 0.25])
        """
        return self.solve(v)

    def __repr__(self) -> str:
        n = self.shape[0]
        said = "of every row" if getattr(self.damping, "ndim", 0) else f"{self.damping:.3g}"
        return (
            f"{type(self).__name__}({n} x {n}, {self.dtype}, {self.device}, "
            f"damping {said}{self._more_said()}, {self.nbytes / 1e6:.3g} MB{self.owners.said})"
        )

    def _more_said(self) -> str:
        """For the repr."""
        return ""


class _Inverse:
    """The inverse as a matrix, of this rank's rows."""

    def __init__(self, solver: Solver) -> None:
        self.shape, self.dtype, self.device = solver.shape, solver.dtype, solver.device
        self.owners, self.matmat = solver.owners, solver._inverse


class SymmetricFactor(Solver):
    """K + damping I = W W^T for a square W that is not triangular; see `Solver` for its attributes.

    A subclass writes the products and solves with W; shapes, types and devices are handled here.
    On many ranks right-hand sides are whole on every rank, or this rank's rows of them; the
    coordinates z of W z likewise (`coordinates`). Every rank must make the same calls.
    """

    @abstractmethod
    def _solve(self, b: Array) -> Array:
        """(K + damping I)^-1 b for b (N, k)."""

    @abstractmethod
    def _product(self, z: Array) -> Array:
        """W z for z (N, k)."""

    @abstractmethod
    def _transposed_product(self, z: Array) -> Array:
        """W^T z for z (N, k)."""

    @abstractmethod
    def _sqrt_solve(self, z: Array) -> Array:
        """W^-1 z for z (N, k)."""

    @abstractmethod
    def _transposed_sqrt_solve(self, z: Array) -> Array:
        """W^-T z for z (N, k)."""

    @property
    def coordinates(self) -> Rows:
        """Which coordinates of z in W z every rank has."""
        return self.owners.rows

    def _inverse(self, b: Array) -> Array:
        return self._solve(b)

    def _halves(self, b: Vectors) -> tuple[Any, Any]:
        z = self.sqrt_solve(b)
        return z, z

    def _with_coordinates(
        self, run: Callable[[Array], Array], z: Vectors, transpose: bool, source: bool
    ) -> Vectors:
        """Run on z, from coordinates to rows (`source`) or from rows to coordinates."""
        comm = self.owners.comm
        memory = memory_errors("the square root", "the columns of z", self.device)
        with nvtx_range("square root"), memory, comm.phase("square root"):
            if not comm.alike(transpose):
                comm.same(transpose=transpose)

            def sides() -> tuple[Rows, Rows]:
                rows, coordinates = self.owners.rows, self.coordinates
                return (coordinates, rows) if source else (rows, coordinates)

            columns, restore = self.owners.right_hand_side(
                z, self.shape[0], self.dtype, self.device, "z", sides
            )
            return restore(run(columns))

    @abstractmethod
    def logdet(self) -> float:
        """Log of the determinant of K + damping I.

        Collective: all ranks call.

        Example:
            >>> F = gh.compress(np.diag([1.0, 3.0])).factorize(damping=1.0)
            >>> bool(np.isclose(F.logdet(), np.log(2.0 * 4.0)))
            True
        """

    @symmetric
    def solve(self, b: Vectors) -> Vectors:
        """(K + damping I)^-1 b for b (N,) or (N, k); the result is like b.

        Collective: all ranks call.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.

        Example:
            >>> x = np.linspace(0, 1, 200)
            >>> K = gh.compress(gh.KernelOperator(x, nugget=0.1), leaf_size=25)
            >>> F = K.factorize(damping=0.5)
            >>> b = np.sin(x)
            >>> y = F.solve(b)
            >>> bool(np.allclose(K @ y + 0.5 * y, b))
            True
        """
        owners = self.owners
        columns, restore = owners.right_hand_side(b, self.shape[0], self.dtype, self.device, "b")
        memory = memory_errors("a solve", "the columns of b", self.device)
        with nvtx_range("solve"), memory, owners.comm.phase("solve"):
            return restore(self._replay(self._solve, columns))

    @transposable
    def sqrt_matmat(self, z: Vectors, *, transpose: bool = False) -> Vectors:
        """W z, or W^T z; W W^T = K + damping I, W is (N, N) and not triangular.

        Collective: all ranks call.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.

        Example:
            >>> K = gh.compress(np.eye(3) + 1.0)
            >>> F = K.factorize()
            >>> z = F.sqrt_matmat(np.ones(3), transpose=True)
            >>> bool(np.allclose(F.sqrt_matmat(z), K @ np.ones(3)))
            True
        """
        transpose = bool(transpose)
        run = self._transposed_product if transpose else self._product
        return self._with_coordinates(run, z, transpose, not transpose)

    @transposable
    def sqrt_solve(self, z: Vectors, *, transpose: bool = False) -> Vectors:
        """W^-1 z (whitening: z ~ N(0, K + damping I) becomes white), or W^-T z.

        Collective: all ranks call.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.

        Example:
            >>> F = gh.compress(np.eye(3) + 1.0).factorize()
            >>> bool(np.allclose(F.sqrt_solve(F.sqrt_matmat(np.ones(3))), 1.0))
            True
        """
        transpose = bool(transpose)
        run = self._transposed_sqrt_solve if transpose else self._sqrt_solve
        return self._with_coordinates(run, z, transpose, transpose)

    def sample(self, num: int, seed: int = 0, *, inverse: bool = False) -> Array:
        """Samples of N(0, K + damping I), or of N(0, (K + damping I)^-1), as (N, num).

        Collective: all ranks call.

        Raises:
            ArgumentError, DtypeError: num is not an integer >= 1, seed not one >= 0, or they are
                others on other ranks.

        Example:
            >>> F = gh.compress(np.diag([1.0, 100.0])).factorize()
            >>> samples = F.sample(2000, seed=0)
            >>> samples.shape
            (2, 2000)
            >>> bool(np.allclose(samples.std(axis=1), [1.0, 10.0], rtol=0.1))
            True
        """
        with self.owners.comm.agreed():  # another rank may have less memory
            self.owners.comm.same(num=num, seed=seed, inverse=inverse)
            check_count(num, "num")
            check_count(seed, "seed", least=0)
            n, copies = self.shape[0], _COPIES * self.dtype.itemsize
            check_memory(n * num * copies, f"{num} samples", "num", self.device)
            with memory_errors(f"{num} samples", "num", self.device):
                white = batched.normal_source((seed,), self.device)((n, num), self.dtype)
        if inverse:
            return self.sqrt_solve(white, transpose=True)
        return self.sqrt_matmat(white)


def cholesky(a: Array, *, overwrite: bool = False) -> Array:
    """Stack of lower Cholesky factors; with `overwrite` in the memory of a, where that can be.

    Raises:
        IndefiniteError: a block is not positive definite.
    """
    lower, info = batched.cholesky(a, overwrite=overwrite)
    if to_host(info).any():
        raise IndefiniteError
    return lower


def damped(D: Array, leaves: Array, damping: float) -> Array:
    """Diagonal blocks D (leaves, m, m) plus damping I; the identity on the padding of `leaves`."""
    D = D.copy()
    add_to_diagonal(D, ridge(leaves, damping, D.dtype))
    return D


def ridge(leaves: Array, damping: float, dtype: np.dtype[Any]) -> Array:
    """(leaves, m) what damping adds to the diagonal of leaves: one to their padding."""
    return namespace(leaves).where(leaves >= 0, dtype.type(damping), dtype.type(1))


def add_to_diagonal(blocks: Array, added: Array) -> None:
    """Add (nodes, m) to the diagonals of (nodes, m, m), in place."""
    diagonal = namespace(blocks).arange(blocks.shape[1])
    blocks[:, diagonal, diagonal] += added


def log_determinant(factors: list[Array]) -> float:
    """2 sum log diag over stacks of Cholesky factors."""
    diagonals = [L.diagonal(axis1=1, axis2=2).astype(np.float64) for L in factors]
    logs = to_hosts(*(namespace(d).log(d).sum() for d in diagonals))
    return sum((2.0 * float(one) for one in logs), 0.0)
