"""NumPy/LAPACK implementation of the batched linear algebra, over a thread pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from scipy.linalg import lapack

from gpu_hodlr.batched import blocked_id
from gpu_hodlr.batched.threads import num_threads, over_nodes, over_spans
from gpu_hodlr.devices import HostArray

_BLOCK = 32  # LAPACK's block size, for workspaces
_WIDE = 0.6  # columns a row from where a Gram matrix is quicker than GEQP3
_GRAM_BYTES = 1 << 24  # of samples and Gram matrices that are worked on together
_CACHED_BYTES, _MOST_COLUMNS = 1 << 24, 64  # of one intermediate of a product
_ADDED_BYTES = 1 << 20  # of products that are added, at a time: new memory is slow at first touch


def _routine(name: str, dtype: np.dtype[Any]) -> Callable[..., tuple[Any, ...]]:
    return getattr(lapack, ("s" if dtype == np.float32 else "d") + name)


def matmul(
    a: HostArray,
    b: HostArray,
    transpose_a: bool,
    transpose_b: bool,
    out: HostArray | None,
    sign: int,
) -> HostArray:
    """See `batched.matmul`."""
    a = a.swapaxes(-1, -2) if transpose_a else a
    b = b.swapaxes(-1, -2) if transpose_b else b
    result = np.empty((len(a), a.shape[1], b.shape[2]), a.dtype) if out is None else out

    def work(start: int, stop: int) -> None:
        mine = slice(start, stop)
        # BLAS kernels work on whole vector registers, and what lies in the lanes past the end may
        # raise the invalid flag for finite operands, now and then; a NaN in the result still shows.
        with np.errstate(invalid="ignore"):
            if out is None or sign == 0:
                np.matmul(a[mine], b[mine], out=result[mine])
            else:
                _add_products(a[mine], b[mine], result[mine], sign)

    over_spans(work, len(a), result.size * a.shape[2])
    return result


def _add_products(a: HostArray, b: HostArray, out: HostArray, sign: int) -> None:
    """Out += or -= a b, some at a time in one buffer."""
    step = max(1, _ADDED_BYTES // max(1, out[:1].nbytes))
    buffer = np.empty(out[:step].shape, out.dtype)
    for start in range(0, len(out), step):
        some = slice(start, start + step)
        product = np.matmul(a[some], b[some], out=buffer[: len(out[some])])
        if sign > 0:
            out[some] += product
        else:
            out[some] -= product


def pivoted_qr(
    samples: HostArray, max_rank: int, negligible: float
) -> tuple[HostArray, HostArray, HostArray]:
    """See `batched.pivoted_qr`; GEQP3, of a tall S^T after an unpivoted QR, which is BLAS-3.

    Where the rounding of a node's Gram matrix is negligible, `blocked_id`, some nodes at a time.
    """
    nodes, m, s = samples.shape
    k = min(m, s)
    pivots = np.tile(np.arange(m), (nodes, 1))
    r = np.zeros((nodes, k, m), samples.dtype)
    tails = np.zeros((nodes, k + 1), np.float64)
    if k == 0:
        return pivots, r, tails
    others = np.arange(nodes)
    if s >= _WIDE * m and negligible > 0:
        energy = np.empty(nodes)
        over_spans(lambda start, stop: _energies(samples, energy, slice(start, stop)), nodes)
        # Twice, as it is summed again in another order. PSTRF goes on down to it for little.
        rounding = 2 * np.asarray(blocked_id.rounding(m, energy))
        exact = (rounding > 0) & (rounding <= negligible)
        group = max(num_threads(), _GRAM_BYTES // (8 * m * (m + s)))
        for start in range(0, nodes, group):
            some: Any = slice(start, start + group)
            if not exact[some].any():
                continue
            if not exact[some].all():
                some = start + np.flatnonzero(exact[some])
            part = samples[some].astype(np.float64, copy=False)
            factors = blocked_id.of_scaled(part, max_rank, rounding[some], samples.dtype)
            pivots[some], r[some], tails[some] = factors
        others = np.flatnonzero(~exact)

    def work(i: int) -> None:
        t = others[i]
        pivots[t], r[t], tails[t, :k] = _lapacks_pivoted_qr(samples[t])

    over_nodes(work, len(others))
    return pivots, r, tails


def _energies(samples: HostArray, out: HostArray, nodes: slice) -> None:
    """Squared norms, in double."""
    mine = samples[nodes]
    out[nodes] = np.einsum("tij,tij->t", mine, mine, dtype=np.float64)


def _lapacks_pivoted_qr(sample: HostArray) -> tuple[HostArray, HostArray, HostArray]:
    """Pivots, R and tails but the last, which is 0."""
    m, s = sample.shape
    geqrf, geqp3 = _routine("geqrf", sample.dtype), _routine("geqp3", sample.dtype)
    a = sample.T  # column-major as LAPACK wants it: no copy but LAPACK's own
    if s > 1.3 * m:
        a = np.asfortranarray(np.triu(geqrf(a, lwork=m * _BLOCK)[0][:m]))
    a, pivots, _, _, info = geqp3(a, lwork=2 * m + (m + 1) * _BLOCK)
    assert info == 0, info
    r = np.triu(a[: min(m, s)])
    squares = np.einsum("ij,ij->i", r, r, dtype=np.float64)
    return pivots - 1, r, np.cumsum(squares[::-1])[::-1]


def interpolation(
    pivots: HostArray,
    r: HostArray,
    tails: HostArray,
    noise: HostArray,
    rank: int,
    padding: HostArray,
) -> tuple[HostArray, HostArray, HostArray]:
    """See `batched.interpolation`."""
    nodes, k, m = r.shape
    order = np.empty((nodes, m), np.int64)
    T = np.zeros((nodes, m - rank, rank), r.dtype)
    ranks = np.zeros(nodes, np.int64)
    trtrs = _routine("trtrs", r.dtype)
    known = (tails[:, :k] > noise[:, None]) & (np.diagonal(r, axis1=1, axis2=2) != 0)

    def work(t: int) -> None:
        numerical = int(np.count_nonzero(np.logical_and.accumulate(known[t, :rank])))
        # Beyond the numerical rank any row will do as a skeleton row: real ones before padding.
        rest = numerical + np.argsort(padding[t, pivots[t, numerical:]], kind="stable")
        position = np.concatenate([np.arange(numerical), rest])
        order[t] = pivots[t, position]
        ranks[t] = numerical
        if numerical and rank < m:
            x, info = trtrs(r[t, :numerical, :numerical], r[t][:numerical, position[rank:]])
            assert info == 0, info
            T[t, :, :numerical] = x.T

    over_nodes(work, nodes)
    return order, T, ranks


def full_qr(a: HostArray) -> tuple[HostArray, HostArray]:
    """See `batched.full_qr`."""
    nodes, m, k = a.shape
    q = np.empty((nodes, m, m), a.dtype)
    r = np.zeros((nodes, k, k), a.dtype)
    if k == 0:
        q[:] = np.eye(m, dtype=a.dtype)
        return q, r
    geqrf, orgqr = _routine("geqrf", a.dtype), _routine("orgqr", a.dtype)

    def work(t: int) -> None:
        factor = np.zeros((m, m), a.dtype, order="F")
        factor[:, :k], tau, _, _ = geqrf(a[t], lwork=k * _BLOCK)
        r[t] = np.triu(factor[:k, :k])
        # m reflectors, the last m - k of them identities: orgqr then gives the full Q
        all_tau = np.zeros(m, a.dtype)
        all_tau[:k] = tau
        q[t] = orgqr(factor, all_tau, lwork=m * _BLOCK, overwrite_a=1)[0]

    over_nodes(work, nodes)
    return q, r


def cholesky(a: HostArray, overwrite: bool) -> tuple[HostArray, HostArray]:
    """See `batched.cholesky`."""
    lower = a if overwrite and a.flags.c_contiguous else np.zeros_like(a)
    info = np.zeros(len(a), np.int64)
    if a.shape[1] == 0:
        return lower, info
    potrf = _routine("potrf", a.dtype)

    def work(t: int) -> None:
        # The transpose of a C-ordered lower factor is the upper factor in LAPACK's order.
        factor, failed = potrf(a[t].T, lower=0, clean=1, overwrite_a=lower is a)
        if not np.may_share_memory(factor, lower):
            lower[t] = factor.T
        # OpenBLAS takes a NaN for a pivot and goes on.
        nan = np.flatnonzero(np.isnan(factor.diagonal()))[:1] + 1
        info[t] = min([*nan, *([failed] if failed else [])], default=0)

    over_nodes(work, len(a))
    return lower, info


def solve_triangular(lower: HostArray, b: HostArray, transpose: bool, overwrite: bool) -> HostArray:
    """See `batched.solve_triangular`."""
    x = np.empty_like(b)
    if b.size == 0:
        return x
    trtrs = _routine("trtrs", lower.dtype)

    def work(t: int) -> None:
        # lower[t].T is an upper triangle in column-major order: solve with it or its transpose.
        x[t], info = trtrs(lower[t].T, b[t], lower=0, trans=0 if transpose else 1)
        assert info == 0, info

    over_nodes(work, len(lower))
    return x


def gather_rows(x: HostArray, index: HostArray) -> HostArray:
    """See `batched.gather_rows`."""
    out: HostArray = x[index]
    out[index < 0] = 0
    return out


def scatter_rows(blocks: HostArray, index: HostArray, n: int, every: bool) -> HostArray:
    """See `batched.scatter_rows`."""
    out = (np.empty if every else np.zeros)((n, blocks.shape[2]), blocks.dtype)
    real = index >= 0
    out[index[real]] = blocks[real]
    return out


def permute_rows(x: HostArray, order: HostArray) -> HostArray:
    """See `batched.permute_rows`."""
    return np.take_along_axis(x, order[:, :, None], axis=1)


def permute_both(blocks: HostArray, order: HostArray) -> HostArray:
    """See `batched.permute_both`."""
    out = np.empty_like(blocks)

    def task(t: int) -> None:
        out[t] = blocks[t][order[t][:, None], order[t]]

    over_nodes(task, len(blocks))
    return out


def unpermute_rows(x: HostArray, order: HostArray) -> HostArray:
    """See `batched.unpermute_rows`."""
    out = np.empty_like(x)
    np.put_along_axis(out, order[:, :, None], x, axis=1)
    return out


def normal_columns(seed: tuple[int, ...], n: int, columns: range, dtype: DTypeLike) -> HostArray:
    """See `batched.NormalSource`."""
    out = np.empty((len(columns), n), dtype)

    def task(t: int) -> None:
        stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(columns[t],)))
        stream.standard_normal(dtype=out.dtype, out=out[t])

    over_nodes(task, len(columns))
    return out.T


def columns_at_once(column_bytes: int, alone: bool) -> int:
    """See `batched.columns_at_once`."""
    share = 2 if alone else 1  # what threads share may be as large as two of theirs
    return max(1, min(share * _MOST_COLUMNS, share * _CACHED_BYTES // column_bytes))


def over_columns(work: Callable[[slice], None], columns: int, chunk: int) -> None:
    """See `batched.over_columns`."""
    over_nodes(lambda t: work(slice(t * chunk, (t + 1) * chunk)), -(-columns // chunk))


def over_parts(work: Callable[[slice], None], count: int) -> None:
    """See `batched.over_spans`."""
    over_spans(lambda start, stop: work(slice(start, stop)), count)
