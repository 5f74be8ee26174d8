"""What every Krylov method is given: the matrix, a preconditioner, vectors, ranks; and its info."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gpu_hodlr.arrays import as_array
from gpu_hodlr.autograd import linear
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import Array, is_array
from gpu_hodlr.distributed import ALONE, Communicator, communicator
from gpu_hodlr.errors import AccuracyWarning, DtypeError, NotPositiveDefiniteError, ShapeError
from gpu_hodlr.operators import Operator, SharedOperator, as_operator


class Matrix(Protocol):
    """A symmetric matrix with products."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its products."""

    @property
    def device(self) -> str:
        """Where it is: "cpu" or "cuda"."""

    def matmat(self, v: Any) -> Any:
        """The product with (N, k)."""


# How a preconditioner is applied: the first of these that it has.
_APPLIED = ("precondition", "solve", "matmat", "__matmul__")


@dataclass(frozen=True)
class CGInfo:
    """How a run of `cg` or `minres` ended.

    Attributes:
        converged: whether every column reached rtol.
        iterations: products that x was made of.
        residuals: largest relative residual norm(b - A x) / norm(b) of the columns, by
            iteration (recurrence; the last of `minres` is that of a product), the first before
            any.
        direction: (N,) p with p^T (A + damping I) p <= 0, at which an indefinite matrix stopped
            the run; None where none was met, and of `minres`, which needs none.
        curvature: its Rayleigh quotient p^T (A + damping I) p / p^T p; None where none was met.

    Example:
        >>> x, info = gh.cg(gh.DenseOperator(np.diag([1.0, 2.0])), np.ones(2))
        >>> info.converged, info.iterations, len(info.residuals)
        (True, 2, 3)
    """

    converged: bool
    iterations: int
    residuals: tuple[float, ...]
    direction: Any = field(default=None, compare=False)
    curvature: float | None = None


Method = Callable[..., tuple[Array, CGInfo]]


def solved(
    name: str,
    method: Method,
    A: Any,
    b: Any,
    x0: Any,
    callback: Callable[[Any], Any] | None,
    options: dict[str, Any],
) -> tuple[Any, CGInfo]:
    """Solve (A + damping I) x = b by a method; of torch tensors differentiable in b.

    Args:
        name: of the method, for what is said.
        method: `conjugate_gradients` or another that is called alike.
        A: see `cg`, as the next three.
        b: the right-hand sides.
        x0: where to start.
        callback: called with x.
        options: damping, M, rtol, maxiter, comm: those of a gradient's run as well.
    """
    infos: list[CGInfo] = []

    def solve(b: Any) -> Any:
        x, info = _once(method, A, b, x0=x0, callback=callback, **options)
        infos.append(info)
        return x

    def again(b: Any) -> Any:  # of a gradient
        x, info = solved(name, method, A, b, None, None, options)
        infos.append(info)
        if not info.converged:
            warnings.warn(
                f"{name}: the residual of a gradient is {info.residuals[-1]:.2g} after "
                f"{info.iterations} iterations, rtol {options['rtol']:.2g}; raise maxiter",
                AccuracyWarning,
                stacklevel=2,
            )
        return x

    x = linear(b, solve, again, again)
    return x, infos[0]


def matrix_on(A: Any, comm: Any) -> tuple[Any, Any, Communicator]:
    """A as something that multiplies, who has which of its rows, and the ranks that call.

    With a communicator the products of an operator, which all ranks have, are formed together.

    Raises:
        DtypeError: A does not multiply, or is no operator where there is a communicator.
    """
    owners = getattr(A, "owners", ALONE)
    ranks = owners.comm if comm is None else communicator(comm, getattr(A, "device", "cpu"))
    with ranks.agreed():
        if not hasattr(A, "matmat") or not hasattr(A, "device"):
            A = as_operator(A)
        if comm is not None:
            if not isinstance(A, Operator):
                raise DtypeError(f"comm is for an operator, got A of type {type(A).__name__}")
            A = SharedOperator(A, ranks)
    return A, owners, ranks


def _once(
    method: Method,
    A: Any,
    b: Any,
    damping: float,
    M: Any,
    x0: Any,
    rtol: float,
    maxiter: int,
    callback: Callable[[Any], Any] | None,
    comm: Any,
) -> tuple[Any, CGInfo]:
    """See `solved`, of plain arrays and tensors."""
    A, owners, ranks = matrix_on(A, comm)
    with ranks.agreed():
        precondition = _precondition(M, A.shape)
        if callback is not None and not callable(callback):
            raise DtypeError(f"callback must be callable, got {type(callback).__name__}")
        definite = bool(getattr(A, "definite", True))
        if comm is not None:
            ranks.same(b=b)
        given = {"M": M, "x0": x0, "callback": callback}
        ranks.same(
            damping=damping, rtol=rtol, maxiter=maxiter,
            **{name: "none" if value is None else "one" for name, value in given.items()},
        )  # fmt: skip
        check_number(damping, "damping")
        rtol = check_number(rtol, "rtol")
        check_count(maxiter, "maxiter")
        columns, restore = owners.right_hand_side(b, A.shape[0], A.dtype, A.device, "b")
        start = None
        if x0 is not None:
            start = owners.right_hand_side(x0, A.shape[0], A.dtype, A.device, "x0")[0]
            if start.shape != columns.shape:
                raise ShapeError(
                    f"x0 must be like b, {columns.shape[1]} columns, got {start.shape[1]}"
                )
    apply = A.matmat if comm is None else on_all(ranks, A.matmat)
    if precondition is not None and not hasattr(M, "owners"):
        precondition = on_all(ranks, precondition)

    def multiply(v: Array) -> Array:
        return apply(v) + v.dtype.type(damping) * v

    x, info = method(
        multiply, columns, precondition, rtol, maxiter, A.device, owners, start,
        None if callback is None else on_all(ranks, lambda x: callback(restore(x))),
    )  # fmt: skip
    if info.direction is not None and definite:
        raise NotPositiveDefiniteError(
            f"the matrix plus damping {damping:.3g} is not positive definite: p^T A p / p^T p = "
            f"{info.curvature:.3g} for the direction p of this error, met after "
            f"{info.iterations} iterations; an operator that declares definite = False ends the "
            "run there",
            direction=info.direction,
            curvature=info.curvature,
        )
    return restore(x), info


def on_all(ranks: Communicator, function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A user's function, called by all ranks: where it fails on one, it fails on all."""

    def run(x: Array) -> Any:
        with ranks.agreed():
            return function(x)

    return run


def _precondition(M: Any, shape: tuple[int, int]) -> Callable[[Array], Array] | None:
    """How M is applied.

    Raises:
        DtypeError: it neither solves nor multiplies; later, it does not give a floating array.
        ShapeError: it has another shape; later, its result has.
    """
    if M is None:
        return None
    if tuple(getattr(M, "shape", shape)) != tuple(shape):
        raise ShapeError(f"M must have shape {shape}, got {tuple(M.shape)}")
    if is_array(M):
        M = as_array(M, "M")
    names = [name for name in _APPLIED if hasattr(M, name)]
    if not names:
        raise DtypeError(f"M must have a method solve or matmat, or @, got {type(M).__name__}")
    apply = getattr(M, names[0])

    def checked(r: Array) -> Array:
        z = as_array(apply(r), "the result of M")
        if z.shape != r.shape:
            raise ShapeError(f"the result of M must have shape {r.shape}, got {z.shape}")
        return z.astype(r.dtype, copy=False)

    return checked
