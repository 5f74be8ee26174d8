"""Stacks of few tall matrices: inner products and orthonormal columns.

Near the root of a tree a stack has two matrices of N / 2 rows. They are worked on in chunks of
as many rows as a leaf has, so that threads and thread blocks have as much to do as at the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace

_MOST_ROWS = 4096  # of a matrix whose rows are pivoted as a whole
_CHUNKS = 16  # of the rows of a single matrix
_SLAB = 1 << 14  # rows of a single matrix that are converted, or multiplied, at a time
_SHIFT = 10  # times columns times rounding, of the diagonal of a Gram matrix


def inner(a: Array, b: Array, chunk: int) -> Array:
    """A^T B, (nodes, r, k), for stacks (nodes, rows, r) and (nodes, rows, k); chunk divides rows.

    Either is copied where it is not contiguous.
    """
    xp = namespace(a)
    nodes, rows, r = a.shape
    k, parts = b.shape[2], rows // chunk
    a, b = (xp.ascontiguousarray(x).reshape(nodes * parts, chunk, x.shape[2]) for x in (a, b))
    product = batched.matmul(a, b, transpose_a=True).reshape(nodes, parts, r, k)
    return product.sum(axis=1) if parts > 1 else product[:, 0]


def inner_of_one(a: Array, b: Array) -> Array:
    """A^T B for (rows, r) and (rows, k), in equal chunks of rows and what is left of them."""
    chunk = len(a) // _CHUNKS
    whole = chunk * _CHUNKS
    a, b = a[None], b[None]
    if not whole:
        return batched.matmul(a, b, transpose_a=True)[0]
    product = inner(a[:, :whole], b[:, :whole], chunk)
    if whole < a.shape[1]:
        batched.matmul(a[:, whole:], b[:, whole:], transpose_a=True, add_to=product)
    return product[0]


def slabs(rows: int) -> Iterator[slice]:
    """So many rows, some at a time: what is made of a slab is small beside the whole."""
    for start in range(0, rows, _SLAB):
        yield slice(start, min(start + _SLAB, rows))


def inner_in_double(a: Array, b: Array) -> Array:
    """`inner_of_one` in float64, whatever the type of both: neither is converted as a whole."""
    total = namespace(a).zeros((a.shape[1], b.shape[1]), np.float64)
    for part in slabs(len(a)):
        left = a[part].astype(np.float64, copy=False)
        right = left if b is a else b[part].astype(np.float64, copy=False)
        total += inner_of_one(left, right)
    return total


def multiplied(rows: Callable[[slice], Array], m: Array, out: Array) -> Array:
    """A M for A (rows, r) and M (r, k), slab by slab, into `out`, which may be columns of A.

    Args:
        rows: gives a slab of A.
        m: M, of the type of `out`.
        out: (rows, k), overwritten and returned.
    """
    xp = namespace(m)
    for part in slabs(len(out)):
        a = xp.ascontiguousarray(rows(part))
        parts = _CHUNKS if len(a) % _CHUNKS == 0 else 1  # for threads
        stack = a.reshape(parts, len(a) // parts, a.shape[1])
        product = batched.matmul(stack, xp.broadcast_to(m, (parts, *m.shape)))
        out[part] = product.reshape(len(a), -1)
    return out


def _same(x: Array) -> Array:
    return x


def orthonormal(
    a: Array,
    chunk: int,
    add_up: Callable[[Array], Array] = _same,
    deal_out: Callable[[Array], Array] = _same,
) -> tuple[Array, Array, Array]:
    """Stack of A = Q S^T with orthonormal columns of Q (nodes, rows, r), and info (nodes,).

    CholeskyQR twice, the first with a shift, which cannot fail for condition numbers up to about
    1 / rounding (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42
    (2020)). The shift is relative to each column's norm: scaling columns changes nothing. Zero
    columns stay zero, with the unit vector in S.

    Args:
        a: (nodes, rows, r).
        chunk: see `inner`.
        add_up: where a is of pieces of the nodes' rows: sums over the pieces of a node.
        deal_out: then from what is of a node to each of its pieces.

    Returns:
        Q; S (nodes, r, r), lower triangular; info, not 0 where a Cholesky factorization failed:
        there Q and S are of no use.
    """
    xp = namespace(a)
    r = a.shape[2]
    place = xp.arange(r)
    shift = a.dtype.type(1 + _SHIFT * r * float(np.finfo(a.dtype).eps))
    S: Array | None = None
    info: Array | None = None
    for factor in (shift, a.dtype.type(1)):
        gram = add_up(inner(a, a, chunk))
        norms = gram[:, place, place]
        gram[:, place, place] = xp.where(norms > 0, norms * factor, a.dtype.type(1))
        lower, failed = batched.cholesky(gram)
        lower = xp.where((failed > 0)[:, None, None], xp.eye(r, dtype=a.dtype), lower)
        # A S^-T by a product with the inverse would lose the condition number of S in Q S^T = A.
        a = batched.solve_triangular(deal_out(lower), xp.ascontiguousarray(a.swapaxes(1, 2)))
        a = xp.ascontiguousarray(a.swapaxes(1, 2))
        S = lower if S is None else batched.matmul(S, lower)
        info = failed if info is None else xp.maximum(info, failed)
    assert S is not None
    assert info is not None
    return a, S, info


def pivoted_qr(
    samples: Array, max_rank: int | None = None, negligible: float = 0.0
) -> batched.PivotedQR:
    """`batched.pivoted_qr` for samples (nodes, rows, s) of any number of rows.

    Of many rows the pivots are chosen by tournament: the first s pivots of every chunk, which span
    all of its rows, go on to the next round (Grigori, Demmel, Xiang, SIAM J. Matrix Anal. Appl. 32
    (2011)). Tails are those of all rows.
    """
    nodes, rows, s = samples.shape
    most = max(_MOST_ROWS, 4 * s)
    if rows <= most:
        return batched.pivoted_qr(samples, max_rank, negligible)
    xp = namespace(samples)
    index = xp.empty((nodes, rows), np.int64)
    index[:] = xp.arange(rows)
    left, parts = samples, 0
    while parts != 1:
        parts, chunk = 1, left.shape[1]
        while chunk > most and chunk % 2 == 0:
            parts, chunk = 2 * parts, chunk // 2
        left = xp.ascontiguousarray(left).reshape(nodes * parts, chunk, s)
        best = xp.ascontiguousarray(batched.pivoted_qr(left).pivots[:, :s])
        left = batched.permute_rows(left, best).reshape(nodes, parts * s, s)
        index = xp.take_along_axis(index.reshape(nodes * parts, chunk), best, axis=1)
        index = index.reshape(nodes, parts * s)
    # S[pivots]^T = Q R: in the basis Q the other rows of S are the other columns of R.
    Q, R = batched.full_qr(xp.ascontiguousarray(left.swapaxes(1, 2)))
    place = xp.empty((nodes, rows), np.int64)
    place[:] = xp.arange(rows, 2 * rows)
    xp.put_along_axis(place, index, xp.broadcast_to(xp.arange(s), (nodes, s)).copy(), axis=1)
    pivots = xp.argsort(place, axis=1)
    V = batched.permute_rows(batched.matmul(samples, Q), pivots)
    r = xp.ascontiguousarray(V.swapaxes(1, 2))
    r[:, :, :s] = R
    squares = (r * r).sum(axis=2, dtype=np.float64)
    return batched.PivotedQR(pivots, r, tails_of(squares, xp.zeros(nodes, np.float64)))


def tails_of(squares: Array, rest: Array) -> Array:
    """`PivotedQR.tails` (nodes, k + 1), of the squared norms of the rows of R and of what is left.

    From the end, so that nothing cancels: every sum is of terms >= 0.

    Args:
        squares: (nodes, k) float64.
        rest: (nodes,) float64.
    """
    xp = namespace(squares)
    nodes, k = squares.shape
    tails = xp.zeros((nodes, k + 1), np.float64)
    tails[:, :k] = xp.cumsum(xp.ascontiguousarray(squares[:, ::-1]), axis=1)[:, ::-1]
    tails += rest[:, None]
    return tails
