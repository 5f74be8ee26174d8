"""What every operator must keep to, for the tests of this package and of its users."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_hodlr.devices import Array, HostArray, namespace_on, to_host
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import Operator

_FACTOR = 1000  # times eps times sqrt(N), of the largest entry: what a sum of N terms may lose
_MOST_ROWS = 512  # of a matrix that is compared as a whole where no dense one is given


def check_operator(op: Operator, dense: Array | None = None, *, seed: int = 0) -> None:
    """Check that an operator keeps the contract of `Operator`.

    Shapes, types and devices of products and blocks; products, blocks and diagonal against each
    other, and against a dense matrix; padding; symmetry; and where `definite` is declared that no
    direction tried has negative curvature.

    Args:
        op: the operator.
        dense: (N, N) the same matrix, made in another way; up to N = 512 the operator's own
            products with all unit vectors (or its entries) by default.
        seed: of the vectors and indices tried.

    Raises:
        AssertionError: says what does not hold, with both numbers.
        TypeError: op is not an Operator.

    Example:
        >>> d = np.arange(1.0, 9.0)
        >>> gh.testing.check_operator(gh.Diagonal(d), np.diag(d))
        >>> op = gh.FunctionOperator(9, matmat=lambda v: -v)  # definite is not declared False
        >>> try:
        ...     gh.testing.check_operator(op)
        ... except AssertionError as error:
        ...     print(error)
        FunctionOperator: declares definite = True and has an eigenvalue below -1
    """
    if not isinstance(op, Operator):
        raise TypeError(f"op must be a gpu_hodlr.Operator, got {type(op).__name__}")
    _Check(op, dense, seed).run()


class _Check:
    def __init__(self, op: Operator, dense: Array | None, seed: int) -> None:
        self._op, self._n = op, op.shape[0]
        self._rng = np.random.default_rng(seed)
        self._xp = namespace_on(op.device)
        self._columns = self._rng.permutation(self._n)[:_MOST_ROWS]  # those that are compared
        self._want = self._reference(dense)
        self._scale = float(np.abs(self._want).max(initial=0.0))

    def _reference(self, dense: Array | None) -> NDArray[np.float64]:
        """K[:, columns], (N, columns), float64 on the host."""
        if dense is not None:
            given = to_host(dense).astype(np.float64)
            self._true(given.shape == self._op.shape, f"dense has shape {given.shape}")
            return given[:, self._columns]
        if self._op.has_products:
            unit = self._xp.zeros((self._n, len(self._columns)), self._op.dtype)
            index = self._xp.asarray(self._columns)
            unit[index, self._xp.arange(len(self._columns))] = 1
            return to_host(self._op.matmat(unit)).astype(np.float64)
        every = np.arange(self._n)
        return to_host(self._op.entries(every, self._columns)).astype(np.float64)

    def _true(self, holds: bool, said: str) -> None:
        if not holds:
            raise AssertionError(f"{type(self._op).__name__}: {said}")

    def _close(self, got: Array, want: HostArray, name: str, amplified: float = 1.0) -> None:
        op = self._op
        self._true(got.dtype == op.dtype, f"{name} is {got.dtype}, dtype is {op.dtype}")
        self._true(got.shape == want.shape, f"{name} has shape {got.shape}, not {want.shape}")
        host = to_host(got).astype(np.float64)
        eps = float(np.finfo(op.dtype).eps)
        allowed = _FACTOR * eps * self._n**0.5 * self._scale * amplified
        gap = np.abs(host - want)
        if gap.size and not gap.max() <= allowed:
            i = np.unravel_index(np.nan_to_num(gap, nan=np.inf).argmax(), gap.shape)
            place = tuple(map(int, i))
            raise AssertionError(
                f"{type(op).__name__}: {name} has {host[i]:.8g} at {place}, wanted {want[i]:.8g}"
            )

    def run(self) -> None:
        op, n = self._op, self._n
        self._true(op.shape == (n, n), f"shape is {op.shape}")
        self._true(isinstance(op.definite, bool), f"definite is {op.definite!r}, not a bool")
        self._products()
        if op.has_entries:
            self._blocks()
        else:
            try:
                op.entries([0], [1])
            except ArgumentError:
                pass
            else:
                raise AssertionError(f"{type(op).__name__} has entries though has_entries is False")
        self._close(
            op.diagonal()[self._xp.asarray(self._columns)],
            self._want[self._columns, np.arange(len(self._columns))],
            "diagonal()",
        )
        square = self._want[self._columns]
        self._true(bool(np.abs(square - square.T).max() <= self._tolerance()), "is not symmetric")
        if op.definite:
            lowest = float(np.linalg.eigvalsh(square)[0])
            self._true(
                lowest >= -n * self._tolerance(),
                f"declares definite = True and has an eigenvalue below {lowest:.3g}",
            )

    def _tolerance(self) -> float:
        return float(_FACTOR * np.finfo(self._op.dtype).eps * self._n**0.5 * self._scale)

    def _products(self) -> None:
        op, n, xp = self._op, self._n, self._xp
        v = np.zeros((n, 3))
        v[self._columns] = self._rng.standard_normal((len(self._columns), 3))
        v = v.astype(op.dtype)
        want = self._want @ v[self._columns].astype(np.float64)
        given = xp.asarray(v)
        kept = v.copy()
        for name, x, right in (
            ("op @ (N, 3)", given, want),
            ("op @ (N,)", given[:, 1], want[:, 1]),
            ("op @ (N, 1)", given[:, 1:2], want[:, 1:2]),
            ("op @ a matrix in column order", given.T.copy().T, want),
            ("op @ (N, 0)", given[:, :0], want[:, :0]),
        ):
            self._close(op @ x, right, name, n**0.5)
        self._true(bool((to_host(given) == kept).all()), "a product has written to its argument")

    def _blocks(self) -> None:
        op, rng, count = self._op, self._rng, len(self._columns)
        rows, places = rng.integers(self._n, size=7), rng.integers(count, size=5)
        cols = self._columns[places]
        self._close(op.entries(rows, cols), self._want[np.ix_(rows, places)], "entries")
        batch = np.stack([rows, rows[::-1], np.full(7, -1)])
        padded = np.stack([cols, np.where(np.arange(5) % 2, cols, -1), cols])
        want = np.where(
            (batch[:, :, None] >= 0) & (padded[:, None, :] >= 0),
            self._want[batch[:, :, None], places[None, None, :]],
            0.0,
        )
        self._close(op.reader.blocks(batch, padded), want, "a batch of padded blocks")
