"""CuPy implementation of the batched linear algebra: a constant number of launches a call."""

from __future__ import annotations

from collections.abc import Callable

import cupy
import numpy as np
from cupy_backends.cuda.libs import cusolver
from numpy.typing import DTypeLike

from gpu_hodlr.batched import blocked_id
from gpu_hodlr.batched.cublas import UPPER, batches, gemm, pointers, trsm
from gpu_hodlr.batched.cuda import NULL, device_index, launch, most_shared, narrow, suffix
from gpu_hodlr.batched.cupy_quarters import quartered
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.devices import Array, free_bytes

_SMALL = 128  # triangles up to here go to potrfBatched and trsmBatched, larger ones are halved
# Samples of so many values, and of no more rows than that times their columns, are decomposed by
# products: a step of the kernel then reads more than the panel's. Estimated, not measured.
_BLOCKED, _WIDE = 1 << 16, 2
_ROW_THREADS = 256
_MOST_BLOCKS = 1 << 16  # of a row copy: its blocks walk over the rows
_ENOUGH_BLOCKS = 8 * 132  # of a row copy, to fill a large GPU: few long rows are divided among them
_EACH_THREAD = 8  # numbers of a divided row at least
_MOST_WALKERS = 1 << 10  # blocks a column of random numbers: they walk over it
_WORKSPACE = 8  # one intermediate of a product may take this part of the free memory


def matmul(
    a: Array, b: Array, transpose_a: bool, transpose_b: bool, out: Array | None, sign: int
) -> Array:
    """See `batched.matmul`."""
    alpha, beta = (1.0, 0.0) if out is None or sign == 0 else (sign, 1.0)
    if out is None:
        shape = (len(a), a.shape[2 if transpose_a else 1], b.shape[1 if transpose_b else 2])
        out = cupy.empty(shape, a.dtype)
    gemm(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, alpha=alpha, beta=beta)
    return out


def pivoted_qr(samples: Array, max_rank: int, negligible: float) -> tuple[Array, Array, Array]:
    """See `batched.pivoted_qr`; of large matrices by products, of others a block each."""
    nodes, m, s = samples.shape
    if nodes and m * s >= _BLOCKED and m <= _WIDE * s:
        return blocked_id.pivoted_qr(samples, max_rank, negligible)
    return pivoted_qr_by_blocks(samples, max_rank, negligible)


def pivoted_qr_by_blocks(
    samples: Array, max_rank: int, negligible: float
) -> tuple[Array, Array, Array]:
    """See `batched.pivoted_qr`; kernels/pivoted_qr.cu, a block a matrix. It ends at `negligible`.

    Norms of too many rows for the shared memory are kept in global memory.
    """
    nodes, m, s = samples.shape
    steps, dtype = min(m, s), samples.dtype
    pivots = cupy.empty((nodes, m), np.int64)
    r = cupy.empty((nodes, steps, m), dtype)
    tails = cupy.empty((nodes, steps + 1), np.float64)
    if steps == 0:
        pivots[:] = cupy.arange(m)
        tails[:] = 0
        return pivots, r, tails
    ranks = cupy.empty(nodes, np.int32)
    threads = 32 * min(16, max(2, -(-m // 8)))
    shared = 8 * (steps + 33) + dtype.itemsize * (2 * m + steps) + 4 * m
    arguments = (samples.copy(order="C"), pivots, r, tails, ranks)
    sizes = (m, s, max_rank, np.float64(negligible))
    if shared <= most_shared(cupy.cuda.Device().id):
        name = f"pivoted_qr_{suffix(dtype)}"
        launch("pivoted_qr", name, (nodes,), (threads,), arguments + sizes, shared)
        return pivots, r, tails
    work_bytes = -(-shared // 16) * 16
    work = cupy.empty((nodes, work_bytes), np.uint8)
    launch(
        "pivoted_qr", f"pivoted_qr_tall_{suffix(dtype)}", (nodes,), (threads,),
        (*arguments, work, np.int64(work_bytes), *sizes),
    )  # fmt: skip
    return pivots, r, tails


def interpolation(
    pivots: Array, r: Array, tails: Array, noise: Array, rank: int, padding: Array
) -> tuple[Array, Array, Array]:
    """See `batched.interpolation`; kernels/interpolation.cu, one block 32 columns."""
    nodes, k, m = r.shape
    padding = cupy.ascontiguousarray(cupy.asarray(padding)).view(np.uint8)
    pivots, r, tails, noise = (cupy.ascontiguousarray(x) for x in (pivots, r, tails, noise))
    dtype, columns = r.dtype, m - rank
    order, ranks = cupy.empty((nodes, m), np.int64), cupy.empty(nodes, np.int64)
    place = cupy.empty((nodes, m), np.int32)
    T = cupy.empty((nodes, columns, rank), dtype)
    launch(
        "interpolation", f"interpolation_order_{suffix(dtype)}", (nodes,),
        (32 * min(16, max(1, -(-m // 32))),),
        (pivots, r, tails, noise, padding, order, place, ranks, m, k, rank), 64,
    )  # fmt: skip
    if T.size:
        launch(
            "interpolation", f"interpolation_{suffix(dtype)}", (nodes * -(-columns // 32),),
            (32, 8), (r, place, ranks, T, cupy.empty(T.shape, dtype), m, k, rank),
            2112 * dtype.itemsize,
        )  # fmt: skip
    return order, T, ranks


def full_qr(a: Array) -> tuple[Array, Array]:
    """See `batched.full_qr`; kernels/householder_qr.cu, one block a matrix.

    Panels of too many rows for the shared memory lie in global memory.
    """
    nodes, m, k = a.shape
    dtype = a.dtype
    q, r = cupy.empty((nodes, m, m), dtype), cupy.empty((nodes, k, k), dtype)
    if k == 0:
        q[:] = cupy.eye(m, dtype=dtype)
        return q, r
    panels, group = -(-k // 8), 16 // dtype.itemsize
    factors = cupy.empty((nodes, panels, 8, 8), dtype)
    reflectors = a.copy(order="C")
    panel = 9 * group * -(-m // group)
    most = most_shared(cupy.cuda.Device().id)
    # Fewer threads leave more shared memory to the panel.
    values = {sharers: 336 + 8 * 64 * sharers for sharers in (8, 4, 2, 1)}
    fitting = [n for n in values if dtype.itemsize * (values[n] + panel) <= most]
    sharers, tall = (fitting[0], "") if fitting else (8, "tall_")
    shared = dtype.itemsize * (values[sharers] + (panel if fitting else 0))
    outside = () if fitting else (cupy.empty((nodes, panels, panel), dtype),)
    block = (32, sharers, 2)
    launch(
        "householder_qr", f"householder_qr_{tall}{suffix(dtype)}", (nodes,), block,
        (reflectors, *outside, r, factors, m, k), shared,
    )  # fmt: skip
    launch(
        "householder_qr", f"householder_q_{tall}{suffix(dtype)}", (nodes, -(-m // 64)), block,
        (*(outside or (reflectors,)), factors, q, m, k), shared,
    )  # fmt: skip
    return q, r


def cholesky(a: Array, overwrite: bool) -> tuple[Array, Array]:
    """See `batched.cholesky`; cuSOLVER, and kernels/cholesky.cu for what it leaves open."""
    lower = a if overwrite and a.flags.c_contiguous else a.copy(order="C")
    if not a.size:
        return lower, cupy.zeros(len(a), np.int32)
    nodes, n, _ = a.shape
    info, found = cupy.empty(nodes, np.int32), cupy.empty((-(-n // _SMALL), nodes), np.int32)
    _factorize(lower, found)
    launch(
        "cholesky", f"finish_cholesky_{suffix(a.dtype)}", (nodes * -(-n // 32),), (256,),
        (lower, found, info, n, _SMALL),
    )  # fmt: skip
    return lower, info


def _factorize(a: Array, found: Array) -> None:
    """Lower Cholesky factors in place by halves, so that most work is in GEMM.

    What cuSOLVER says of every `_SMALL` rows goes to `found`: but for the last it is so many.
    """
    n = a.shape[1]
    if n <= _SMALL:
        potrf = cusolver.spotrfBatched if a.dtype == np.float32 else cusolver.dpotrfBatched
        handle = cupy.cuda.device.get_cusolver_handle()
        at, ld = pointers(a), a.strides[1] // a.itemsize
        for part in batches(len(a)):
            one, its = at[part], found[0, part]
            potrf(handle, UPPER, n, one.data.ptr, ld, its.data.ptr, len(one))
        return
    h = _half(n)
    _factorize(a[:, :h, :h], found)
    _solve_right(a[:, :h, :h], a[:, h:, :h])
    below = a[:, h:, :h]
    gemm(below, below, a[:, h:, h:], transpose_b=True, alpha=-1.0, beta=1.0)
    _factorize(a[:, h:, h:], found[h // _SMALL :])


def _half(n: int) -> int:
    """About n / 2, a multiple of the size the base case is best at."""
    return -(-n // (2 * _SMALL)) * _SMALL


def _solve_right(lower: Array, x: Array) -> None:
    """In place: x <- x L^-T."""
    n = lower.shape[1]
    if n <= _SMALL:
        trsm(lower, x, transpose=True, right=True)
        return
    h = _half(n)
    _solve_right(lower[:, :h, :h], x[:, :, :h])
    gemm(x[:, :, :h], lower[:, h:, :h], x[:, :, h:], transpose_b=True, alpha=-1.0, beta=1.0)
    _solve_right(lower[:, h:, h:], x[:, :, h:])


def solve_triangular(lower: Array, b: Array, transpose: bool, overwrite: bool) -> Array:
    """See `batched.solve_triangular`; few columns: kernels/triangular.cu, one block a matrix."""
    if not b.size:
        return b.copy(order="C")
    if not solves_narrow(lower, b):
        x = b if overwrite and b.flags.c_contiguous else b.copy(order="C")
        _solve_left(lower, x, transpose)
        return x
    return solve_narrow(lower, b, transpose, cupy.empty(b.shape, b.dtype))


def _solve_shared(lower: Array, k: int) -> int:
    width = 1 << (k - 1).bit_length()
    return int(lower.itemsize * (4224 + 32 * width * -(-lower.shape[1] // 32)))


def solves_narrow(lower: Array, b: Array) -> bool:
    """Whether `solve_narrow` can: few columns, and a block holds a matrix's."""
    k = b.shape[-1]
    if not 0 < k <= NARROW or lower.dtype != b.dtype:
        return False
    return _solve_shared(lower, k) <= most_shared(cupy.cuda.Device().id)


def solve_narrow(
    lower: Array,
    b: Array,
    transpose: bool,
    x: Array,
    index: Array | None = None,
) -> Array:
    """L^-1 b or L^-T b, written to x (nodes, m, k).

    With an index (nodes, m) of rows b, or of the transposed solve x, is (n, k).
    """
    nodes, m, _ = lower.shape
    k = b.shape[-1]
    name = "solve_lower_transposed" if transpose else "solve_lower"
    threads = 32 * min(16, max(2, -(-m // 32)))
    rows = NULL if index is None else device_index(index)
    launch(
        "triangular", narrow(name, x.dtype, k), (nodes,), (threads,),
        (cupy.ascontiguousarray(lower), cupy.ascontiguousarray(b), rows, x, m, k),
        _solve_shared(lower, k),
    )  # fmt: skip
    return x


def _solve_left(lower: Array, x: Array, transpose: bool) -> None:
    """In place: x <- L^-1 x or L^-T x."""
    n = lower.shape[1]
    if n <= _SMALL:
        trsm(lower, x, transpose=transpose, right=False)
        return
    h = _half(n)
    first, second = (slice(h, None), slice(h)) if transpose else (slice(h), slice(h, None))
    _solve_left(lower[:, first, first], x[:, first], transpose)
    below = lower[:, h:, :h]
    gemm(below, x[:, first], x[:, second], transpose_a=transpose, alpha=-1.0, beta=1.0)
    _solve_left(lower[:, second, second], x[:, second], transpose)


def _copy_rows(kernel: str, x: Array, index: Array, out: Array, *sizes: int) -> Array:
    """One thread row a matrix row; blocks walk over the rows."""
    return _walk_rows(kernel, out, index.size, cupy.ascontiguousarray(x), index, sizes=sizes)


def _walk_rows(
    kernel: str, out: Array, count: int, *arrays: Array, sizes: tuple[int, ...] = ()
) -> Array:
    k = out.shape[-1]
    if k == 0:
        return out
    width = min(32, 1 << (k - 1).bit_length())
    height = _ROW_THREADS // width
    down = min(_MOST_BLOCKS, -(-count // height))
    across = max(1, min(_ENOUGH_BLOCKS // max(1, down), k // (_EACH_THREAD * width)))
    launch(
        "rows", f"{kernel}_{suffix(out.dtype)}", (down, across), (width, height),
        (*arrays, out, np.int64(count), *sizes, k),
    )  # fmt: skip
    return out


def gather_rows(x: Array, index: Array) -> Array:
    """See `batched.gather_rows`."""
    index = device_index(index)
    return _copy_rows("gather_rows", x, index, cupy.empty((*index.shape, x.shape[1]), x.dtype))


def scatter_rows(blocks: Array, index: Array, n: int, every: bool) -> Array:
    """See `batched.scatter_rows`."""
    new = cupy.empty if every else cupy.zeros
    return put_rows(blocks, index, new((n, blocks.shape[2]), blocks.dtype))


def put_rows(blocks: Array, index: Array, out: Array) -> Array:
    """`scatter_rows` into rows of out (n, k), by rows; the others stay as they are."""
    return _copy_rows("scatter_rows", blocks, device_index(index), out)


def scaled_panels(
    x: Array, y: Array, node: Array, slot: Array, feature: Array, slots: Array, row_of: Array
) -> Array:
    """x[feature[t, j]] * y[row_of[slot[g], slots[t, j]]], (groups, columns, k), t = node[g].

    0 where an index of x or y is -1; for x (n, k), y (p, k) by rows, and int64 arrays.
    """
    columns = feature.shape[1]
    out = cupy.empty((len(node), columns, x.shape[1]), x.dtype)
    return _walk_rows(
        "scaled_panels", out, len(node) * columns, x, y, node, slot, feature, slots, row_of,
        sizes=(columns, len(row_of)),
    )  # fmt: skip


def permute_rows(x: Array, order: Array) -> Array:
    """See `batched.permute_rows`."""
    order = device_index(order)
    out = cupy.empty((*order.shape, x.shape[2]), x.dtype)
    return _copy_rows("permute_rows", x, order, out, x.shape[1], order.shape[1])


def permute_both(blocks: Array, order: Array) -> Array:
    """See `batched.permute_both`; kernels/quarters.cu."""
    return quartered(blocks, blocks.shape[1], order, None)[0]


def unpermute_rows(x: Array, order: Array) -> Array:
    """See `batched.unpermute_rows`."""
    order = device_index(order)
    return _copy_rows("unpermute_rows", x, order, cupy.empty(x.shape, x.dtype), x.shape[1])


def normal_columns(seed: tuple[int, ...], n: int, columns: range, dtype: DTypeLike) -> Array:
    """See `batched.NormalSource`; kernels/normal.cu."""
    out = cupy.empty((len(columns), n), dtype)
    if out.size:
        key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0].astype(np.int64)
        grid = (len(columns), min(_MOST_WALKERS, -(-n // (2 * _ROW_THREADS))))
        launch(
            "normal", f"normal_{suffix(out.dtype)}", grid, (_ROW_THREADS,),
            (out, np.int64(n), np.int64(columns.start), key),
        )  # fmt: skip
    return out.T


def columns_at_once(column_bytes: int, alone: bool = True) -> int:
    """See `batched.columns_at_once`."""
    return max(1, free_bytes("cuda") // _WORKSPACE // column_bytes)


def over_columns(work: Callable[[slice], None], columns: int, chunk: int) -> None:
    """See `batched.over_columns`."""
    for start in range(0, columns, chunk):
        work(slice(start, start + chunk))


def over_parts(work: Callable[[slice], None], count: int) -> None:
    """See `batched.over_spans`."""
    work(slice(0, count))
