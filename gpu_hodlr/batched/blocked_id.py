"""Blocked column-pivoted QR of stacks of samples, whose work is in matrix products.

R of S^T P = Q R is a Cholesky factor of P^T S S^T P, and complete pivoting of the Gram matrix S S^T
takes the pivots that QR with column pivoting takes (Higham, Accuracy and Stability of Numerical
Algorithms (2002), section 10.3). All that needs one pivot after the other is then done on m x m
matrices, by panels, and none of it on S. Rounding is that of squares: a Gram matrix tells rows
apart down to about 1e-8 of S. What is asked for below comes from further rounds: the rows found are
taken off by an orthonormal basis Q (CholeskyQR twice), S <- S - (S Q) Q^T, and the next Gram matrix
is that of what is left, which is known to its own digits. Tolerances down to about 1e-5 take one
round, 1e-10 two or three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import tall
from gpu_hodlr.devices import Array, namespace, to_host

_REACH = 2.0**-26  # of the squared norm, how far a round goes that is not the last
_CHUNK = 128  # rows that are taken off together


def pivoted_cholesky(gram: Array, stop: Array, most: int, steps: int) -> tuple[Array, Array, Array]:
    """Pivoted Cholesky factors P^T G P = R^T R + what is left, of a stack.

    A node ends where the trace of what is left is not above `stop`; the CPU looks at the largest
    pivot alone, and ends where that is not above stop / m.

    Args:
        gram: G (nodes, m, m) float64, symmetric positive semidefinite; may be overwritten.
        stop: (nodes,) float64.
        most: pivots at most.
        steps: rows of R, at least `most`.

    Returns:
        pivots (nodes, m), those chosen first; R (nodes, steps, m) upper trapezoidal, its columns in
        the order of the pivots; how many are chosen (nodes,).
    """
    own = batched._implementation("pivoted_cholesky", gram)
    result: tuple[Array, Array, Array] = own.pivoted_cholesky(gram, stop, most, steps)
    return result


def pivoted_qr(samples: Array, max_rank: int, negligible: float) -> tuple[Array, Array, Array]:
    """Pivots, R and tails, see `batched.pivoted_qr`; of any scale, as exact as is asked for."""
    dtype = samples.dtype
    S, down, up = scaled(samples)
    pivots, r, tails = of_scaled(S, max_rank, negligible * down * down, dtype)
    r *= up[:, None, None]
    with np.errstate(over="ignore"):  # infinite squares of finite samples
        tails *= up[:, None]
        tails *= up[:, None]
    return pivots, r.astype(dtype, copy=False), tails


def scaled(samples: Array) -> tuple[Array, Array, Array]:
    """Samples in float64, each matrix times a power of two, to a largest value of about one.

    Returns:
        They, the powers (nodes,), and the inverse powers; one of what is 0 or not finite.
    """
    own = batched._implementation("gram_rounds", samples)
    result: tuple[Array, Array, Array] = own.scaled(samples)
    return result


def limits(
    energy: Array, enough: Array, rounding: float, reach: float
) -> tuple[Array, Array, Array]:
    """What rounding hides of Gram matrices, where that is enough, and where a round stops.

    Args:
        energy: (nodes,) their traces.
        enough: (nodes,) what may be left.
        rounding: of a Gram matrix, relative to its trace.
        reach: how far a round goes that is not the last, likewise.

    Returns:
        rounding energy; whether it is not above `enough`; there `enough`, else reach energy.
    """
    own = batched._implementation("gram_rounds", energy)
    result: tuple[Array, Array, Array] = own.limits(energy, enough, rounding, reach)
    return result


def left_and_tails(energy: Array, unknown: Array, squares: Array) -> tuple[Array, Array]:
    """What rows found leave of the energy (nodes,), and `tall.tails_of` the squares and that.

    Args:
        energy: (nodes,) traces.
        unknown: (nodes,) what is left is 0 where it is not above that.
        squares: (nodes, k) squared norms of the rows.
    """
    own = batched._implementation("gram_rounds", energy)
    result: tuple[Array, Array] = own.left_and_tails(energy, unknown, squares)
    return result


def seen(exact: Array, ranks: Array, done: Array, most: int) -> Array:
    """What the host has to know of a round: all exact, all exact or full, most rows; (3,) int64.

    Args:
        exact: (nodes,) bool.
        ranks: (nodes,) int64 rows that the round has found.
        done: (nodes,) int64 rows found before, to which these are added.
        most: rows of a node that is full.
    """
    own = batched._implementation("gram_rounds", exact)
    result: Array = own.seen(exact, ranks, done, most)
    return result


def rounding(rows: int, energy: Any) -> Any:
    """The most that the Gram matrix of so many rows, of this squared norm, may be wrong by."""
    return rows * float(np.finfo(np.float64).eps) * energy


@dataclass(frozen=True)
class _Round:
    """What a Gram matrix tells.

    Attributes:
        pivots: (nodes, m) rows of S, those found first.
        r: (nodes, k, m) of R, its columns in the order of the pivots.
        ranks: (nodes,) rows found.
        left: (nodes,) squared norm of what the rows found leave of S, 0 where that is rounding.
        tails: (nodes, k + 1) of these rows, see `tall.tails_of`.
        exact: (nodes,) whether all this is as exact as is asked for.
    """

    pivots: Array
    r: Array
    ranks: Array
    left: Array
    tails: Array
    exact: Array


@dataclass(frozen=True)
class _Rows:
    """Rows that a round has found.

    Attributes:
        pivots: (nodes, p) rows of S.
        real: (nodes, p) which of them are: of some nodes there are fewer.
        columns: (nodes, m, p) of R^T, its rows in the order of S.
    """

    pivots: Array
    real: Array
    columns: Array


def of_scaled(
    samples: Array, max_rank: int, negligible: float | Array, dtype: np.dtype[Any]
) -> tuple[Array, Array, Array]:
    """See `pivoted_qr`; of float64 samples whose squares neither overflow nor underflow.

    Args:
        samples: S (nodes, m, s); not changed.
        max_rank: steps at most.
        negligible: of all nodes or each, see `batched.pivoted_qr`.
        dtype: of the numbers that the samples come from, which says how exact they are.
    """
    xp = namespace(samples)
    nodes, m, s = samples.shape
    steps = min(m, s)
    most = min(steps, max_rank)
    S, found = samples, list[_Rows]()
    done, ended = xp.zeros(nodes, np.int64), xp.zeros(nodes, bool)
    rest = enough = xp.zeros(nodes, np.float64)
    while True:
        gram, energy = _gram(S)
        if not found:
            enough = xp.maximum(negligible, batched.squared_rounding(energy, dtype))
        one = _factorized(gram, energy, enough, most, steps)
        del gram
        all_exact, all_ended, width = to_host(seen(one.exact, one.ranks, done, most)).tolist()
        if all_exact and not found:
            return one.pivots, one.r, one.tails
        full = done >= most
        found.append(_first_rows(one, min(-(-width // _CHUNK) * _CHUNK, steps)))
        left = one.left
        if not all_exact:
            S = _taken_off(S.copy() if S is samples else S, found[-1], one.exact)
            left = xp.where(one.exact, left, batched.squared_norms(S))
        rest = xp.where(ended, rest, left)
        ended |= one.exact | full
        if all_ended:
            return _joined(found, rest, most, steps)
        S = xp.where(ended[:, None, None], 0.0, S)


def _gram(S: Array) -> tuple[Array, Array]:
    """S S^T and its trace."""
    gram = batched.matmul(S, S, transpose_b=True)
    diagonals = gram.diagonal(axis1=1, axis2=2)
    return gram, namespace(S).ascontiguousarray(diagonals).sum(axis=1)


def _factorized(gram: Array, energy: Array, enough: Array, most: int, steps: int) -> _Round:
    """The rows that a Gram matrix, which is lost, tells from rounding, until `enough` is left."""
    nodes, m, _ = gram.shape
    unknown, exact, stop = limits(energy, enough, rounding(m, 1.0), _REACH)
    pivots, r, ranks = pivoted_cholesky(gram, stop, most, steps)
    squares = batched.squared_norms(r.reshape(nodes * steps, m)).reshape(nodes, steps)
    left, tails = left_and_tails(energy, unknown, squares)
    return _Round(pivots, r, ranks, left, tails, exact)


def _first_rows(one: _Round, count: int) -> _Rows:
    """The first rows that a round has found."""
    xp = namespace(one.r)
    columns = xp.ascontiguousarray(one.r[:, :count].swapaxes(1, 2))
    real = xp.arange(count) < one.ranks[:, None]
    return _Rows(one.pivots[:, :count], real, batched.unpermute_rows(columns, one.pivots))


def _taken_off(S: Array, found: _Rows, exact: Array) -> Array:
    """What an orthonormal basis of the rows found leaves of S; its columns of R^T go to `found`.

    Chunk by chunk, each of what the ones before have left. All shapes are those of every stack, and
    where a node has fewer rows nothing is taken off: its bits do not depend on the others.

    Args:
        S: (nodes, m, s), overwritten.
        found: overwritten.
        exact: (nodes,) where the columns found are as exact as is asked for.
    """
    xp = namespace(S)
    nodes, m, s = S.shape
    gone = xp.zeros((nodes, m), bool)
    for first in range(0, found.pivots.shape[1], _CHUNK):
        some = slice(first, first + _CHUNK)
        pivots, real = found.pivots[:, some], found.real[:, some]
        rows = xp.where(real[:, :, None], batched.permute_rows(S, pivots), 0.0)
        Q, _, _ = tall.orthonormal(xp.ascontiguousarray(rows.swapaxes(1, 2)), s)
        columns = batched.matmul(S, Q)
        S = batched.matmul(columns, Q, transpose_b=True, subtract_from=S)
        now = xp.take_along_axis(gone, pivots, axis=1) | real
        xp.put_along_axis(gone, pivots, now, axis=1)
        S = xp.where(gone[:, :, None], 0.0, S)
        kept = found.columns[:, :, some]
        found.columns[:, :, some] = xp.where(exact[:, None, None], kept, columns)
    return S


def _joined(found: list[_Rows], rest: Array, most: int, steps: int) -> tuple[Array, Array, Array]:
    """Pivots, R and tails of all rounds: of every node what it has found, one after the other."""
    xp = namespace(rest)
    columns = xp.concatenate([rows.columns for rows in found], axis=2)
    pivots = xp.concatenate([rows.pivots for rows in found], axis=1)
    real = xp.concatenate([rows.real for rows in found], axis=1)
    nodes, m, width = columns.shape
    count = xp.arange(width)
    taken = xp.argsort(xp.where(real, count, width + count), axis=1)
    position = xp.empty((nodes, m + width), np.int64)  # the last are of what is not real
    position[:] = xp.arange(width, m + 2 * width)
    step = xp.cumsum(real.astype(np.int64), axis=1) - 1
    xp.put_along_axis(position, xp.where(real, pivots, m + count), step, axis=1)
    order = xp.argsort(position[:, :m], axis=1)
    columns = xp.where(real[:, None, :], columns, 0.0)
    rows = xp.ascontiguousarray(batched.permute_rows(columns, order).swapaxes(1, 2))
    rows = xp.triu(batched.permute_rows(rows, taken))
    squares = batched.squared_norms(rows.reshape(nodes * width, m)).reshape(nodes, width)
    kept = min(width, most)
    r, of_r = xp.zeros((nodes, steps, m), np.float64), xp.zeros((nodes, steps), np.float64)
    r[:, :kept], of_r[:, :kept] = rows[:, :kept], squares[:, :kept]
    return order, r, tall.tails_of(of_r, rest + squares[:, kept:].sum(axis=1))
