"""Blocked column-pivoted QR of stacks of samples, whose work is in matrix products.

R of S^T P = Q R is a Cholesky factor of P^T S S^T P, and complete pivoting of the Gram matrix S S^T
takes the pivots that QR with column pivoting takes (Higham, Accuracy and Stability of Numerical
Algorithms (2002), section 10.3). All that needs one pivot after the other is then done on m x m
matrices, by panels, and none of it on S. Rounding is that of squares: a Gram matrix tells rows apart
down to about 1e-8 of S, and what is asked for below comes from further rounds. A round takes the
rows found so far off by an orthonormal basis Q (CholeskyQR twice), S <- S - (S Q) Q^T, and what is
left is known to its own digits: the next Gram matrix is that of what is left. One round does for a
tolerance of 1e-4 and more, two or three do for 1e-10.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import tall
from gpu_hodlr.devices import Array, namespace, to_hosts

_REACH = 2.0**-26  # of the squared norm, how far a round goes that is not the last
_CHUNK = 128  # rows that are taken off together
_MOST_EXPONENT = 1000


def pivoted_cholesky(gram: Array, stop: Array, most: int, steps: int) -> tuple[Array, Array, Array]:
    """Pivoted Cholesky factors P^T G P = R^T R + what is left, of a stack.

    A node ends at the latest when the trace of what is left is not above `stop`, and never later
    than where no pivot is above stop / m.

    Args:
        gram: G (nodes, m, m) float64, symmetric positive semidefinite; may be overwritten.
        stop: (nodes,) float64.
        most: pivots at most.
        steps: rows of R, at least `most`.

    Returns:
        pivots (nodes, m), those chosen first; R (nodes, steps, m) upper trapezoidal, its columns in
        the order of the pivots; how many are chosen (nodes,).
    """
    library = "numpy" if namespace(gram) is np else "cupy"
    module = importlib.import_module(f"gpu_hodlr.batched.{library}_pivoted_cholesky")
    result: tuple[Array, Array, Array] = module.pivoted_cholesky(gram, stop, most, steps)
    return result


def pivoted_qr(samples: Array, max_rank: int, negligible: float) -> tuple[Array, Array, Array]:
    """Pivots, R and tails, see `batched.pivoted_qr`; of any scale, as exact as is asked for."""
    xp = namespace(samples)
    dtype = samples.dtype
    largest = xp.maximum(samples.max(axis=(1, 2)), -samples.min(axis=(1, 2)))
    largest = largest.astype(np.float64)
    usual = (largest > 0) & xp.isfinite(largest)
    power = xp.floor(xp.log2(xp.where(usual, largest, 1.0)))
    power = xp.clip(power, -_MOST_EXPONENT, _MOST_EXPONENT).astype(np.int32)
    one = xp.ones(len(samples), np.float64)
    down, up = xp.ldexp(one, -power), xp.ldexp(one, power)
    S = samples.astype(np.float64) * down[:, None, None]
    pivots, r, tails = of_scaled(S, max_rank, negligible * down * down, dtype)
    r *= up[:, None, None]
    with np.errstate(over="ignore"):  # infinite squares of finite samples
        tails *= up[:, None]
        tails *= up[:, None]
    return pivots, r.astype(dtype, copy=False), tails


def rounding(rows: int, energy: Array) -> Array:
    """The most that the Gram matrix of so many rows, of this squared norm, may be wrong by."""
    return rows * float(np.finfo(np.float64).eps) * energy


@dataclass(frozen=True)
class _Round:
    """What a round has found of R^T.

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
    most, place = min(steps, max_rank), xp.arange(m)
    S, rounds = samples, []
    done, ended = xp.zeros(nodes, np.int64), xp.zeros(nodes, bool)
    rest = enough = xp.zeros(nodes, np.float64)
    while True:
        gram = batched.matmul(S, S, transpose_b=True)
        energy = xp.ascontiguousarray(gram[:, place, place]).sum(axis=1)
        if not rounds:
            enough = xp.maximum(negligible, batched.squared_rounding(energy, dtype))
        unknown = rounding(m, energy)
        exact = ~(unknown > enough)  # written so that a NaN ends it
        stop = xp.where(exact, enough, _REACH * energy)
        pivots, r, ranks = pivoted_cholesky(gram, stop, most, steps)
        squares = batched.squared_norms(r.reshape(nodes * steps, m)).reshape(nodes, steps)
        left = energy - squares.sum(axis=1)
        left = xp.where((left <= unknown) & xp.isfinite(energy), 0.0, left)  # it is rounding
        done = done + ranks
        full = done >= most
        seen = [x.astype(np.int64) for x in (exact.all(), (exact | full).all(), ranks.max())]
        all_exact, all_ended, width = (int(x) for x in to_hosts(*seen))
        if all_exact and not rounds:
            return pivots, r, _tails(squares, left)
        width = min(-(-width // _CHUNK) * _CHUNK, steps)
        columns = xp.ascontiguousarray(r[:, :width].swapaxes(1, 2))
        found = _Round(
            pivots[:, :width], place[:width] < ranks[:, None],
            batched.unpermute_rows(columns, pivots),
        )  # fmt: skip
        rounds.append(found)
        if not all_exact:
            S = _taken_off(S.copy() if S is samples else S, found, exact)
            left = xp.where(exact, left, batched.squared_norms(S))
        rest = xp.where(ended, rest, left)
        ended |= exact | full
        if all_ended:
            return _joined(rounds, rest, most, steps)
        S = xp.where(ended[:, None, None], 0.0, S)


def _taken_off(S: Array, found: _Round, exact: Array) -> Array:
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


def _tails(squares: Array, rest: Array) -> Array:
    """(nodes, k + 1) squared norms of R without its first rows, of the squared norms of its rows.

    From the end, so that nothing cancels.
    """
    xp = namespace(squares)
    nodes, k = squares.shape
    tails = xp.zeros((nodes, k + 1), np.float64)
    tails[:, :k] = xp.cumsum(xp.ascontiguousarray(squares[:, ::-1]), axis=1)[:, ::-1]
    tails += rest[:, None]
    return tails


def _joined(rounds: list[_Round], rest: Array, most: int, steps: int) -> tuple[Array, Array, Array]:
    """Pivots, R and tails of all rounds: of every node what it has found, one after the other."""
    xp = namespace(rest)
    columns = xp.concatenate([one.columns for one in rounds], axis=2)
    pivots, real = (
        xp.concatenate([getattr(one, name) for one in rounds], axis=1)
        for name in ("pivots", "real")
    )
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
    r, kept_squares = xp.zeros((nodes, steps, m), np.float64), xp.zeros((nodes, steps), np.float64)
    r[:, :kept], kept_squares[:, :kept] = rows[:, :kept], squares[:, :kept]
    return order, r, _tails(kept_squares, rest + squares[:, kept:].sum(axis=1))
