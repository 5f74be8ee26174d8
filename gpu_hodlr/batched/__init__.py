"""Level-batched linear algebra: one contract, one implementation an array library.

A level of the tree is one stack, a 3-D array (nodes, rows, columns); no caller loops over nodes.
The functions here are the contract. They look up the implementation by the library of their
first array: `numpy_linalg`, `numpy_blocks`, `numpy_dots`, `numpy_entries`, `numpy_smallest`,
`numpy_sparse` (NumPy/LAPACK over a thread pool) for NumPy, `cupy_linalg`, `cupy_blocks`,
`cupy_dots`, `cupy_entries`, `cupy_smallest`, `cupy_sparse` (raw kernels of kernels/, cuBLAS,
cuSOLVER) for CuPy, imported at their first use. Index arrays may be of either library.
An index array marks padding with -1: rows of zeros when read, skipped when written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpu_hodlr.batched import numpy_linalg, stored
from gpu_hodlr.batched.threads import one_blas_thread
from gpu_hodlr.devices import Array, HostIndex, namespace

__all__ = [
    "BlockPattern",
    "NormalSource",
    "PivotedQR",
    "PointKernel",
    "SparseRows",
    "block_pattern",
    "block_sparse_matmul",
    "cholesky",
    "column_dots",
    "columns_at_once",
    "dense_entries",
    "full_qr",
    "gather_rows",
    "identities",
    "inner_products",
    "interpolation",
    "join_rows",
    "joined",
    "khatri_rao_entries",
    "matmul",
    "merge_smallest",
    "normal_source",
    "one_blas_thread",
    "over_columns",
    "over_spans",
    "permute_both",
    "permute_rows",
    "pivoted_qr",
    "point_entries",
    "scatter_rows",
    "solve_triangular",
    "sparse_rows",
    "squared_norms",
    "squared_rounding",
    "sums_by_key",
    "unpermute_rows",
    "widened",
]


@dataclass(frozen=True)
class PivotedQR:
    """Column-pivoted QR of the transposes of a stack of samples: S^T P = Q R.

    Attributes:
        pivots: (nodes, m) rows of S in pivot order.
        r: (nodes, min(m, s), m) upper trapezoidal.
        tails: (nodes, min(m, s) + 1); tails[t, k] = ||R22||_F^2 after k steps, the squared error
            of the rank-k interpolative decomposition of the sample.
    """

    pivots: Array
    r: Array
    tails: Array


@dataclass(frozen=True)
class BlockPattern:
    """Where the blocks of a symmetric block-sparse matrix stand, grouped by block row.

    Attributes:
        starts: (nodes + 1,) the terms of block row i are starts[i] .. starts[i + 1] - 1.
        terms: (2 p, 3) block, block column, and 1 where the block is used transposed; ordered by
            block row, then by block column.
        pairs: (2, p) the rows and columns of the blocks.
    """

    starts: Array
    terms: Array
    pairs: Array


class SparseRows(Protocol):
    """A sparse matrix S by rows, see `sparse_rows`."""

    def matmul(self, x: Array) -> Array:
        """S x, (rows, k), for x (width, k) of the type of the values."""

    def transposed_matmul(self, x: Array) -> Array:
        """S^T x, (width, k), for x (rows, k)."""


@dataclass(frozen=True)
class PointKernel:
    """A kernel of the distance between points, see `point_entries`.

    Attributes:
        profile: k(r): gaussian, laplace, matern32, matern52, rational_quadratic, spherical, or
            squared_distance, which is r^2.
        parameter: alpha of rational_quadratic; of the others nothing.
        variance: what k is multiplied by.
    """

    profile: str
    parameter: float = 2.0
    variance: float = 1.0


class GramRows(Protocol):
    """Rows of G of a Khatri-Rao Gram matrix, see `khatri_rao_entries`."""

    def rows(self, u: int, units: Array) -> Array:
        """G[u, units], (len(units), n)."""

    def pairs(self, u: HostIndex, v: HostIndex) -> Array:
        """G[u, v], (len(u), n)."""

    def coupled(self, u: HostIndex, v: HostIndex) -> NDArray[np.bool_]:
        """Which G[u, v] can be other than 0, (len(u),)."""


class NormalSource:
    """A random matrix of N(0, 1) numbers, any number of rows and columns, drawn by columns.

    Column j of a seed is a stream of its own: it is the same whoever draws it with whichever
    others, and with more rows it goes on. It is the same on every GPU; NumPy's are others.

    Args:
        seed: integers >= 0.
        draw: (seed, n, numbers of columns, dtype) -> (n, columns), see `normal_source`.
    """

    def __init__(
        self, seed: tuple[int, ...], draw: Callable[[tuple[int, ...], int, range, Any], Array]
    ) -> None:
        self._seed, self._draw, self._next = seed, draw, 0

    def __call__(
        self, shape: tuple[int, int], dtype: DTypeLike, part: slice = slice(None)
    ) -> Array:
        """A part of the next k columns for shape (n, k); the next call goes on after all k.

        The numbers of a column are contiguous.
        """
        n, k = shape
        columns = range(self._next, self._next + k)[part]
        self._next += k
        return self._draw(self._seed, n, columns, dtype)


def _implementation(name: str, x: Array) -> ModuleType:
    """The module of such functions for the library of an array."""
    library = "numpy" if namespace(x) is np else "cupy"
    return importlib.import_module(f"gpu_hodlr.batched.{library}_{name}")


_linalg, _blocks, _dots, _sparse, _entries, _lists = (
    partial(_implementation, name)
    for name in ("linalg", "blocks", "dots", "sparse", "entries", "smallest")
)


def matmul(
    a: Array,
    b: Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    add_to: Array | None = None,
    subtract_from: Array | None = None,
    write_to: Array | None = None,
) -> Array:
    """Stack of products op(a) op(b): new, or added to, subtracted from or written to an array."""
    given = ((add_to, 1), (subtract_from, -1), (write_to, 0))
    out, sign = next((one for one in given if one[0] is not None), (None, 0))
    module = _linalg(a) if a.dtype == b.dtype else stored  # narrower than what it is multiplied by
    return module.matmul(a, b, transpose_a, transpose_b, out, sign)


def block_pattern(
    pairs: HostIndex, nodes: int, like: Array, order_by: HostIndex | None = None
) -> BlockPattern:
    """The pattern of blocks K[a, b] of pairs (p, 2) of different nodes, each stored once.

    Args:
        pairs: a host array.
        nodes: block rows; nodes of the pairs beyond them are columns alone.
        like: an array where the pattern is to be, such as the blocks.
        order_by: (p, 2) the numbers by which the columns of a row are ordered, if not the pairs.
    """
    keys = pairs if order_by is None else order_by
    block = np.arange(len(pairs))
    row = np.concatenate([pairs[:, 0], pairs[:, 1]])
    column = np.concatenate([pairs[:, 1], pairs[:, 0]])
    transposed = np.repeat([0, 1], len(block))
    terms = np.stack([np.concatenate([block, block]), column, transposed], axis=1)
    order = np.lexsort((np.concatenate([keys[:, 1], keys[:, 0]]), row))
    starts = np.searchsorted(row[order], np.arange(nodes + 1))
    xp = namespace(like)
    return BlockPattern(
        xp.asarray(starts.astype(np.int32)),
        xp.asarray(terms[order], np.int32),
        xp.asarray(np.ascontiguousarray(pairs.T, np.int64)),
    )


def block_sparse_matmul(blocks: Array, pattern: BlockPattern, x: Array, add_to: Array) -> Array:
    """add_to[a] += K[a, b] x[b] and add_to[b] += K[a, b]^T x[a] for every stored block.

    The terms of a block row are added in the order of the pattern, whatever the threads.

    Args:
        blocks: (p, m, m).
        pattern: of the blocks, see `block_pattern`.
        x: (nodes, m, k).
        add_to: (nodes, m, k), overwritten and returned.
    """
    return _blocks(blocks).block_sparse_matmul(blocks, pattern, x, add_to)


def sparse_rows(starts: Array, columns: Array, values: Array, width: int) -> SparseRows:
    """A sparse matrix (rows, width): values[starts[i] : starts[i + 1]] stand in row i.

    Args:
        starts: (rows + 1,) int64; the first is 0.
        columns: (entries,) uint16 or int32.
        values: (entries,), fewer than 2^31.
        width: how many columns there are.
    """
    result: SparseRows = _sparse(values).SparseRows(starts, columns, values, width)
    return result


def sums_by_key(keys: Array, values: Array) -> tuple[Array, Array]:
    """The different keys (q,), ascending, and what is the sum of the values of each, (q,).

    Sums have a fixed order: the same values give the same bits.

    Args:
        keys: (k,) int64; values of negative keys are left out.
        values: (k,) floating, fewer than 2^31.
    """
    result: tuple[Array, Array] = _sparse(values).sums_by_key(keys, values)
    return result


def column_dots(u: Array, v: Array) -> Array:
    """The dot products of the columns of u and v (n, k), (k,); on a GPU summed in double."""
    return _dots(u).column_dots(u, v)


def squared_norms(x: Array) -> Array:
    """Squared Frobenius norms (nodes,), float64, of a stack of rows or matrices (nodes, ...)."""
    return _dots(x).squared_norms(x)


def identities(nodes: int, r: int, like: Array) -> Array:
    """A stack of identity matrices (nodes, r, r) of the library and type of an array."""
    xp = namespace(like)
    stack = xp.empty((nodes, r, r), like.dtype)
    stack[:] = xp.eye(r, dtype=like.dtype)
    return stack


def widened(x: Array, columns: int) -> Array:
    """A copy of x with so many more columns (its last axis), to be filled."""
    wider = namespace(x).empty((*x.shape[:-1], x.shape[-1] + columns), x.dtype)
    wider[..., : x.shape[-1]] = x
    return wider


def join_rows(top: Array, bottom: Array) -> Array:
    """[top; bottom] for stacks (nodes, m, k), (nodes, p, k): (nodes, m + p, k)."""
    # Not concatenate: CuPy's may copy from the host, which cannot be captured into a graph.
    nodes, m, k = top.shape
    joined = namespace(top).empty((nodes, m + bottom.shape[1], k), top.dtype)
    joined[:, :m], joined[:, m:] = top, bottom
    return joined


def pivoted_qr(samples: Array, max_rank: int | None = None, negligible: float = 0.0) -> PivotedQR:
    """Column-pivoted QR of S^T for a stack of samples S (nodes, m, s) (LAPACK GEQP3).

    With `max_rank` it may stop after so many steps; rows of R beyond them are then 0 and tails
    stay as they are. Tails may be wrong by `negligible`, and what is no larger left out of R: where
    that is above the rounding of a Gram matrix, S S^T may be factorized instead.
    """
    steps = min(samples.shape[1:]) if max_rank is None else max_rank
    return PivotedQR(*_linalg(samples).pivoted_qr(samples, steps, negligible))


def squared_rounding(energy: Array, dtype: np.dtype[Any]) -> Array:
    """Squared rounding error in samples made of terms of such a squared norm."""
    return energy * (8 * float(np.finfo(dtype).eps)) ** 2


def joined(parts: Sequence[PivotedQR]) -> PivotedQR:
    """One for the nodes of several, of samples of one shape."""
    if len(parts) == 1:
        return parts[0]
    concatenate = namespace(parts[0].r).concatenate
    return PivotedQR(
        concatenate([p.pivots for p in parts]),
        concatenate([p.r for p in parts]),
        concatenate([p.tails for p in parts]),
    )


def interpolation(
    qr: PivotedQR, rank: int, padding: Array, noise: Array | None = None
) -> tuple[Array, Array, Array]:
    """Row interpolative decompositions S[order] = [I; T] S[order[:rank]] + R22^T Q2^T.

    Cheng, Gimbutas, Martinsson, Rokhlin: On the compression of low rank matrices, SIAM J. Sci.
    Comput. 26 (2005). One rank serves the level; columns of T beyond a node's numerical rank are 0.

    Args:
        qr: of the samples.
        rank: skeleton rows a node, at most m.
        padding: (nodes, m) bool, rows that are padding; they come last in `order`.
        noise: (nodes,) float64, the squared rounding error in S: a tail that is not above it ends
            the numerical rank. That of S itself by default.

    Returns:
        order (nodes, m), skeleton rows first; T (nodes, m - rank, rank); numerical ranks (nodes,).
    """
    if noise is None:
        noise = squared_rounding(qr.tails[:, 0], qr.r.dtype)
    result: tuple[Array, Array, Array] = _linalg(qr.r).interpolation(
        qr.pivots, qr.r, qr.tails, noise, rank, padding
    )
    return result


def full_qr(a: Array) -> tuple[Array, Array]:
    """Stack of Householder QR a = Q [R; 0] of (m, r), r <= m: Q (m, m) and R (r, r)."""
    result: tuple[Array, Array] = _linalg(a).full_qr(a)
    return result


def cholesky(a: Array, *, overwrite: bool = False) -> tuple[Array, Array]:
    """Stack of lower Cholesky factors, and info (nodes,): 0, or the order of the failing minor.

    A minor that is not a number fails as well. With `overwrite` a may be lost: its memory is used.
    """
    result: tuple[Array, Array] = _linalg(a).cholesky(a, overwrite)
    return result


def solve_triangular(
    lower: Array, b: Array, *, transpose: bool = False, overwrite: bool = False
) -> Array:
    """Stack of solutions of L x = b, or of L^T x = b; with `overwrite` b may be lost."""
    return _linalg(lower).solve_triangular(lower, b, transpose, overwrite)


def gather_rows(x: Array, index: Array) -> Array:
    """Rows of x (n, k) by index (nodes, m) as a stack (nodes, m, k)."""
    return _linalg(x).gather_rows(x, index)


def scatter_rows(blocks: Array, index: Array, n: int, *, every: bool = False) -> Array:
    """(n, k) whose rows index (nodes, m) are the blocks, others 0; `every`: there are no others."""
    return _linalg(blocks).scatter_rows(blocks, index, n, every)


def permute_rows(x: Array, order: Array) -> Array:
    """y[t, i] = x[t, order[t, i]]; order may pick fewer rows than x has."""
    return _linalg(x).permute_rows(x, order)


def unpermute_rows(x: Array, order: Array) -> Array:
    """The inverse of permute_rows: y[t, order[t, i]] = x[t, i]."""
    return _linalg(x).unpermute_rows(x, order)


def permute_both(blocks: Array, order: Array) -> Array:
    """Rows and columns of symmetric blocks: y[t, i, j] = x[t, order[t, i], order[t, j]]."""
    return _linalg(blocks).permute_both(blocks, order)


def normal_source(seed: tuple[int, ...], device: str) -> NormalSource:
    """A source of N(0, 1) numbers on a device, the same from the same seed."""
    if device == "cpu":
        return NormalSource(seed, numpy_linalg.normal_columns)
    return NormalSource(
        seed, importlib.import_module("gpu_hodlr.batched.cupy_linalg").normal_columns
    )


def columns_at_once(like: Array, column_bytes: int, *, alone: bool = False) -> int:
    """Columns to push through a product together, each with an intermediate of so many bytes.

    On the CPU they share the caches, on a GPU an eighth of the free memory.

    Args:
        like: of the library.
        column_bytes: of the intermediate.
        alone: no other columns go through meanwhile: threads share the work on these.
    """
    return int(_linalg(like).columns_at_once(column_bytes, alone))


def over_columns(work: Callable[[slice], None], v: Array, chunk: int) -> None:
    """Call `work` on chunks of the columns of v (n, k), in parallel; a GPU is filled by each."""
    _linalg(v).over_columns(work, v.shape[1], chunk)


def over_spans(work: Callable[[slice], None], like: Array, count: int) -> None:
    """Call `work` on spans of range(count), in parallel; a GPU is filled by all as one."""
    _linalg(like).over_parts(work, count)


def dense_entries(array: Array, rows: Array, cols: Array) -> Array:
    """Blocks array[rows[t], cols[t]] of a dense matrix: (nodes, m, k)."""
    return _entries(array).dense_entries(array, rows, cols)


def point_entries(
    points: Array, kernel: PointKernel, nugget: Array, rows: Array, cols: Array
) -> Array:
    """Blocks of the kernel matrix variance k(|x_i - x_j|) + nugget_i [i = j].

    Args:
        points: (N, d) in units of the length scale.
        kernel: its profile, the profile's parameter, the variance.
        nugget: (N,), or (1,) for every row.
        rows: (nodes, m) indices; -1 gives zeros.
        cols: (nodes, k) indices likewise.
    """
    return _entries(points).point_entries(points, kernel, nugget, rows, cols)


def inner_products(x: Array, rows: Array, cols: Array) -> Array:
    """x_i . x_j, (nodes, m, c), for the rows of x (N, d), (nodes, m) and (nodes, c) indices.

    Padded indices get any values.
    """
    return _entries(x).inner_products(x, rows, cols)


def khatri_rao_entries(
    features: Array,
    feature_of: Array,
    unit_of: Array,
    unit_gram: GramRows,
    rows: Array,
    cols: Array,
) -> Array:
    """Blocks K[i, j] = sum_k X[f(i), k] X[f(j), k] G[u(i), u(j), k] of a Khatri-Rao Gram matrix.

    Args:
        features: X (num_features, n).
        feature_of: f (N,), a host array.
        unit_of: u (N,), a host array.
        unit_gram: gives rows of G: `unit_gram.rows(u, units)` -> (len(units), n), or for pairs
            `unit_gram.pairs(u, v)` -> (len(u), n); `unit_gram.coupled(u, v)`: which are not 0.
        rows: (nodes, m) indices, -1 for padding.
        cols: (nodes, k) indices, -1 for padding.
    """
    return _entries(features).khatri_rao_entries(
        features, feature_of, unit_of, unit_gram, rows, cols
    )


def merge_smallest(
    values: Array, index: Array, rows: Array, found: Array, candidates: Array
) -> None:
    """Merge what was found for some rows into the short sorted lists of all rows.

    List rows[t, i] keeps the smallest of itself and of found[t, i] for candidates[t], ascending,
    equal values by index. Of an index met twice the smaller value counts; the row's own index and
    values that are not finite are left out.

    Args:
        values: (n, count) ascending, infinity where there is none; overwritten.
        index: (n, count) int64, -1 where there is none; overwritten.
        rows: (nodes, m) the lists to merge into, each at most once, -1 for none.
        found: (nodes, m, c), of the type of values; may be overwritten.
        candidates: (nodes, c) indices, different in a node, -1 for none.
    """
    _lists(values).merge_smallest(values, index, rows, found, candidates)
