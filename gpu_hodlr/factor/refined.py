"""Factors in float32 whose solutions are refined to the accuracy of float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.arrays import Vectors, power_of_two
from gpu_hodlr.autograd import symmetric
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import Array, HostIndex, namespace, to_hosts
from gpu_hodlr.distributed import Ownership, Rows
from gpu_hodlr.factor.hodlr_cholesky import HODLRCholesky
from gpu_hodlr.factor.inverse import ExactInverse
from gpu_hodlr.factor.residuals import sizes, warn_of_residual
from gpu_hodlr.factor.solver import IndefiniteError, SymmetricFactor
from gpu_hodlr.factor.ulv import ULVCholesky
from gpu_hodlr.factor.woodbury import Woodbury
from gpu_hodlr.krylov import CGInfo
from gpu_hodlr.structures import HODLR, LowRank, Structure, Telescope
from gpu_hodlr.structures.stored import Part, Ranks, Source, Stack, unpacked_ranks

NARROW = np.dtype(np.float32)
_MAXITER = 50
_ROOM = 2.0**60
_GAIN = 0.5  # of the residual, that a step must leave at most
_ENOUGH = 10  # times rounding: what a residual may be in the end
_PREFIX = "factor."  # of the factor's arrays in a file

Make = Callable[[Any, float], Any]  # a factor of a structure plus a damping


class RefinedFactor(ExactInverse, SymmetricFactor):
    """A factor W W^T of K + damping I in float32, and solutions as good as in float64.

    x <- x + (W W^T)^-1 (b - A x): the residual is formed in float64, by a product with K whose sums
    are float64, whatever K is stored in; the correction in float32 (iterative refinement:
    Wilkinson, Rounding Errors in Algebraic Processes (1963); Higham, Accuracy and Stability of
    Numerical Algorithms (2002), chapter 12; Carson and Higham, SIAM J. Sci. Comput. 40 (2018)). A
    step leaves about eps_32 norm(A) norm(A^-1) of the residual. Where it would not leave less than
    half of it, the damping is too small for float32, and there is no such factor. With A = W B W^T
    the steps converge only if all eigenvalues of B are in (0, 2): then A is positive definite.

    `logdet`, `inverse_diagonal`, square roots and samples are those of W, to the rounding of
    float32; blocks of the inverse and quadratic forms come from `solve`. See `SymmetricFactor` for
    other attributes.

    Args:
        form: K over `scale`, in float64, or stored narrower.
        damping: added to the diagonal, >= 0.
        scale: a power of two.
        norm: a bound of norm(K)_2, such as norm(K)_F.
        make: the factor of a structure plus a damping.

    Attributes:
        factor: the one in float32.
        info: CGInfo of the last `solve`, its iterations the steps of refinement; None before.
        residual: largest norm(b - A x) / norm(b) of the last `solve`, computed from x; None before.

    Raises:
        IndefiniteError: K + damping I, rounded to float32, is not positive definite, or refinement
            of a random right-hand side does not converge.

    Example:
        >>> x = np.linspace(0, 1, 300)
        >>> K = gh.compress(gh.KernelOperator(x, "laplace", 0.2, nugget=0.1), leaf_size=25)
        >>> F = K.factorize(0.1, dtype="float32")
        >>> b = np.sin(9 * x)
        >>> y = F.solve(b)
        >>> bool(np.linalg.norm(K @ y + 0.1 * y - b) <= 1e-14 * np.linalg.norm(b))
        True
        >>> F.info.converged, F.nbytes < K.factorize(0.1).nbytes
        (True, True)
    """

    form_class: ClassVar[type[Structure]]
    factor_class: ClassVar[type[SymmetricFactor]]

    def __init__(
        self, form: Structure, damping: float, scale: float, norm: float, make: Make
    ) -> None:
        super().__init__(form, damping)
        own = _size(form, damping / scale)
        narrow = (form if own == 1.0 else form.scaled(1 / own)).astype(NARROW)
        factor = make(narrow, damping / (own * scale))
        factor._loaded |= narrow is not form  # what it shares is no matrix's
        self._set(form, factor, damping, scale, own * scale, norm)
        if not self.verified():
            raise IndefiniteError

    def _set(
        self, form: Structure, factor: SymmetricFactor, added: float, scale: float, size: float,
        norm: float,
    ) -> None:  # fmt: skip
        """From K / scale, and the factor of (K + added I) / size."""
        self.dtype = np.dtype(np.float64)
        self.factor, self._form = factor, form
        self._added, self._scale, self._size, self._norm = added, scale, size, norm
        self.info: CGInfo | None = None
        self.residual: float | None = None

    # --- in float64 ------------------------------------------------------------------------------

    def _multiply(self, v: Array) -> Array:
        """(K + damping I) v."""
        product = self._form.matmat(v)
        if self._scale != 1.0:
            product *= self._scale
        product += self._added * v
        return product

    def _refined(self, b: Array, rtol: float, maxiter: int = _MAXITER) -> tuple[Array, CGInfo]:
        def multiply(v: Array) -> Array:
            return self._replay(self._multiply, v)

        norm = self._norm + self._added
        return refine(multiply, self._inverse, b, norm, rtol, maxiter, self.owners)

    def verified(self) -> bool:
        """Whether refinement converges for a random right-hand side; see the class.

        Collective: all ranks call.
        """
        normal = batched.normal_source((0, streams.VERIFY), self.device)
        b = self.owners.take(normal((self.shape[0], 1), self.dtype))
        return self._refined(b, 0.0)[1].converged

    @symmetric
    def solve(self, b: Vectors, rtol: float = 0.0, maxiter: int = _MAXITER) -> Vectors:
        """(K + damping I)^-1 b for b (N,) or (N, k); the result is like b.

        Collective: all ranks call.

        Args:
            b: right-hand sides.
            rtol: norm(b - A x) <= rtol norm(b) is enough. By default steps are made until every
                column has a residual of rounding, eps (norm(K)_F + damping) norm(x) + eps norm(b),
                or gains no more.
            maxiter: most steps.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.

        Warns:
            AccuracyWarning: the residual is ten times as large as that.
        """
        owners = self.owners
        owners.comm.same(rtol=rtol, maxiter=maxiter)
        rtol = check_number(rtol, "rtol")
        check_count(maxiter, "maxiter")
        columns, restore = owners.right_hand_side(b, self.shape[0], self.dtype, self.device, "b")
        x, self.info = self._refined(columns, rtol, maxiter)
        self.residual = self.info.residuals[-1]
        if not self.info.converged:
            advice = "raise the damping, or factorize in float64"
            rounding = float(np.finfo(self.dtype).eps)
            warn_of_residual(self.residual, max(rtol, rounding), self.info, advice)
        return restore(x)

    def _solve(self, b: Array) -> Array:
        return self._refined(b, 0.0)[0]

    # --- in float32 ------------------------------------------------------------------------------

    def _narrowly(self, run: Callable[[Array], Array], v: Array, power: float) -> Array:
        """run(v) in float32, and in its range, times a power of what the factor was divided by."""
        size = sizes(v, self.owners)
        result = run((v / size).astype(NARROW))
        return result.astype(self.dtype) * (size * self._size**power)

    def _inverse(self, b: Array) -> Array:
        def run(c: Array) -> Array:
            return self.factor._replay(self.factor._inverse, c)

        return self._narrowly(run, b, -1.0)

    def _product(self, z: Array) -> Array:
        return self._narrowly(self.factor._product, z, 0.5)

    def _transposed_product(self, z: Array) -> Array:
        return self._narrowly(self.factor._transposed_product, z, 0.5)

    def _sqrt_solve(self, z: Array) -> Array:
        return self._narrowly(self.factor._sqrt_solve, z, -0.5)

    def _transposed_sqrt_solve(self, z: Array) -> Array:
        return self._narrowly(self.factor._transposed_sqrt_solve, z, -0.5)

    @property
    def coordinates(self) -> Rows:
        """See `SymmetricFactor`."""
        return self.factor.coordinates

    def logdet(self) -> float:
        """See `SymmetricFactor`: that of W W^T, to the rounding of float32.

        Collective: all ranks call.
        """
        return self.factor.logdet() + self.shape[0] * math.log(self._size)

    def _halves(self, b: Vectors) -> tuple[Any, Any]:
        return super(SymmetricFactor, self)._halves(b)  # by `solve`

    def _inverse_diagonal(self) -> Array:
        """See `ExactInverse`: that of (W W^T)^-1."""
        factor: Any = self.factor
        diagonal: Array = factor._inverse_diagonal().astype(self.dtype) / self._size
        return diagonal

    def _inverse_diagonal_bytes(self) -> int:
        """See `ExactInverse`."""
        factor: Any = self.factor
        return int(factor._inverse_diagonal_bytes())

    def _more_said(self) -> str:
        return f", {type(self.factor).__name__} in {NARROW}"

    @property
    def nbytes(self) -> int:
        """Bytes of the factor on this rank; of one that was loaded, of K as well."""
        own = (*self._form.arrays(), *self._form.index_arrays()) if self._loaded else ()
        return self.factor.nbytes + sum(int(a.nbytes) for a in own)

    @classmethod
    def memory(cls, structure: Any) -> int:
        """See `Solver`: half of what the factor takes in float64, and a copy of the structure."""
        wide = cls.factor_class.memory(structure)
        if structure.dtype == NARROW:
            return wide
        return (wide + sum(int(a.nbytes) for a in structure.arrays())) // 2

    # --- files -----------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        packed = {_PREFIX + name: a for name, a in self.factor.pack().items()}
        return super().pack() | self._form.pack() | packed

    def about(self) -> dict[str, Any]:
        """See `Stored`."""
        here = {
            "added": self._added, "scale": self._scale, "size": self._size, "norm": self._norm,
            "of_factor": self.factor.about(),
        }  # fmt: skip
        return super().about() | self._form.about() | here

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`: those of K, and of the factor."""
        inner = cls.factor_class.stacks(leaves, levels, read)
        form = cls.form_class.stacks(leaves, levels, read)
        return form | {_PREFIX + name: stack for name, stack in inner.items()}

    @classmethod
    def read_leaves(cls, source: Source, ranks: int) -> HostIndex | None:
        """See `Stored`."""
        return cls.form_class.read_leaves(source, ranks)

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        form, about = cls.form_class._unpack(part, ranks), part.about
        inner = about["of_factor"]
        factor = cls.factor_class._unpack(part.within(_PREFIX, inner), unpacked_ranks(inner))
        if factor.dtype != NARROW or factor.shape != form.shape:
            raise ValueError(f"a factor {factor.shape} of {factor.dtype} for {form.shape}")
        self = cls._unpacked(part, form.n, np.dtype(np.float64))
        names = ("added", "scale", "size", "norm")
        added, scale, size, norm = (check_number(about[name], name) for name in names)
        if not scale or not size:
            raise ValueError(f"scales {scale} and {size}")
        self._set(form.to(part.device), factor, added, scale, size, norm)
        return self


def _by_rows(form: type[Structure], factor: type[SymmetricFactor]) -> tuple[str, ...]:
    """See `Stored.BY_ROWS`."""
    return ("row_damping", *form.BY_ROWS, *(_PREFIX + name for name in factor.BY_ROWS))


class RefinedULV(RefinedFactor):
    """Of an HSS form; see `RefinedFactor`."""

    form_class, factor_class = Telescope, ULVCholesky
    BY_ROWS = _by_rows(Telescope, ULVCholesky)


class RefinedHODLR(RefinedFactor):
    """Of a HODLR form; see `RefinedFactor`."""

    form_class, factor_class = HODLR, HODLRCholesky
    BY_ROWS = _by_rows(HODLR, HODLRCholesky)


class RefinedWoodbury(RefinedFactor):
    """Of a low-rank form; see `RefinedFactor`."""

    form_class, factor_class = LowRank, Woodbury
    BY_ROWS = _by_rows(LowRank, Woodbury)


def refine(
    multiply: Callable[[Array], Array],
    correct: Callable[[Array], Array],
    b: Array,
    norm: float,
    rtol: float,
    maxiter: int,
    owners: Ownership,
) -> tuple[Array, CGInfo]:
    """Solve A x = b by steps x <- x + correct(b - A x), until rounding or rtol is reached.

    Args:
        multiply: v (rows, k) -> A v.
        correct: about A^-1.
        b: this rank's rows, (rows, k).
        norm: a bound of norm(A)_2.
        rtol: norm(b - A x) <= rtol norm(b) is enough for a column.
        maxiter: most steps.
        owners: which rank has which rows.

    Returns:
        x; how it ended, `converged` where every column has come within 10 times of the residual
        wanted.
    """
    xp = namespace(b)
    if b.shape[1] == 0:
        return b.copy(), CGInfo(True, 0, (0.0,))
    size, eps = sizes(b, owners), float(np.finfo(b.dtype).eps)
    b = b / size

    def norms(v: Array) -> Array:
        size = sizes(v, owners)
        v = v / size
        return size * xp.sqrt(owners.sum(batched.column_dots(v, v)))

    x, r = xp.zeros_like(b), b
    missing = norms(b)
    [length] = to_hosts(missing)
    of = np.where(length > 0, length, 1.0)
    before, found = length, missing * 0
    residuals, converged = [float((length / of).max())], False
    for _ in range(maxiter):
        y = x + correct(r)
        s = b - multiply(y)
        now, long = norms(s), norms(y)
        better = now < missing
        x, r = xp.where(better, y, x), xp.where(better, s, r)
        missing, found = xp.where(better, now, missing), xp.where(better, long, found)
        left, reached = to_hosts(missing, found)
        allowed = np.maximum(rtol * length, eps * (norm * reached + length))
        residuals.append(float((left / of).max()))
        converged = bool((left <= _ENOUGH * allowed).all())
        if ((left <= allowed) | ~(left < _GAIN * before)).all():
            break
        before = left
    return x * size, CGInfo(converged, len(residuals) - 1, tuple(residuals))


def _size(form: Structure, damping: float) -> float:
    """A power of two of the size of a form and its damping; 1 of what float32 has room for."""
    diagonal = form.diagonal()
    largest = float(abs(diagonal).max()) if diagonal.size else 0.0
    size = power_of_two(max(*form.owners.comm.share(largest), damping))
    return 1.0 if form.dtype == NARROW and size < _ROOM else size
