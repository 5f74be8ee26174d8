"""Solves, determinant and square root of the form that is sparse in a network's eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.arrays import Vectors
from gpu_hodlr.autograd import symmetric
from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import Array, HostArray, HostIndex, to_hosts
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.factor.eigenbasis_frame import Everywhere, Frame, Inside
from gpu_hodlr.factor.probing import Control, ProbedInverse, signs
from gpu_hodlr.factor.residuals import meets_no_direction, relative_residuals, warn_of_residual
from gpu_hodlr.factor.solver import IndefiniteError, SymmetricFactor
from gpu_hodlr.factor.vecchia import Vecchia, vecchia
from gpu_hodlr.factor.vecchia_pattern import Pattern
from gpu_hodlr.krylov import CGInfo, conjugate_gradients
from gpu_hodlr.matrix_functions import function_of_tridiagonals, inverse_square_root, lanczos
from gpu_hodlr.structures import RotatedSparse
from gpu_hodlr.structures.stored import Part, Ranks, Stack

_RTOL = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}
_ESTIMATE = 1e-3  # rtol of the solves that estimate the norm of the inverse
_MAXITER = 1000
_PROBES = 16  # of the trace of a logarithm
_PREFIX = "inverse."  # of the arrays of N in a file


class KFEFactor(ProbedInverse, SymmetricFactor):
    """(K + damping I)^-1 for K = Q K' Q^T, sparse in the Kronecker-factored eigenbasis.

    N^T N, Vecchia's approximation of (K' + damping I)^-1 (`factor.vecchia`), is positive definite
    by construction. What it lacks is made up for by iterations with B = N (K' + damping I) N^T,
    whose eigenvalues lie near 1: `solve` is CG preconditioned by it, W = (K' + damping I) N^T
    B^-1/2 a square root, log det = log det N^-2 + tr log B, by Lanczos. Outside the range of Q all
    is exact. A diagonal of the user's order, such as a damping of every row, that is one number in
    each layer is diagonal in the eigenbasis as well; of any other N has the diagonal alone of what
    it is there, and the iterations, then in the user's order, make up for the rest.

    Args:
        form: K.
        damping: added to the diagonal, >= 0.
        pattern: of N; None: what takes no more than K, see `KFEMatrix.factorize`.

    Attributes:
        info: CGInfo of the last `solve`, None before.
        residual: largest norm(b - A x) / norm(b) of the last `solve`, computed from x; None before.
        logdet_error: standard error of the last `logdet`; None before.

    Raises:
        IndefiniteError: K + damping I is not positive definite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(0, 1, 40).reshape(10, 4)
        >>> layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 4)
        >>> op = gh.GGNOperator(torch.nn.Sequential(*layers), "mse", x, x, dtype="float64")
        >>> K = gh.compress(op, "kfe")
        >>> F = K.factorize(damping=0.1)
        >>> b = np.ones(K.shape[0])
        >>> y = F.solve(b)
        >>> bool(np.allclose(K @ y + 0.1 * y, b)), F.info.converged
        (True, True)
    """

    BY_ROWS = ("row_damping", "E")

    def __init__(self, form: RotatedSparse, damping: float, pattern: Pattern | None = None) -> None:
        super().__init__(form, damping)
        near, exact = form.absorbed()
        if not near.basis.lowest_outside() + damping > 0:
            raise IndefiniteError
        inverse = vecchia(near, damping, pattern or Pattern(form.num_stored))
        self._set(near if exact else form, near, inverse, damping)
        if not self.verified():
            raise IndefiniteError

    def _set(
        self, form: RotatedSparse, near: RotatedSparse, inverse: Vecchia, number: float
    ) -> None:
        """From K, K with its diagonal in the eigenbasis, N, and the damping that K has not."""
        self._form, self._near, self._vecchia, self._number = form, near, inverse, number
        self._frame: Frame = (
            Inside(form, inverse, number) if form.E is None
            else Everywhere(form, near, inverse, number)
        )  # fmt: skip
        self._replay = Replay(False)  # the host reads the iterations
        self.info: CGInfo | None = None
        self.residual: float | None = None
        self.logdet_error: float | None = None

    # --- in the frame, of the same bits on every rank ---------------------------------------------

    def _near_identity(self, c: Array) -> Array:
        """B c."""
        frame = self._frame
        return frame.half(frame.damped(frame.half_transposed(c)))

    def _inverse_root(self, c: Array) -> Array:
        """B^-1/2 c."""
        if not len(c):
            return c
        return inverse_square_root(self._near_identity, c, _RTOL[self.dtype])

    def _cg(self, c: Array, rtol: float, maxiter: int = _MAXITER) -> tuple[Array, CGInfo]:
        if not len(c):
            return c, CGInfo(True, 0, (0.0,))
        frame = self._frame
        return conjugate_gradients(frame.damped, c, frame.precondition, rtol, maxiter, self.device)

    # --- in the user's order ----------------------------------------------------------------------

    def _apply(
        self, core: Callable[[Array], Array], v: Array, outside: Callable[[Any], Any]
    ) -> Array:
        """What core does in the frame, and a function of K + damping I outside of it."""
        return self.owners.take(self._frame.around(core, self.owners.whole(v), outside))

    @symmetric
    def precondition(self, b: Vectors) -> Vectors:
        """N^T N b, an approximate inverse, for b (N,) or (N, k): what `gh.cg` uses of `M`.

        Collective: all ranks call.

        Example:
            >>> import torch
            >>> x = torch.eye(3, dtype=torch.float64)
            >>> op = gh.GGNOperator(torch.nn.Linear(3, 2).double(), "mse", x, x[:, :2])
            >>> F = gh.compress(op, "kfe").factorize(damping=0.1)
            >>> b = np.ones(8)
            >>> bool(np.allclose(F.precondition(b), F.solve(b)))  # one layer: nothing is lacking
            True
        """
        owners = self.owners
        columns, restore = owners.right_hand_side(b, self.shape[0], self.dtype, self.device, "b")
        return restore(self._apply(self._frame.precondition, columns, _reciprocal))

    @symmetric
    def solve(self, b: Vectors, rtol: float | None = None, maxiter: int = _MAXITER) -> Vectors:
        """(K + damping I)^-1 b for b (N,) or (N, k); the result is like b.

        Collective: all ranks call.

        Args:
            b: right-hand sides.
            rtol: norm(b - A x) <= rtol norm(b) for every column; 1e-10 by default, 1e-5 in float32.
            maxiter: most products with K.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.
            NotPositiveDefiniteError: CG meets a direction of negative curvature.

        Warns:
            AccuracyWarning: rtol was not reached.
        """
        owners = self.owners
        owners.comm.same(rtol=rtol, maxiter=maxiter)
        wanted = _RTOL[self.dtype] if rtol is None else check_number(rtol, "rtol")
        check_count(maxiter, "maxiter")
        columns, restore = owners.right_hand_side(b, self.shape[0], self.dtype, self.device, "b")
        x = self._apply(partial(self._solved, rtol=wanted, maxiter=maxiter), columns, _reciprocal)
        product = self._apply(self._frame.damped, x, _itself)
        [relative] = to_hosts(relative_residuals(columns, product, owners))
        self.residual = float(relative.max(initial=0.0))
        assert self.info is not None
        warn_of_residual(self.residual, wanted, self.info)
        return restore(x)

    def _solved(self, c: Array, rtol: float, maxiter: int = _MAXITER) -> Array:
        """(K' + damping I)^-1 c.

        Raises:
            NotPositiveDefiniteError: see `solve`.
        """
        x, self.info = self._cg(c, rtol, maxiter)
        if self.info.direction is not None:
            raise NotPositiveDefiniteError(
                "the compressed matrix plus its damping is not positive definite: "
                f"CG met a direction of curvature {self.info.curvature:.3g}",
                curvature=self.info.curvature,
            )
        return x

    def verified(self) -> bool:
        """Whether `meets_no_direction` holds for a random right-hand side.

        Collective: all ranks call.
        """
        if not self._frame.size:
            return True
        normal = batched.normal_source((0, streams.VERIFY), self.device)
        c = normal((self._frame.size, 1), self.dtype)
        return meets_no_direction(lambda c: self._cg(c, _RTOL[self.dtype]), c)

    def _solve(self, b: Array) -> Array:
        """See `SymmetricFactor`, as the next."""
        return self._apply(partial(self._solved, rtol=_RTOL[self.dtype]), b, _reciprocal)

    def _inverse(self, b: Array) -> Array:
        """See `Solver`."""
        return self._apply(partial(self._solved, rtol=_ESTIMATE), b, _reciprocal)

    def _product(self, z: Array) -> Array:
        def core(c: Array) -> Array:
            return self._frame.damped(self._frame.half_transposed(self._inverse_root(c)))

        return self._apply(core, z, _root)

    def _transposed_product(self, z: Array) -> Array:
        def core(c: Array) -> Array:
            return self._inverse_root(self._frame.half(self._frame.damped(c)))

        return self._apply(core, z, _root)

    def _sqrt_solve(self, z: Array) -> Array:
        def core(c: Array) -> Array:
            return self._inverse_root(self._frame.half(c))

        return self._apply(core, z, _inverse_of_root)

    def _transposed_sqrt_solve(self, z: Array) -> Array:
        def core(c: Array) -> Array:
            return self._frame.half_transposed(self._inverse_root(c))

        return self._apply(core, z, _inverse_of_root)

    def _control(self) -> Control:
        """Q diag(N^T N) Q^T and, outside the range of Q, what the inverse is there."""
        basis, inside, owners = self._near.basis, self._vecchia.diagonal(), self.owners

        def outside(x: Any) -> Any:
            return 1 / (x + self._number)

        def apply(v: Array) -> Array:
            whole = basis.matmat(lambda c: inside[:, None] * c, owners.whole(v), outside)
            return owners.take(whole)

        return Control(apply, owners.take(basis.diagonal(inside, outside)))

    def logdet(self, probes: int = _PROBES, seed: int = 0) -> float:
        """Log of the determinant of K + damping I, estimated; `logdet_error` is the standard error.

        Outside the range of Q and of N it is exact; tr log B is estimated by stochastic Lanczos
        quadrature (Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 38 (2017)): the mean over random
        signs z of norm(z)^2 e_1^T log(T_z) e_1. The nearer N^T N is to the inverse, the smaller the
        error.

        Collective: all ranks call.

        Args:
            probes: vectors z.
            seed: of the signs.

        Raises:
            ArgumentError, DtypeError: probes is not an integer >= 2, seed not one >= 0.
        """
        self.owners.comm.same(probes=probes, seed=seed)
        check_count(probes, "probes", least=2)
        check_count(seed, "seed", least=0)
        size = self._frame.size
        exact = self._vecchia.logdet + self._near.basis.log_outside(self._number)
        if not size:
            self.logdet_error = 0.0
            return exact
        z = signs((seed, streams.LOGARITHM), (size, probes), self.dtype, self.device)
        logs: list[HostArray] = []

        def done(alpha: HostArray, beta: HostArray) -> bool:
            logs.append(function_of_tridiagonals(alpha, beta, _log)[0])
            near = len(logs) > 1 and np.abs(logs[-1] - logs[-2]).max() <= _RTOL[self.dtype]
            return bool(near)

        _, alpha, beta, norms = lanczos(self._near_identity, z, done, _MAXITER)
        traces = norms**2 * function_of_tridiagonals(alpha, beta, _log)[0]
        self.logdet_error = float(traces.std(ddof=1) / math.sqrt(probes))
        return exact + float(traces.mean())

    def _more_said(self) -> str:
        stored = 100 * self.num_stored / max(self.shape[0] ** 2, 1)
        return f", {stored:.3g} % stored, head {self._vecchia.head}"

    @property
    def num_stored(self) -> int:
        """Numbers of N on all ranks, counted as those of a matrix; it needs Q besides.

        Collective: all ranks ask.
        """
        return self._vecchia.num_stored()

    @property
    def nbytes(self) -> int:
        """Bytes of N on this rank; of a factor that was loaded, of the form as well."""
        form = self._form
        arrays = (*form.arrays(), *form.index_arrays()) if self._loaded else ()
        return self._vecchia.nbytes + sum(a.nbytes for a in arrays)

    @classmethod
    def memory(cls, structure: Any) -> int:
        """See `Solver`: the entries with their places, and N, of which there are some copies."""
        entry = structure.D.itemsize + 12
        return int(entry * (structure.entries + 3 * structure.num_stored))

    # --- files ---------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        return super().pack() | self._form.pack() | self._vecchia.pack(_PREFIX)

    def about(self) -> dict[str, Any]:
        """See `Stored`."""
        about = super().about() | self._form.about() | self._vecchia.about()
        return about | {"number": self._number}

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`: none."""
        return {}

    @classmethod
    def read_leaves(cls, source: Any, ranks: int) -> HostIndex | None:
        """See `Stored`."""
        return RotatedSparse.read_leaves(source, ranks)

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        form = RotatedSparse._unpack(part, ranks)
        self = cls._unpacked(part, form.n, form.dtype)
        number = check_number(part.about["number"], "damping")
        inverse = Vecchia.read(part, _PREFIX, form.basis.size, form.dtype)
        form = form.to(part.device)
        self._set(form, form.absorbed()[0], inverse, number)
        return self


def _itself(x: Any) -> Any:
    return x


def _reciprocal(x: Any) -> Any:
    return 1 / x


def _root(x: Any) -> Any:
    return x**0.5


def _inverse_of_root(x: Any) -> Any:
    return x**-0.5


def _log(values: HostArray) -> HostArray:
    return np.log(np.maximum(values, np.finfo(np.float64).tiny))
